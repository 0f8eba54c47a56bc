"""Change the prompt while the video plays, and see how each switch was made.

python samples/switch.py switch.mp4
"""

import sys
from pathlib import Path

from swiftvideo.runtime import load
from swiftvideo.sdk.video import VideoWriter

PROMPTS = {
    0: "a green square moving down in the fog",
    4: "a purple square moving down in the fog",
    8: "a yellow cross bouncing at night",
}


def main(path: Path) -> None:
    pipeline = load()
    geometry = pipeline.geometry
    with (
        pipeline.session(prompt=PROMPTS[0], seed=3) as session,
        VideoWriter(path, geometry.width, geometry.height, geometry.fps) as video,
    ):
        for chunk in session:
            video.write(chunk.frames)
            how = f"{chunk.mode}, rho {chunk.rho:.2f}" if chunk.rho is not None else ""
            print(f"chunk {chunk.index:2}  window {chunk.window:2}  {chunk.prompt}  {how}")
            if chunk.index + 1 in PROMPTS:
                session.prompt(PROMPTS[chunk.index + 1])
            if chunk.index == 11:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "switch.mp4"))
