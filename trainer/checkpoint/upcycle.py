"""Dense to mixture: the weights of a dense model as those of one with experts that computes the same at step 0.

Exactness. Let F(x) = gelu(x U + u) V + v be the dense FFN of a block, E the number of experts, f the capacity factor,
S the tokens of an image, C = S f / E the capacity. The layer computes

    y(x_s) = sum over the experts e that took token s of  gate(s, e) F_e(x_s),    gate = softmax over E of x_s W_r.

With W_r = 0 all logits are 0, so every gate is exactly 1 / E and all affinities are tied, whatever the input. Ties
alone would let all experts take the same tokens; with `moe.tie_break: rotate` expert e takes the C tokens from
floor(e S / E) on, round the image. Token s is taken by the e with s + 1 - C <= e S / E < s + 1 (modulo S): an interval
of f steps of S / E, if C was not rounded, which contains exactly f whole e if f is whole. So every token is taken by
exactly f experts. Let every expert be F with its output scaled by E / f, which `w2` and the second half of `w3` take
up:

    F_e(x) = gelu(x U + u) (E/f V) + E/f v = E/f F(x),    y(x_s) = f * 1/E * E/f F(x_s) = F(x_s).

This is equality for every input, up to the rounding of the products, on any topology. It needs a whole f and a whole
C for all token counts in use (training with masks, sampling, every bucket), hence the checks in `check_upcycle`.
It holds at step 0 only: the router's gradient is not zero, and breaks the ties. If two experts took the same tokens
they would get the same gradients and stay equal for ever; the starts differ, so none do, unless E > S or f = E, which
is refused.

Copying the FFN follows sparse upcycling (arXiv 2212.05055); the scaled output replaces its normalised gates.
Shapes: E experts, D width, F hidden width.
"""

import re
from collections.abc import Sequence
from math import prod

from torch import Tensor

from moe.config import MoeConfig
from trainer.checkpoint.export_reader import WeightSource
from trainer.config import require

_EXPERT = re.compile(r"(blocks\.\d+\.mlp)\.experts\.(w[123])")
_ROUTER = re.compile(r"(blocks\.\d+\.mlp)\.router\.weight")
_Part = tuple[str, float]  # name of a dense tensor, and what its values are multiplied by


def check_upcycle(moe: MoeConfig, token_counts: Sequence[int], origin: str) -> None:
    """Refuse settings with which the mixture would not equal the dense model; ConfigError with the remedy."""
    for setting, value, needed in (
        ("router", moe.router, "expert_choice"),
        ("gate", moe.gate, "softmax"),
        ("normalize_gates", moe.normalize_gates, False),
        ("gate_scale", moe.gate_scale, 1.0),
        ("num_shared_experts", moe.num_shared_experts, 0),
        ("capacity_anneal_steps", moe.capacity_anneal_steps, 0),
    ):
        require(
            value == needed,
            f"moe.{setting} is {value} but {origin} is of a dense model, which a mixture equals only with raw softmax "
            f"gates and a fixed share of tokens: set moe.{setting}={needed}",
        )
    require(
        moe.tie_break == "rotate",
        f"moe.tie_break is {moe.tie_break} but {origin} is of a dense model, and experts that start equal must take "
        "every token equally often: set moe.tie_break=rotate",
    )
    require(
        float(moe.capacity_factor).is_integer(),
        f"moe.capacity_factor is {moe.capacity_factor:g} but {origin} is of a dense model, and experts that start "
        "equal must take every token equally often: use a whole number",
    )
    require(
        moe.num_experts == 1 or moe.capacity_factor < moe.num_experts <= min(token_counts),
        f"moe.num_experts is {moe.num_experts} but {origin} is of a dense model, and experts that start equal and take "
        f"the same tokens stay equal: use more than moe.capacity_factor={moe.capacity_factor:g} and at most "
        f"{min(token_counts)}, the smallest number of tokens",
    )
    for count in token_counts:
        require(
            moe.exact_capacity(count).denominator == 1,
            f"moe.num_experts is {moe.num_experts} but {origin} is of a dense model, and experts that start equal must "
            f"take every token equally often: use a divisor of moe.capacity_factor * {count} tokens = "
            f"{moe.capacity_factor * count:g}",
        )


class Upcycled:
    """A dense `WeightSource` seen as one with experts in the blocks that `moe` says."""

    def __init__(self, dense: WeightSource, moe: MoeConfig) -> None:
        self.dense, self.num_experts = dense, moe.num_experts
        self.scale = moe.num_experts / moe.capacity_factor
        self.reads_time = moe.router_input == "unmodulated"
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in dense.shapes.items():
            block = re.match(r"(blocks\.(\d+)\.mlp)\.", name)
            if block is None or not moe.has_moe(int(block[2])):
                self.shapes[name] = shape
        blocks = [re.fullmatch(r"(blocks\.(\d+)\.mlp)\.up\.weight", name) for name in dense.shapes]
        for prefix, number in (match.groups() for match in blocks if match):
            if moe.has_moe(int(number)):
                self.shapes |= self._moe_shapes(prefix)

    def _moe_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        E, (F, D) = self.num_experts, self.dense.shapes[f"{prefix}.up.weight"]
        return {
            f"{prefix}.router.weight": (E, 2 * D if self.reads_time else D),
            f"{prefix}.experts.w1": (E, F, D),
            f"{prefix}.experts.w2": (E, D, F),
            f"{prefix}.experts.w3": (E, 1, F + D),
        }

    def _parts(self, prefix: str, name: str) -> list[_Part]:
        """The dense tensors of which one expert's share of a parameter consists."""
        bias: list[_Part] = [(f"{prefix}.up.bias", 1.0), (f"{prefix}.down.bias", self.scale)]
        weights: dict[str, list[_Part]] = {
            "w1": [(f"{prefix}.up.weight", 1.0)],
            "w2": [(f"{prefix}.down.weight", self.scale)],
            "w3": bias,
        }
        return weights[name]

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a flattened tensor."""
        if name not in self.shapes or not (found := _EXPERT.fullmatch(name)):
            if _ROUTER.fullmatch(name):
                out.zero_()
            else:
                self.dense.read_into(name, start, out)
            return
        parts = self._parts(found[1], found[2])
        period = sum(prod(self.dense.shapes[part]) for part, _ in parts)
        end = start + out.numel()
        for expert in range(start // period, -(-end // period)):
            begin = expert * period
            for part, scale in parts:
                stop = begin + prod(self.dense.shapes[part])
                first, last = max(start, begin), min(end, stop)
                if first < last:
                    target = out[first - start : last - start]
                    self.dense.read_into(part, first - begin, target)
                    target.mul_(scale)
                begin = stop
