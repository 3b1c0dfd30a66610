"""The planner's report: reads a configuration, prints whether it fits, its memory and time, and other layouts."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe.routers.registry import router_class
from trainer.config import ConfigError, TrainConfig, load_config, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import ModelShape
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.catalog import known_sizes
from trainer.engine.deepspeed_config import accumulation_dtype, load_deepspeed_config, zero_stage
from trainer.plan.devices import Efficiency, find_device
from trainer.plan.job import Job, Term, configured_layout
from trainer.plan.memory import checkpoint_bytes
from trainer.plan.search import PlanResult, best_of_each, evaluate, search, smallest_nodes, why_slower

_UNITS = {"byte": (1e9, "GB"), "FLOP": (1e12, "TFLOP"), "s": (1.0, "s"), "": (1.0, "")}


def data_shape(config: TrainConfig, given: Namespace) -> tuple[ModelShape, int]:
    """Shape of the latents and tokens of the longest caption: from the encoded data if there, else from flags."""
    described = Path(config.data.latents) / "dataset.json"
    if config.data.latents and described.is_file():
        from trainer.data.dataset import open_dataset

        info: LatentInfo = open_dataset(config).info
        return ModelShape.of(info), info.max_tokens
    channels, factor = _codec_sizes(config.data.codec)
    channels, factor = given.channels or channels, given.factor or factor
    text_dim, text_tokens = (32, 8) if config.data.source == "synthetic" else _text_sizes(config.data.text_encoder)
    require(
        config.data.image_size % (factor * config.model.patch_size) == 0,
        f"data.image_size={config.data.image_size} is no multiple of --factor {factor} x model.patch_size="
        f"{config.model.patch_size}",
    )
    side = config.data.image_size // factor
    shape = ModelShape(channels=channels, height=side, width=side, text_dim=given.text_dim or text_dim)
    return shape, given.text_tokens or text_tokens


def _codec_sizes(setting: str) -> tuple[int, int]:
    """Channels and factor."""
    try:
        codec = build_codec(setting)
        return codec.channels, codec.factor
    except ConfigError:  # its files are not on this machine; of one that is not listed either, the most common ones
        return known_sizes(setting) or (16, 8)


def _text_sizes(setting: str) -> tuple[int, int]:
    """Width of a token and tokens of the longest caption."""
    if setting.startswith("minilm"):
        return 384, 32
    try:
        encoder = build_text_encoder(setting)
        return encoder.dim, encoder.max_tokens
    except ConfigError:
        return known_sizes(setting) or (4096, 120)


def plan(given: Namespace) -> tuple[dict[str, Any], Job, PlanResult, list[PlanResult]]:
    """All that is printed: the report for JSON, the job, the configured layout's result, and those of all layouts."""
    for flag in ("world_size", "nodes", "per_node", "channels", "factor", "text_dim", "text_tokens"):
        value = getattr(given, flag)
        require(value is None or value >= 1, f"--{flag.replace('_', '-')} is {value}: use 1 or more")
    device = find_device(
        given.device, flops=given.flops, memory=given.memory, hbm=given.hbm, node=given.node, nic=given.nic,
        per_node=given.per_node,
    )  # fmt: skip
    config = load_config(given.config, given.overrides)
    world_size = given.world_size or (given.nodes or 1) * device.per_node
    content = load_deepspeed_config(config, world_size)
    shape, text_tokens = data_shape(config, given)
    summed, loop = content["data_types"]["grad_accum_dtype"], config.train
    chosen = summed != accumulation_dtype(loop.precision, loop.gradient_accumulation_steps)
    job = Job(
        config=config, shape=shape, text_tokens=text_tokens, zero=content["zero_optimization"],
        grad_accum_dtype=summed if chosen else "",
    )  # fmt: skip
    try:
        if job.counts.num_moe:
            config.moe.capacity(job.num_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    efficiency = Efficiency()
    layout, refusal = configured_layout(config, world_size, zero_stage(content))
    mine = evaluate(job, layout, device, efficiency, refusal)
    per_rank = config.train.micro_batch_size * config.train.gradient_accumulation_steps
    outcomes = search(job, world_size, per_rank, device, efficiency)
    report: dict[str, Any] = {
        "device": asdict(device), "world_size": world_size, "global_batch_size": config.global_batch_size(world_size),
        "parameters": {"total": job.counts.total, "experts": job.counts.experts, "active": job.counts.active},
        "checkpoint_bytes": checkpoint_bytes(job), "configured": describe(mine),
        "best": describe(outcomes[0]) if outcomes and outcomes[0].fits else None,
        "alternatives": [describe(outcome, terms=False) for outcome in best_of_each(outcomes, "ep_size")],
        "stages": [
            describe(outcome, terms=False) | {"against_best": why_slower(outcomes[0], outcome)}
            for outcome in best_of_each(outcomes, "stage")
        ],
        "smallest_nodes": None if mine.fits else smallest_nodes(job, device, efficiency),
    }  # fmt: skip
    return report, job, mine, outcomes


def describe(outcome: PlanResult, *, terms: bool = True) -> dict[str, Any]:
    """A layout's result for JSON; `terms` adds each number that it is made of."""
    content: dict[str, Any] = {
        "layout": asdict(outcome.layout), "fits": outcome.fits, "peak_bytes": outcome.value("peak"),
        "limit_bytes": outcome.limit, "step_seconds": outcome.value("step"), "mfu": outcome.value("MFU bound"),
        "images_per_second": outcome.images_per_second, "reason": "" if outcome.fits else outcome.reason,
    }  # fmt: skip
    if terms:
        content["terms"] = {term.name: term.value for term in (*outcome.memory, *outcome.time)}
    return content


def show(term: Term, *, explain: bool) -> str:
    """The line of a term, `explain` with its formula."""
    scale, unit = _UNITS[term.unit]
    line = f"  {term.name:<24} {term.value / scale:>10.3f} {unit:<6}"
    return f"{line} = {term.formula}" + (f" = {term.figures}" if term.figures else "") if explain else line.rstrip()


def verdict(report: dict[str, Any], mine: PlanResult, outcomes: list[PlanResult]) -> str:
    """One sentence: the job fits, or it does not and what would."""
    if mine.fits:
        peak, limit = mine.value("peak") / 1e9, mine.limit / 1e9
        return f"fits: {mine.layout} needs {peak:.1f} GB of {limit:.1f} GB usable per device"
    remedy = f"use {outcomes[0].layout}, which does; " if outcomes and outcomes[0].fits else ""
    nodes = report["smallest_nodes"]
    smallest = f"the smallest number of nodes that would hold it is {nodes}" if nodes else "no number of nodes would"
    why = mine.reason if mine.refusal else f"{mine.layout} needs {mine.reason}"
    return f"does not fit: {why}; {remedy}{smallest}"


def notes(job: Job) -> list[str]:
    """Costs of this configuration that the formulas leave out."""
    found = []
    if job.counts.num_moe and not router_class(job.config.moe.router).traits.has_equal_splits:
        found.append(
            f"  note: moe.router={job.config.moe.router} fills every expert up to the fullest; exchanges and experts "
            "cost as many times more as it has tokens above the mean"
        )
    if job.config.train.precision != "bf16":
        found.append("  note: compute is that of bf16; train.precision=fp32 is several times slower")
    return found


def text(report: dict[str, Any], job: Job, mine: PlanResult, outcomes: list[PlanResult], *, explain: bool) -> str:
    """The report for a person."""
    counts, device = job.counts, report["device"]
    lines = [
        f"{counts.total / 1e9:.3f}B parameters ({counts.experts / 1e9:.3f}B in experts), {counts.active / 1e9:.3f}B "
        f"activated per token; {report['world_size']} x {device['name']}, global batch {report['global_batch_size']}",
        verdict(report, mine, outcomes),
        f"memory of a rank, {mine.layout}:",
        *(show(term, explain=explain) for term in mine.memory),
        "one step:",
        *(show(term, explain=explain) for term in mine.time),
        f"  {mine.images_per_second:.0f} images/s on all ranks; a checkpoint takes "
        f"{report['checkpoint_bytes'] / 1e9:.1f} GB on disk",
        *notes(job),
        "best layout for each ep_size (equal global batch):",
        *(f"  {outcome.layout}: {summary(outcome)}" for outcome in best_of_each(outcomes, "ep_size")),
        "and for each ZeRO stage:",
    ]
    for outcome in best_of_each(outcomes, "stage"):
        slower = f"; {why_slower(outcomes[0], outcome)}" if outcome.fits and outcome is not outcomes[0] else ""
        lines.append(f"  {outcome.layout}: {summary(outcome)}{slower}")
    return "\n".join(lines)


def summary(outcome: PlanResult) -> str:
    """Step, speed and memory of a layout, or why it is refused."""
    if not outcome.fits:
        return f"refused, {outcome.reason}"
    return (
        f"{outcome.value('step'):.3f} s/step, {outcome.images_per_second:.0f} images/s, MFU "
        f"{outcome.value('MFU bound'):.0%}, {outcome.value('peak') / 1e9:.1f} GB"
    )


def run(given: Namespace) -> int:
    """Print the plan; exit code 0 if the configured job fits, 1 if not. ConfigError for bad settings."""
    report, job, mine, outcomes = plan(given)
    print(json.dumps(report, indent=2) if given.json else text(report, job, mine, outcomes, explain=given.explain))
    if not mine.fits and given.json:
        print(verdict(report, mine, outcomes), file=sys.stderr)
    return 0 if mine.fits else 1
