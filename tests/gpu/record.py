"""Figures of a program on a GPU, kept whatever happens to it: on disk after every entry, failures as tracebacks."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Record:
    """Nested figures, and the seconds that each took.

    path: of the JSON file, or None. first: figures that are there already.
    """

    def __init__(self, path: Path | None, first: dict[str, Any]) -> None:
        self.path = path
        self.figures: dict[str, Any] = {**first, "failed": [], "seconds": {}}
        self.save()

    @property
    def failed(self) -> list[str]:
        """Entries that raised."""
        names: list[str] = self.figures["failed"]
        return names

    def add(self, *place: str, work: Callable[[], T]) -> T | None:
        """What `work` returns, kept at `place`; where it raises, None, and its traceback is kept."""
        begin = time.perf_counter()
        value: T | None = None
        try:
            value = work()
        except Exception:  # noqa: BLE001  # what comes after is still worth its time
            self.failed.append("/".join(place))
            self.put(*place, value={"error": traceback.format_exc()})
        else:
            self.put(*place, value=value)
        self.figures["seconds"]["/".join(place)] = round(time.perf_counter() - begin, 3)
        try:
            self.save()
        except OSError as error:  # a full disk: what was printed is there, and the next may be written again
            print(f"{self.path} was not written: {error}", file=sys.stderr)
        clean()
        return value

    def put(self, *place: str, value: Any) -> None:
        """Keep and print a figure."""
        inside = self.figures
        for name in place[:-1]:
            inside = inside.setdefault(name, {})
        inside[place[-1]] = value
        print(json.dumps({"/".join(place): value}), flush=True)

    def save(self) -> None:
        """Write all figures; the file is never half of them."""
        if self.path is None:
            return
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.figures, indent=1) + "\n")
        part.replace(self.path)


def clean() -> None:
    """Free what nothing refers to: engines and sessions are in cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a GPU that failed stays so
            print(f"no memory was freed: {error}", file=sys.stderr)
