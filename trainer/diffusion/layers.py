"""Building blocks of the transformer: norm, attention, embedders, positions, modulation.

Shapes: B images, S image tokens, L text tokens, D width, H heads, K key/value heads, h = D / H head width,
C latent channels, P patch size.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def modulate(x_BSD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Adaptive layer norm's affine part: x * (1 + scale) + shift, per image (DiT, arXiv 2212.09748)."""
    return x_BSD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def layer_norm(x_BSD: Tensor) -> Tensor:
    """Layer norm without parameters; the modulation supplies them."""
    return functional.layer_norm(x_BSD, x_BSD.shape[-1:], eps=1e-6)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, times a learned scale (QK-norm, arXiv 2302.05442)."""
    return functional.rms_norm(x, x.shape[-1:], scale, eps=1e-6)


def rope_2d(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Turns of a 2-D rotary embedding: half of the head turns with the row, half with the column.

    Returns cosine and sine of each angle, [height * width, head_dim / 2, 2] fp32 (RoPE, arXiv 2104.09864, on two axes).
    """
    num_frequencies = head_dim // 4
    frequency = 100.0 ** (-_numbers(num_frequencies, device) / num_frequencies)
    row, column = _rows_and_columns(height, width, device)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed absolute positions: sinusoids of the row in one half, of the column in the other (DiT, PixArt).

    Returns [height * width, dim] fp32; `dim` is a multiple of 4. RoPE alone sees only differences of
    positions, and nothing in a square of noise says where its edges are.
    """
    frequency = 1e4 ** (-_numbers(dim // 4, device) / (dim // 4))
    angles = [position[:, None] * frequency for position in _rows_and_columns(height, width, device)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)


def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device)


def _rows_and_columns(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each token, row by row; made on the device, as a copy to it would wait for it."""
    row_HW, column_HW = _numbers(height, device)[:, None], _numbers(width, device)[None, :]
    return row_HW.expand(height, width).reshape(-1), column_HW.expand(height, width).reshape(-1)


def rotate(x_BSHh: Tensor, turn_BSa2: Tensor) -> Tensor:
    """Turn each two neighbouring channels, a complex number, by their token's; a = h / 2, B may be 1.

    As they stand one product of complex fp32 numbers is two to three times as fast as the real and imaginary parts; a
    compiler has no complex numbers, and makes one pass of the parts and of what is around them.
    """
    x_BSHa2 = x_BSHh.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (x, y), (cos, sin) = x_BSHa2.unbind(-1), turn_BSa2.unsqueeze(2).unbind(-1)
        turned_BSHa2 = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
    else:
        turn_BS1a = torch.view_as_complex(turn_BSa2).unsqueeze(2)
        turned_BSHa2 = torch.view_as_real(torch.view_as_complex(x_BSHa2) * turn_BS1a)
    return turned_BSHa2.flatten(-2).to(x_BSHh.dtype)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm and no biases; self-attention if `context` is the input.

    Heads stand behind tokens, as the products write them, until attention itself: a norm of the transposed view would
    copy it, and what attention writes, which lies as its queries do, would be copied back.
    The norms' scales are its own parameters, not those of modules: under ZeRO-3 each module costs four hooks a step.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * num_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.Parameter(torch.empty(self.head_dim))
        self.key_norm = nn.Parameter(torch.empty(self.head_dim))

    def keys_values(self, context_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed keys and values [B, L, K, h] of a context; a sampler computes them once per caption."""
        B, L, _ = context_BLD.shape
        key_value = self.key_value(context_BLD).view(B, L, 2, self.num_kv_heads, self.head_dim)
        key, value = key_value.unbind(2)
        return rms_norm(key, self.key_norm), value

    def forward(
        self,
        x_BSD: Tensor,
        context_BLD: Tensor,
        *,
        turn_BSa2: Tensor | None = None,
        mask_B11L: Tensor | None = None,
        cached: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, S, D], [B, L, D] -> [B, S, D]; `mask` is True at real text tokens; `turn` is RoPE's."""
        B, S, D = x_BSD.shape
        query = self.query(x_BSD).view(B, S, self.num_heads, self.head_dim)
        query = rms_norm(query, self.query_norm)
        key, value = cached if cached is not None else self.keys_values(context_BLD)
        if turn_BSa2 is not None:
            query, key = rotate(query, turn_BSa2), rotate(key, turn_BSa2)
        y = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask_B11L)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, S, D))
        return out


def attend(query_BHSh: Tensor, key_BKLh: Tensor, value_BKLh: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """Softmax attention with grouped heads, [B, H, S, h].

    | where                                  | how, and why (measured forward + backward)                            |
    |----------------------------------------|-----------------------------------------------------------------------|
    | CPU, up to 512 queries                 | two matmuls and a softmax: 2-3 times as fast as the fused kernel      |
    | GPU, mask and deterministic algorithms | fused, keys and values repeated: grouped, it falls back to slow maths |
    | elsewhere                              | fused, grouped: a third less time than with repeated keys and values  |
    """
    groups = query_BHSh.shape[1] // key_BKLh.shape[1]
    if query_BHSh.device.type == "cpu" and query_BHSh.shape[2] <= 512:
        return attend_by_products(query_BHSh, key_BKLh, value_BKLh, mask_B11L)
    if groups > 1 and mask_B11L is not None and torch.are_deterministic_algorithms_enabled():
        key_BKLh, value_BKLh = (t.repeat_interleave(groups, dim=1) for t in (key_BKLh, value_BKLh))
        groups = 1
    return functional.scaled_dot_product_attention(
        query_BHSh, key_BKLh, value_BKLh, attn_mask=mask_B11L, enable_gqa=groups > 1
    )


def attend_by_products(query_BHSh: Tensor, key_BKLh: Tensor, value_BKLh: Tensor, mask_B11L: Tensor | None) -> Tensor:
    """The same, all scores in memory. Queries with one head of keys stand behind each other: none is repeated."""
    B, H, S, h = query_BHSh.shape
    score = query_BHSh.reshape(B, key_BKLh.shape[1], -1, h) @ (key_BKLh * h**-0.5).transpose(-1, -2)
    if mask_B11L is not None:
        score = score.masked_fill(~mask_B11L, -torch.inf)
    out: Tensor = (score.softmax(dim=-1) @ value_BKLh).view(B, H, S, h)
    return out


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 t through a two-layer SiLU MLP (DiT)."""

    num_frequencies = 128

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * self.num_frequencies, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, t_B: Tensor) -> Tensor:
        """Timesteps in [0, 1], [B] fp32 -> [B, D] in the weights' dtype."""
        exponent = torch.arange(self.num_frequencies, device=t_B.device) / self.num_frequencies
        angle = 1000.0 * t_B.float()[:, None] * torch.exp(-math.log(1e4) * exponent)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        out: Tensor = self.down(functional.silu(self.up(wave.to(self.up.weight.dtype))))
        return out


def patchify(x_BCHW: Tensor, patch_size: int, keep_BS: Tensor | None = None) -> Tensor:
    """[B, C, H, W] -> tokens [B, S, C * P * P], row by row; with `keep_BS` those at these positions."""
    x_BSD = functional.pixel_unshuffle(x_BCHW, patch_size).flatten(2).transpose(1, 2)
    return x_BSD if keep_BS is None else x_BSD.gather(1, keep_BS.unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1]))


def unpatchify(x_BSD: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Inverse of `patchify`; height and width are the latent's."""
    grid = x_BSD.transpose(1, 2).unflatten(2, (height // patch_size, width // patch_size))
    return functional.pixel_shuffle(grid, patch_size)
