"""The whole-sequence forward used in training equals diffusers' cached one."""

from pathlib import Path

import pytest
import torch

from swiftvideo.export.toy import vae as toy


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return toy.build().eval()


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoding_equals_the_cached_path(model: torch.nn.Module, frames: int) -> None:
    clips = torch.randn(1, 3, frames, 32, 24)
    with torch.no_grad():
        mean, logvar = toy.encode(model, clips)
        reference = model.encode(clips).latent_dist
    torch.testing.assert_close(mean, reference.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, reference.logvar, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decoding_equals_the_cached_path(model: torch.nn.Module, frames: int) -> None:
    latents = torch.randn(1, 16, frames, 4, 3)
    with torch.no_grad():
        whole = toy.decode(model, latents).clamp(-1, 1)
        reference = model.decode(latents).sample
    assert whole.shape == (1, 3, 4 * frames - 3, 32, 24)
    torch.testing.assert_close(whole, reference, atol=1e-5, rtol=1e-5)


def test_other_models_of_the_process_are_left_alone() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

    before = WanResample.forward
    toy.build()
    assert WanResample.forward is before


def test_each_training_stage_changes_its_own_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = toy.build()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    toy.train(model, tmp_path / "vae.pt", 1e-5, log=lambda text: None)
    first = torch.load(tmp_path / "vae.pt", weights_only=True)
    toy.train_decoder(model, tmp_path / "decoder.pt", 1e-5, log=lambda text: None)
    second = torch.load(tmp_path / "decoder.pt", weights_only=True)

    def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}

    assert changed(start, first) == {"encoder", "quant_conv", "decoder", "post_quant_conv"}
    assert changed(first, second) == {"decoder", "post_quant_conv"}
