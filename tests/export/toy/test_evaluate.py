"""Scores of pipelines whose quality is known."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from swiftvideo.export.toy import evaluate, prompts, scenes
from swiftvideo.export.toy.prompts import Attributes
from swiftvideo.export.toy.sampling import TorchPipeline
from swiftvideo.export.toy.train import write_checkpoint

BY_PROMPT = {
    attributes.prompt(): attributes
    for attributes in (
        Attributes(c, s, m, b)
        for c in prompts.COLOURS
        for s in prompts.SHAPES
        for m in prompts.MOTIONS
        for b in prompts.BACKGROUNDS
    )
}


class Drawn:
    """A pipeline that draws what it is asked for, `late` chunks after it is asked for it."""

    def __init__(self, late: int) -> None:
        self.late = late

    def session(self, prompt: str, seed: int) -> "Drawn":
        self.asked, self.world = [prompt], scenes.World(np.random.default_rng(seed))
        self.next = prompt
        return self

    def __enter__(self) -> "Drawn":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def prompt(self, text: str) -> None:
        self.next = text

    def __iter__(self) -> Iterator[SimpleNamespace]:
        while True:
            self.asked.append(self.next)
            text = self.asked[max(0, len(self.asked) - 1 - self.late)]
            frames = self.world.frames(BY_PROMPT[text], 12 if len(self.asked) > 2 else 9)
            yield SimpleNamespace(frames=frames.astype(np.uint8))


def test_a_drawn_video_scores_a_hundred() -> None:
    table = evaluate.evaluate(Drawn(late=0), stories=2)
    assert [table[group]["chunks"] for group in ("before", "switch", "after")] == [12, 2, 10]
    assert all(row[name] == 100 for row in table.values() for name in Attributes.names())
    assert "| before | 12 | 100.0 |" in evaluate.markdown(table)


def test_a_late_switch_is_allowed_one_chunk() -> None:
    table = evaluate.evaluate(Drawn(late=1), stories=2)
    assert all(table["after"][name] == 100 for name in Attributes.names())
    assert min(table["switch"][name] for name in Attributes.names()) < 100
    late = evaluate.evaluate(Drawn(late=2), stories=2)
    assert min(late["after"][name] for name in Attributes.names()) < 100


def test_stories_have_two_different_prompts() -> None:
    for seed in range(50):
        first, second = evaluate.random_story(seed).prompts.values()
        assert first != second


def test_the_torch_loop_plays_an_untrained_model_and_its_checkpoint_is_complete(tmp_path: Path) -> None:
    import torch

    from swiftvideo.export.toy import vae
    from swiftvideo.export.toy.network import Network

    torch.manual_seed(0)
    network, autoencoder = Network(), vae.build()
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    frames = evaluate.play(TorchPipeline(network, autoencoder, mean, std), evaluate.random_story(0, 3, 1))
    assert [chunk.shape for chunk in frames] == [(9, 64, 64, 3), (12, 64, 64, 3), (12, 64, 64, 3)]

    torch.save({"ema": network.state_dict(), "mean": mean, "std": std}, tmp_path / "backbone.pt")
    torch.save(autoencoder.state_dict(), tmp_path / "vae.pt")
    folder = write_checkpoint(tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer.json",
        "model.json",
    }
