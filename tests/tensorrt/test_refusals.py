"""Everything that the loading of a plan refuses, before anything is deserialised or allocated. No GPU is needed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime import load
from swiftvideo.runtime.engines import tensorrt as engine_module
from swiftvideo.runtime.engines.cuda import Arena, Gpu, Pinned, find_gpus
from swiftvideo.runtime.engines.tensorrt import TensorRTEngine, runs, usable_plans
from swiftvideo.runtime.errors import (
    BundleIntegrityError,
    BundleMissingError,
    BundleVersionError,
    EngineError,
    EngineUnavailableError,
    OutOfMemoryError,
    SettingsError,
)
from swiftvideo.runtime.geometry import Geometry, PolicySettings
from swiftvideo.runtime.manifest import Manifest, ScheduleInfo, Source, measure_files
from swiftvideo.runtime.plugins import tensorrt as plugins
from swiftvideo.runtime.plugins.flavours import RTX, TENSORRT, Flavour, parse_target
from swiftvideo.runtime.plugins.kernel import (
    ATTENTION,
    COMMIT,
    INJECTION,
    OPS,
    PLACE,
    Axis,
    Kernel,
    KernelSpec,
    read_kernel,
)
from swiftvideo.runtime.plugins.launch import Launcher
from swiftvideo.runtime.plugins.plans import PlanInfo, choose_plans, graph_source, plans_of

from .driver import FakeDriver

GRAPHS = ("condition", "denoise", "inject")
VERSION = "1.7.1.116"
GPU = Gpu(0, "A test", 89, "13.0", 8 << 30)
GEOMETRY = Geometry(
    layers=2, heads=2, head_dim=24, latent_channels=4, latent_height=4, latent_width=4, text_len=6, text_dim=8
)


def kernel(op: str, capability: int = 89, content: bytes = b"no real cubin") -> Kernel:
    sha256 = hashlib.sha256(content).hexdigest()
    axes = (Axis(("queries",), 16), Axis(("heads",)), Axis(("batch",)))
    spec = KernelSpec(
        op,
        "entry",
        capability,
        "fp32",
        24,
        4,
        64 << 10,
        (("q", "ptr"), ("n", "i32"), ("s", "f32")),
        2,
        axes,
        sha256,
        tile=(16, 16, 32, 8) if op == ATTENTION else (),
    )
    return Kernel(spec, content)


def save(folder: Path, plans: list[PlanInfo], model: str = "a model") -> Manifest:
    """Write the manifest of what lies in a folder."""
    return Manifest(
        model=model,
        dtype="fp32",
        geometry=GEOMETRY,
        policy=PolicySettings(),
        schedule=ScheduleInfo((1000.0, 900.0, 800.0, 700.0), (1.0, 0.9, 0.8, 0.7)),
        source=Source("test", "0" * 64),
        text_encoder="none",
        files=measure_files(folder),
        plans=tuple(plan.entry() for plan in plans),
    ).save(folder)


def make(folder: Path, model: str = "a model", plugins: bool = True) -> Manifest:
    """A bundle whose plans and cubins are bare bytes."""
    for graph in GRAPHS:
        (folder / "onnx").mkdir(parents=True, exist_ok=True)
        (folder / "onnx" / f"{graph}.onnx").write_bytes(f"{graph} of {model}".encode())
        (folder / "trt").mkdir(exist_ok=True)
        (folder / "trt" / f"{graph}.plan").write_bytes(f"plan of {graph} of {model}".encode())
        (folder / "trt" / f"{graph}.layers.json").write_text('{"bindings": [], "layers": []}')
    (folder / "kernels").mkdir(exist_ok=True)
    for op in OPS:
        for name, content in kernel(op).files().items():
            (folder / name).write_bytes(content)
    manifest = save(folder, [], model)
    ours = {"denoise": ATTENTION, "inject": INJECTION}
    plans = [
        PlanInfo(
            graph=graph,
            target="rtx:sm89",
            flavour="tensorrt_rtx",
            version=VERSION,
            capability=89,
            dtype="fp32",
            file=f"trt/{graph}.plan",
            layers=f"trt/{graph}.layers.json",
            source=graph_source(manifest, graph),
            plugins={ours[graph]: kernel(ours[graph]).spec.sha256} if plugins and graph in ours else {},
        )
        for graph in GRAPHS
    ]
    return save(folder, plans, model)


@pytest.fixture
def bundle(tmp_path: Path) -> Manifest:
    return make(tmp_path / "bundle")


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    """The manifest with fields of every plan replaced."""
    plans = tuple(dataclasses.replace(plan, **fields).entry() for plan in plans_of(manifest))
    return dataclasses.replace(manifest, plans=plans)


def choose(manifest: Manifest, **here: Any) -> dict[str, PlanInfo]:
    seen = {"flavour": "tensorrt_rtx", "version": VERSION, "capability": 89} | here
    return choose_plans(manifest, **seen)


def test_plans_that_fit_are_chosen(bundle: Manifest) -> None:
    assert set(choose(bundle)) == set(GRAPHS)


def test_another_version(bundle: Manifest) -> None:
    with pytest.raises(
        BundleVersionError, match=r"built by tensorrt_rtx 1\.7\.1\.116 and 1\.8\.0\.1 runs here: install"
    ):
        choose(bundle, version="1.8.0.1")


def test_another_capability(bundle: Manifest) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"capability 89 and this one has 120.*--target rtx:sm120"
    ):
        choose(bundle, capability=120)


def test_another_product(bundle: Manifest) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"a plan of tensorrt_rtx and tensorrt runs here.*--target h200"
    ):
        choose(bundle, flavour="tensorrt", version="11.0.0", capability=90)


def test_a_bundle_without_plans(bundle: Manifest) -> None:
    with pytest.raises(BundleMissingError, match=r"no TensorRT plans.*--target rtx:sm89"):
        choose(dataclasses.replace(bundle, plans=()))


def test_a_plan_swapped_between_bundles(bundle: Manifest, tmp_path: Path) -> None:
    """File, entry and hash come from the other bundle; the graphs it was built from are not this bundle's."""
    other = make(tmp_path / "other", "another model")
    assert bundle.folder is not None and other.folder is not None
    name = "trt/denoise.plan"
    (bundle.folder / name).write_bytes((other.folder / name).read_bytes())
    mixed = [p for p in plans_of(bundle) if p.graph != "denoise"]
    mixed += [p for p in plans_of(other) if p.graph == "denoise"]
    manifest = save(bundle.folder, mixed)
    manifest.verify_all()
    with pytest.raises(
        BundleIntegrityError, match=r"trt/denoise\.plan was built from another denoise graph.*another bundle"
    ):
        choose(manifest)


