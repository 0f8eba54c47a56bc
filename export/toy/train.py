"""Train the embedded model from nothing: drawn clips, encoder, encoded stories, decoder, backbone, checkpoint.

    python -m swiftvideo.export.toy.train --out FOLDER [--stages encoder,latents,vae,backbone,checkpoint]

Everything comes from one seed. Stages read what earlier ones left in FOLDER, so each can be repeated, and
`vae` (the decoder) and `backbone` resumed; these two need the encoder alone and may run side by side in two
processes. `checkpoint` writes FOLDER/checkpoint, which `swiftvideo export` turns into a bundle.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from . import backbone, encoder, latents, vae
from .checkpoint import save_checkpoint
from .network import Network
from .sampling import TorchPipeline

STAGES = ("encoder", "latents", "vae", "backbone", "checkpoint")
MINUTES = {"encoder": 8.0, "vae": 55.0, "backbone": 97.0}
STORIES = 3000


def log(text: str) -> None:
    """Print at once, so that a log file can be followed."""
    print(text, flush=True)


def load_trained(folder: Path) -> TorchPipeline:
    """The newest weights of a training folder in a plain torch loop."""
    state = torch.load(folder / "backbone.pt", weights_only=True)
    network = Network()
    network.load_state_dict(state["ema"])
    return TorchPipeline(network, _autoencoder(folder), state["mean"], state["std"])


def _autoencoder(folder: Path) -> AutoencoderKLWan:
    """The autoencoder of a training folder; only its decoder is trained."""
    model = vae.build()
    model.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    return model.eval()


def write_checkpoint(folder: Path) -> Path:
    """Write FOLDER/checkpoint from the stages' states."""
    pipeline = load_trained(folder)
    target = folder / "checkpoint"
    save_checkpoint(
        target,
        backbone=pipeline.network.wan.state_dict(),
        config=dataclasses.asdict(pipeline.network.wan.config),
        vae=pipeline.vae,
        text_encoder=pipeline.network.text,
        mean=pipeline.mean.flatten(),
        std=pipeline.std.flatten(),
    )
    return target


def run_stage(
    stage: str, folder: Path, minutes: float | None, *, seed: int, resume: bool, stories: int
) -> None:
    """Run one of STAGES in `folder`; `minutes` None means the stage's default."""
    budget = MINUTES.get(stage, 0.0) if minutes is None else minutes
    if stage == "encoder":
        encoder.train(folder / "encoder.pt", budget, seed=seed, log=log)
    elif stage == "latents":
        latents.make(encoder.load(folder / "encoder.pt"), folder / "latents.pt", stories, seed, log)
    elif stage == "vae":
        fixed = encoder.load(folder / "encoder.pt")
        vae.train(fixed, folder / "vae.pt", budget, resume=resume, seed=seed, log=log)
    elif stage == "backbone":
        backbone.train(
            folder / "latents.pt", folder / "backbone.pt", budget, resume=resume, seed=seed, log=log
        )
    else:
        log(f"wrote {write_checkpoint(folder)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m swiftvideo.export.toy.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for states and the checkpoint")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated: " + ", ".join(STAGES))
    parser.add_argument(
        "--minutes", type=float, help="budget of each training stage; defaults: " + str(MINUTES)
    )
    parser.add_argument(
        "--stories", type=int, default=STORIES, help="encoded stories the backbone learns from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="start from the states in the folder")
    parser.add_argument(
        "--threads", type=int, default=1, help="one thread is the quickest for so small a model"
    )
    options = parser.parse_args(arguments)
    stages = options.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stages {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        run_stage(
            stage,
            options.out,
            options.minutes,
            seed=options.seed,
            resume=options.resume,
            stories=options.stories,
        )


if __name__ == "__main__":
    main()
