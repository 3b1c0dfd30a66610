"""Trajectories that go on over a checkpoint; `tests/test_checkpoint_topology.py` starts them.

torchrun --nproc-per-node 4 tests/checkpoint_checks.py FOLDER "save NAME EP STAGE [key=value ...]"
                                                       "load ORIGIN EP STAGE [key=value ...]" ...

Several commands in one start: building the processes takes longer than the runs. `save` trains an unbroken run
of 15 steps and keeps its checkpoint of step 5. `load` goes on from that on this topology and asserts what must
hold; `repeat` does so bitwise, on the topology that saved. `same NAME OTHER` compares all checkpoints of two runs.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from checkpoint_layout import layout_places, tensor_hashes
from named_checks import run_named

from trainer.checkpoint.resume import choose_checkpoint
from trainer.checkpoint.save import write_checkpoint
from trainer.checkpoint.snapshot import group_settings, take_snapshot
from trainer.checkpoint.state import STATE, Topology, read_state
from trainer.checkpoint.tensorfile import TensorFile
from trainer.config import load_config
from trainer.distributed import World, barrier
from trainer.engine.zero_state import flat_masters
from trainer.loop.loop import Trainer
from trainer.loop.run import prepare_run_folder
from trainer.loop.run_lock import RunLock
from trainer.loop.signals import StopSignal
from trainer.loop.start_checks import check_start

SAVED, LAST, GLOBAL_BATCH = 5, 15, 8
STAGES = {
    "1": "ds_configs/zero1.json",
    "2": "ds_configs/zero2.json",
    "3": "ds_configs/zero3.json",
    "offload": "ds_configs/zero3_offload.json",
}


def start(world: World, run_dir: Path, ep_size: str, stage: str, overrides: list[str]) -> Trainer:
    """What the command line does up to the loop."""
    config = load_config(
        "debug",
        [
            f"run_dir={run_dir}", f"parallel.ep_size={ep_size}", f"parallel.deepspeed_config={STAGES[stage]}",
            f"train.micro_batch_size={GLOBAL_BATCH // world.size}", f"train.checkpoint_every={SAVED}",
            "train.keep_last=9", "model.num_layers=2", f"train.stop_at_step={LAST}", *overrides,
        ],
    )  # fmt: skip
    plan = check_start(config, world)
    checkpoint, _ = choose_checkpoint(config, plan.topology, plan.dataset.info, world)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)  # the lock does it in the command line
        prepare_run_folder(plan)
    barrier()
    return Trainer(replace(plan, checkpoint=checkpoint), torch.device("cpu"), StopSignal(), RunLock(run_dir))


def finish(trainer: Trainer) -> None:
    trainer.run()
    trainer.reporter.close()
    trainer.engine.destroy()
    barrier()


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if SAVED < line["step"] <= LAST]


def save(world: World, folder: Path, name: str, ep_size: str, stage: str, *overrides: str) -> None:
    finish(start(world, folder / name, ep_size, stage, list(overrides)))


def repeat(world: World, folder: Path, origin: str, ep_size: str, stage: str, *overrides: str) -> None:
    saved = read_state(folder / origin / f"checkpoints/step_{SAVED:08d}").topology
    mine = Topology(world_size=world.size, ep_size=int(ep_size), zero_stage=int(stage))
    assert saved == mine, (saved, mine)
    load(world, folder, origin, ep_size, stage, *overrides)


def load(world: World, folder: Path, origin: str, ep_size: str, stage: str, *overrides: str) -> None:
    run_dir = folder / f"{origin}-on-{world.size}-{ep_size}-{stage}"
    step = f"checkpoints/step_{SAVED:08d}"
    if world.is_main:
        shutil.copytree(folder / origin / step, run_dir / step)
        shutil.copy(folder / origin / "config.yaml", run_dir)
    barrier()
    trainer = start(world, run_dir, ep_size, stage, list(overrides))
    assert trainer.state.step == SAVED
    saved = json.loads((folder / origin / step / STATE).read_text())
    check_optimizer(trainer, saved)
    again = replace(trainer.config, run_dir=str(run_dir / "again"))
    plan = trainer.checked
    snapshot = take_snapshot(trainer.engine, trainer.ema, trainer.state, again, plan.topology, plan.dataset.info)
    path = write_checkpoint(snapshot, again, plan.world)
    if world.is_main:
        assert tensor_hashes(path) == tensor_hashes(folder / origin / step)
        check_places(path, plan.topology)
    finish(trainer)
    if not world.is_main:
        return
    unbroken, resumed = losses(folder / origin), losses(run_dir)
    same = Topology(**saved["topology"]) == read_state(path).topology
    if same and stage != "offload":
        assert resumed == unbroken, (resumed, unbroken)
        last = f"checkpoints/step_{LAST:08d}"
        assert tensor_hashes(run_dir / last) == tensor_hashes(folder / origin / last)
    difference = max(abs(a - b) / abs(b) for a, b in zip(resumed, unbroken, strict=True))
    assert difference <= 1e-5, difference


def same(world: World, folder: Path, name: str, other: str) -> None:
    """Both runs saved the same at every step."""
    if world.is_main:
        for step in range(SAVED, LAST + 1, SAVED):
            path = f"checkpoints/step_{step:08d}"
            assert tensor_hashes(folder / name / path) == tensor_hashes(folder / other / path), step


def check_optimizer(trainer: Trainer, saved: dict) -> None:  # type: ignore[type-arg]
    """Step counters of their own for each flat tensor, and the hyper-parameters of each group, right after loading."""
    states = trainer.engine.optimizer.optimizer.state
    counters = [states[flat]["step"] for flat in flat_masters(trainer.engine)]
    assert all(float(counter) == SAVED for counter in counters)
    assert len({id(counter) for counter in counters}) == len(counters)
    expected = {group["role"]: group for group in saved["optimizer"]["groups"]}
    assert expected["decay"]["weight_decay"] > 0 == expected["no_decay"]["weight_decay"]
    for group in json.loads(json.dumps(group_settings(trainer.engine))):
        assert group == expected[group["role"]], (group, expected)
    assert trainer.engine.global_steps == SAVED and trainer.engine.skipped_steps == 0


def check_places(path: Path, topology: Topology) -> None:
    """The pieces are where the pure function says that ZeRO puts them."""
    written = set()
    for file in map(TensorFile, sorted(path.glob("rank_*.safetensors"))):
        places = json.loads(file.metadata["places"])
        for kind, _, name in (key.partition("/") for key in file.places):
            if kind == "weight":
                written.add((file.path.name, name, places[name][0], file.length(f"weight/{name}")))
    expected = {
        (f"rank_{rank:05d}.safetensors", place.name, place.offset, place.length)
        for rank, places in enumerate(layout_places(json.loads((path / STATE).read_text())["parameters"], topology))
        for place in places
    }
    assert written == expected, sorted(written ^ expected)[:5]


def obey(world: World, command: str) -> None:
    """One command, as the module's docstring describes them."""
    action, *arguments = command.split()
    {"save": save, "load": load, "repeat": repeat, "same": same}[action](world, Path(sys.argv[1]), *arguments)
    barrier()


if __name__ == "__main__":
    run_named(sys.argv[2:], obey)
