"""Loads a checkpoint's parts that diffusers and transformers define: the VAE and the text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from transformers import UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from swiftvideo.runtime.errors import CheckpointError, SettingsError

from . import checkpoint_naming as naming
from .checkpoint_files import (
    INDEX_SUFFIX,
    TORCH_SUFFIXES,
    check_finite,
    find_weights,
    read_json,
    stored_shapes,
)
from .model_info import ModelInfo
from .models.text import TextEncoder, umt5_config
from .models.vae import StreamingDecoder


def load_vae(
    folder: str | Path, info: ModelInfo | None = None, dtype: torch.dtype = torch.float32
) -> StreamingDecoder:
    """The decoder of a diffusers VAE folder. Raises CheckpointError, and SettingsError for a dtype that is none."""
    vae = _pretrained(AutoencoderKLWan, Path(folder), dtype)
    info = info or ModelInfo()
    return StreamingDecoder(vae, info.latents_mean, info.latents_std)


def load_text_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The encoder of a transformers UMT5 folder; a decoder in the same files is left alone.

    Raises CheckpointError, and SettingsError for a dtype that is none.
    """
    return TextEncoder(_pretrained(UMT5EncoderModel, Path(folder), dtype))


def check_dtype(dtype: torch.dtype) -> None:
    """Raise SettingsError for a dtype that weights cannot have."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingsError(f"dtype is {dtype!r}: use one of torch's for weights, such as torch.bfloat16")


def _pretrained(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    check_dtype(dtype)
    text = cls is UMT5EncoderModel
    _check_name(cls, folder, "model.safetensors" if text else "diffusion_pytorch_model.safetensors")
    shapes = stored_shapes(find_weights(folder))
    settings = read_json(folder / "config.json")
    with reading(cls, folder), torch.device("meta"):
        config = umt5_config(settings) if text else None
        blank = cls(config) if text else cls.from_config(settings)
    wrong = naming.wrong_shapes(shapes, {key: value.shape for key, value in blank.state_dict().items()})
    _refuse_misfit(cls, folder, wrong=wrong)
    with reading(cls, folder):
        model, report = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({"dtype": dtype, "config": config} if text else {"torch_dtype": dtype}),
        )
    unread = ("decoder.", "lm_head.") if text else ()
    surplus = [key for key in report["unexpected_keys"] if not key.startswith(unread)]
    _refuse_misfit(cls, folder, sorted(report["missing_keys"]), sorted(surplus))
    check_finite(model.state_dict(), folder)
    return model.eval().requires_grad_(False)


def _check_name(cls: type, folder: Path, name: str) -> None:
    """Raise CheckpointError unless a folder has weights under the name that the library reads."""
    if not folder.is_dir() or any((folder / own).is_file() for own in (name, name + INDEX_SUFFIX)):
        return
    kinds = (".safetensors", ".json", *TORCH_SUFFIXES)
    found = sorted(
        file.name for file in folder.iterdir() if file.suffix in kinds and file.name != "config.json"
    )
    tensors = [file for file in found if ".safetensors" in file]
    remedy = f"copy {name} there"
    if len(tensors) == 1:
        remedy = f"rename {tensors[0]} to {name}"
    elif index := [file for file in tensors if file.endswith(".json")]:
        remedy = f"rename {index[0]} to {name}{INDEX_SUFFIX}"
    elif found:
        remedy = f"write it with {cls.__name__}.from_pretrained(...).save_pretrained(...)"
    raise CheckpointError(
        f"{folder} has no {name}, which alone is read there, but {naming.listed(found) or 'no weights'}: {remedy}"
    )


def _refuse_misfit(
    cls: type,
    folder: Path,
    missing: Iterable[str] = (),
    surplus: Iterable[str] = (),
    wrong: Iterable[str] = (),
) -> None:
    if problems := naming.misfit(missing, surplus, wrong):
        raise CheckpointError(f"{folder} does not fit {cls.__name__}: {problems}. Use its own config.json")


@contextmanager
def reading(cls: type, folder: Path) -> Iterator[None]:
    """Turn what a library raises for files or settings that it cannot use into CheckpointError, and say no more."""
    try:
        with _silent():
            yield
    except MemoryError:
        raise
    except Exception as error:  # odd values of a config.json fail anywhere in it
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{folder} cannot be read as {cls.__name__} ({reason}); use the config.json and weights of one model"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep both libraries from writing on stderr, where the message is ours."""
    loggers = (transformers_logging, diffusers_logging)
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logger.CRITICAL)
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level, bar in before:
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()
