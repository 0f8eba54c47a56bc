"""Plans of real graphs, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from rich.console import Console

from swiftvideo.export import tensorrt as builder
from swiftvideo.export.destination import BundleWriteError
from swiftvideo.export.onnx_ops import DOMAIN
from swiftvideo.export.tensorrt import PlanBuildError, build_plans, check_buildable
from swiftvideo.export.tensorrt_child import parse_inspection, parse_report, take_timings
from swiftvideo.runtime.engines import cuda
from swiftvideo.runtime.errors import (
    BundleIntegrityError,
    BundleMissingError,
    EngineUnavailableError,
    SettingsError,
)
from swiftvideo.runtime.manifest import GRAPHS, Manifest, measure_files
from swiftvideo.runtime.plugins import flavours
from swiftvideo.runtime.plugins.flavours import RTX, Flavour
from swiftvideo.runtime.plugins.kernel import ATTENTION, INJECTION, OPS, ROW_OPS, read_kernel
from swiftvideo.runtime.plugins.plans import choose_plans, plans_of
from swiftvideo.sdk import plans as sdk_plans
from swiftvideo.sdk.inspect import show

from .driver import FakeDriver


def our_nodes(bundle: Path, graph: str) -> list[tuple[str, int]]:
    """(op, layer) of the nodes of our domain, from the ONNX file itself."""
    model = onnx.load(bundle / "onnx" / f"{graph}.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    return [(n.op_type, next((a.i for a in n.attribute if a.name == "layer"), 0)) for n in nodes]


def plugin_layers(bundle: Path, file: str) -> list[dict[str, Any]]:
    report = json.loads((bundle / file).read_text())
    return [layer for layer in report["layers"] if layer["type"] == "custom_layer"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rtx:sm89", "rtx:sm120"])
@pytest.mark.parametrize("plugins", [True, False], ids=["plugins", "functions"])
def test_all_graphs_of_the_embedded_model(
    rtx: None, tiny_bundle: Path, tmp_path: Path, target: str, plugins: bool
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = Manifest.load(bundle)
    built = build_plans(bundle, target, plugins=plugins)
    manifest = Manifest.load(bundle)
    manifest.verify_all()
    assert {item.info.graph for item in built} == set(GRAPHS)
    assert before.fingerprint == manifest.fingerprint
    for item in built:
        plan = item.info
        assert (bundle / plan.file).stat().st_size == item.size > 0
        found = plugin_layers(bundle, plan.layers)
        if not plugins:
            assert not found and not plan.plugins and plan.functions
            continue
        wanted = our_nodes(bundle, plan.graph)
        assert len(found) == len(wanted)
        for op, layer in wanted:
            assert any(f"swift.{op}.{layer}." in item["name"] for item in found)
        assert {op for op, _ in wanted} == set(plan.plugins)
        content = (bundle / plan.file).read_bytes()
        for op in plan.plugins:
            assert read_kernel(manifest, op, plan.capability).cubin in content, (
                "a plan needs no file beside it"
            )
    g = manifest.geometry
    if plugins:
        assert our_nodes(bundle, "denoise") == [(ATTENTION, i) for i in range(g.layers)]
        assert our_nodes(bundle, "inject") == [(INJECTION, 0)]
    for op in OPS if plugins else ROW_OPS:  # without those of cache rows no engine could run the plans
        assert read_kernel(manifest, op, built[0].info.capability).spec.dtype == manifest.dtype
    chosen = choose_plans(manifest, RTX.name, built[0].info.version, built[0].info.capability)
    assert set(chosen) == set(GRAPHS)


def test_plans_with_plugins_are_preferred_and_rebuilding_replaces(small: Path) -> None:
    for plugins in (False, True, True):
        build_plans(small, "rtx:sm86", plugins=plugins, graphs=["inject"])
    manifest = Manifest.load(small)
    manifest.verify_all()
    plans = plans_of(manifest)
    assert sorted(plan.functions for plan in plans) == [False, True]
    chosen = choose_plans(manifest, RTX.name, str(RTX.installed), 86)
    assert list(chosen) == ["inject"] and not chosen["inject"].functions
    assert set(manifest.files) == set(measure_files(small))


def test_targets_that_are_one_thing_replace_each_other(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As h100 and h200: what is left of the other would be chosen in its place, or refused for old kernels."""
    monkeypatch.setitem(flavours._NAMED, "another", (RTX, 89))
    for target in ("rtx:sm89", "another"):
        build_plans(small, target, graphs=["inject"])
    manifest = Manifest.load(small)
    assert [plan.target for plan in plans_of(manifest)] == ["another"]
    assert set(manifest.files) == set(measure_files(small))


