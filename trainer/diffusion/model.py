"""EcDit: a text-to-image diffusion transformer whose every second block has an MoE, by default with expert choice.

Block (PixArt-alpha, arXiv 2310.00426, as EC-DIT uses it): self-attention -> cross-attention to the text
-> MLP or MoE, with adaLN-single: one shared map from the timestep to six vectors, plus a learned offset
per block. Added to the paper's description: RMS QK-norm and 2-D RoPE (beside PixArt's
absolute sinusoids).

Shapes: B images, C channels, H x W latent, P patch, S image tokens (S = H W / P^2, fewer when masked),
L text tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moe.config import MoeConfig
from moe.experts import Mlp
from moe.layer import MoeLayer
from moe.routers.modules import INITIAL_STD
from moe.routers.registry import router_class
from moe.routing import ChoiceMemory, Routed
from trainer.config import ModelConfig
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.layers import (
    Attention,
    TimestepEmbedder,
    layer_norm,
    modulate,
    patchify,
    rope_2d,
    sincos_2d,
    unpatchify,
)
from trainer.randomness import keyed_generator

# x_t = (1 - t) x_0 + t x_1, so the velocity x_1 - x_0 is (x_t - x_0) / t; below this time t is held, since
# the division would blow up what the network gets wrong.
MIN_TIME = 0.05
MoeBuilder = Callable[..., nn.Module]
TextCache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the data decides about the model: latent channels and size, width of the text tokens."""

    channels: int
    height: int
    width: int
    text_dim: int

    @classmethod
    def of(cls, info: LatentInfo) -> "ModelShape":
        """Of the model of these data; of their first bucket, where they have several."""
        return cls(channels=info.channels, height=info.height, width=info.width, text_dim=info.text_dim)


