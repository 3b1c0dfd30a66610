"""The model's initial values, name by name, against the table in `initial_value`'s docstring."""

import math
import re

import pytest
import torch

from moe.config import MoeConfig
from trainer.config import ModelConfig
from trainer.diffusion.model import EcDit, ModelShape, init_weights, initial_value

SHAPE = ModelShape(channels=4, height=8, width=8, text_dim=48)
CONFIG = ModelConfig(dim=64, num_layers=2, num_heads=2, num_kv_heads=1, patch_size=2, mlp_ratio=3, pooled_text=True)
ONE = r".*_norm"
ZERO = (
    r".*bias|.*\.w3|final\.weight|final_modulation\.weight|condition\.weight|blocks\.\d\.modulation|.*cross_attention"
    r"\.out\.weight|.*threshold\.value"
)
STD = {
    r"patch_embedder\.weight": 16, r"timestep_embedder\.up\.weight": 256, r"text_projection\.up\.weight": 48,
    r".*mlp\.down\.weight": 192, r".*experts\.w2": 192,
    r"(timestep_embedder|text_projection)\.down\.weight|pooled_projection\.weight|.*mlp\.up\.weight|.*experts\.w1": 64,
    r".*(query|key_value)\.weight|.*self_attention\.out\.weight|.*predictor\.(up|down)\.weight": 64,
}  # fmt: skip


@pytest.mark.parametrize("router", ["expert_choice", "diffmoe", "expert_race"])
def test_each_parameter_starts_as_the_table_says(router: str) -> None:
    pool = "image" if router == "expert_choice" else "batch"
    model = EcDit(CONFIG, MoeConfig(num_experts=8, router=router, pool=pool), SHAPE)
    init_weights(model, 3)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if re.fullmatch(ONE, name):
            assert (value == 1).all(), name
        elif re.fullmatch(ZERO, name):
            assert not value.any(), name
        elif name.endswith("router.weight"):
            assert float(value.std()) == pytest.approx(0.02, rel=0.15)
        else:
            (fan_in,) = (number for pattern, number in STD.items() if re.fullmatch(pattern, name))
            assert float(value.std()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.15), name
            assert abs(float(value.mean())) < 4 / math.sqrt(fan_in * value.numel()), name
            if ".experts." in name:
                assert len({float(of_expert.flatten()[0]) for of_expert in value}) == 8, "each expert its own"


def test_any_rank_draws_its_own_experts() -> None:
    name, moe = "blocks.1.mlp.experts.w1", MoeConfig()
    whole = initial_value(name, (6, 8, 4), 3, moe=moe)
    for size in (1, 2, 3):
        parts = [initial_value(name, (size, 8, 4), 3, first_expert=first, moe=moe) for first in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), whole)
