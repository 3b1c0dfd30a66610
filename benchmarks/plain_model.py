"""EcDit, its noise and its loss restated as plainly as can be: what tests and `benchmarks.parity` compare with.

One image, one head, one token after the other, in fp32 and with formulas of its own. It has the parameters of
`trainer.diffusion.model.EcDit` by name and shape, reads the same settings and shares nothing else with it; mixtures are
`moe.oracle`'s. Nothing here is fast.

Shapes: B images, C channels, H x W latent, P patch, S image tokens of an image, L text tokens, D width, h head width.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from moe.config import MoeConfig
from moe.oracle.layer import ReferenceMoe
from moe.routing import RoutingStats
from trainer.config import DiffusionConfig, ModelConfig
from trainer.data.latents.samples import Batch
from trainer.diffusion.model import ModelShape


def _holder(**members: nn.Module | tuple[int, ...]) -> nn.Module:
    """A module of these submodules, and parameters of these shapes, that computes nothing."""
    module = nn.Module()
    for name, member in members.items():
        setattr(module, name, member if isinstance(member, nn.Module) else nn.Parameter(torch.empty(member)))
    return module


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """`x W^T + b` with the parameters that the module has."""
    of = dict(module.named_parameters())
    y = x @ of["weight"].T
    return y + of["bias"] if "bias" in of else y


def _two_layers(module: nn.Module, x: Tensor) -> Tensor:
    """Two linear maps with GELU in its exact form between."""
    up, down = (dict(module.named_children())[name] for name in ("up", "down"))
    hidden = _linear(up, x)
    return _linear(down, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _normed(x: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + 1e-6).sqrt()


def _rms_normed(x: Tensor, scale: Tensor) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def position_waves(row: int, column: int, dim: int) -> list[float]:
    """Of one token: sines and cosines of its row, then of its column, at frequencies 1 down to nearly 1/10000."""
    quarter = dim // 4
    frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
    return [wave(place * f) for place in (row, column) for wave in (math.sin, math.cos) for f in frequencies]


def _turn(row: int, column: int, head_dim: int) -> Tensor:
    """What turns a query or key of this place [h, h]: each two neighbours, the first half of the pairs by the row."""
    matrix = [[0.0] * head_dim for _ in range(head_dim)]
    half = head_dim // 4
    for p in range(2 * half):
        angle = row * 100 ** (-p / half) if p < half else column * 100 ** (-(p - half) / half)
        matrix[2 * p][2 * p] = matrix[2 * p + 1][2 * p + 1] = math.cos(angle)
        matrix[2 * p][2 * p + 1], matrix[2 * p + 1][2 * p] = -math.sin(angle), math.sin(angle)
    return torch.tensor(matrix)


def _attention(
    module: nn.Module, x_SD: Tensor, context_LD: Tensor, heads: int, kv_heads: int, turns: list[Tensor] | None
) -> Tensor:
    """Of one image, head by head: [S, D] looks at [L, D]; `turns` of its tokens, where queries and keys are turned."""
    of = dict(module.named_parameters())
    h = x_SD.shape[1] // heads
    all_keys, all_values = (context_LD @ of["key_value.weight"].T).chunk(2, dim=1)
    out = []
    for n in range(heads):
        query = _rms_normed(x_SD @ of["query.weight"][n * h : (n + 1) * h].T, of["query_norm"])
        shared = n * kv_heads // heads
        key = _rms_normed(all_keys[:, shared * h : (shared + 1) * h], of["key_norm"])
        if turns is not None:
            query = torch.stack([turn @ q for turn, q in zip(turns, query, strict=True)])
            key = torch.stack([turn @ k for turn, k in zip(turns, key, strict=True)])
        weight = torch.exp(query @ key.T / math.sqrt(h))
        out.append(weight / weight.sum(1, keepdim=True) @ all_values[:, shared * h : (shared + 1) * h])
    return torch.cat(out, dim=1) @ of["out.weight"].T


class PlainDit(nn.Module):
    """`EcDit` in loops: the same parameters, the same call."""

    def __init__(self, config: ModelConfig, moe: MoeConfig, shape: ModelShape) -> None:
        super().__init__()
        D, patch = config.dim, shape.channels * config.patch_size**2
        self.config, self.shape = config, shape
        self.patch_embedder = nn.Linear(patch, D)
        self.timestep_embedder = _holder(up=nn.Linear(256, D), down=nn.Linear(D, D))
        self.text_projection = _holder(up=nn.Linear(shape.text_dim, D), down=nn.Linear(D, D))
        self.pooled_projection = nn.Linear(D, D) if config.pooled_text else None
        self.condition = nn.Linear(D, 6 * D)
        hidden = config.mlp_ratio * D
        self.blocks = nn.ModuleList()
        for number in range(1, config.num_layers + 1):
            is_moe = moe.every > 0 and number % moe.every == 0
            mlp = (
                ReferenceMoe(moe, dim=D, hidden_dim=hidden)
                if is_moe
                else _holder(up=nn.Linear(D, hidden), down=nn.Linear(hidden, D))
            )
            attentions = {name: self._attention_parameters() for name in ("self_attention", "cross_attention")}
            self.blocks.append(_holder(**attentions, mlp=mlp, modulation=(6, D)))
        self.final_modulation = nn.Linear(D, 2 * D)
        self.final = nn.Linear(D, patch)

    def _attention_parameters(self) -> nn.Module:
        D, h = self.config.dim, self.config.dim // self.config.num_heads
        return _holder(
            query=nn.Linear(D, D, bias=False), key_value=nn.Linear(D, 2 * self.config.num_kv_heads * h, bias=False),
            out=nn.Linear(D, D, bias=False), query_norm=(h,), key_norm=(h,),
        )  # fmt: skip

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor, mask_BL: Tensor, keep_BS: Tensor | None = None
    ) -> tuple[Tensor, list[RoutingStats]]:
        """Velocity [B, C, H, W], or of the kept tokens [B, S, C P P]; what the routers did."""
        B, _, H, W = x_BCHW.shape
        P = self.config.patch_size
        cells = [(i, j) for i in range(H // P) for j in range(W // P)]
        kept = [[cells[s] for s in keep_BS[b].tolist()] if keep_BS is not None else cells for b in range(B)]
        texts = [
            _two_layers(self.text_projection, _normed(text[mask])) for text, mask in zip(text_BLD, mask_BL, strict=True)
        ]
        times = [self._time(t, text) for t, text in zip(t_B, texts, strict=True)]
        patches = [
            torch.stack([x[:, i * P : i * P + P, j * P : j * P + P].reshape(-1) for i, j in kept[b]])
            for b, x in enumerate(x_BCHW)
        ]
        xs = [self._embedded(patches[b], kept[b]) for b in range(B)]
        width = self.config.dim // self.config.num_heads
        turns = [[_turn(i, j, width) for i, j in of_image] for of_image in kept]
        all_stats = []
        for block in self.blocks:
            xs, stats = self._block(block, xs, texts, times, turns)
            all_stats += stats
        velocities = [self._velocity(*of_image) for of_image in zip(xs, times, patches, t_B, strict=True)]
        if keep_BS is not None:
            return torch.stack(velocities), all_stats
        pictures = []
        for v_SD in velocities:
            tokens = v_SD.view(H // P, W // P, -1, P, P)
            rows = [torch.cat(list(row), dim=2) for row in tokens]  # each [C, P, W]
            pictures.append(torch.cat(rows, dim=1))
        return torch.stack(pictures), all_stats

    def _embedded(self, patches_SD: Tensor, cells: list[tuple[int, int]]) -> Tensor:
        waves = torch.tensor([position_waves(i, j, self.config.dim) for i, j in cells])
        return _linear(self.patch_embedder, patches_SD) + waves

    def _time(self, t: Tensor, text_LD: Tensor) -> Tensor:
        """What conditions one image, [D]: sinusoids of 1000 t through two layers, plus the mean of its text."""
        # In fp32 and in the model's order: at an angle of 1000 one rounding is 6e-5, which would hide all else.
        frequency = torch.exp(-math.log(10000.0) * (torch.arange(128) / 128))
        angle = 1000 * t * frequency
        module = dict(self.timestep_embedder.named_children())
        time = _linear(module["down"], _silu(_linear(module["up"], torch.cat([torch.cos(angle), torch.sin(angle)]))))
        if self.pooled_projection is not None:
            time = time + _linear(self.pooled_projection, text_LD.sum(0) / len(text_LD))
        return _silu(time)

    def _block(
        self, block: nn.Module, xs: list[Tensor], texts: list[Tensor], times: list[Tensor], turns: list[list[Tensor]]
    ) -> tuple[list[Tensor], list[RoutingStats]]:
        """Self-attention, cross-attention, MLP or mixture; mixtures see all images, which may compete."""
        part = dict(block.named_children())
        heads = self.config.num_heads, self.config.num_kv_heads
        vectors = [_linear(self.condition, time).view(6, -1) + dict(block.named_parameters())["modulation"]
                   for time in times]  # fmt: skip
        after, plain = [], []
        for x, text, six, turned in zip(xs, texts, vectors, turns, strict=True):
            shift, scale, gate = six[0], six[1], six[2]
            seen = _normed(x) * (1 + scale) + shift
            x = x + gate * _attention(part["self_attention"], seen, seen, *heads, turned)
            x = x + _attention(part["cross_attention"], _normed(x), text, *heads, None)
            after.append(x)
            plain.append(_normed(x))
        seen_BSD = torch.stack([n * (1 + six[4]) + six[3] for n, six in zip(plain, vectors, strict=True)])
        if isinstance(part["mlp"], ReferenceMoe):
            y_BSD, stats = part["mlp"](seen_BSD, None, torch.stack(plain), torch.stack(times))
            found = [stats]
        else:
            y_BSD, found = _two_layers(part["mlp"], seen_BSD), []
        return [x + six[5] * y for x, six, y in zip(after, vectors, y_BSD, strict=True)], found

    def _velocity(self, x_SD: Tensor, time_D: Tensor, patches_SD: Tensor, t: Tensor) -> Tensor:
        """Of one image, token by token [S, C P P]."""
        shift, scale = _linear(self.final_modulation, time_D).view(2, -1)
        out = _linear(self.final, _normed(x_SD) * (1 + scale) + shift)
        return (patches_SD - out) / max(float(t), 0.05) if self.config.prediction == "data" else out


def plain_noise(seed: int, index: int, shape: tuple[int, ...], config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """Noise and time of sample number `index`: a normal time on the logit scale, moved by log(shift)."""
    digest = hashlib.blake2b(f"{seed}\0{index}\0diffusion".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
    noise = torch.randn(shape, generator=generator)
    logit = config.logit_mean + config.logit_std * torch.randn((), generator=generator) + math.log(config.time_shift)
    return noise, torch.sigmoid(logit)


def plain_loss(model: PlainDit, batch: Batch, config: DiffusionConfig, seed: int) -> Tensor:
    """Mean squared error of the velocity of one batch, and the routers' own losses."""
    noisy, times, wanted = [], [], []
    for index, latent in zip(batch.index_B.tolist(), batch.latent_BCHW, strict=True):
        noise, t = plain_noise(seed, index, tuple(latent.shape), config)
        noisy.append((1 - t) * latent + t * noise)
        times.append(t)
        wanted.append(noise - latent)
    velocity, stats = model(torch.stack(noisy), torch.stack(times), batch.text_BLD, batch.text_mask_BL)
    loss: Tensor = ((velocity - torch.stack(wanted)) ** 2).mean()
    for of_layer in stats:
        loss = loss + of_layer.auxiliary_loss
    return loss
