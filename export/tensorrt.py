"""Builds TensorRT plans of a bundle's graphs, and adds them to the bundle.

    build_plans("wan.bundle", "rtx:sm89")

Each plan is built in a child process (`tensorrt_child.py`): a crash of the builder is an error here, not an end. Plans
and kernels appear in the bundle only when all are there: a failed build leaves it as it was.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftvideo.runtime.engines.cuda import find_gpus
from swiftvideo.runtime.engines.tensorrt import check_driver
from swiftvideo.runtime.errors import (
    BundleMissingError,
    EngineUnavailableError,
    SettingsError,
    SwiftVideoError,
)
from swiftvideo.runtime.manifest import GRAPHS, FileEntry, Manifest, measure, measure_files
from swiftvideo.runtime.plugins.flavours import RTX, TENSORRT, Target, parse_target
from swiftvideo.runtime.plugins.kernel import FOLDER, OPS, ROW_OPS, Kernel
from swiftvideo.runtime.plugins.plans import PlanInfo, graph_source, plans_of
from swiftvideo.runtime.plugins.tensorrt import PLUGINS

from .destination import writing
from .kernels.compiler import check_kernel, compile_kernel
from .model_info import plain_name

WORK = ".plans-"
"""How the folder in a bundle begins in which plans are built."""
PLAN, LAYERS = ".plan", ".layers.json"
LOG_LINES = 12
"""Of the builder's log in the message of a failure."""

Progress = Callable[[str, str, int, int], None]
"""(graph, phase, steps done, steps)."""


class PlanBuildError(SwiftVideoError):
    """TensorRT could not build a plan."""


@dataclass(frozen=True, slots=True)
class Built:
    """A plan, and what building it took."""

    info: PlanInfo
    files: dict[str, FileEntry]
    """The plan and its layers' report, by their names in the bundle."""
    seconds: float
    peak: int
    """Bytes of memory, the most that its child had resident."""

    @property
    def size(self) -> int:
        """Bytes of the plan."""
        return self.files[self.info.file].size


