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
from trainer.checkpoint.export_reader import ExportReader
from trainer.config import require

_MLP = re.compile(r"(blocks\.(\d+)\.mlp)\..*")
_Part = tuple[str, float]  # name of a dense tensor, and what its values are multiplied by


def check_upcycle(moe: MoeConfig, token_counts: Sequence[int], origin: str) -> None:
    """Refuse settings with which the mixture would not equal the dense model; ConfigError with the remedy."""

    def check(setting: str, fits: bool, why: str, remedy: str) -> None:
        value = getattr(moe, setting)
        require(fits, f"moe.{setting} is {value} but {origin} is of a dense model, {why}: {remedy}")

    raw = "which a mixture equals only with raw softmax gates and a fixed share of tokens"
    equally = "and experts that start equal must take every token equally often"
    needed = {"router": "expert_choice", "gate": "softmax", "normalize_gates": False, "gate_scale": 1.0}
    for setting, value in (needed | {"num_shared_experts": 0, "capacity_anneal_steps": 0}).items():
        check(setting, getattr(moe, setting) == value, raw, f"set moe.{setting}={value}")
    check("tie_break", moe.tie_break == "rotate", equally, "set moe.tie_break=rotate")
    factor, fewest = moe.capacity_factor, min(token_counts)
    check("capacity_factor", float(factor).is_integer(), equally, "use a whole number")
    check(
        "num_experts",
        moe.num_experts == 1 or factor < moe.num_experts <= fewest,
        "and experts that start equal and take the same tokens stay equal",
        f"use more than moe.capacity_factor={factor:g} and at most {fewest}, the smallest number of tokens",
    )
    for count in token_counts:
        remedy = f"use a divisor of moe.capacity_factor * {count} tokens = {factor * count:g}"
        check("num_experts", moe.exact_capacity(count).denominator == 1, equally, remedy)


class Upcycled:
    """An export of a dense model seen as one with experts in the blocks that `moe` says."""

    def __init__(self, dense: ExportReader, moe: MoeConfig) -> None:
        self.dense = dense
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Of what a tensor consists: an expert's share of these parts again and again; the router of none, it is zero.
        self._parts: dict[str, list[_Part]] = {}
        for name, shape in dense.shapes.items():
            block = _MLP.fullmatch(name)
            if block is None or not moe.has_moe(int(block[2])):
                self.shapes[name], self._parts[name] = shape, [(name, 1.0)]
            elif name == f"{block[1]}.up.weight":
                self._add_experts(block[1], moe)

    def _add_experts(self, prefix: str, moe: MoeConfig) -> None:
        E, scale = moe.num_experts, moe.num_experts / moe.capacity_factor
        F, D = self.dense.shapes[f"{prefix}.up.weight"]
        up, down = f"{prefix}.up", f"{prefix}.down"
        tensors: dict[str, tuple[tuple[int, ...], list[_Part]]] = {
            "router.weight": ((E, 2 * D if moe.router_input == "unmodulated" else D), []),
            "experts.w1": ((E, F, D), [(f"{up}.weight", 1.0)]),
            "experts.w2": ((E, D, F), [(f"{down}.weight", scale)]),
            "experts.w3": ((E, 1, F + D), [(f"{up}.bias", 1.0), (f"{down}.bias", scale)]),
        }
        for name, (shape, parts) in tensors.items():
            self.shapes[f"{prefix}.{name}"], self._parts[f"{prefix}.{name}"] = shape, parts

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill the flat fp32 host tensor `out` with the elements from `start` on of a flattened tensor."""
        parts = self._parts[name]
        if not parts:
            out.zero_()
            return
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