class DitBlock(nn.Module):
    """One transformer block; `moe` replaces the dense MLP where given."""

    def __init__(self, config: ModelConfig, moe: Callable[[], nn.Module] | None) -> None:
        super().__init__()
        self.self_attention = Attention(config.dim, config.num_heads, config.num_kv_heads)
        self.cross_attention = Attention(config.dim, config.num_heads, config.num_kv_heads)
        self.has_moe = moe is not None
        self.mlp = moe() if moe else Mlp(config.dim, config.mlp_ratio * config.dim, config.dim)
        self.modulation = nn.Parameter(torch.empty(6, config.dim))

    def forward(
        self,
        x_BSD: Tensor,
        condition_B6D: Tensor,
        text_BLD: Tensor,
        mask_B11L: Tensor,
        turn_BSa2: Tensor,
        time_BD: Tensor,
        memory: ChoiceMemory | None = None,
        cached: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """[B, S, D] -> [B, S, D] and, in an MoE block, what its router decided."""
        vectors = (condition_B6D + self.modulation).unbind(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        h_BSD = modulate(layer_norm(x_BSD), shift1, scale1)
        x_BSD = x_BSD + gate1.unsqueeze(1) * self.self_attention(h_BSD, h_BSD, turn_BSa2=turn_BSa2)
        x_BSD = x_BSD + self.cross_attention(layer_norm(x_BSD), text_BLD, mask_B11L=mask_B11L, cached=cached)
        plain_BSD = layer_norm(x_BSD)
        h_BSD = modulate(plain_BSD, shift2, scale2)
        y_BSD, routed = self.mlp(h_BSD, memory, plain_BSD, time_BD) if self.has_moe else (self.mlp(h_BSD), None)
        return x_BSD + gate2.unsqueeze(1) * y_BSD, routed


class EcDit(nn.Module):
    """Predicts the velocity of rectified flow from a noised latent, a timestep and text tokens.

    `build_moe(config, dim=..., hidden_dim=...)` makes the MoE layers: local experts by default, the
    expert-parallel layer under DeepSpeed, the plain-loop oracle in tests.
    """

    def __init__(
        self, config: ModelConfig, moe: MoeConfig, shape: ModelShape, build_moe: MoeBuilder = MoeLayer
    ) -> None:
        super().__init__()
        D, P = config.dim, config.patch_size
        self.config, self.moe, self.shape = config, moe, shape
        self.activation_checkpointing = False
        self.is_compiled = False  # trainer/diffusion/compiled.py, which then recomputes within the blocks
        self.patch_embedder = nn.Linear(shape.channels * P * P, D)
        self.timestep_embedder = TimestepEmbedder(D)
        self.text_projection = Mlp(shape.text_dim, D, D)
        self.pooled_projection = nn.Linear(D, D) if config.pooled_text else None
        self.condition = nn.Linear(D, 6 * D)
        make_moe = partial(build_moe, moe, dim=D, hidden_dim=config.mlp_ratio * D)
        self.blocks = nn.ModuleList(
            DitBlock(config, make_moe if moe.has_moe(i) else None) for i in range(config.num_layers)
        )
        self.final_modulation = nn.Linear(D, 2 * D)
        self.final = nn.Linear(D, shape.channels * P * P)

    def positions(
        self, keep_BS: Tensor | None, device: torch.device, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Absolute embedding [1, S, D] in the weights' dtype and RoPE turns [1, S, a, 2]; [B, S, .] of the kept tokens.

        `size` is the height and width of the latent where it is not the shape's: buckets differ in it.
        """
        P, config = self.config.patch_size, self.config
        height, width = size or (self.shape.height, self.shape.width)
        grid = height // P, width // P
        tables = _tables(*grid, config.dim, config.num_heads, device, self.patch_embedder.weight.dtype)
        absolute, turn = (table.unsqueeze(0) if keep_BS is None else table[keep_BS] for table in tables)
        return absolute, turn

    def embed_text(self, text_BLD: Tensor) -> Tensor:
        """Text tokens [B, L, text_dim] -> [B, L, D] in the weights' dtype; normed, as encoders differ in scale."""
        out: Tensor = self.text_projection(layer_norm(text_BLD.float()).to(self.patch_embedder.weight.dtype))
        return out

    def cache_text(self, text_BLD: Tensor) -> TextCache:
        """Cross-attention keys and values of each block: computed once per caption when sampling.

        Only for a model whose parameters are whole on this process (not partitioned by ZeRO-3).
        """
        text = self.embed_text(text_BLD)
        return [block.cross_attention.keys_values(text) for block in self.blocks if isinstance(block, DitBlock)]

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        text_BLD: Tensor,
        text_mask_BL: Tensor,
        keep_BS: Tensor | None = None,
        text_cache: TextCache | None = None,
    ) -> tuple[Tensor, list[Routed]]:
        """Velocity [B, C, H, W] fp32 (with `keep_BS`: of the kept tokens, [B, S, C P P]), and what the routers decided.

        `t_B` is 1 at pure noise. `keep_BS` are the positions of the tokens that masked training keeps.
        """
        dtype = self.patch_embedder.weight.dtype
        patches = patchify(x_BCHW, self.config.patch_size, keep_BS).float()
        H, W = x_BCHW.shape[-2:]
        position_BSD, turn_BSa2 = self.positions(keep_BS, patches.device, (H, W))
        x_BSD = self.patch_embedder(patches.to(dtype)) + position_BSD
        text = self.embed_text(text_BLD)
        time_BD = self._condition(t_B, text, text_mask_BL)
        condition_B6D = self.condition(time_BD).unflatten(1, (6, -1))
        mask_B11L = text_mask_BL[:, None, None, :]
        decided: list[Routed] = []
        for i, block in enumerate(self.blocks):
            arguments = (x_BSD, condition_B6D, text, mask_B11L, turn_BSa2, time_BD)
            if self.activation_checkpointing and torch.is_grad_enabled() and not self.is_compiled:
                memory = ChoiceMemory() if block.has_moe else None
                x_BSD, routed = checkpoint(block, *arguments, memory, use_reentrant=False)
            else:
                x_BSD, routed = block(*arguments, cached=text_cache[i] if text_cache else None)
            if routed is not None:
                decided.append(routed)
        shift_BD, scale_BD = self.final_modulation(time_BD).chunk(2, dim=-1)
        out = self.final(modulate(layer_norm(x_BSD), shift_BD, scale_BD)).float()
        if self.config.prediction == "data":
            out = (patches - out) / t_B.float().clamp_min(MIN_TIME)[:, None, None]
        if keep_BS is None:
            out = unpatchify(out, self.config.patch_size, H, W)
        return out, decided

    def _condition(self, t_B: Tensor, text_BLD: Tensor, text_mask_BL: Tensor) -> Tensor:
        """Timestep embedding (plus the mean text token), through SiLU, [B, D]."""
        time_BD: Tensor = self.timestep_embedder(t_B)
        if self.pooled_projection is not None:
            weight_BL1 = (text_mask_BL / text_mask_BL.sum(1, keepdim=True)).unsqueeze(-1).to(text_BLD.dtype)
            time_BD = time_BD + self.pooled_projection((text_BLD * weight_BL1).sum(1))
        return functional.silu(time_BD)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # also when first asked for while sampling: training keeps them for its backward pass
def _tables(
    height: int, width: int, dim: int, num_heads: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`sincos_2d` in the dtype and `rope_2d`, made once: dozens of small kernels, and a cast of every token's."""
    return sincos_2d(height, width, dim, device).to(dtype), rope_2d(height, width, dim // num_heads, device)


def initial_value(name: str, shape: tuple[int, ...], seed: int, first_expert: int = 0, *, moe: MoeConfig) -> Tensor:
    """The initial fp32 value of a parameter: a function of seed, name and expert number only.

    | parameter                                   | value                                                |
    |---------------------------------------------|------------------------------------------------------|
    | norm scales                                 | 1                                                    |
    | biases, `w3` (expert biases)                | 0                                                    |
    | `final`, `final_modulation`                 | 0: the first prediction is 0                         |
    | `condition`, `modulation` of blocks         | 0: attention and MLP branches start closed (adaLN-0) |
    | cross-attention `out`                       | 0, as PixArt-alpha                                   |
    | `router.weight`                             | normal, std 0.02: near-uniform affinities            |
    | what a router learns beside it              | as the router says (`RouterTraits.initial_std`)      |
    | expert `w1`, `w2` (drawn expert by expert)  | normal, std 1 / sqrt(fan in)                         |
    | other matrices                              | normal, std 1 / sqrt(fan in)                         |

    `first_expert` is the global number of the first expert in `shape` for expert parameters.
    """
    if name.endswith(("query_norm", "key_norm")):
        return torch.ones(shape)
    of_router = {"router.weight": INITIAL_STD, **router_class(moe.router).traits.initial_std}
    zero = "bias", "w3", "modulation", "condition.weight", "final.weight", "cross_attention.out.weight"
    is_zero = name.endswith(zero) or name.startswith("final_modulation")
    std = of_router.get(name.rpartition(".mlp.")[2], 0.0 if is_zero else float(shape[-1]) ** -0.5)
    if std == 0:
        return torch.zeros(shape)
    if ".experts." in name:
        experts = torch.empty(shape)  # filled in place: at scale this is most of what a rank holds while building
        for i in range(shape[0]):
            experts[i].normal_(generator=keyed_generator(seed, "init", name, first_expert + i))
        return experts.mul_(std)
    value: Tensor = std * torch.randn(shape, generator=keyed_generator(seed, "init", name))
    return value


def init_weights(model: EcDit, seed: int) -> None:
    """Initialise a model whose parameters are whole on this process, all experts included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), seed, moe=model.moe))
