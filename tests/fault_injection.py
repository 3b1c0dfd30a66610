"""Kill a training run of two processes again and again, at random moments, and check that nothing is lost.

    python tests/fault_injection.py --trials 120 --seed 7 --stages 1 2 3        # about ten seconds a trial

Each trial starts the run (the command line, as srun would start it), waits for a moment and sends SIGKILL to one
rank or to all. The moments are found by watching the run folder: during start-up, training, the writing of
a checkpoint, and the few milliseconds of its publishing and the pruning of old ones. What must hold:

- ranks that were not killed end by themselves, with an error;
- the next start succeeds and resumes from a step no older than the last one that the log called saved;
- at the end `metrics.jsonl` has every step once and in order, and losses, gradient norms and learning rates
  equal those of an unbroken run bitwise;
- nothing unfinished is left among the checkpoints, and no lock.

Only the command line and the names of the run folder are relied on, not the format of a checkpoint.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from tests_launcher import Launcher

RANKS = 2
MAX_STEPS = 40
SETTINGS = (
    "-m", "trainer.train", "debug", f"train.max_steps={MAX_STEPS}", "train.checkpoint_every=2",
    "train.keep_last=2", "train.micro_batch_size=2", "parallel.ep_size=2", "moe.num_experts=4", "model.dim=16",
    "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "data.image_size=8",
)  # fmt: skip
PATIENCE_SECONDS = 120.0
STABLE = ("step", "loss", "grad_norm", "learning_rate", "moe/1/coverage_0", "moe/1/gate_entropy")


@dataclass(frozen=True, kw_only=True)
class Blow:
    """When and whom to kill: `steps` to wait for after the start, then an event, then a delay in seconds."""

    moment: str
    steps: int
    delay: float
    ranks: tuple[int, ...]


def draw_blow(rng: random.Random) -> Blow:
    """Half of all blows fall into the writing, publishing and pruning of a checkpoint."""
    moment = rng.choice(["starting", "training", "training", "saving", "saving", "publishing", "publishing"])
    longest = {"starting": 3.0, "training": 0.05, "saving": 0.03, "publishing": 0.005}[moment]
    everyone = tuple(range(RANKS))
    # A rank that waits for one that never arrived to its start is its launcher's to end.
    ranks = everyone if moment == "starting" else rng.choice([everyone, (0,), (1,)])
    return Blow(moment=moment, steps=rng.randint(1, 5), delay=rng.uniform(0, longest), ranks=ranks)


class Run:
    """One run folder and what its files say."""

    def __init__(self, folder: Path, stage: int, overrides: list[str]) -> None:
        self.folder, self.checkpoints, self.output = folder, folder / "checkpoints", folder.with_suffix(".out")
        self.arguments = (
            *SETTINGS,
            f"run_dir={folder}",
            f"parallel.deepspeed_config=ds_configs/zero{stage}.json",
            *overrides,
        )
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.ranks = Launcher().start_ranks(RANKS, *self.arguments, log=self.output)

    def running(self) -> bool:
        return all(rank.poll() is None for rank in self.ranks)

    def finish(self) -> list[int]:
        """Exit codes, once all ranks have ended by themselves."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            for rank in self.ranks:
                rank.kill()
            raise AssertionError(f"a rank hangs; see {self.output}") from None

    def log(self) -> str:
        path = self.folder / "train.log"
        return path.read_text() if path.exists() else ""

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def num_logged(self) -> int:
        return self.log().count("loss")

    def last_saved(self) -> int:
        """Step of the newest checkpoint that the log calls saved, 0 if none."""
        return max([0, *(int(step) for step in re.findall(r" saved \S*step_(\d+)", self.log()))])

    def names(self) -> frozenset[str]:
        try:
            return frozenset(path.name for path in self.checkpoints.iterdir())
        except FileNotFoundError:
            return frozenset()


