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
    distributions: tuple[str, ...]
    """That bring the module, by the names that pip knows; the first that is there says its version."""
    command: str
    """That installs it, where there are packages."""
    libraries: str
    """Where the shared libraries come from that the module needs."""
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
        except ValueError:
            return None
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def load(self) -> Any:
        """The module. Raises EngineUnavailableError with what is missing: the product, or its libraries alone."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: its shared libraries
            version = self.installed
            what = self.install if version is None else f"{version} is installed; {self.libraries}"
            raise EngineUnavailableError(f"{self.name} cannot be imported ({error}): {what}") from error


TENSORRT = Flavour(
    "tensorrt",
    "tensorrt",
    ("tensorrt_cu13", "tensorrt_cu12", "tensorrt"),  # the last alone in containers
    "pip install 'swiftvideo[tensorrt]'",
    "its libraries are in tensorrt_cu13_libs, which pip gets from https://pypi.nvidia.com, or in a folder that "
    "LD_LIBRARY_PATH names",
    (90,),
)
RTX = Flavour(
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    ("tensorrt_rtx_cu13_bindings",),
    "pip install 'swiftvideo[tensorrt-rtx]'",
    "its libraries are in tensorrt_rtx_cu13_libs of the same version",
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
