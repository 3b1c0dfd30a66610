"""The subcommands of `python -m trainer.checkpoint`: each takes the parsed arguments and returns an exit code."""

import argparse
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from trainer.checkpoint.export import CONFIG, ExportOptions, check_target, export
from trainer.checkpoint.export_reader import ExportReader, is_export, read_export_config
from trainer.checkpoint.folder import fault, find_checkpoint, list_checkpoints, read_manifest
from trainer.checkpoint.hub import check_push, push
from trainer.checkpoint.model_card import BLANK, CARD
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.state import STATE, read_state
from trainer.errors import ConfigError, require

_HEADER = ("STEP", "SAVED", "SIZE", "TOPOLOGY", "STATE")


def _list(arguments: argparse.Namespace) -> int:
    return _show(_checkpoints(arguments.path), checksums=False)


def _verify(arguments: argparse.Namespace) -> int:
    if not is_export(arguments.path):
        return _show(_checkpoints(arguments.path), checksums=True)
    problem = _problem(arguments.path, ExportReader, checksums=True, state=CONFIG)
    print(f"{arguments.path}: {problem or 'whole'}")
    return int(bool(problem))


def _export(arguments: argparse.Namespace) -> int:
    require(isfinite(arguments.shard_gb), f"--shard-gb {arguments.shard_gb}: use a number more than 0")
    options = ExportOptions(
        weights=arguments.weights, dtype=arguments.dtype, shard_bytes=int(arguments.shard_gb * 1e9),
        encoders=arguments.encoders, digests=not arguments.no_digests,
    )  # fmt: skip
    if arguments.push:
        check_push(arguments.push)
    check_target(arguments.out)
    require(not is_export(arguments.path), f"{arguments.path} is an export already: name a run or a checkpoint")
    source = find_checkpoint(arguments.path)
    size = export(source, arguments.out, options)
    print(f"{arguments.out}: {arguments.weights} weights of {source} in {arguments.dtype}, {_human(size)}")
    print(f"{arguments.out / CARD}: a model card, where {BLANK} marks what only you know")
    if arguments.push:
        print(push(arguments.out, arguments.push))
    return 0


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one step folder that is named."""
    require(path.is_dir(), f"{path}: no such run folder or checkpoint")
    if not (path / "checkpoints").is_dir():
        require(path.name.startswith("step_"), f"{path} is not a run folder (no checkpoints in it) nor a checkpoint")
        return [path]
    return list_checkpoints(path / "checkpoints")


def _show(checkpoints: Sequence[Path], *, checksums: bool) -> int:
    rows = [_row(path, checksums) for path in checkpoints]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    for row in (_HEADER, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(any(row[-1] != "whole" for row in rows))


def _problem(path: Path, reader: type[CheckpointReader | ExportReader], *, checksums: bool, state: str) -> str:
    """What is wrong with a folder; with `checksums` also in files that are as they were written."""
    problem = fault(path, checksums=checksums, state=state)
    if problem or not checksums:
        return problem
    try:
        if reader is ExportReader:
            read_export_config(path, checksums=False)
        reader(path).close()
    except ConfigError as error:
        return str(error)
    return ""


def _row(path: Path, checksums: bool) -> tuple[str, ...]:
    problem = _problem(path, CheckpointReader, checksums=checksums, state=STATE)
    step = path.name.removeprefix("step_").lstrip("0") or "0"
    try:
        saved = read_state(path)
        size = sum(entry.size for entry in read_manifest(path).values())
        when = saved.saved_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        facts = (when, _human(size), str(saved.topology))
    except (OSError, ValueError) as error:  # the row says so; the table goes on
        return (step, "-", "-", "-", problem or str(error))
    return (step, *facts, problem or "whole")


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


COMMANDS = {"list": _list, "verify": _verify, "export": _export}
