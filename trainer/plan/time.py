"""Time of one optimizer step, as terms that add up to it. Symbols as in `trainer.plan.memory`; c micro-batches a step.

The GPU computes what the host has started, so a micro-batch takes the longer of both, and so does the update.
"""

from trainer.plan.devices import Device, Efficiency
from trainer.plan.job import Job, Layout, Term
from trainer.plan.memory import held, shared
from trainer.plan.passes import pass_bytes
from trainer.plan.traffic import exchange_terms, zero_terms

# Bytes per parameter of a rank's share. AdamW reads weight, gradient and both moments, and writes all but the gradient.
# Beside it DeepSpeed 0.19.8 casts gradients for the norm and reads them (10), flattens them (4), casts them again (6),
# scales them (8) and casts the weights (6); in stage 3 the norm reads (2), and a cast scales as well (6). The average
# reads itself and the weight, and writes itself.
ADAMW, SGD, AVERAGE = 28, 12, 12
AROUND = {1: 34, 2: 34, 3: 14}  # by stage

# What a step is the sum of, in the order of the report.
PARTS = (
    "products", "attention", "passes", "ZeRO copies", "all-to-all", "ZeRO exposed", "update", "average of weights",
    "host wait",
)  # fmt: skip


def time_terms(job: Job, layout: Layout, device: Device, eff: Efficiency) -> list[Term]:
    """Traffic and seconds; the last two are the step and its MFU."""
    useful = float(job.flops_per_image * layout.micro_batch_size * layout.accumulation)
    compute = compute_terms(job, layout, device, eff, useful)
    copies = _zero_copies(job, layout, device, eff)
    sent, exchange = exchange_terms(job, layout, device, eff)
    sync, synced = zero_terms(job, layout, device, eff)
    update = update_terms(job, layout, device, eff)
    busy = sum(term.value for term in compute) + copies.value
    host, host_update = host_terms(job, layout, eff)
    hidden = min(eff.hidden * synced, 0.8 * max(busy, host.value)) if layout.stage == 3 else 0.0
    exposed = Term("ZeRO exposed", synced - hidden, "s", "gathers and reductions - hidden part",
                   f"{synced:.4g} - {hidden:.4g}")  # fmt: skip
    queued, updating = busy + exchange.value + exposed.value, sum(term.value for term in update)
    wait = max(0.0, host.value - queued) + max(0.0, host_update.value - updating)
    waiting = Term(
        "host wait", wait, "s", "max(0, host - GPU) + max(0, host update - GPU update)",
        f"max(0, {host.value:.4g} - {queued:.4g}) + max(0, {host_update.value:.4g} - {updating:.4g})",
    )  # fmt: skip
    parts = [*compute, copies, exchange, exposed, *update, waiting]
    assert tuple(part.name for part in parts) == PARTS
    step = sum(part.value for part in parts)
    return [
        Term("model FLOPs per rank", useful, "FLOP", "3 x images x forward FLOPs"),
        *sent,
        *sync,
        host,
        host_update,
        *parts,
        Term("step", step, "s", " + ".join(PARTS)),
        Term("MFU bound", useful / step / device.flops, "", "model FLOPs / step / peak",
             f"{useful:.4g} / {step:.4g} / {device.flops:.4g}"),
    ]  # fmt: skip


