"""Checkpoints under faults: damaged files, full and read-only disks, a process that dies at any file operation."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import INFO, TOPOLOGY, sample_config, sample_pieces, sample_state, write_sample
from tests_launcher import ROOT, metrics

from trainer.checkpoint.agree import CheckpointError
from trainer.checkpoint.folder import clean, fault, list_checkpoints, newest_whole, prune, step_of
from trainer.checkpoint.resume import choose_checkpoint, find_candidate
from trainer.checkpoint.save import write_checkpoint
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.state import Topology
from trainer.config import ConfigError, load_config
from trainer.distributed import World
from trainer.loop.run_lock import RunLock
from trainer.loop.start_checks import find_resume

ALONE, WORLD = Topology(world_size=1, ep_size=1, zero_stage=3), World(rank=0, local_rank=0, size=1)


def save(run_dir: Path, step: int, **train: Any) -> Path:
    """Save made-up tensors as one process; needs a process group."""
    config = sample_config(run_dir, **train)
    content = sample_state(ALONE, step, config)
    return write_checkpoint(Snapshot(pieces=sample_pieces(ALONE, 0, step), rng={}, content=content), config, WORLD)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (flip, "has a wrong checksum"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 3), "bytes instead of"),
    "zero": (lambda path: os.truncate(path, 0), "has 0 bytes instead of"),
    "deleted": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", ["rank_00002.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_and_the_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write_sample(tmp_path, 10), write_sample(tmp_path, 20)
    assert newest_whole([good, bad]) == bad
    action, words = DAMAGE[damage]
    action(bad / name)
    problem = fault(bad)
    if name == "MANIFEST.json":
        assert problem, "a damaged manifest never passes"
    else:
        assert problem.startswith(name) and words in problem
        shallow = fault(bad, checksums=False)
        assert bool(shallow) == (damage != "flipped" or name == "state.json")
        parts = [fault(bad, part=part, num_parts=3) for part in range(3)]
        assert sum(map(bool, parts)) == 1, "one of the parties that share the work finds it"
    assert newest_whole(list_checkpoints(tmp_path / "checkpoints")) == good
    assert "passed over checkpoint" in caplog.text


@pytest.mark.usefixtures("process_group")
def test_resume_takes_the_newest_whole_one_and_cleans_up(tmp_path: Path) -> None:
    good, bad, stale = (write_sample(tmp_path, step) for step in (10, 20, 30))
    stale = stale.rename(stale.with_name("step_00000030.tmp"))
    flip(bad / "rank_00003.safetensors")
    config = sample_config(tmp_path)
    assert find_candidate(tmp_path) == bad, "sizes are right"
    found, notes = choose_checkpoint(config, TOPOLOGY, INFO, WORLD)
    assert found == good and notes == [f"passed over checkpoint {bad}: rank_00003.safetensors has a wrong checksum"]
    assert not stale.exists()
    (good / "state.json").unlink()
    assert find_candidate(tmp_path) == bad
    with pytest.raises(ConfigError, match=r"has checkpoints and none is whole \(.*state.json is missing.*\): restore"):
        choose_checkpoint(config, TOPOLOGY, INFO, WORLD)
    shutil.rmtree(tmp_path / "checkpoints")
    assert choose_checkpoint(config, TOPOLOGY, INFO, WORLD) == (None, [])


def test_retention_keeps_the_last_and_each_nth(tmp_path: Path) -> None:
    paths = [write_sample(tmp_path, step) for step in (10, 20, 30, 40, 50, 90)]
    prune(tmp_path / "checkpoints", paths[4], keep_last=2, keep_every=20)
    assert list_checkpoints(tmp_path / "checkpoints") == [paths[1], paths[3], paths[4], paths[5]]
    prune(tmp_path / "checkpoints", paths[4], keep_last=1, keep_every=0)
    assert list_checkpoints(tmp_path / "checkpoints") == [paths[4], paths[5]], "a later one is not counted"


EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "open", "os.truncate"}


def dies_at(number: int, folder: Path, action: Callable[[], Any]) -> bool:
    """Run `action` in a child that dies just before its `number`-th file operation below `folder`.

    Returns False when it had fewer.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 77), f"the child failed with {code}"
        return code == 77
    try:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in EVENTS:
                return
            below = isinstance(arguments[0], str) and arguments[0].startswith(str(folder))
            if below or (event in ("os.remove", "os.rmdir") and arguments[-1] != -1):
                count += 1
                if count == number:
                    os._exit(77)

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        sys.addaudithook(hook)
        action()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.__stderr__, flush=True)
        os._exit(1)


def crash_everywhere(folder: Path, prepare: Callable[[], Any], action: Callable[[], Any]) -> int:
    """Kill `action` before each of its file operations; afterwards nothing of what was there may be lost."""
    trials = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        prepare()
        checkpoints = folder / "checkpoints"
        before = max(int(path.name[5:]) for path in list_checkpoints(checkpoints))
        died = dies_at(trials + 1, checkpoints, action)
        assert all(not fault(path) for path in list_checkpoints(checkpoints)), "no name without its content"
        clean(checkpoints)
        found = newest_whole(list_checkpoints(checkpoints))
        assert found is not None and int(found.name[5:]) >= before
        assert not list(checkpoints.glob("*.tmp"))
        assert not dies_at(-1, checkpoints, lambda: save(folder, 77)), "the next save succeeds"
        assert (checkpoints / "latest").read_text() == "step_00000077\n"
        if not died:
            return trials
        trials += 1


