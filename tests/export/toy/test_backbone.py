"""Batches of the backbone's training are what teacher_forcing expects, and training learns."""

from pathlib import Path

import torch

from swiftvideo.export.models.schedule import Schedule
from swiftvideo.export.toy import backbone, prompts
from swiftvideo.export.toy.network import Network


def stories(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 18, 16, 8, 8, generator=generator)
    sizes = (prompts.COLOURS, prompts.SHAPES, prompts.MOTIONS, prompts.BACKGROUNDS)
    rows = [torch.randint(0, len(names), (count, 6), generator=generator) for names in sizes]
    return latents, torch.stack(rows, -1)


def test_a_batch_pairs_clean_and_noisy_frames() -> None:
    latents, attributes = stories()
    batch = backbone.Sampler(latents, attributes, seed=3).batch(8)
    assert batch.latents.shape == (8, 21, 16, 8, 8)
    assert batch.mask.shape == (8, 21 * 16, 4 + 21 * 16)
    assert len(batch.sentences) == 8 * 4
    sigma = batch.t[:, 9:, None, None, None] / 1000
    x = batch.latents[:, 9:] - sigma * batch.target  # x_t - sigma * flow is the clean frame
    assert torch.allclose(x[:, :3], torch.stack(nearest(x[:, :3], latents)), atol=1e-4)
    assert (batch.t[:, :9] == 0).all()
    steps = torch.tensor(Schedule().steps)
    exact = (batch.t[:, 9:, None] - steps).abs().min(-1).values < 0.01
    assert 0.2 < exact.float().mean() < 0.8


def nearest(sinks: torch.Tensor, latents: torch.Tensor) -> list[torch.Tensor]:
    """For each [3,16,8,8] the first chunk of the story it comes from."""
    return [min(latents[:, :3], key=lambda story: float((story - sink).square().sum())) for sink in sinks]


def test_one_seed_gives_one_batch() -> None:
    a, b = (backbone.Sampler(*stories(), seed=5).batch(2) for _ in range(2))
    assert torch.equal(a.latents, b.latents) and a.sentences == b.sentences


def test_a_stage_writes_its_state_and_resumes(tmp_path: Path) -> None:
    latents, attributes = stories()
    torch.save({"latents": latents, "attributes": attributes}, tmp_path / "latents.pt")
    for resume in (False, True):
        backbone.train(
            tmp_path / "latents.pt", tmp_path / "backbone.pt", 1e-5, resume=resume, log=lambda text: None
        )
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    Network().load_state_dict(state["ema"])
    assert state["mean"].shape == state["std"].shape == (16,)
