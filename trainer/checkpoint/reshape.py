"""Rewrites a checkpoint in the pieces of another topology: on a CPU, one chunk in memory at a time.

Resuming does not need this: any topology reads any checkpoint. It makes each rank's file hold just what that rank
will read, for clusters that copy files to nodes beforehand.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.folder import (
    checkpoint_dir,
    clean,
    list_checkpoints,
    publish,
    step_of,
    temporary_dir,
    write_durable,
    write_manifest,
)
from trainer.checkpoint.layout import Place, layout_places
from trainer.checkpoint.reader import KINDS, CheckpointReader, piece_metadata, rank_file, tensor_hashes
from trainer.checkpoint.state import STATE, Topology, read_state, topology_of
from trainer.checkpoint.tensorfile import Source, Written, write_tensors
from trainer.config import ConfigError, config_from_dict, require, save_config
from trainer.loop.run_lock import RunLock

Hashes = dict[tuple[str, str], str]


def reshape(source: Path, run_dir: Path, topology: Topology, *, verify: bool) -> tuple[Path, Hashes, Hashes]:
    """Write the checkpoint `source` as one of `topology` into the run folder `run_dir`; `source` may be of that run.

    Returns the new checkpoint and, with `verify`, the hashes of all logical tensors before and after. Holds the run's
    lock; a crash leaves the old checkpoint or the new one. Raises ConfigError for a topology that the model does
    not allow, for a disk that refuses, and for hashes that differ (nothing is published then).
    """
    saved = read_state(source)
    _check_topology(saved, topology)
    final = checkpoint_dir(run_dir, saved["step"])
    temporary, parent = temporary_dir(final), final.parent
    with _locked(run_dir):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            clean(parent)
            temporary.mkdir()
            _write(source, temporary, saved, topology)
            before, after = (tensor_hashes(source), tensor_hashes(temporary)) if verify else ({}, {})
            require(
                before == after, f"{temporary} has other tensors than {source}: the disk or this program is at fault"
            )
            publish(
                temporary, final, latest=not any(step_of(path) > saved["step"] for path in list_checkpoints(parent))
            )
            if not (run_dir / "config.yaml").exists():
                save_config(config_from_dict(saved["config"]), run_dir / "config.yaml")  # makes it a run folder
        except OSError as error:
            raise ConfigError(f"{final} could not be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final, before, after


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    lock = RunLock(run_dir)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_topology(saved: dict[str, Any], topology: Topology) -> None:
    num_experts = saved["config"]["moe"]["num_experts"]
    require(topology.world_size >= 1, f"--world-size {topology.world_size}: use 1 or more")
    require(topology.zero_stage in (1, 2, 3), f"--zero-stage {topology.zero_stage}: use 1, 2 or 3")
    for name, count in (("--world-size", topology.world_size), ("moe.num_experts", num_experts)):
        require(
            topology.ep_size >= 1 and count % topology.ep_size == 0,
            f"--ep-size {topology.ep_size} does not divide {name} {count}: choose a divisor of both",
        )


def _write(source: Path, temporary: Path, saved: dict[str, Any], topology: Topology) -> None:
    reader = CheckpointReader(source)
    files: dict[str, Written] = {}
    for rank, places in enumerate(layout_places(saved["parameters"], topology)):
        sources = {
            f"{kind}/{place.name}": _source(reader, kind, place)
            for kind in KINDS
            if reader.names(kind)
            for place in places
        }
        metadata = piece_metadata({place.name: (place.offset, reader.shape(place.name)) for place in places})
        files[rank_file(rank)] = write_tensors(temporary / rank_file(rank), sources, metadata)
    reader.close()
    content = saved | {"topology": asdict(topology), "reshaped_from": asdict(topology_of(saved))}
    files[STATE] = write_durable(temporary / STATE, json.dumps(content, indent=1) + "\n")
    write_manifest(temporary, files)


def _source(reader: CheckpointReader, kind: str, place: Place) -> Source:
    chunks = partial(reader.chunks, kind, place.name, place.offset, place.offset + place.length)
    return Source(dtype=torch.float32, length=place.length, chunks=chunks)
