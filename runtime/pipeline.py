"""A loaded bundle: shared weights, and any number of sessions on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Literal

from .engine import Engine, Prompt
from .errors import BundleMissingError, ClosedError, SettingsError, UsageError
from .geometry import Geometry, Policy, PolicySettings
from .manifest import TOKENIZER_NAME, Manifest
from .session import Session
from .snapshot import read
from .tokenizer import PromptTokenizer

EngineName = Literal["auto", "onnxruntime", "tensorrt"]
EMBEDDED = Path(__file__).parent / "bundles" / "default"
"""The model that the package carries."""


def load(path: str | Path | None = None, engine: EngineName = "auto", threads: int | None = None) -> Pipeline:
    """Open a bundle, checking the hash of every file that is used.

    path: of a bundle's folder; None: the embedded model. engine: "onnxruntime", "tensorrt", or "auto": TensorRT where
    the bundle has plans that this machine can run, else ONNX Runtime. threads: of the CPU engine; None: one for every
    core that this process may use.

    Raises:
        BundleError: the bundle is missing, of another version, or was changed.
        EngineUnavailableError: the engine cannot run here.
        SettingsError: no such engine, or `path` cannot be a name.
    """
    manifest = Manifest.load(EMBEDDED if path is None else path)
    if engine not in ("auto", "onnxruntime", "tensorrt"):
        raise SettingsError(
            f"engine is {engine!r}: use 'auto', 'onnxruntime' or 'tensorrt'; what opens a bundle with torch is "
            "swiftvideo.export.restore.open_torch"
        )
    if engine == "tensorrt" or (engine == "auto" and manifest.plans):
        from .engines.tensorrt import TensorRTEngine, runs

        if engine == "tensorrt" or runs(manifest):
            return Pipeline(TensorRTEngine(manifest), manifest)
    from .engines.onnxruntime import OnnxRuntimeEngine

    return Pipeline(OnnxRuntimeEngine(manifest, threads), manifest)


class Pipeline:
    """An engine with a bundle's tokenizer and settings. Sessions may run in different threads.

    The pipeline closes the engine, also where it cannot be made. Raises BundleError where the tokenizer is missing or
    was changed.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self.engine = engine
        self.manifest = manifest
        self._closed = False
        try:
            if not manifest.has(TOKENIZER_NAME):
                raise BundleMissingError(f"the bundle lists no {TOKENIZER_NAME}: export it again")
            self._tokenizer = PromptTokenizer(manifest.read_file(TOKENIZER_NAME), manifest.geometry.text_len)
        except BaseException:
            engine.close()
            raise

    @property
    def geometry(self) -> Geometry:
        """Shapes of the model."""
        return self.manifest.geometry

    @property
    def settings(self) -> PolicySettings:
        """The bundle's settings, which sessions use unless told otherwise."""
        return self.manifest.policy

    @property
    def words(self) -> list[str]:
        """The tokenizer's vocabulary."""
        return self._tokenizer.words

    def encode(self, text: str) -> Prompt:
        """Encode a prompt, for use in any session of this pipeline. Raises PromptError, EngineError, ClosedError."""
        self._check_open()
        ids, mask = self._tokenizer.encode(text)
        return self.engine.encode(ids, mask, text)

    def session(
        self, prompt: str | Prompt, seed: int = 0, policy: PolicySettings | Policy | None = None
    ) -> Session:
        """Start a video.

        seed: 0 to 2^64 - 1; the same seed, prompts and bundle give the same video, on the same engine, kind
        of processor and number of threads (with others, a frame's values may differ by one).
        policy: settings; or the name of a policy, the rest being the bundle's settings; None: the bundle's.

        Raises:
            PromptError: the prompt is empty, too long, or has unknown words.
            SettingsError: the settings do not fit the model, or the seed is out of range.
            EngineError: the prompt could not be encoded, or its signature is not finite.
            OutOfMemoryError: no memory for another session.
            ClosedError: the pipeline was closed.
        """
        self._check_open()
        if policy is None:
            policy = self.settings
        elif isinstance(policy, str):
            policy = dataclasses.replace(self.settings, policy=policy)
        elif not isinstance(policy, PolicySettings):
            raise SettingsError(f"policy is {policy!r}: give PolicySettings, the name of a policy, or None")
        return Session(self.engine, self.encode, policy, prompt, seed, self.manifest.fingerprint)

    def restore(self, path: str | Path) -> Session:
        """Continue a session that `Session.save` wrote, on the same bundle.

        Raises:
            UsageError: the file is no saved session, one of another bundle, or was changed (its SHA-256 tells).
            OutOfMemoryError, ClosedError: as `session`.
        """
        self._check_open()
        saved = read(path)
        if saved.model != self.manifest.fingerprint:
            raise UsageError(
                f"{path} was saved with another model than {self.manifest.model!r} as it is in "
                f"{str(self.manifest.folder)!r}: load the bundle that it was saved with"
            )
        session = self.session(saved.prompt, saved.seed, saved.settings)
        try:
            session.load_state(saved)
        except BaseException:
            session.close()
            raise
        return session

    def close(self) -> None:
        """Free the weights; twice is fine."""
        self._closed = True
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this pipeline was closed: load the bundle again")
