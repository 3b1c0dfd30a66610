"""How the text moves the compute: a known shift, words of a model that reads them, and of one that does not."""

import pytest
import torch

from eval.demo.prompts import demo_prompts
from eval.pages.allocation import WordShares, moved_share, word_lines, word_shares
from eval.pages.charts import moved_chart
from eval.pages.compute_map import ComputeMaps, trace_compute
from eval.pictures.prompts import picture_seed
from trainer.config import load_config
from trainer.data.latents.samples import LatentInfo, pad_text
from trainer.diffusion.model import EcDit, ModelShape
from trainer.diffusion.solver import initial_noise
from trainer.pipeline import Pipeline

INFO = LatentInfo(
    channels=3, height=32, width=32, text_dim=384, max_tokens=24, codec="pixel", text_encoder="minilm",
    fingerprint="none", mean=[0.0] * 3, std=[1.0] * 3,
)  # fmt: skip
CONFIG = load_config("debug", ["diffusion.sampling_steps=3", "model.patch_size=4", "diffusion.guidance_start=0.5"])


@pytest.fixture(scope="module")
def reading() -> Pipeline:
    """A model of random weights, whose picture and routing depend on the text."""
    generator = torch.Generator().manual_seed(0)
    shape = ModelShape(channels=3, height=32, width=32, text_dim=384)
    weights = {
        name: value.shape[-1] ** -0.5 * torch.randn(value.shape, generator=generator)
        for name, value in EcDit(CONFIG.model, CONFIG.moe, shape).named_parameters()
    }
    return Pipeline(CONFIG, INFO, 1, weights)


@pytest.fixture(scope="module")
def maps(reading: Pipeline) -> ComputeMaps:
    found = trace_compute(reading, demo_prompts(0, 1)[:2])
    assert found is not None
    return found


def test_share_of_a_known_shift() -> None:
    one = torch.tensor([[[2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 0.0, 0.0]]])
    other = torch.tensor([[[2.0, 2.0, 2.0, 2.0], [4.0, 2.0, 2.0, 0.0]]])
    assert moved_share(one, other).tolist() == [0.0, 0.5]


def test_every_word_of_a_caption_has_its_share(maps: ComputeMaps) -> None:
    assert len(maps.words) == 2
    for caption, item in zip(maps.captions, maps.words, strict=True):
        assert " ".join(item.words) == caption and len(item.shares) == len(item.words)


def test_a_word_moves_what_the_caption_without_it_leaves(reading: Pipeline, maps: ComputeMaps) -> None:
    """Tokens that an expert takes with the caption and not without one word, over three times."""
    caption, shares = maps.captions[1], maps.words[1].shares
    words = caption.split()
    (noise,) = initial_noise([picture_seed(demo_prompts(0, 1)[1].id, 0)], (3, 32, 32))
    picture = maps.pictures_NHWC[1].permute(2, 0, 1) / 127.5 - 1  # the pixel codec, of mean 0 and deviation 1

    def experts(text: str, time: float) -> torch.Tensor:
        x = (1 - time) * picture + time * noise
        encoded, mask = pad_text(reading.text_encoder.encode([text]), 24)
        _, routed = reading.model(x[None], torch.tensor([time]), encoded, mask)
        return torch.stack([layer.statistics().experts_per_token_BS[0] for layer in routed]).float()

    for i in range(len(words)):
        moved = []
        for time in (0.3, 0.6, 0.9):
            whole, without = experts(caption, time), experts(" ".join(words[:i] + words[i + 1 :]), time)
            moved += [float((whole[n] - without[n]).abs().sum() / whole[n].sum()) for n in range(2)]
        assert shares[i] == pytest.approx(sum(moved) / 6, abs=1e-6)
    assert max(shares) > 0.01


def test_the_caption_moves_compute_while_both_are_evaluated(maps: ComputeMaps) -> None:
    assert maps.moved_TL is not None and maps.moved_TL.shape == (3, 2)
    guided = torch.tensor([time >= 0.5 for time in maps.times])
    assert (maps.moved_TL[guided] > 0).all() and maps.moved_TL[~guided].isnan().all()
    assert moved_chart(maps).startswith("data:image/svg+xml")


def test_words_of_a_model_that_does_not_read_them_move_nothing(maps: ComputeMaps) -> None:
    untrained = Pipeline(CONFIG, INFO, 0, None)  # cross-attention starts closed
    (found,) = word_shares(untrained, maps.captions[:1], maps.pictures_NHWC[:1], [1])
    assert set(found.shares) == {0.0}
    assert "darkest word moves 100" not in " ".join(word_lines([found]))


def test_words_are_shaded_and_escaped() -> None:
    lines = word_lines([WordShares(words=("a", "<b>"), shares=(0.0, 0.2))])
    assert "&lt;b&gt;" in lines[-1] and "0.55" in lines[-1] and 'title="20.0%"' in lines[-1]
    assert word_lines([]) == []
