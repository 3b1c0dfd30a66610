"""Sets of pictures drawn by a real pipeline: each picture is that of its prompt and sample, and the card says how."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.pictures.generate import draw_set
from eval.pictures.image_files import picture_path, read_picture
from eval.pictures.prompts import Prompt
from eval.pictures.protocol import fingerprint, sampling_card
from trainer.config import DiffusionConfig, load_config
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import EcDit, ModelShape
from trainer.distributed import World
from trainer.pipeline import Pipeline

ALONE = World(rank=0, local_rank=0, size=1)
DRAWN = {
    "diffusion.sampler": "heun", "diffusion.sampling_steps": 3, "diffusion.guidance_scale": 2.5,
    "diffusion.time_shift": 1.5, "diffusion.guidance_start": 0.2, "diffusion.guidance_end": 0.9,
    "train.precision": "bf16", "ema.decay": 0.97, "data.image_size": 16, "data.text_encoder": "minilm@6",
}  # fmt: skip
OTHERWISE = {
    "diffusion.sampler": ("sampler", "euler"), "diffusion.sampling_steps": ("sampling_steps", 4),
    "diffusion.guidance_scale": ("guidance_scale", 1.0), "diffusion.time_shift": ("time_shift", 1.0),
    "diffusion.guidance_start": ("guidance_interval", [0.1, 0.9]), "train.precision": ("precision", "fp32"),
    "diffusion.guidance_end": ("guidance_interval", [0.2, 0.8]), "ema.decay": ("ema_decay", 0.5),
    "data.image_size": ("image_size", 32), "data.text_encoder": ("text_encoder", "minilm"),
    "data.codec": ("codec", "rgb"),
}  # fmt: skip


# The times of the steps follow from three settings: t of 3 equal steps at shift s is s t / (1 + (s - 1) t).
TIMES = {
    "diffusion.sampling_steps": "equal: 1, 0.818182 ... 0.333333, 0",
    "diffusion.time_shift": "equal: 1, 0.666667 ... 0.333333, 0",
}
TRAINING_ONLY = {"logit_mean", "logit_std", "mask_ratio", "unmask_at_step"}


def _config(**changed: Any) -> Any:
    return load_config("debug", [f"{key}={value}" for key, value in {**DRAWN, **changed}.items()])


def _prompts() -> list[Prompt]:
    rows = [("a/1", "a cat"), ("a/2", "two dogs"), ("b/1", "a cat")]
    return [Prompt(id=name, text=text, tag="", metadata={"prompt": text, "id": name}) for name, text in rows]


def _seed(name: str, sample: int) -> int:
    """The first eight bytes of a hash as a number of 63 bits."""
    digest = hashlib.sha256(name.encode() + b"\x00" + str(sample).encode()).digest()
    return sum(digest[i] << 8 * i for i in range(8)) // 2


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A model of random weights, whose pictures depend on noise and caption."""
    config = load_config("debug", ["diffusion.sampling_steps=2", "model.patch_size=4", "diffusion.guidance_scale=4"])
    info = LatentInfo(
        channels=3, height=16, width=16, text_dim=384, max_tokens=24, codec="pixel", text_encoder="minilm",
        fingerprint="none", mean=[0.0] * 3, std=[1.0] * 3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value.shape[-1] ** -0.5 * torch.randn(value.shape, generator=generator)
        for name, value in EcDit(config.model, config.moe, ModelShape.of(info)).named_parameters()
    }
    return Pipeline(config, info, 70, weights)


def test_each_sample_is_drawn_from_noise_of_its_own(tmp_path: Path, pipeline: Pipeline) -> None:
    folder, card = draw_set(pipeline, _prompts(), tmp_path, num_samples=3, batch_size=4, world=ALONE)
    assert json.loads((folder / "sampling.json").read_text()) == card
    assert [json.loads(line) for line in (folder / "evaluation_metadata.jsonl").read_text().splitlines()] == [
        prompt.metadata for prompt in _prompts()
    ]
    drawn = {}
    for number, prompt in enumerate(_prompts()):
        for sample in range(3):
            picture = read_picture(picture_path(folder, number, sample)).int()
            (alone,) = pipeline.generate([prompt.text], [_seed(prompt.id, sample)]).int()
            assert (picture - alone).abs().max() <= 1, "rounding of batched matmuls is one level at most"
            drawn[number, sample] = picture
    different = [
        float((drawn[a] - drawn[b]).abs().float().mean()) for a in drawn for b in drawn if a < b
    ]  # of one prompt, of two, and of two with the same text
    assert min(different) > 5


