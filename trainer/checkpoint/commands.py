"""The subcommands of `python -m trainer.checkpoint`: each adds its parser, and returns an exit code when run."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.checkpoint.export import CONFIG, DTYPES, KIND_OF, ExportOptions, check_target, export
from trainer.checkpoint.export_reader import is_export
from trainer.checkpoint.folder import checkpoint_dir, fault, find_checkpoint, list_checkpoints, read_manifest
from trainer.checkpoint.reshape import reshape
from trainer.checkpoint.state import Topology, read_state, topology_of
from trainer.config import ConfigError, require

_HEADER = ("STEP", "SAVED", "SIZE", "TOPOLOGY", "STATE")


def add_list(commands: Any) -> None:
    """`list RUN`: every checkpoint of a run, by names and sizes."""
    parser: argparse.ArgumentParser = commands.add_parser("list", help="checkpoints of a run, checked by size")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.set_defaults(run=lambda arguments: _show(_checkpoints(arguments.run_dir), checksums=False))


def add_verify(commands: Any) -> None:
    """`verify RUN_OR_STEP`: the same with all checksums, of a run, of one checkpoint or of an export."""
    parser: argparse.ArgumentParser = commands.add_parser("verify", help="read every byte and compare checksums")
    parser.add_argument("path", type=Path, metavar="RUN_OR_STEP", help="run folder, step folder or export")
    parser.set_defaults(run=_verify)


def add_reshape(commands: Any) -> None:
    """`reshape RUN`: rewrite a checkpoint in the pieces of another topology."""
    parser: argparse.ArgumentParser = commands.add_parser("reshape", help="rewrite for another topology")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--world-size", type=int, required=True, help="number of processes")
    parser.add_argument("--ep-size", type=int, required=True, help="processes that share the experts of a layer")
    parser.add_argument("--zero-stage", type=int, help="ZeRO stage; default: the checkpoint's")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest whole one")
    parser.add_argument("--out", type=Path, help="run folder to write to; default: in place")
    parser.add_argument("--verify", action="store_true", help="hash all logical tensors before and after")
    parser.set_defaults(run=_reshape)


def add_export(commands: Any) -> None:
    """`export RUN_OR_STEP OUT`: the weights as plain safetensors files."""
    parser: argparse.ArgumentParser = commands.add_parser("export", help="write the weights as safetensors files")
    parser.add_argument("path", type=Path, metavar="RUN_OR_STEP", help="run folder (newest whole one) or step folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
    parser.add_argument("--weights", choices=KIND_OF, default="ema", help="average or live weights (default ema)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all tensors (default bf16)")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest file in GB (10^9 bytes); default 4")
    parser.set_defaults(run=_export)


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one step folder that is named."""
    require(path.is_dir(), f"{path}: no such run folder or checkpoint")
    if not (path / "checkpoints").is_dir():
        require(path.name.startswith("step_"), f"{path} is not a run folder (no checkpoints in it) nor a checkpoint")
        return [path]
    return list_checkpoints(path / "checkpoints")


def _show(checkpoints: Sequence[Path], *, checksums: bool) -> int:
    rows = [_row(path, checksums) for path in tqdm(checkpoints, disable=not sys.stderr.isatty(), leave=False)]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    for row in (_HEADER, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return int(any(row[-1] != "whole" for row in rows))


def _row(path: Path, checksums: bool) -> tuple[str, ...]:
    problem = fault(path, checksums=checksums)
    step = path.name.removeprefix("step_").lstrip("0") or "0"
    try:
        saved = read_state(path)
        size = sum(entry.size for entry in read_manifest(path).values())
        when = datetime.fromisoformat(saved["saved_at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        facts = (when, _human(size), str(topology_of(saved)))
    except (OSError, ValueError) as error:  # the row says so; the table goes on
        return (step, "-", "-", "-", problem or str(error))
    return (step, *facts, problem or "whole")


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _reshape(arguments: argparse.Namespace) -> int:
    if arguments.step is None:
        source = find_checkpoint(arguments.run_dir)
    else:
        source = find_checkpoint(checkpoint_dir(arguments.run_dir, arguments.step))
    old = topology_of(read_state(source))
    topology = Topology(
        world_size=arguments.world_size, ep_size=arguments.ep_size, zero_stage=arguments.zero_stage or old.zero_stage
    )
    out = arguments.out or _run_of(source)
    final, before, after = reshape(source, out, topology, verify=arguments.verify)
    for (kind, name), value in sorted(before.items()):
        verdict = "equal" if after[kind, name] == value else "DIFFERENT"
        print(f"{kind:<10}  {value}  {after[kind, name]}  {verdict}  {name}")
    print(f"{final}: {old} -> {topology}" + (f", {len(before)} tensors equal" if arguments.verify else ""))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if not is_export(arguments.path):
        return _show(_checkpoints(arguments.path), checksums=True)
    problem = fault(arguments.path, state=CONFIG)
    print(f"{arguments.path}: {problem or 'whole'}")
    return int(bool(problem))


def _export(arguments: argparse.Namespace) -> int:
    options = ExportOptions(weights=arguments.weights, dtype=arguments.dtype, shard_bytes=int(arguments.shard_gb * 1e9))
    check_target(arguments.out)
    require(not is_export(arguments.path), f"{arguments.path} is an export already: name a run or a checkpoint")
    source = find_checkpoint(arguments.path)
    size = export(source, arguments.out, options)
    print(f"{arguments.out}: {arguments.weights} weights of {source} in {arguments.dtype}, {_human(size)}")
    return 0


def _run_of(checkpoint: Path) -> Path:
    if checkpoint.parent.name != "checkpoints":
        raise ConfigError(f"{checkpoint} is not in a run folder: name one with --out")
    return checkpoint.parent.parent