def test_inspect_shows_plugins_precisions_and_bindings(small: Path) -> None:
    build_plans(small, "rtx:sm89", graphs=["inject"])
    console = Console(width=300, record=True, file=io.StringIO())
    show(small, console)
    text = console.export_text()
    assert "swift.SemanticInjection.0." in text
    assert "tensorrt_rtx" in text and "compute capability 89" in text
    assert "cache_v FLOAT[2, -1, -1, 2, 24]" in text and "Float: 1" in text


def test_numbered_bindings_are_shown_in_short() -> None:
    caches = [{"name": f"vae_cache_{i}", "dtype": "BF16", "shape": [1, i]} for i in range(12)]
    text = sdk_plans._bindings([{"name": "latents", "dtype": "FLOAT", "shape": [-1, 3]}, *caches])
    assert text == "latents FLOAT[-1, 3]  vae_cache_0 to 11"


def test_each_plan_has_the_peak_memory_of_its_own_build(small: Path) -> None:
    ballast = bytearray(1 << 30)  # of this process, which starts the child
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    (built,) = build_plans(small, "rtx:sm89", graphs=["inject"])
    assert 50 << 20 < built.peak < 700 << 20


def test_progress_is_told(small: Path) -> None:
    told: list[tuple[str, str, int, int]] = []
    build_plans(small, "rtx:sm89", graphs=["inject"], progress=lambda *args: told.append(args))
    assert {graph for graph, *_ in told} == {"inject"}
    assert any(step == steps > 0 for _, _, step, steps in told)


def unchanged(bundle: Path, before: dict[str, Any]) -> bool:
    Manifest.load(bundle).verify_all()
    return measure_files(bundle) == before and not list(bundle.glob(".plans-*"))


def test_a_failed_build_names_graph_and_layer_and_leaves_the_bundle(small: Path) -> None:
    path = small / "onnx" / "inject.onnx"
    model = onnx.load(path)
    node = onnx.helper.make_node(
        "Cast", ["bridge"], ["bytes"], name="a_strange_cast", to=onnx.TensorProto.UINT8
    )
    again = onnx.helper.make_node("Add", ["bytes", "bytes"], ["twice"], name="a_strange_sum")
    model.graph.node.extend([node, again])
    model.graph.output.append(onnx.helper.make_tensor_value_info("twice", onnx.TensorProto.UINT8, None))
    onnx.save(model, path)
    manifest = Manifest.load(small)
    dataclasses.replace(manifest, files=measure_files(small)).save(small)
    before = measure_files(small)
    with pytest.raises(
        PlanBuildError, match=r"(?s)no plan of inject for rtx:sm89, layer a_strange_.*UINT8.*log ends"
    ):
        build_plans(small, "rtx:sm89")
    assert unchanged(small, before)