def test_plans_swapped_within_a_bundle(bundle: Manifest) -> None:
    plans = plans_of(bundle)
    swapped = [
        dataclasses.replace(plan, source=other.source, file=other.file)
        for plan, other in zip(plans, [*plans[1:], plans[0]], strict=True)
    ]
    with pytest.raises(BundleIntegrityError, match="built from another"):
        choose(dataclasses.replace(bundle, plans=tuple(plan.entry() for plan in swapped)))


def test_a_missing_plugin(bundle: Manifest) -> None:
    files = {name: entry for name, entry in bundle.files.items() if ATTENTION not in name}
    with pytest.raises(
        BundleMissingError, match=r"needs the plugin DynamicWindowAttention and the bundle has no kernels/"
    ):
        choose(dataclasses.replace(bundle, files=files))


def test_a_plan_that_is_not_listed(bundle: Manifest) -> None:
    files = {name: entry for name, entry in bundle.files.items() if name != "trt/denoise.plan"}
    with pytest.raises(BundleMissingError, match=r"names the plan trt/denoise\.plan and does not list it"):
        choose(dataclasses.replace(bundle, files=files))


def test_another_plugin_than_the_bundle_s(bundle: Manifest) -> None:
    assert bundle.folder is not None
    for name, content in kernel(INJECTION, content=b"another cubin").files().items():
        (bundle.folder / name).write_bytes(content)
    with pytest.raises(BundleIntegrityError, match="holds the SemanticInjection kernel"):
        choose(save(bundle.folder, plans_of(bundle)))


def test_an_entry_of_another_format(bundle: Manifest) -> None:
    entry = plans_of(bundle)[0].entry()
    for wrong in (entry | {"surprise": 1}, {"graph": "denoise"}, entry | {"flavour": "tensorrt_nano"}):
        with pytest.raises(BundleVersionError, match="plan"):
            plans_of(dataclasses.replace(bundle, plans=(wrong,)))


def test_kernels_are_verified(bundle: Manifest) -> None:
    assert bundle.folder is not None
    assert read_kernel(bundle, COMMIT, 89).cubin == b"no real cubin"
    with pytest.raises(BundleMissingError, match="no CommitRows kernel for compute capability 90"):
        read_kernel(bundle, COMMIT, 90)
    path = bundle.folder / "kernels" / f"{kernel(COMMIT).spec.stem}.cubin"
    path.write_bytes(b"No real cubin")
    with pytest.raises(BundleIntegrityError, match="was changed"):
        read_kernel(bundle, COMMIT, 89)
    (bundle.folder / "kernels" / f"{kernel(PLACE).spec.stem}.json").write_text("{}")
    with pytest.raises(BundleIntegrityError, match="describes no kernel"):
        read_kernel(save(bundle.folder, []), PLACE, 89)


