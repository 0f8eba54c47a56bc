"""The two products that read and write plans: TensorRT, and TensorRT-RTX. Their Python modules have one interface."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from swiftvideo.runtime.errors import EngineUnavailableError, SettingsError


@dataclass(frozen=True, slots=True)
class Flavour:
    """A product, as plans and bundles name it."""

    name: str
    module: str
    distribution: str
    command: str
    """That installs it, where there are packages."""
    capabilities: tuple[int, ...]
    """That there are targets for, of those that the kernels support."""
    processors: tuple[str, ...] = ()
    """That there are packages for, on Linux; empty: any."""

    @property
    def packaged(self) -> bool:
        """Whether there are packages for this machine."""
        return sys.platform == "linux" and (not self.processors or platform.machine() in self.processors)

    @property
    def install(self) -> str:
        """`command`, or that there is none here."""
        here = f"{platform.system()} on {platform.machine()}"
        return self.command if self.packaged else f"there are no packages for {here}"

    @property
    def installed(self) -> str | None:
        """Installed version without importing the module; None where it is not there."""
        try:
            if importlib.util.find_spec(self.module) is None:
                return None
            return importlib.metadata.version(self.distribution)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return None

    def load(self) -> Any:
        """The module. Raises EngineUnavailableError with the command that installs it."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: its shared libraries
            raise EngineUnavailableError(
                f"{self.name} cannot be imported ({error}): {self.install}"
            ) from error


TENSORRT = Flavour("tensorrt", "tensorrt", "tensorrt", "pip install 'swiftvideo[tensorrt]'", (90,))
RTX = Flavour(
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "tensorrt_rtx_cu13_bindings",
    "pip install 'swiftvideo[tensorrt-rtx]'",
    (80, 86, 89, 120),
    ("x86_64",),
)
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, RTX)}


def install_one(flavours: Collection[Flavour]) -> str:
    """The commands that install one of these, or that there are no packages here; empty for no flavours."""
    told = [flavour.install for flavour in flavours if flavour.packaged]
    return " or ".join(told) or next((flavour.install for flavour in flavours), "")


@dataclass(frozen=True, slots=True)
class Target:
    """What plans are built for: a product and a compute capability."""

    name: str
    flavour: Flavour
    capability: int

    @property
    def folder(self) -> str:
        """Where a bundle keeps its plans."""
        return "trt/" + self.name.replace(":", "-")


_NAMED = {"h100": (TENSORRT, 90), "h200": (TENSORRT, 90)}


def parse_target(text: str) -> Target:
    """A target from h100, h200 or rtx:smNN. Raises SettingsError listing what there is."""
    names = [*_NAMED, *(f"rtx:sm{capability}" for capability in RTX.capabilities)]
    if text not in names:
        raise SettingsError(f"target is {text!r}: use {', '.join(names)}")
    if text in _NAMED:
        return Target(text, *_NAMED[text])
    return Target(text, RTX, int(text.removeprefix("rtx:sm")))
