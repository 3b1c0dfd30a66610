"""Memory of one rank, as terms with formulas, whether it has that much, and the size of a checkpoint.

| symbol | meaning                                                        |
|--------|----------------------------------------------------------------|
| Pe, Pr | parameters of all experts, of the rest                         |
| Po     | of the rest those outside of blocks                            |
| p      | parameters of this rank before ZeRO: Pe / ep + Pr              |
| p'     | of these what it shares with other ranks                       |
| q      | parameters of this rank's share: Pe / (ep edp) + Pr / world    |
| s      | bytes of a working value: 2 in bf16, 4 in fp32                 |
| g      | bytes of a summed gradient: s, or 4 of several micro-batches   |
| u      | bytes of a reduced gradient: g at stage 1, else s              |
| T      | image tokens of a micro-batch, b S                             |
| D, m   | width, MLP ratio; H heads, r = key/value heads per head        |
| L      | text tokens of a caption; N blocks, Nm of them with MoE        |

What a block keeps for its backward pass is counted from `trainer.diffusion.model` with fused attention: bf16
attention keeps its normed and rotated queries in fp32 too. The tests compare with counted allocations. A compiled block
computes norms and rotations again and keeps less: as `python -m benchmarks.count_kernels` counts.
"""

from dataclasses import dataclass

from moe.routers.registry import build_router
from trainer.engine.deepspeed_config import accumulation_dtype
from trainer.plan.devices import GB, Efficiency
from trainer.plan.job import Job, Layout, Term

MASTER, MOMENTS, EMA = 4, 8, 4  # bytes per parameter of fp32 weights, AdamW's two moments, the average


def held(job: Job, layout: Layout) -> tuple[float, float]:
    """(p, q): parameters of a rank before ZeRO, and its share of them."""
    counts = job.counts
    p = counts.experts / layout.ep_size + counts.rest
    return p, counts.experts / (layout.ep_size * layout.edp_size) + counts.rest / layout.world_size


def shared(job: Job, layout: Layout) -> float:
    """p': parameters of a rank, before ZeRO, of which another rank has a part."""
    return job.counts.rest * (layout.world_size > 1) + job.counts.experts / layout.ep_size * (layout.edp_size > 1)


def state_terms(job: Job, layout: Layout) -> list[Term]:
    """Weights, gradients, optimizer, average and ZeRO's buffers."""
    p, q = held(job, layout)
    s, stage = job.num_bytes, layout.stage
    moments = MOMENTS if job.config.optim.name == "adamw" else 0
    kept = q + job.counts.persistent * (layout.world_size > 1) if stage == 3 else p
    grads = p if stage == 1 else q
    summed = job.grad_accum_dtype or accumulation_dtype(job.config.train.precision, layout.accumulation)
    g = 2 if summed == "bf16" else 4
    u = g if stage == 1 else s
    bucket = float(job.zero.get("reduce_bucket_size", 5e8)) * (2 if job.zero.get("overlap_comm") and stage < 3 else 1)
    optimizer = [
        Term("optimizer", (MASTER + moments) * q, "byte", "(4 + moments) q", f"({MASTER} + {moments}) x {q:.4g}"),
        Term("average", EMA * q, "byte", "4 q", f"{EMA} x {q:.4g}"),
    ]
    if is_offloaded(job):
        optimizer = [Term(term.name, 0.0, "byte", "in host memory") for term in optimizer]
    terms = [
        Term("weights", s * kept, "byte", "s (q + small ones)" if stage == 3 else "s p", f"{s} x {kept:.4g}"),
        Term("gradients", g * grads, "byte", "g p" if stage == 1 else "g q", f"{g} x {grads:.4g}"),
        *optimizer,
        Term("reduce bucket", u * bucket, "byte", "u reduce_bucket_size", f"{u} x {bucket:.4g}"),
    ]
    if stage == 3:
        block = float(job.counts.largest_block)  # gathered at once, whatever the limit
        if job.counts.num_moe and layout.edp_size > 1:
            block += job.counts.one_expert * job.config.moe.num_experts / layout.ep_size
        limit = max(float(job.zero.get("stage3_max_live_parameters", 1e9)), block)
        limit += float(job.zero.get("stage3_prefetch_bucket_size", 5e7))
        live = min(shared(job, layout), job.counts.ends + limit)
        formula = "s min(p', Po + max(max_live_parameters, one block) + prefetch_bucket_size)"
        terms.append(Term("gathered weights", s * live, "byte", formula, f"{s} x {live:.4g}"))
    return terms


