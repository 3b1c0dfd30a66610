"""Micro-batches as a step gets them: noised by any number of workers alike, masked for the step that takes them."""

from itertools import islice

import pytest
import torch

from trainer.config import DiffusionConfig, TrainConfig, load_config
from trainer.data.dataset import open_dataset
from trainer.data.loader import build_loader
from trainer.data.position import DataState
from trainer.diffusion.flow import NoisedBatch, noise_batch
from trainer.loop.step import next_step, noised_batches

START = DataState(seed=0, epoch=0, consumed=0, samples_seen=0)


def config_of(*overrides: str) -> TrainConfig:
    return load_config("debug", ["diffusion.mask_ratio=0.5", "diffusion.unmask_at_step=2", *overrides])


def prepared(config: TrainConfig, count: int) -> list[NoisedBatch]:
    found = noised_batches(open_dataset(config), config, rank=0, world_size=1, state=START)
    return list(islice(found, count))


def equal(a: NoisedBatch, b: NoisedBatch) -> bool:
    names = ("index_B", "x_BCHW", "t_B", "target_BCHW", "text_BLD", "text_mask_BL", "keep_BS")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same(workers: int) -> None:
    here, there = (prepared(config_of(f"data.num_workers={n}"), 3) for n in (0, workers))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.index_B, b.index_B) and equal(a, b)


def test_a_step_gets_its_micro_batches_masked_as_it_must_be() -> None:
    config = config_of("train.gradient_accumulation_steps=2")
    data = open_dataset(config)
    raw = list(islice(build_loader(data, config, rank=0, world_size=1, state=START), 4))
    batches = noised_batches(data, config, rank=0, world_size=1, state=START)
    found = [item for step in (1, 2) for item in next_step(batches, config, step)]
    wanted = [
        noise_batch(batch, config.diffusion, seed=config.seed, patch_size=2, step=step)
        for batch, step in zip(raw, (1, 1, 2, 2), strict=True)
    ]
    assert all(equal(a, b) for a, b in zip(found, wanted, strict=True))
    keep_BS = found[0].keep_BS
    assert keep_BS is not None and keep_BS.shape == (8, 128) and bool((keep_BS.diff(dim=1) > 0).all())
    assert found[2].keep_BS is None, "from step 2 on all tokens are seen"


def test_without_masking_nothing_is_drawn_for_it() -> None:
    assert DiffusionConfig().mask_ratio == 0
    assert prepared(load_config("debug", []), 1)[0].keep_BS is None