def test_another_model_of_the_same_settings_draws_into_another_folder(tmp_path: Path, pipeline: Pipeline) -> None:
    """Two runs that share --out, or a run trained anew whose eval/ was kept: neither takes the other's pictures."""
    folder, card = draw_set(pipeline, _prompts()[:1], tmp_path, num_samples=1, batch_size=4, world=ALONE)
    weight = next(pipeline.model.parameters())
    weight.flatten()[0] += 1
    try:
        elsewhere, other = draw_set(pipeline, _prompts()[:1], tmp_path, num_samples=1, batch_size=4, world=ALONE)
    finally:
        weight.flatten()[0] -= 1
    assert elsewhere != folder and {key for key in card if card[key] != other[key]} == {"weights_digest"}


def test_the_card_says_how_a_set_was_drawn() -> None:
    lines = b"".join(json.dumps(prompt.metadata).encode() + b"\n" for prompt in _prompts())
    assert sampling_card(_config(), 1234, "ema", _prompts(), 3) == {
        "checkpoint_step": 1234,
        "weights": "ema",
        "ema_decay": 0.97,
        "precision": "bf16",
        "sampler": "heun",
        "sampling_steps": 3,
        "router": "expert_choice in pools of image",
        "time_grid": "equal: 1, 0.75 ... 0.428571, 0",
        "guidance_scale": 2.5,
        "time_shift": 1.5,
        "guidance_interval": [0.2, 0.9],
        "image_size": 16,
        "codec": "pixel",
        "text_encoder": "minilm@6",
        "num_prompts": 3,
        "distinct_texts": 2,
        "pictures_per_prompt": 3,
        "prompts_sha256": hashlib.sha256(lines).hexdigest(),
        "seeds": f"sha256(prompt id, sample), first {_seed('a/1', 0)}",
    }


@pytest.mark.parametrize("setting", OTHERWISE)
def test_pictures_of_other_settings_lie_elsewhere(setting: str) -> None:
    key, value = OTHERWISE[setting]
    number = value[setting.endswith("end")] if isinstance(value, list) else value
    base = sampling_card(_config(), 1234, "ema", _prompts(), 3)
    other = sampling_card(_config(**{setting: number}), 1234, "ema", _prompts(), 3)
    assert other == {**base, key: value} | ({"time_grid": TIMES[setting]} if setting in TIMES else {}) != base
    assert fingerprint(other) != fingerprint(base)


def test_every_setting_of_sampling_is_looked_at() -> None:
    tried = {setting.partition(".")[2] for setting in OTHERWISE if setting.startswith("diffusion.")}
    assert {item.name for item in fields(DiffusionConfig)} == tried | TRAINING_ONLY | {"time_grid"}
    other = sampling_card(_config(**{"diffusion.time_grid": "diffusers"}), 1234, "ema", _prompts(), 3)
    assert other["time_grid"].startswith("diffusers: 1, ")


def test_pictures_of_other_subjects_lie_elsewhere() -> None:
    config, prompts = _config(), _prompts()
    cards = [
        sampling_card(config, step, weights, chosen, samples)
        for step, weights, chosen, samples in (
            (1, "ema", prompts, 1), (2, "ema", prompts, 1), (1, "untrained", prompts, 1), (1, "ema", prompts[:2], 1),
            (1, "ema", prompts[::-1], 1), (1, "ema", prompts, 2), (1, "ema", [], 1),
        )
    ]  # fmt: skip
    assert len({fingerprint(card) for card in cards}) == len(cards)
    assert cards[-1]["seeds"] == "none"