def is_offloaded(job: Job) -> bool:
    """Whether DeepSpeed keeps optimizer state, and with it the average, in host memory."""
    return str(job.zero.get("offload_optimizer", {}).get("device", "none")) != "none"


def block_bytes(job: Job, micro_batch_size: int, *, moe: bool) -> float:
    """What one block keeps for its backward pass, attention and MLP."""
    model, moe_config, s, m = job.config.model, job.config.moe, job.num_bytes, job.config.model.mlp_ratio
    T, D, L = micro_batch_size * job.num_tokens, model.dim, micro_batch_size * job.text_tokens
    attention = _attention_bytes(job, T, L)
    if not moe:
        return attention + s * T * D * ((2 if job.compiled else 1) + 2 * m)
    rows, E = T * moe_config.capacity_factor, moe_config.num_experts
    # Modulated tokens are read by the router or the shared expert; unmodulated ones are kept for the modulation.
    inputs = job.compiled + (moe_config.router_input == "modulated" or moe_config.num_shared_experts > 0)
    mlp: float = s * T * D * (inputs + 2 * m * moe_config.num_shared_experts)
    # Then the experts' rows, logits and affinities, indices and gates.
    mlp += s * rows * D * (2 + 2 * m) + 8 * T * E + 16 * rows
    return attention + mlp + build_router(moe_config).activation_bytes(T, D, s)


def _attention_bytes(job: Job, T: int, L: int) -> float:
    """Of self- and cross-attention, with norms, modulation and gates."""
    model, s = job.config.model, job.num_bytes
    D, H, r = model.dim, model.num_heads, model.num_kv_heads / model.num_heads
    if job.compiled:
        # Queries before and after norm and rotation, keys so and values, results before and after their projection,
        # and what the norms before them read and give.
        return s * T * D * (11 + 3 * r) + s * L * D * 3 * r
    if s == 2:
        kept = T * D * (13 * 2 + 4 * 4 + 14 * r) + L * D * 14 * r
    else:
        kept = T * D * (17 + 4 * r) * 4 + L * D * 4 * r * 4
    return kept + T * 4 * (4 * H + model.num_kv_heads) + T * s * 6


def activation_terms(job: Job, layout: Layout) -> list[Term]:
    """Kept for the backward pass, and the largest buffers beside it."""
    config, b = job.config, layout.micro_batch_size
    T, D, s, m = b * job.num_tokens, config.model.dim, job.num_bytes, config.model.mlp_ratio
    num_moe, num_dense = job.counts.num_moe, config.model.num_layers - job.counts.num_moe
    dense, moe = block_bytes(job, b, moe=False), block_bytes(job, b, moe=True) if num_moe else 0.0
    ends: float = s * T * D * 3 + s * T * config.model.patch_size**2 * job.shape.channels
    ends += s * b * job.text_tokens * (3 * D + job.shape.text_dim)
    ends += 8 * (T if config.diffusion.mask_ratio else job.num_tokens) * (D / config.model.num_heads / 2)  # RoPE
    if layout.recompute:
        decided = num_moe * T * (4 * config.moe.num_experts + 8 * config.moe.capacity_factor)  # logits and choice
        kept = config.model.num_layers * s * T * D + max(dense, moe) + ends + decided
        formula, figures = "N s T D + one block", f"{config.model.num_layers} x {s * T * D:.4g} + {max(dense, moe):.4g}"
    else:
        kept = num_dense * dense + num_moe * moe + ends
        formula = "(N - Nm) dense block + Nm MoE block + ends"
        figures = f"{num_dense} x {dense:.4g} + {num_moe} x {moe:.4g} + {ends:.4g}"
    rows = T * (config.moe.capacity_factor if num_moe else 1)
    exchange = 4 * s * rows * D if layout.ep_size > 1 else 0.0
    return [
        Term("activations", kept, "byte", formula, figures),
        Term("all-to-all buffers", exchange, "byte", "4 s T f_c D", f"4 x {s} x {rows:.4g} x {D}"),
        Term("working buffers", 2 * s * m * rows * D, "byte", "2 s m T f_c D", f"2 x {s} x {m} x {rows:.4g} x {D}"),
    ]