def watch(run: Run, condition: Callable[[], bool]) -> bool:
    """Wait for a condition; False if a rank ends first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if not run.running():
            return False
        assert time.monotonic() < deadline, f"nothing happens; see {run.output}"
        time.sleep(0.0005)
    return True


def wait_for_blow(run: Run, blow: Blow) -> bool:
    """Wait until it is time to strike; False if the run ends first."""
    if blow.moment == "starting":
        reached = watch(run, lambda: (run.folder / "run.lock").exists())
    else:
        before = run.num_logged()
        reached = watch(run, lambda: run.num_logged() >= before + blow.steps)
    if reached and blow.moment in ("saving", "publishing"):
        reached = watch(run, lambda: unfinished(run.names()))
    if reached and blow.moment == "publishing":
        begun = finished(run.names())
        reached = watch(run, lambda: bool(finished(run.names()) - begun))
    time.sleep(blow.delay)
    return reached and run.running()


def unfinished(names: frozenset[str]) -> bool:
    return any(name.startswith("step_") and "." in name for name in names)


def finished(names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if re.fullmatch(r"step_\d+", name))


def check_start(log_before: str, log: str, saved: int) -> str:
    """Where the newest start began, '' if it was killed before it said so."""
    new = log[len(log_before) :]
    found = re.search(r"(starting fresh)|resuming from \S*step_(\d+)", new)
    if found is None:
        return ""
    step = int(found[2] or 0)
    assert step >= saved, f"step {saved} was saved, but the next start began at {step}"
    return f"step {step}"


def strike(run: Run, blow: Blow) -> str:
    """One trial; returns what happened, raises AssertionError if something was lost."""
    log_before, saved = run.log(), run.last_saved()
    run.start()
    in_time = wait_for_blow(run, blow)
    if in_time:
        for rank in blow.ranks:
            run.ranks[rank].send_signal(signal.SIGKILL)
    codes = run.finish()
    if "ended after step" in run.log():
        return "ended first"
    assert in_time and all(code != 0 for code in codes), f"exit codes {codes} without a blow; see {run.output}"
    begun = check_start(log_before, run.log(), saved)
    left = "with" if unfinished(run.names()) else "without"
    who = "all ranks" if len(blow.ranks) == RANKS else f"rank {blow.ranks[0]}"
    return (
        f"{blow.moment:10}  {who:9}  began at {begun or 'nothing yet':11}  "
        f"saved {run.last_saved():2}  {left} a leftover"
    )


def check_end(run: Run, expected: list[tuple[Any, ...]]) -> None:
    """Finish the run without a blow and compare it with the unbroken one."""
    log_before, saved = run.log(), run.last_saved()
    run.start()
    codes = run.finish()
    assert codes == [0] * RANKS, f"exit codes {codes}; see {run.output}"
    check_start(log_before, run.log(), saved)
    assert stable(run) == expected, f"the trajectory differs; see {run.folder}"
    assert not unfinished(run.names()), f"left among the checkpoints: {sorted(run.names())}"
    assert not list(run.folder.glob("run.lock*")), "the lock is left"


def stable(run: Run) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in STABLE) for line in run.metrics()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, nargs="+", default=[3], choices=(1, 2, 3), help="ZeRO stages, in turn")
    parser.add_argument("--folder", type=Path, help="where runs are kept (default: a temporary folder)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of the runs")
    arguments = parser.parse_intermixed_args()
    rng, start, moments = random.Random(arguments.seed), time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        for number, stage in enumerate(arguments.stages):
            trials = len(range(number, arguments.trials, len(arguments.stages)))
            folder = (arguments.folder or Path(temporary)) / f"zero{stage}"
            moments += inject(folder, trials, rng, stage, arguments.overrides)
    told = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
    print(f"nothing lost in {moments.total()} blows ({told}), {time.monotonic() - start:.0f} s")


def inject(folder: Path, trials: int, rng: random.Random, stage: int, overrides: list[str]) -> Counter[str]:
    """Trials at one ZeRO stage, over as many run folders as it takes; returns how often each moment was met."""
    moments = Counter[str]()
    folder.mkdir(parents=True)
    unbroken = Run(folder / "unbroken", stage, overrides)
    unbroken.start()
    assert unbroken.finish() == [0] * RANKS, f"see {unbroken.output}"
    expected = stable(unbroken)
    assert [line[0] for line in expected] == list(range(1, MAX_STEPS + 1))
    run = Run(folder / "run_0", stage, overrides)
    for trial in range(trials):
        blow = draw_blow(rng)
        happened = strike(run, blow)
        moments[blow.moment] += happened != "ended first"
        print(f"zero{stage} {trial + 1:3}  {happened}", flush=True)
        if happened == "ended first":
            check_end(run, expected)
            run = Run(folder / f"run_{trial + 1}", stage, overrides)
    check_end(run, expected)
    return moments


if __name__ == "__main__":
    main()
