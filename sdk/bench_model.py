"""The model that a benchmark runs: a bundle, or random weights in an architecture whose real ones are not at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swiftvideo.runtime.errors import UsageError


@contextmanager
def measured_bundle(
    bundle: Path | None,
    model: str | None = None,
    random: bool = False,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
) -> Iterator[Path | None]:
    """The folder of `bundle`, None for the embedded model, or a temporary bundle of random weights in `model`.

    Raises:
        UsageError: options that contradict each other.
        MissingPartError: random weights, and torch is not installed.
        SettingsError: no such architecture, or a wrong size or dtype.
    """
    if model is None and not random:
        if height is not None or width is not None or dtype is not None:
            raise UsageError("--height, --width and --dtype are for --random: a bundle has its own")
        yield bundle
        return
    if model is None or not random:
        raise UsageError("--model and --random belong together: a model with weights is a --bundle")
    if bundle is not None:
        raise UsageError("--bundle with --model: measure one of them")
    from .exporting import export

    with tempfile.TemporaryDirectory(prefix="swiftvideo-bench-") as folder:
        made = Path(folder) / "bundle"
        export(None, made, random=model, height=height, width=width, dtype=dtype or "bf16")
        yield made