def memory_terms(job: Job, layout: Layout, efficiency: Efficiency) -> list[Term]:
    """All terms; the last one is their peak: state + the larger of both phases + what is reserved."""
    state, activations = state_terms(job, layout), activation_terms(job, layout)
    # fp32 copies while the optimizer steps, when activations are gone.
    _, q = held(job, layout)
    at_once = min(q, float(job.zero.get("sub_group_size", 1e9))) if layout.stage == 3 else q
    step = Term("optimizer step", 12 * at_once, "byte", "12 min(q, sub_group_size)", f"12 x {at_once:.4g}")
    if is_offloaded(job):
        step = Term("optimizer step", 0.0, "byte", "in host memory")
    reserved = Term("reserved", efficiency.reserved, "byte", "device context, communication, fragments")
    phase = max(sum(term.value for term in activations), step.value)
    peak = sum(term.value for term in state) + phase + reserved.value
    total = Term("peak", peak, "byte", "state + max(activations and buffers, optimizer step) + reserved")
    return [*state, *activations, step, reserved, total]


def checkpoint_bytes(job: Job) -> float:
    """On disk, all ranks: fp32 weights, average and moments."""
    moments = MOMENTS if job.config.optim.name == "adamw" else 0
    return float((MASTER + EMA + moments) * job.counts.total)


def host_bytes(job: Job, layout: Layout) -> float:
    """In a process's host memory beside a device: what is offloaded, and copies while a save goes on in background."""
    _, q = held(job, layout)
    moments = MOMENTS if job.config.optim.name == "adamw" else 0
    return (MASTER + EMA + moments) * q * (is_offloaded(job) + job.config.train.async_save)


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that a process needs: its `state` lasts and is counted exactly, its `peak` is an estimate."""

    layout: str
    state: float
    peak: float

    def problem(self, free: float) -> str:
        """The sentence if not even the state fits into `free` bytes; empty otherwise."""
        if self.state <= free:
            return ""
        return self._sentence(f"{self.state / GB:.1f} GB of weights, gradients and optimizer state")

    def warning(self, free: float) -> str:
        """The sentence if the state fits but the expected peak does not; empty otherwise."""
        if self.problem(free) or self.peak <= free:
            return ""
        return self._sentence(f"about {self.peak / GB:.1f} GB at its peak")

    def _sentence(self, what: str) -> str:
        """The same words on every node: a problem that all nodes report alike is no node's fault."""
        return (
            f"a process needs {what} ({self.layout}), more than is free: use more nodes or another layout, "
            "`python -m trainer.plan` says which"
        )


def memory_need(job: Job, layout: Layout, *, on_device: bool) -> MemoryNeed:
    """What a process needs; a device's own share (context, communication) only where there is one."""
    terms = {term.name: term.value for term in memory_terms(job, layout, Efficiency())}
    state = sum(terms[name] for name in ("weights", "gradients", "optimizer", "average"))
    return MemoryNeed(layout=str(layout), state=state, peak=terms["peak"] - (0.0 if on_device else terms["reserved"]))