@pytest.mark.slow
def test_dying_in_a_save_or_its_prune_loses_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def prepare() -> None:
        for step in (10, 20, 30):
            write_sample(run, step, ALONE)

    trials = crash_everywhere(run, prepare, lambda: save(run, 40, keep_last=2))
    assert trials >= 15, f"only {trials} file operations were tried"


@pytest.mark.slow
def test_dying_while_a_step_is_saved_again_loses_neither_version(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trials = crash_everywhere(run, lambda: write_sample(run, 30, ALONE), lambda: save(run, 30))
    assert trials >= 10, f"only {trials} file operations were tried"


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A real tmpfs of 64 KiB, or of the size that the test asks for."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '64k')}", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.usefixtures("process_group")
def test_a_full_disk_is_one_sentence_and_leaves_no_trace(small_disk: Path) -> None:
    first = save(small_disk, 10)
    (small_disk / "filler").write_bytes(b"x" * 30_000)
    with pytest.raises(
        CheckpointError, match=r"step 20 could not be saved in .*No space left on device: free"
    ) as error:
        save(small_disk, 20)
    assert error.value.environment and "\n" not in str(error.value)
    assert [path.name for path in (small_disk / "checkpoints").iterdir() if path.is_dir()] == [first.name]
    assert fault(first) == ""
    (small_disk / "filler").unlink()
    assert fault(save(small_disk, 20)) == ""


def test_a_start_on_a_full_disk_says_free_space(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(b"x" * 100_000)
    with pytest.raises(ConfigError, match=r"run_dir=.*run cannot be written: No space left on device.*: free space$"):
        RunLock(small_disk / "run").acquire()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("small_disk", ["96k"], indirect=True)
def test_a_lower_keep_last_makes_room_before_the_next_save(small_disk: Path) -> None:
    for step in (10, 20, 30):
        save(small_disk, step, keep_last=3)
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(small_disk, 40, keep_last=3)
    config = sample_config(small_disk, keep_last=1, micro_batch_size=8)
    found, notes = choose_checkpoint(config, ALONE, INFO, WORLD)
    assert found is not None and found.name == "step_00000030" and notes == ["train.keep_last: 3 -> 1"]
    assert list_checkpoints(small_disk / "checkpoints") == [found] and not fault(found)
    assert not fault(save(small_disk, 40, keep_last=1))


@pytest.mark.usefixtures("process_group")
def test_what_is_saved_after_the_run_folder_was_removed_can_be_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    save(run, 10)
    shutil.rmtree(run)
    saved = save(run, 20)
    assert "config.yaml is missing, maybe the run folder was removed: written anew" in caplog.text
    assert load_config(run / "config.yaml") == sample_config(run)
    assert find_resume(sample_config(run), ALONE, INFO) == saved


@pytest.mark.slow
def test_a_run_whose_folder_is_removed_ends_in_one_sentence_and_is_rescued(launcher: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["-m", "trainer.train", "debug", f"run_dir={run}", "model.num_layers=2", "train.checkpoint_every=0"]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            launcher.command(*command, "train.max_steps=100000"),
            cwd=ROOT, env=launcher.environment(), stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        while len(metrics(run)) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        shutil.rmtree(run)
        assert process.wait(120) == 2
    sentence = (tmp_path / "errors").read_text()
    assert sentence.startswith(f"error: run_dir={run} ") and sentence.count("\n") == 1, sentence
    (rescued,) = list_checkpoints(run / "checkpoints")
    last = step_of(rescued) + 1
    done = launcher.run(*command, "train.max_steps=100000", f"train.stop_at_step={last}")
    assert done.returncode == 0 and f"resuming from {rescued}" in done.stdout, done.stderr[-2000:]


@pytest.mark.usefixtures("process_group")
def test_a_read_only_folder_is_one_sentence(small_disk: Path) -> None:
    first = save(small_disk, 10)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"process 0: Read-only file system .*: make it writable") as error:
        save(small_disk, 20)
    assert error.value.environment and fault(first) == ""
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert fault(save(small_disk, 20)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["11m"], indirect=True)
def test_a_run_meets_a_full_disk(launcher: Any, small_disk: Path) -> None:
    run = small_disk / "run"
    command = ["-m", "trainer.train", "debug", f"run_dir={run}", "model.num_layers=2", "train.checkpoint_every=5"]
    done = launcher.run(*command)
    assert done.returncode == 2 and done.stderr.count("error: step 10 could not be saved") == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    done = launcher.run(*command, "train.on_save_error=continue")
    assert done.returncode == 2 and "error: step 20 could not be saved" in done.stderr, "the last save must succeed"
    log = (run / "train.log").read_text()
    assert log.count("train.on_save_error=continue: step") == 2 and "train.on_save_error: abort -> continue" in log
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000005"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = launcher.run(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "train.log").read_text().count("resuming from") == 2


@pytest.mark.usefixtures("process_group")
def test_an_error_of_the_program_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    config = sample_config(tmp_path)
    content = sample_state(ALONE, 10, config) | {"config": object()}
    with pytest.raises(CheckpointError, match="TypeError") as error:
        write_checkpoint(Snapshot(pieces=sample_pieces(ALONE, 0, 10), rng={}, content=content), config, WORLD)
    assert not error.value.environment
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_pieces_of_the_samples_are_those_of_real_ranks() -> None:
    counts = [sum(piece.values.numel() for piece in sample_pieces(TOPOLOGY, rank, 1)) for rank in range(4)]
    assert sum(counts) == 4 * 261 and max(counts) < 4 * 75
