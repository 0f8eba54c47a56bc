"""What `swiftvideo doctor` says of GPUs, drivers and the TensorRT engine."""

from __future__ import annotations

import sys

from swiftvideo.runtime.errors import SwiftVideoError

from .doctor import Finding


def gpu_findings() -> list[Finding]:
    """Driver and GPUs, CUDA for Python, both products, the plugins' kernels, and whether the engine can run."""
    return [_nvml(), _cuda(), *_flavours(), _kernels(), _engine()]


def _nvml() -> Finding:
    """Driver and GPUs, as NVML has them; the TensorRT engine itself does not need NVML."""
    what = "NVIDIA GPUs"
    try:
        import pynvml
    except ImportError:
        return Finding(what, False, "nvidia-ml-py is not installed: pip install 'swiftvideo[serve]'")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Finding(what, False, f"{error}: install the driver (https://www.nvidia.com/drivers)")
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(device)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
            free, total = memory.free / 2**30, memory.total / 2**30
            found.append(
                f"{pynvml.nvmlDeviceGetName(device)} (sm{major}{minor}, {free:.1f} of {total:.1f} GiB free)"
            )
        driver = pynvml.nvmlSystemGetDriverVersion()
        return Finding(what, bool(found), f"driver {driver}: {', '.join(found) or 'no GPU'}")
    except pynvml.NVMLError as error:
        return Finding(what, False, f"NVML failed: {error}")
    finally:
        pynvml.nvmlShutdown()


def _cuda() -> Finding:
    from swiftvideo.runtime.engines.cuda import find_gpus

    try:
        gpus = find_gpus()
    except SwiftVideoError as error:
        return Finding("CUDA", False, str(error))
    return Finding("CUDA", True, f"{gpus[0].driver}, {len(gpus)} GPUs for this process")


def _flavours() -> list[Finding]:
    from swiftvideo.runtime.plugins.flavours import FLAVOURS

    found = []
    for flavour in FLAVOURS.values():
        release = flavour.installed
        note = release or f"not installed: {flavour.install}"
        if release is not None:
            try:
                flavour.load()
            except SwiftVideoError as error:
                found.append(Finding(flavour.name, False, str(error)))
                continue
            sm = ", ".join(f"sm{capability}" for capability in flavour.capabilities)
            note = f"{release}; plans for {sm}"
        found.append(Finding(flavour.name, release is not None, note))
    return found


def _kernels() -> Finding:
    """Whether plans with plugins can be built here; running them needs nothing but the plan."""
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        remedy = "pip install triton" if sys.platform == "linux" else "it is for Linux"
        return Finding("plugins", False, f"triton is not installed, so none can be built: {remedy}")
    return Finding("plugins", True, f"kernels can be compiled, triton {importlib.metadata.version('triton')}")


def _engine() -> Finding:
    """The first thing that keeps the engine from running, with what would fix it."""
    from swiftvideo.runtime.engines.cuda import find_gpus
    from swiftvideo.runtime.engines.tensorrt import check_driver
    from swiftvideo.runtime.plugins.flavours import FLAVOURS, install_one

    what = "engine tensorrt"
    try:
        gpu = find_gpus()[0]
        check_driver(gpu)
    except SwiftVideoError as error:
        return Finding(what, False, str(error))
    usable = [flavour for flavour in FLAVOURS.values() if flavour.installed]
    if not usable:
        return Finding(what, False, f"no TensorRT is installed: {install_one(FLAVOURS.values())}")
    fitting = [flavour for flavour in usable if gpu.capability in flavour.capabilities]
    if not fitting:
        builders = [flavour for flavour in FLAVOURS.values() if gpu.capability in flavour.capabilities]
        commands = install_one(builders) or "no product builds them"
        return Finding(what, False, f"no plans can be built for sm{gpu.capability}: {commands}")
    try:
        fitting[0].load()
    except SwiftVideoError as error:
        return Finding(what, False, str(error))
    target = "h200" if gpu.capability == 90 else f"rtx:sm{gpu.capability}"
    return Finding(what, True, f"for bundles with plans: swiftvideo export --out BUNDLE --target {target}")