# -- the engine: a driver that records what is asked of it ----------------------------------------------------------


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A machine with one GPU of capability 89 and TensorRT-RTX in the version of the bundle."""
    fake = FakeDriver()
    monkeypatch.setattr(engine_module, "cuda_driver", lambda: fake)
    monkeypatch.setattr(Flavour, "installed", property(lambda self: VERSION if self is RTX else None))
    return fake


def test_a_flipped_byte_is_found_before_deserialising(bundle: Manifest, driver: FakeDriver) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason=RTX.install)
    assert bundle.folder is not None
    path = bundle.folder / "trt" / "condition.plan"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match=r"condition\.plan was changed"):
        TensorRTEngine(bundle)
    assert not driver.allocated


def test_what_is_no_plan_is_an_error_with_tensorrt_s_words(bundle: Manifest, driver: FakeDriver) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason=RTX.install)
    with pytest.raises(EngineError, match=r"TensorRT cannot load trt/condition\.plan: ."):
        TensorRTEngine(bundle)
    assert not driver.allocated


def test_too_little_memory_for_the_plans(bundle: Manifest, driver: FakeDriver) -> None:
    driver.free = 16
    with pytest.raises(OutOfMemoryError, match=r"the plans need .* MiB on A test"):
        TensorRTEngine(bundle)
    assert not driver.allocated


def test_too_little_memory_for_a_session(driver: FakeDriver) -> None:
    driver.free = 1000
    with pytest.raises(OutOfMemoryError, match="a session needs 0 MiB of GPU memory and 0 MiB are free"):
        Arena(driver, {"x": ((300,), "fp32")}, 0, "a session")
    assert not driver.allocated


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda driver: Arena(driver, {"x": ((300,), "fp32")}, 0, "a session"),
            "allocating 1536 bytes for a session",
        ),
        (lambda driver: Pinned(driver, 1000), "pinning 1000 bytes"),
    ],
    ids=["device", "pinned"],
)
def test_memory_that_the_driver_does_not_give_is_said_to_be_out(
    driver: FakeDriver, make: Callable[[FakeDriver], object], text: str
) -> None:
    driver.allocation_code = 2
    with pytest.raises(
        OutOfMemoryError, match=rf"^{text} failed with CUDA_ERROR_OUT_OF_MEMORY \(2\): close other sessions"
    ):
        make(driver)
    driver.allocation_code = 1
    with pytest.raises(EngineError, match=rf"^{text} failed with CUDA_ERROR_INVALID_VALUE \(1\)$") as caught:
        make(driver)
    assert not isinstance(caught.value, OutOfMemoryError)


def test_memory_that_cannot_be_cleared_is_freed(driver: FakeDriver) -> None:
    driver.cuCtxSetCurrent(1)
    driver.clearing_code = 1
    with pytest.raises(EngineError, match="clearing memory failed"):
        Arena(driver, {"x": ((300,), "fp32")}, 0, "a session")
    assert not driver.allocated


def test_no_such_gpu(bundle: Manifest, driver: FakeDriver) -> None:
    with pytest.raises(EngineUnavailableError, match="no GPU 3: there are 1"):
        TensorRTEngine(bundle, device=3)


def test_no_product_is_installed(
    bundle: Manifest, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flavour, "installed", None)
    monkeypatch.setattr(Flavour, "packaged", True)
    with pytest.raises(EngineUnavailableError, match=r"neither tensorrt nor tensorrt_rtx.*pip install"):
        TensorRTEngine(bundle)


def test_a_graph_without_a_plan(bundle: Manifest, driver: FakeDriver) -> None:
    plans = tuple(plan.entry() for plan in plans_of(bundle) if plan.graph != "denoise")
    with pytest.raises(Exception, match="no plan of denoise"):
        usable_plans(dataclasses.replace(bundle, plans=plans), GPU)


def test_a_driver_that_is_too_old(bundle: Manifest, driver: FakeDriver) -> None:
    driver.version = 12080
    with pytest.raises(EngineUnavailableError, match=r"supports CUDA 12\.8 and TensorRT needs 13\.0.*580"):
        TensorRTEngine(bundle)
    assert not driver.allocated


def test_the_gpu_of_another_capability(bundle: Manifest, driver: FakeDriver) -> None:
    driver.capability = (9, 0)
    with pytest.raises(EngineUnavailableError, match="capability 89 and this one has 90"):
        TensorRTEngine(bundle)
    assert not driver.allocated


def test_no_driver(bundle: Manifest, driver: FakeDriver) -> None:
    driver.missing = True
    with pytest.raises(EngineUnavailableError, match=r"no NVIDIA driver.*install it.*engine='onnxruntime'"):
        TensorRTEngine(bundle)
    assert bundle.folder is not None
    with pytest.raises(EngineUnavailableError, match="no NVIDIA driver"):
        load(bundle.folder, engine="tensorrt")


def test_a_driver_that_fails_and_one_without_gpus(driver: FakeDriver) -> None:
    driver.init_code = 999
    with pytest.raises(EngineUnavailableError, match="CUDA error 999"):
        find_gpus(driver)
    driver.init_code, driver.count = 0, 0
    with pytest.raises(EngineUnavailableError, match="sees no GPU"):
        find_gpus(driver)


def test_gpus_are_described(driver: FakeDriver) -> None:
    assert find_gpus(driver) == [GPU]


def test_auto_takes_tensorrt_only_where_it_runs(
    bundle: Manifest, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swiftvideo.runtime.engines.cuda.cuda_driver", lambda: driver)
    assert runs(bundle)
    assert not runs(changed(bundle, version="1.0.0"))
    driver.missing = True
    assert not runs(bundle)


# -- launches and targets -------------------------------------------------------------------------------------------


def test_a_launch_packs_its_arguments(driver: FakeDriver) -> None:
    made = kernel(ATTENTION, content=b"packs")
    launcher = Launcher(made, driver)
    sizes = {"queries": 33, "heads": 2, "batch": 1}
    assert launcher.launch(7, sizes, 0x1234_5678_9ABC, -5, 0.25) == 0
    (call,) = driver.launches
    assert (
        call.grid == (3, 2, 1) and call.block == (128, 1, 1) and call.shared == 64 << 10 and call.stream == 7
    )
    assert call.values(made.spec) == (0x1234_5678_9ABC, -5, 0.25)
    assert driver.shared_limits == [64 << 10]
    Launcher(made, driver)
    assert driver.libraries == [b"packs"], "a cubin is loaded once"


def test_a_launch_that_fails_returns_its_code(driver: FakeDriver) -> None:
    launcher = Launcher(kernel(INJECTION, content=b"fails"), driver)
    driver.launch_code = 1
    sizes = {"queries": 1, "heads": 1, "batch": 1}
    assert launcher.launch(0, sizes, 1, 1, 1) == 1
    with pytest.raises(EngineError, match=r"launching SemanticInjection-fp32-d24-sm89 failed with .*\(1\)"):
        launcher.run(0, sizes, 1, 1, 1)
    with pytest.raises(ValueError, match="got 2 arguments and takes 3: q, n, s"):
        launcher.launch(0, sizes, 1, 1)
    driver.launch_code = 0
    driver.launches.clear()
    assert launcher.launch(0, sizes | {"batch": 0}, 1, 1, 1) == 0
    assert not driver.launches


def test_a_cubin_that_the_driver_refuses(driver: FakeDriver) -> None:
    driver.load_code = 209
    with pytest.raises(EngineError, match=r"loading the cubin CommitRows-fp32-d24-sm89 .*\(209\)"):
        Launcher(kernel(COMMIT, content=b"refused"), driver)


def test_plugin_fields_come_back() -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx_bindings", reason=RTX.install)
    made = kernel(ATTENTION)
    made_fields = plugins.fields(trt, made, 3, 0.125)
    collection = trt.PluginFieldCollection([field for field, _ in made_fields])
    layer, scale, read = plugins.read_fields(collection, "a plugin")
    assert (layer, scale, read.spec, read.cubin) == (3, 0.125, made.spec, made.cubin)
    few = trt.PluginFieldCollection([field for field, _ in made_fields[:2]])
    with pytest.raises(EngineError, match="has no cubin, kernel"):
        plugins.read_fields(few, "a plugin")


def test_targets() -> None:
    assert (parse_target("h200").flavour, parse_target("h100").capability) == (TENSORRT, 90)
    assert (parse_target("rtx:sm120").flavour, parse_target("rtx:sm120").capability) == (RTX, 120)
    assert parse_target("rtx:sm86").folder == "trt/rtx-sm86"
    for text in ("rtx", "rtx:sm90", "rtx:89", "b200", ""):
        with pytest.raises(SettingsError, match="use h100, h200, rtx:sm80, rtx:sm86, rtx:sm89, rtx:sm120"):
            parse_target(text)
