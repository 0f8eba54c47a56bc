"""Save a session to a file, open it again, and go on with exactly the same video.

Another machine makes the same video if its kind of processor and the number of threads are the same; else values may
differ by one.

python samples/resume.py session.safetensors
"""

import sys
from itertools import islice
from pathlib import Path

import numpy as np

from swiftvideo.runtime import load


def main(path: Path) -> None:
    pipeline = load()
    with pipeline.session(prompt="a blue circle moving left in the snow", seed=5) as session:
        for _ in islice(session, 3):
            pass
        session.save(path)
        expected = next(session).frames

    with load().restore(path) as session:
        chunk = next(session)
    assert np.array_equal(chunk.frames, expected), "the restored session made another video"
    print(f"chunk {chunk.index} is the same to the byte; the file has {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "session.safetensors"))