def compute_terms(job: Job, layout: Layout, device: Device, eff: Efficiency, useful: float) -> list[Term]:
    """Matrix products, attention and what other kernels move; a forward pass more if recomputed."""
    config, images = job.config, layout.micro_batch_size * layout.accumulation
    S, L, D, N = job.num_tokens, job.text_tokens, config.model.dim, config.model.num_layers
    again = 4 / 3 if layout.recompute else 1.0
    share = eff.gemm
    if job.counts.num_moe:
        rows = layout.micro_batch_size * layout.ep_size * S * config.moe.capacity_factor / config.moe.num_experts
        share *= min(1.0, rows / eff.rows) ** 0.5
    own = min(12.0 * images * N * D * (S * S + S * L), useful)
    multiplied, attended = again * (useful - own), again * own
    read, bandwidth = again * images * 6 * job.num_bytes * N * D * (3 * S + L), device.hbm * eff.attention_hbm
    moved, kind = again * pass_bytes(job, images), "fused" if job.compiled else "eager"
    reached = device.hbm * (eff.fused if job.compiled else eff.eager)
    return [
        Term("products", multiplied / (device.flops * share), "s",
             "(FLOPs - attention's) / (peak x share); x 4/3 if recomputed",
             f"{multiplied:.4g} / ({device.flops:.4g} x {share:.3f})"),
        Term("attention", attended / (device.flops * eff.attention) + read / bandwidth, "s",
             "12 b c N D (S S + S L) / (peak x share) + 6 s b c N D (3 S + L) / (HBM x share)",
             f"{attended:.4g} / ({device.flops:.4g} x {eff.attention}) + {read:.4g} / {bandwidth:.4g}"),
        Term("passes", moved / reached, "s", f"bytes of {kind} kernels / (HBM x share)",
             f"{moved:.4g} / {reached:.4g}"),
    ]  # fmt: skip


def _zero_copies(job: Job, layout: Layout, device: Device, eff: Efficiency) -> Term:
    """Copies around collectives: gradients into a bucket (not in stage 3), side by side, divided; gathered weights.

    Stage 3 copies nothing of what a rank shares with no other.
    """
    p, q = held(job, layout)
    s, reductions, passes, gathers = job.num_bytes, 1 if layout.stage == 1 else layout.accumulation, 6, 0
    ends = 0
    if layout.stage == 3:
        passes, gathers, p = 4, 2 * layout.accumulation, shared(job, layout)
        ends = job.counts.ends if p else 0  # gathered once
    gathered = (p - ends) * gathers + ends
    moved, reached = s * (p * passes * reductions + 2 * gathered + 2 * q * reductions), device.hbm * eff.hbm
    return Term(
        "ZeRO copies", moved / reached, "s",
        "s (shared p passes x reductions + 2 gathered + 2 q reductions) / (HBM x share)",
        f"{s} x ({p:.4g} x {passes} x {reductions} + 2 x {gathered:.4g} + 2 x {q:.4g} x {reductions}) / {reached:.4g}",
    )  # fmt: skip


def update_terms(job: Job, layout: Layout, device: Device, eff: Efficiency) -> list[Term]:
    """The optimizer step and the average of the weights."""
    _, q = held(job, layout)
    own, around = ADAMW if job.config.optim.name == "adamw" else SGD, AROUND[layout.stage]
    reached = device.hbm * eff.hbm
    return [
        Term("update", (own + around) * q / reached, "s", "(optimizer + around it) q / (HBM x share)",
             f"({own} + {around}) x {q:.4g} / {reached:.4g}"),
        Term("average of weights", AVERAGE * q / reached, "s", "12 q / (HBM x share)",
             f"{AVERAGE} x {q:.4g} / {reached:.4g}"),
    ]  # fmt: skip


def host_terms(job: Job, layout: Layout, eff: Efficiency) -> tuple[Term, Term]:
    """Seconds that the host needs to start the micro-batches of a step, and its update."""
    cost, N, c, is_stage3 = eff.host, job.config.model.num_layers, layout.accumulation, layout.stage == 3
    plain, stage3 = (cost.compiled, cost.compiled_stage3) if job.compiled else (cost.eager, cost.eager_stage3)
    block = (stage3 if is_stage3 else plain) + (plain / 3 if layout.recompute else 0.0)
    block += cost.shared if is_stage3 and layout.world_size > 1 else 0.0
    ends = cost.ends_stage3 if is_stage3 else cost.ends
    seconds = cost.scale * c * (N * block + ends)
    starting = cost.update_stage3 if is_stage3 else cost.update
    update = cost.scale * (N + 2) * starting
    return (
        Term("host", seconds, "s", "scale c (N block + ends)",
             f"{cost.scale} x {c} x ({N} x {block:.3g} + {ends:.3g})"),
        Term("host update", update, "s", "scale (N + 2) update", f"{cost.scale} x {N + 2} x {starting:.3g}"),
    )  # fmt: skip