def build_plans(
    bundle: str | Path,
    target: str,
    *,
    plugins: bool = True,
    graphs: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> list[Built]:
    """Build plans for a target and add them, with their kernels and layer reports, to the bundle.

    target: h100, h200, or rtx:smNN with 80, 86, 89 or 120. plugins: False leaves our two ops as standard layers; the
    kernels that move cache rows are the engine's own and come in either case.
    graphs: names; all of the bundle's by default. An earlier plan of the same graph and kind for the same product and
    compute capability is replaced: one for h100 by one for h200.

    Raises:
        SettingsError: no such target, or the bundle's folder of plans or kernels is a link.
        EngineUnavailableError: the target's product is not installed, or needs another GPU to build.
        BundleError: the bundle cannot be read, or has no such graph.
        PlanBuildError: a plan could not be built; the message names graph, layer if known, and the log's end. Or
            another process adds plans to the bundle.
        BundleWriteError: the disk is full or refuses.
    """
    parse_target(target)
    with _alone(Path(bundle)):
        return _build_all(Manifest.load(bundle), target, plugins, graphs, progress)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from adding plans to a bundle meanwhile, and remove what killed ones left in it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # loading the manifest says what is wrong
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlanBuildError(f"another process adds plans to {folder}: wait until it is done") from error
        except OSError:  # a disk without locks: what is there may be in use
            left = []
        else:
            left = list(folder.glob(f"{WORK}*"))
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def _build_all(
    manifest: Manifest, target: str, plugins: bool, graphs: Iterable[str] | None, progress: Progress | None
) -> list[Built]:
    assert manifest.folder is not None
    plans = manifest.folder / "trt"
    for place in (manifest.folder / FOLDER, plans, *plans.glob("*")):
        if place.is_symlink():
            raise SettingsError(
                f"{place} is a link, and plans are written and deleted there: use a copy of the bundle"
            )
    wanted = check_buildable(target, manifest.dtype, manifest.geometry.head_dim)
    names = [g for g in GRAPHS if manifest.has(f"onnx/{g}.onnx")] if graphs is None else list(graphs)
    missing = [name for name in names if not manifest.has(f"onnx/{name}.onnx")]
    if missing:
        raise BundleMissingError(f"the bundle has no graph {missing[0]!r}: it has {', '.join(GRAPHS)}")
    _verify(manifest, names)
    with writing(manifest.folder):
        work = Path(tempfile.mkdtemp(prefix=WORK, dir=manifest.folder))
        try:
            ops = OPS if plugins else ROW_OPS
            kernels = write_kernels(ops, wanted, manifest.dtype, manifest.geometry.head_dim, work)
            built = [_build(manifest, wanted, graph, plugins, kernels, work, progress) for graph in names]
            _add(manifest, work, built)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return built


def check_buildable(target: str, dtype: str, head_dim: int) -> Target:
    """The target, where plans of a bundle of that dtype and head width can be built here.

    Raises SettingsError where there is no such target or no kernel for such heads, EngineUnavailableError where the
    target's product is not installed or needs another GPU to build.
    """
    wanted = parse_target(target)
    if wanted.flavour.installed is None:
        raise EngineUnavailableError(
            f"--target {target} needs {wanted.flavour.name}, which is not installed: {wanted.flavour.install}"
        )
    if wanted.flavour is TENSORRT:
        _check_gpu(wanted)
    for op in OPS:
        check_kernel(op, wanted.capability, dtype, head_dim)
    return wanted


def _check_gpu(target: Target) -> None:
    """TensorRT, unlike TensorRT-RTX, builds for the GPU that is there."""
    gpu = find_gpus()[0]
    check_driver(gpu)
    if gpu.capability != target.capability:
        raise EngineUnavailableError(
            f"--target {target.name} is built on a GPU of compute capability {target.capability}, and this one "
            f"({gpu.name}) has {gpu.capability}: build it there, or use --target rtx:sm{gpu.capability}"
        )


def _verify(manifest: Manifest, graphs: list[str]) -> None:
    """Hash the graphs and the weights that they name, which children will read from the bundle's folder."""
    models = [bytes(manifest.read_file(f"onnx/{graph}.onnx")) for graph in graphs]
    weights = [
        name
        for name in manifest.files
        if name.endswith(".data") and any(Path(name).name.encode() in model for model in models)
    ]
    dataclasses.replace(manifest, files={name: manifest.files[name] for name in weights}).verify_all()


def write_kernels(
    ops: Iterable[str], target: Target, dtype: str, head_dim: int, work: Path
) -> dict[str, Kernel]:
    """Kernels of ops for a target, by op, and as files in the folder `work`."""
    kernels = {op: compile_kernel(op, target.capability, dtype, head_dim).kernel for op in ops}
    for kernel in kernels.values():
        for name, content in kernel.files().items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(content)
    return kernels


def sizes(manifest: Manifest, graph: str) -> dict[str, tuple[int, int, int]]:
    """Smallest, usual and largest size of each dynamic axis: B sessions, F latent frames, R cache rows."""
    g = manifest.geometry
    rows = (g.rows, g.rows, g.rows)
    if graph == "decode":  # a chunk, or what the first frame leaves of it
        frames = (1, g.chunk, g.chunk)
    else:
        frames = (1, g.chunk, g.window)  # a policy's micro recache may take a single one
    return {"B": (1, 1, 1), "F": frames, "R": rows}


def plan_stem(manifest: Manifest, target: Target, graph: str, plugins: bool) -> str:
    """File name of a plan without suffix: model, graph, dtype, product, version, capability."""
    version = target.flavour.installed
    kind = "" if plugins else "-functions"
    model = plain_name(manifest.model)
    return f"{model}-{graph}-{manifest.dtype}-{target.flavour.name}{version}-sm{target.capability}{kind}"


def _build(
    manifest: Manifest,
    target: Target,
    graph: str,
    plugins: bool,
    kernels: dict[str, Kernel],
    work: Path,
    progress: Progress | None,
) -> Built:
    assert manifest.folder is not None
    began = time.monotonic()
    stem = plan_stem(manifest, target, graph, plugins)
    folder = work / target.folder
    folder.mkdir(parents=True, exist_ok=True)
    plan, source = folder / f"{stem}{PLAN}", manifest.folder / "onnx" / f"{graph}.onnx"
    result = run_builder(graph, source, plan, target, sizes(manifest, graph), plugins, work, progress)
    found = _plugin_layers(graph, result, plugins)
    layers = folder / f"{stem}{LAYERS}"
    layers.write_text(
        json.dumps({"bindings": result["bindings"], "layers": result["layers"]}, indent=1) + "\n"
    )
    files = dict(_named_by_content(work, file, suffix) for file, suffix in ((plan, PLAN), (layers, LAYERS)))
    plan_name, layers_name = files
    info = PlanInfo(
        graph=graph,
        target=target.name,
        flavour=target.flavour.name,
        version=result["version"],
        capability=target.capability,
        dtype=manifest.dtype,
        file=plan_name,
        layers=layers_name,
        source=graph_source(manifest, graph),
        plugins={op: kernels[op].spec.sha256 for op in PLUGINS if op in found},
        functions=not plugins,
    )
    return Built(info, files, time.monotonic() - began, result["peak"])


def run_builder(
    graph: str,
    source: Path,
    plan: Path,
    target: Target,
    axes: Mapping[str, tuple[int, int, int]],
    plugins: bool,
    work: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `plan`, of the ONNX file `source`, in a child process; what that tells of it (tensorrt_child.py).

    axes: smallest, usual and largest size of each dynamic one. work: where the plugins' kernels are (`write_kernels`).
    Raises PlanBuildError, in which the graph is called `graph`.
    """
    log, result_file, job_file = (work / f"{graph}{end}" for end in (".log", ".result.json", ".job.json"))
    job = {
        "flavour": target.flavour.name,
        "capability": target.capability,
        "graph": str(source),
        "plan": str(plan),
        "log": str(log),
        "result": str(result_file),
        "kernels": str(work / "kernels") if plugins else None,
        "sizes": axes,
        "timing_cache": _timing_cache(target),
        "parent": os.getpid(),
    }
    job_file.write_text(json.dumps(job))
    code, problem = _run_child(job_file, target, work, graph, progress)
    result: dict[str, Any] = {"error": problem} if problem else _read_result(result_file)
    if code or not result or "error" in result or not plan.is_file():
        raise _failure(graph, target, code, result, log)
    return result


def _read_result(file: Path) -> dict[str, Any]:
    """What the child wrote; nothing where it could not."""
    try:
        result: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return result


def _named_by_content(work: Path, file: Path, suffix: str) -> tuple[str, FileEntry]:
    """Rename a file so that another content has another name: a rebuilt plan never takes an earlier one's place.

    Its new name in the bundle, and its entry.
    """
    entry = measure(file)
    named = file.rename(file.with_name(f"{file.name.removesuffix(suffix)}-{entry.sha256[:8]}{suffix}"))
    return named.relative_to(work).as_posix(), entry


def _plugin_layers(graph: str, result: dict[str, Any], plugins: bool) -> set[str]:
    """Ops of the graph's nodes, after checking that each is a plugin layer of the builder's report."""
    if not plugins:
        return set()
    layers = result["layers"]
    lost = [
        node["name"]
        for node in result["nodes"]
        if not any(node["name"] in layer["name"] for layer in layers if layer["plugin"])
    ]
    if lost:
        found = [
            f"{layer['name']} ({layer['type']})" for layer in layers if any(n in layer["name"] for n in lost)
        ]
        raise PlanBuildError(
            f"the plan of {graph} has no plugin layer for {', '.join(lost)}; of these names its {len(layers)} layers "
            f"have {', '.join(found) or 'none'}: this version of TensorRT reports or fuses layers in another way"
        )
    return {node["op"] for node in result["nodes"]}


def _run_child(
    job: Path, target: Target, work: Path, graph: str, progress: Progress | None
) -> tuple[int, str]:
    """Run the child to its end, passing its progress on.

    Returns its exit code, negative for a signal, and what kept it from writing its result, '' where nothing did.
    """
    problem = ""
    with (work / f"{graph}.stderr").open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "swiftvideo.export.tensorrt_child", str(job)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(target, work),
            text=True,
        )
        with child:
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if not line.startswith("{"):
                        continue
                    step = json.loads(line)
                    if "error" in step:
                        problem = step["error"]
                    elif progress:
                        progress(graph, step["phase"], step["step"], step["steps"])
            except BaseException:
                child.kill()
                raise
    return child.returncode, problem


def _environment(target: Target, work: Path) -> dict[str, str]:
    """The child's environment. TensorRT-RTX's parser opens its library by a name without version: give it a link."""
    environment = dict(os.environ)
    if target.flavour is not RTX:
        return environment
    import importlib.util

    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is not None and spec.submodule_search_locations:
        libraries = Path(next(iter(spec.submodule_search_locations)))
        links = work / "lib"
        links.mkdir(exist_ok=True)
        for library in libraries.glob("libtensorrt_rtx.so.*"):
            link = links / "libtensorrt_rtx.so"
            if not link.exists():
                link.symlink_to(library)
        paths = [str(links), str(libraries), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _timing_cache(target: Target) -> str | None:
    """File of measured tactics, kept between builds. TensorRT-RTX measures nothing when it builds."""
    if target.flavour is RTX:
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swiftvideo"
    base.mkdir(parents=True, exist_ok=True)
    gpu = "".join(c if c.isalnum() else "-" for c in find_gpus()[0].name)
    return str(base / f"{target.flavour.name}-{target.flavour.installed}-{gpu}.timing")


def _failure(graph: str, target: Target, code: int, result: dict[str, Any], log: Path) -> PlanBuildError:
    lines = []
    for file, most in ((log, LOG_LINES), (log.with_suffix(".stderr"), LOG_LINES // 2)):
        if file.is_file():  # an exception in a plugin is in stderr alone
            lines += file.read_text(errors="replace").splitlines()[-most:]
    layer = f", layer {result['layer']}" if result.get("layer") else ""
    how = result.get("error") or (f"the builder died of signal {-code}" if code < 0 else f"exit code {code}")
    end = "\n".join(f"  {line}" for line in lines)
    return PlanBuildError(
        f"no plan of {graph} for {target.name}{layer}: {how}. The bundle is as it was. The log ends with:\n{end}"
    )


def _add(manifest: Manifest, work: Path, built: list[Built]) -> None:
    """Move the files into the bundle and write the manifest, which at any time lists nothing but what is there.

    Plans have names of their own content. A kernel of another content under the same name, as another version of
    Triton makes, is first taken off the manifest.
    """
    assert manifest.folder is not None
    fresh = [item.info for item in built]
    kept: list[PlanInfo] = []
    stale: list[PlanInfo] = []
    for plan in plans_of(manifest):
        (stale if any(plan.serves_as(other) for other in fresh) else kept).append(plan)
    used = {name for plan in (*kept, *fresh) for name in (plan.file, plan.layers)}
    gone = {name for plan in stale for name in (plan.file, plan.layers)} - used
    made = measure_files(work, [f"kernels/{path.name}" for path in (work / "kernels").glob("*")])
    for item in built:
        made |= item.files
    changed = {name for name, entry in made.items() if manifest.files.get(name, entry) != entry}
    if changed:
        unchanged = {name: entry for name, entry in manifest.files.items() if name not in changed}
        dataclasses.replace(manifest, files=unchanged).save(manifest.folder)
    for name in made:
        target = manifest.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (work / name).replace(target)
    files = {name: entry for name, entry in manifest.files.items() if name not in gone} | made
    entries = tuple(plan.entry() for plan in (*kept, *fresh))
    dataclasses.replace(manifest, files=files, plans=entries).save(manifest.folder)
    for suffix in (PLAN, LAYERS):  # those that were replaced, now or before an interruption
        for path in manifest.folder.glob(f"trt/*/*{suffix}"):
            if path.relative_to(manifest.folder).as_posix() not in files:
                path.unlink()
