"""What the ranks send each other in one optimizer step, and how long that takes. Symbols as in `trainer.plan.memory`.

Expert groups are consecutive ranks, so they lie within nodes first. A ring over all ranks leaves a node through all
its network cards; ranks of one expert-data group share a node's cards with the groups beside them.
"""

from trainer.plan.devices import Device, Efficiency
from trainer.plan.job import Job, Layout, Term


def all_to_all_bytes(job: Job, layout: Layout) -> float:
    """Sent by one rank in one step, its own share included: dispatch and combine, forward and backward."""
    if layout.ep_size == 1:
        return 0.0
    tokens = layout.micro_batch_size * layout.accumulation * job.num_tokens
    rows = tokens * job.config.moe.capacity_factor
    return job.counts.num_moe * _exchanges(layout) * rows * job.config.model.dim * job.num_bytes


def _exchanges(layout: Layout) -> int:
    return 6 if layout.recompute else 4


def exchange_terms(job: Job, layout: Layout, device: Device, eff: Efficiency) -> tuple[list[Term], Term]:
    """All-to-all: what stays in the node over NVLink, the rest over the network card; nothing hides it."""
    total = all_to_all_bytes(job, layout)
    near = min(layout.ep_size, device.per_node)
    inside, across = total * (near - 1) / layout.ep_size, total * (layout.ep_size - near) / layout.ep_size
    count = job.counts.num_moe * _exchanges(layout) * layout.accumulation if layout.ep_size > 1 else 0
    seconds = max(inside / (device.node * eff.node), across / (device.nic * eff.nic)) + count * eff.latency
    traffic = [
        Term("all-to-all in the node", inside, "byte", "Nm exchanges T f_c D s (near - 1) / ep",
             f"{total:.4g} x {near - 1} / {layout.ep_size}"),
        Term("all-to-all across nodes", across, "byte", "Nm exchanges T f_c D s (ep - near) / ep",
             f"{total:.4g} x {layout.ep_size - near} / {layout.ep_size}"),
    ]  # fmt: skip
    term = Term(
        "all-to-all", seconds, "s", "max(in node / NVLink, across / NIC) + latencies",
        f"max({inside:.4g} / {device.node * eff.node:.4g}, {across:.4g} / {device.nic * eff.nic:.4g})"
        f" + {count} x {eff.latency:g}",
    )  # fmt: skip
    return traffic, term


def zero_terms(job: Job, layout: Layout, device: Device, eff: Efficiency) -> tuple[list[Term], float]:
    """Gradients reduced and weights gathered: of the rest over all ranks, of experts over their data group.

    Stages 1 and 2 gather weights once per step, stage 3 twice per micro-batch (what is outside of blocks once per
    step). Stage 1 reduces once per step, the others once per micro-batch; stages 1 and 2 of DeepSpeed 0.19.8 do so by
    an all-reduce, which sends twice as much.
    """
    s, counts, per_node = job.num_bytes, job.counts, device.per_node
    gathers = 2 * layout.accumulation if layout.stage == 3 else 1
    reductions = {1: 2, 2: 2 * layout.accumulation, 3: layout.accumulation}[layout.stage]
    several = layout.world_size > per_node
    inside = device.node * eff.node
    ring = per_node * device.nic * eff.nic if several else inside
    sent = (counts.rest - counts.ends) * gathers + counts.ends + counts.rest * reductions
    rest = s * sent * (1 - 1 / layout.world_size)
    beside = min(layout.ep_size, per_node)  # groups that share a node's cards
    card = per_node * device.nic / beside * eff.nic if several else inside
    local = counts.experts / layout.ep_size
    expert = s * local * (gathers + reductions) * (1 - 1 / layout.edp_size)
    terms = [
        Term("ZeRO of the rest", rest, "byte", "s ((Pr - Po) gathers + Po + Pr reductions) (1 - 1 / world)",
             f"{s} x {sent:.4g} x (1 - 1 / {layout.world_size})"),
        Term("ZeRO of the experts", expert, "byte", "s Pe / ep (gathers + reductions) (1 - 1 / edp)",
             f"{s} x {local:.4g} x ({gathers} + {reductions}) x (1 - 1 / {layout.edp_size})"),
    ]  # fmt: skip
    return terms, rest / ring + expert / card
