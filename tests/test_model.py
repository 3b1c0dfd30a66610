"""The transformer: shapes, masks, positions, initial values and activation checkpointing."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.parity import VARIANTS
from moe.config import MoeConfig
from moe.layer import auxiliary_loss
from moe.routing import ChoiceMemory
from trainer.config import ModelConfig
from trainer.diffusion.layers import Attention, attend, modulate, patchify, rope_2d, rotate, sincos_2d, unpatchify
from trainer.diffusion.model import EcDit, ModelShape, init_weights, initial_value

SHAPE = ModelShape(channels=3, height=8, width=8, text_dim=12)
CONFIG = ModelConfig(dim=32, num_layers=4, num_heads=2, num_kv_heads=1, patch_size=2, pooled_text=True)


def build(seed: int = 0, moe: MoeConfig | None = None) -> EcDit:
    model = EcDit(CONFIG, moe or MoeConfig(num_experts=4), SHAPE)
    init_weights(model, seed)
    with torch.no_grad():  # open the zero-initialised branches
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(batch: int = 2, tokens: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    text = torch.randn(batch, tokens, 12, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), text, torch.ones(batch, tokens, dtype=torch.bool)


def test_patches_and_back() -> None:
    x = torch.randn(2, 3, 8, 12)
    assert patchify(x, 2).shape == (2, 24, 12)
    assert torch.equal(unpatchify(patchify(x, 2), 2, 8, 12), x)


def test_first_prediction_is_zero() -> None:
    model = EcDit(CONFIG, MoeConfig(num_experts=4), SHAPE)
    init_weights(model, 0)
    prediction, routed = model(*inputs())
    assert prediction.shape == (2, 3, 8, 8) and prediction.dtype == torch.float32
    assert torch.count_nonzero(prediction) == 0
    assert len(routed) == 2 and routed[0].statistics().experts_per_token_BS.shape == (2, 16)


def test_data_prediction_gives_the_velocity_of_the_path() -> None:
    """The untrained network predicts data 0, so the velocity is x_t / t."""
    model = EcDit(replace(CONFIG, prediction="data"), MoeConfig(num_experts=4), SHAPE)
    init_weights(model, 0)
    x, t, text, mask = inputs()
    torch.testing.assert_close(model(x, t, text, mask)[0], x / t.view(2, 1, 1, 1))


def test_padding_of_the_text_changes_nothing() -> None:
    model, (x, t, text, mask) = build(), inputs()
    padded = torch.cat([text, torch.full((2, 3, 12), 7.0)], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model(x, t, padded, longer)[0], model(x, t, text, mask)[0], rtol=1e-5, atol=1e-5)


def test_picture_does_not_depend_on_batch_mates() -> None:
    model, (x, t, text, mask) = build(), inputs(batch=3)
    alone = model(x[1:2], t[1:2], text[1:2], mask[1:2])[0]
    torch.testing.assert_close(model(x, t, text, mask)[0][1:2], alone, rtol=1e-5, atol=1e-5)


def test_keeping_all_tokens_is_no_mask() -> None:
    model, (x, t, text, mask) = build(), inputs()
    keep = torch.arange(16).expand(2, 16)
    tokens, _ = model(x, t, text, mask, keep)
    torch.testing.assert_close(unpatchify(tokens, 2, 8, 8), model(x, t, text, mask)[0])


def test_masked_tokens_keep_their_positions() -> None:
    turn = rope_2d(4, 4, 16, torch.device("cpu"))
    keep = torch.tensor([[0, 5, 10]])
    absolute, kept_turn = build().positions(keep, torch.device("cpu"))
    assert torch.equal(kept_turn[0], turn[keep[0]])
    assert torch.equal(absolute[0], sincos_2d(4, 4, 32, torch.device("cpu"))[keep[0]])


def test_rotation_turns_each_pair_by_its_angle() -> None:
    """Written out: pair p of a head of 16 turns with the row (p < 4) or the column, by 100^(-(p mod 4) / 4) a step."""
    x, turn = torch.randn(1, 12, 1, 16), rope_2d(3, 4, 16, torch.device("cpu"))
    found = rotate(x, turn[None])
    for token in range(12):
        for pair in range(8):
            angle = (token // 4 if pair < 4 else token % 4) * 100.0 ** (-(pair % 4) / 4)
            a, b = x[0, token, 0, 2 * pair : 2 * pair + 2].tolist()
            wanted = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
            torch.testing.assert_close(found[0, token, 0, 2 * pair : 2 * pair + 2], torch.tensor(wanted))


def test_rotation_depends_on_distance_only() -> None:
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    turn = rope_2d(6, 6, 16, torch.device("cpu"))

    def score(a: int, b: int) -> torch.Tensor:
        return (rotate(query, turn[None, a : a + 1]) * rotate(key, turn[None, b : b + 1])).sum()

    torch.testing.assert_close(score(0, 8), score(7, 15))  # both one row and two columns apart
    assert not torch.allclose(score(0, 8), score(0, 9))


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention_equals_the_fused_kernel(masked: bool) -> None:
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])[:, None, None, :] if masked else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask
    )
    torch.testing.assert_close(attend(query, key, value, mask), expected, rtol=1e-5, atol=1e-6)


def test_cached_text_gives_the_same_prediction() -> None:
    model, (x, t, text, mask) = build(), inputs()
    cached = model(x, t, text, mask, text_cache=model.cache_text(text))[0]
    torch.testing.assert_close(cached, model(x, t, text, mask)[0])


def test_activation_checkpointing_gives_the_same_gradients_with_tied_affinities() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build()
        with torch.no_grad():
            for block in model.blocks[1::2]:
                block.mlp.router.weight.zero_()  # every affinity is tied
        model.activation_checkpointing = checkpointing
        model(*inputs())[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_recomputation_is_given_what_was_chosen() -> None:
    """Here it would choose the same again; on a GPU it need not."""
    model = build()
    model.activation_checkpointing = True
    seen: list[ChoiceMemory] = []
    model.blocks[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[-1]))
    out = model(*inputs())[0]
    (memory,) = seen
    chosen = memory.index_BEC
    assert chosen is not None
    out.square().mean().backward()
    assert len(seen) == 2 and seen[1] is memory and memory.index_BEC is chosen


@pytest.mark.parametrize("router", VARIANTS)
def test_routers_recompute_what_they_computed(router: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(moe=MoeConfig(num_experts=4, **VARIANTS[router]))
        model.activation_checkpointing = checkpointing
        out, stats = model(*inputs())
        own = auxiliary_loss(stats)
        (out.square().mean() + (0 if own is None else own)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_every_parameter_gets_a_gradient() -> None:
    model = build()
    model(*inputs())[0].square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_initial_values_do_not_depend_on_how_experts_are_split() -> None:
    name = "blocks.1.mlp.experts.w1"
    whole = initial_value(name, (4, 6, 5), 3, moe=MoeConfig())
    parts = [initial_value(name, (2, 6, 5), 3, first_expert=first, moe=MoeConfig()) for first in (0, 2)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, initial_value(name, (4, 6, 5), 4, moe=MoeConfig()))
    assert not torch.equal(whole[0], whole[1])


def test_dense_twin_has_no_router() -> None:
    model = build(moe=MoeConfig(every=0))
    assert model(*inputs())[1] == []
    assert not [name for name, _ in model.named_parameters() if "router" in name]


def test_modulation_formula() -> None:
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    expected = torch.stack([x[b] * (1 + scale[b]) + shift[b] for b in range(2)])
    torch.testing.assert_close(modulate(x, shift, scale), expected)


def test_attention_shares_key_heads() -> None:
    attention = Attention(32, 4, 2)
    assert attention.key_value.out_features == 2 * 2 * 8
    keys, values = attention.keys_values(torch.randn(1, 3, 32))
    assert keys.shape == values.shape == (1, 3, 2, 8)
