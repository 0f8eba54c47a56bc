"""The whole-sequence decoder used in training equals diffusers' cached one; the stages of training work."""

from pathlib import Path

import numpy as np
import pytest
import torch

from swiftvideo.export.toy import encoder as patches, vae as toy


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return toy.build().eval()


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decoding_equals_the_cached_path(model: torch.nn.Module, frames: int) -> None:
    latents = torch.randn(1, 16, frames, 4, 3)
    with torch.no_grad():
        whole = toy.decode(model, latents).clamp(-1, 1)
        reference = model.decode(latents).sample
    assert whole.shape == (1, 3, 4 * frames - 3, 32, 24)
    torch.testing.assert_close(whole, reference, atol=1e-5, rtol=1e-5)


def test_other_models_of_the_process_are_left_alone() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm

    before = WanResample.forward, WanRMS_norm.forward
    toy.build()
    assert (WanResample.forward, WanRMS_norm.forward) == before


def test_a_latent_frame_knows_its_own_frames_only() -> None:
    encoder = patches.PatchEncoder().eval()
    clips = toy.drawn_batch(np.random.default_rng(0), 9, 1)
    other = clips.clone()
    other[:, :, 5:] = 0.5
    with torch.no_grad():
        a, b = encoder(clips), encoder(other)
    assert a.shape == (1, 16, 3, 8, 8)
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert not torch.equal(a[:, :, 2], b[:, :, 2])


def test_patches_unfold_as_they_were_folded() -> None:
    """Frame k of a folded clip is where the decoder puts frame k: a decoder that returns its input shows it."""
    clips = torch.randn(2, 3, 5, 16, 8)
    folded = patches._fold(clips)
    decoder = patches.PatchDecoder()
    decoder.body = torch.nn.Identity()
    shown = decoder(folded.unflatten(0, (2, -1)).transpose(1, 2))
    assert torch.equal(shown[:, :, 3:], clips)
    assert torch.equal(shown[:, :, 0], clips[:, :, 0])


def test_each_stage_writes_its_state_and_the_decoder_resumes(tmp_path: Path) -> None:
    patches.train(tmp_path / "encoder.pt", 1e-5, clips=1, log=lambda text: None)
    encoder = patches.load(tmp_path / "encoder.pt")
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    states = []
    for resume in (False, True):
        toy.train(encoder, tmp_path / "vae.pt", 1e-5, resume=resume, log=lambda text: None)
        states.append(torch.load(tmp_path / "vae.pt", weights_only=True))
    changed = {name.split(".")[0] for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {"decoder", "post_quant_conv"}