def test_a_builder_that_dies_is_an_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = measure_files(small)
    monkeypatch.setattr(builder.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    with pytest.raises(PlanBuildError, match="no plan of inject for rtx:sm89: exit code 1"):
        build_plans(small, "rtx:sm89", graphs=["inject"])
    assert unchanged(small, before)


def test_a_changed_graph_is_not_built(small: Path) -> None:
    path = small / "onnx" / "inject.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleIntegrityError, match="inject"):
        build_plans(small, "rtx:sm89", graphs=["inject"])


def test_a_lost_plugin_is_an_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder whose report has none of our layers as plugins does not pass."""

    def lose(result: str) -> Any:
        data = json.loads(result)
        for layer in data.get("layers", []):
            layer["plugin"] = False
        return data

    before = measure_files(small)
    monkeypatch.setattr(builder, "json", type("Json", (), {"loads": staticmethod(lose), "dumps": json.dumps}))
    with pytest.raises(
        PlanBuildError,
        match=r"no plugin layer for swift\.SemanticInjection.*have .*Injection\.0\.\S* \(custom_layer\)",
    ):
        build_plans(small, "rtx:sm89", graphs=["inject"])
    assert unchanged(small, before)


def test_an_interrupted_rebuild_leaves_a_valid_bundle(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at each step of adding the plan, also where it and a kernel are of other bytes than before."""
    build_plans(small, "rtx:sm89", graphs=["inject"])
    make = builder.compile_kernel

    def recompiled(*arguments: Any) -> Any:
        made = make(*arguments)
        kernel = dataclasses.replace(
            made.kernel, spec=dataclasses.replace(made.kernel.spec, compiler="another")
        )
        return dataclasses.replace(made, kernel=kernel)

    monkeypatch.setattr(builder, "compile_kernel", recompiled)
    for step in range(1, 40):
        steps = 0

        def stop(path: Path, *arguments: Any, real: Any, at: int = step, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == at:
                raise KeyboardInterrupt
            return real(path, *arguments, **options)

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink"):
                real = getattr(Path, name)
                patch.setattr(Path, name, functools.partialmethod(stop, real=real))
            try:
                build_plans(small, "rtx:sm89", graphs=["inject"])
                done = True
            except KeyboardInterrupt:
                done = False
        Manifest.load(small).verify_all()
        if done:
            break
    assert done and step > 5
    assert len(plans_of(Manifest.load(small))) == 1
    assert set(Manifest.load(small).files) == set(measure_files(small))


def test_a_result_that_could_not_be_written_is_said(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builder.json.dumps

    def elsewhere(value: Any, **options: Any) -> str:
        if "result" in value:
            value = value | {"result": str(small / "absent" / "result.json")}
        return real(value, **options)

    before = measure_files(small)
    monkeypatch.setattr(
        builder, "json", type("Json", (), {"loads": json.loads, "dumps": staticmethod(elsewhere)})
    )
    with pytest.raises(
        PlanBuildError, match=r"no plan of inject for rtx:sm89: .*No such file.*absent/result.json"
    ):
        build_plans(small, "rtx:sm89", graphs=["inject"])
    assert unchanged(small, before)


def test_an_empty_result_is_a_failed_build(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def emptied(job: Path, *arguments: Any) -> tuple[int, str]:
        Path(json.loads(job.read_text())["result"]).touch()
        return 1, ""

    before = measure_files(small)
    monkeypatch.setattr(builder, "_run_child", emptied)
    with pytest.raises(PlanBuildError, match="no plan of inject for rtx:sm89: exit code 1"):
        build_plans(small, "rtx:sm89", graphs=["inject"])
    assert unchanged(small, before)


def test_a_full_disk_is_said_with_the_bundle(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = measure_files(small)
    monkeypatch.setattr(builder, "_build", full)
    with pytest.raises(
        BundleWriteError, match=f"{small} cannot be written: .*No space left.*free some space"
    ):
        build_plans(small, "rtx:sm89", graphs=["inject"])
    assert unchanged(small, before)


def test_plans_are_added_by_one_process_at_a_time_which_cleans_up(small: Path) -> None:
    (small / ".plans-killed" / "trt").mkdir(parents=True)
    handle = os.open(small, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(PlanBuildError, match=f"another process adds plans to {small}: wait"):
            build_plans(small, "rtx:sm89", graphs=["inject"])
        assert (small / ".plans-killed").is_dir()
    finally:
        os.close(handle)
    build_plans(small, "rtx:sm89", graphs=["inject"])
    assert not list(small.glob(".plans-*"))


def test_a_builder_dies_with_its_parent() -> None:
    child = (
        "import os, time; from swiftvideo.export.tensorrt_child import _die_with; _die_with(os.getppid()); "
    )
    child += "print('ready', flush=True); time.sleep(20); print('still here')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""


def test_heads_without_a_kernel_are_refused_before_any_work(small: Path) -> None:
    with pytest.raises(SettingsError, match="head width is 12: a multiple of 8"):
        check_buildable("rtx:sm89", "bf16", 12)


@pytest.mark.parametrize("folder", ["trt", "trt/rtx-sm89", "kernels"])
def test_nothing_is_written_or_deleted_through_a_link(small: Path, tmp_path: Path, folder: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "x").mkdir(parents=True)
    (elsewhere / "x/precious.plan").write_text("of another bundle")
    (small / folder).parent.mkdir(exist_ok=True)
    (small / folder).symlink_to(elsewhere)
    with pytest.raises(SettingsError, match=f"{folder} is a link.*use a copy of the bundle"):
        build_plans(small, "rtx:sm89", graphs=["inject"])
    assert [path.name for path in elsewhere.rglob("*")] == ["x", "precious.plan"]


def test_unknown_targets_and_graphs(small: Path) -> None:
    with pytest.raises(SettingsError, match=r"target is 'rtx:sm90': use h100, h200, rtx:sm80"):
        build_plans(small, "rtx:sm90")
    with pytest.raises(BundleMissingError, match="no graph 'paint'"):
        build_plans(small, "rtx:sm89", graphs=["paint"])


def test_a_product_that_is_not_installed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flavour, "installed", None)
    monkeypatch.setattr(Flavour, "packaged", True)
    with pytest.raises(EngineUnavailableError, match=r"--target h200 needs tensorrt.*pip install"):
        build_plans(small, "h200")


def test_tensorrt_builds_on_the_gpu_it_builds_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(cuda, "cuda_driver", lambda: driver)
    monkeypatch.setattr(Flavour, "installed", "11.0")
    with pytest.raises(
        EngineUnavailableError, match=r"capability 90, and this one \(A test\) has 89.*rtx:sm89"
    ):
        build_plans(small, "h200")
    driver.capability, driver.version = (9, 0), 12080
    with pytest.raises(EngineUnavailableError, match=r"supports CUDA 12\.8 and TensorRT needs 13\.0"):
        build_plans(small, "h200")
    driver.missing = True
    with pytest.raises(EngineUnavailableError, match="no NVIDIA driver"):
        build_plans(small, "h200")


def test_reports_of_the_log_and_of_the_inspector_read_alike() -> None:
    log = (
        "Layers:\n"
        "Name: swift.SemanticInjection.0._myl0_1, LayerType: custom_layer, Inputs: [ { Name: v, Dimensions: [3,-1], "
        "Strides: [-1,1], Datatype: Int32 }], Constants: [ { Name: c, Dimensions: [9], Datatype: Half }], "
        "Outputs: [ { Name: b, Dimensions: [2], Datatype: BFloat16, Format: x }], TacticName: \n"
        "Name: none, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: \n\nI/O Tensors:\n"
        " Name: v, IOMode: Input, DataType: Int32"
    )
    tensors = {"precision": "BFloat16", "inputs": ["Int32[3,-1]"], "outputs": ["BFloat16[2]"]}
    ours = {"name": "swift.SemanticInjection.0._myl0_1", "type": "custom_layer", "plugin": True, **tensors}
    shapes = {
        "name": "none",
        "type": "shape_call",
        "plugin": False,
        "precision": "",
        "inputs": [],
        "outputs": [],
    }
    assert parse_report(log) == [ours, shapes]
    tensors_of_11 = {
        side: [
            {"Name": "b", "Dimensions": shape, "Datatype": kind, "Format": "(Linear) Row major linear format"}
        ]
        for side, shape, kind in (("Inputs", [3, -1], "Int32"), ("Outputs", [2], "BFloat16"))
    }
    inspected = [
        {"Name": "swift.SemanticInjection.0._myl0_1", "LayerType": "custom_layer", **tensors_of_11},
        {"Name": "none", "LayerType": "shape_call", "Inputs": [], "Outputs": []},
    ]
    io_tensors = [{"Name": "v", "IOMode": "Input", "DataType": "Int32"}]
    assert parse_inspection(json.dumps({"Layers": inspected, "I/O Tensors": io_tensors})) == [ours, shapes]


class Timings:
    """A builder's configuration, as far as measured tactics go. NVIDIA says that one takes no cache of another machine,
    and not what it makes of broken content: here that is none."""

    def __init__(self) -> None:
        self.taken: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"broken" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, bytes) and not ignore_mismatch
        if cache == b"another machine":
            return False
        self.taken = cache
        return True


@pytest.mark.parametrize(
    ("kept", "taken"),
    [(b"tactics", b"tactics"), (None, b""), (b"another machine", b""), (b"broken", b"")],
)
def test_measured_tactics_are_taken_up_where_they_fit(
    tmp_path: Path, kept: bytes | None, taken: bytes
) -> None:
    path, config = tmp_path / "a.timing", Timings()
    if kept is not None:
        path.write_bytes(kept)
    take_timings(config, path)
    assert config.taken == taken
