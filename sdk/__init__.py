"""What people and services use: the command line, MP4 files, contact sheets, stories and benchmarks.

from swiftvideo.sdk.video import VideoWriter

with VideoWriter("out.mp4", width=64, height=64, fps=12) as writer:
    writer.write(chunk.frames)                         # uint8 [n,H,W,3]
"""
