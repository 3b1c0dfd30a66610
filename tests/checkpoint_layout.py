"""What a checkpoint must hold: ZeRO's partition of every parameter as a pure function, and hashes of logical tensors.

The engine is asked for its pieces when it saves and loads; this says independently where they have to be.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from trainer.checkpoint.reader import KINDS, CheckpointReader
from trainer.checkpoint.state import Topology

_ALIGNMENT = 2  # of a flat group of stages 1 and 2, in elements per rank (nccl_start_alignment_factor)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Elements `offset` to `offset + length` of the flattened logical tensor `name`."""

    name: str
    offset: int
    length: int


def layout_places(parameters: list[dict[str, Any]], topology: Topology) -> list[list[Place]]:
    """The places of each rank, in the order of `parameters` (the list in `state.json`).

    With `ep_size` 1 experts are like any other parameter. Else the ranks of an expert group, which are consecutive,
    hold equal shares of the experts, and ranks that hold the same experts partition them among themselves.
    Stage 3 cuts each parameter into equal parts, the last ones shorter. Stages 1 and 2 cut the concatenation
    of each parameter group (by weight decay and kind).
    """
    ranks: list[list[Place]] = [[] for _ in range(topology.world_size)]
    order = {entry["name"]: number for number, entry in enumerate(parameters)}
    for members in _groups(parameters, topology):
        split = topology.ep_size if members[0]["expert"] else 1
        for first in range(split):
            owners = range(first, topology.world_size, split)
            local = [(entry["name"], prod(entry["shape"]) // split) for entry in members]
            for rank, name, start, length in _cuts(local, owners, topology.zero_stage):
                offset = first * dict(local)[name] + start
                ranks[rank].append(Place(name=name, offset=offset, length=length))
    return [sorted(places, key=lambda place: order[place.name]) for places in ranks]


def _groups(parameters: list[dict[str, Any]], topology: Topology) -> Iterable[list[dict[str, Any]]]:
    """What is partitioned together: single parameters at stage 3, the optimizer's parameter groups below."""
    if topology.zero_stage == 3:
        return [[entry] for entry in parameters]
    groups: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    for entry in parameters:
        groups.setdefault((entry["decays"], entry["expert"] and topology.ep_size > 1), []).append(entry)
    return groups.values()


def _cuts(local: list[tuple[str, int]], owners: range, zero_stage: int) -> Iterable[tuple[int, str, int, int]]:
    """(rank, name, start, length): the concatenated local tensors in equal parts, padded at the end."""
    total = sum(count for _, count in local)
    unit = len(owners) * (1 if zero_stage == 3 else _ALIGNMENT)
    size = -(-total // unit) * unit // len(owners)
    begin = 0
    for name, count in local:
        for number, rank in enumerate(owners):
            first, last = max(begin, number * size), min(begin + count, (number + 1) * size)
            if first < last:
                yield rank, name, first - begin, last - first
        begin += count


def tensor_hashes(folder: Path) -> dict[tuple[str, str], str]:
    """{(kind, name): XXH3-128 of the full logical fp32 tensor}: equal for equal content on any topology."""
    reader = CheckpointReader(folder)
    hashes = {}
    for kind in KINDS:
        for name in reader.names(kind):
            hasher = xxhash.xxh3_128(repr(reader.shape(name)).encode())
            for part in reader.chunks(kind, name):
                hasher.update(part.numpy().data)
            hashes[kind, name] = hasher.hexdigest()
    reader.close()
    return hashes
