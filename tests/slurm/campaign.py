"""Random events against small runs on a real Slurm of four nodes: every run must end as if nothing had happened.

    python tests/slurm/campaign.py --events 200 --seed 1 --minutes 90 --out campaign.jsonl        # needs root

Three runs go on side by side: one of changing shape (two nodes, two ranks on one node, torchrun), and the two tasks of
an array. An event strikes each as soon as the one before is overcome, at times while the run still starts. When a run
is done, its metrics must be those of an unbroken one, no start may have lost what was saved, and no lock, file, process
or unexplained start may be left. Lines of FILE are events, drawn from the seed; a second call goes on behind them.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from campaign_events import EVENTS, Event, TooLateError, draw
from campaign_ledger import Ledger
from campaign_runs import SHAPES, Run, Site, submit_tasks
from slurm_cluster import Cluster

SLOTS = {"changing": ("pair", "twin", "pair", "torchrun"), "task 0": ("task",), "task 1": ("task",)}  # shapes in turn
STEPS = 400
RECOVERY_SECONDS = 480.0  # a lock of another job is watched for 60 s, no controller waited for as long as it takes
DISK = "48m"


@dataclass(frozen=True)
class Draws:
    """Where events come from: a seed, and of which kinds they may be."""

    seed: int
    kinds: tuple[str, ...]


class Slot:
    """One after the other, runs and what happens to them. The two tasks of an array begin each run together."""

    def __init__(
        self, site: Site, ledger: Ledger, name: str, draws: Draws, together: Callable[[str], str] | None
    ) -> None:
        self.site, self.ledger, self.name, self.draws, self.together = site, ledger, name, draws, together
        self.number, self.runs = ledger.next(name), 0
        self.disk = site.folder / f"disk_{name.replace(' ', '_')}"

    def live(self) -> None:
        """Until no more events are wanted; the last run is brought to its end."""
        while self.ledger.reserve():
            run = self._begin()
            try:
                while (goes_on := self._event(run)) and self.ledger.reserve():
                    pass
                if run.finished or goes_on:
                    self._end(run)
                else:
                    self._abandon(run)
            except Exception as error:  # nothing that happens to one slot may end the others, nor pass unnoticed
                self.ledger.add({"slot": self.name, "finding": f"{error!r}", "run": run.as_json()}, reserved=False)
                self._abandon(run)

    def _begin(self) -> Run:
        self.runs += 1
        task = int(self.name[-1]) if self.together else None
        shape = SHAPES[SLOTS[self.name][(self.runs - 1) % len(SLOTS[self.name])]]
        run = Run(self.site, shape, self.disk / f"run{self.runs}_{task or 0}", task)
        run.folder.parent.mkdir(exist_ok=True)
        job = self.together(run.folder.name) if self.together else ""
        if job:
            run.adopt(job)
        else:
            run.submit()
        return run

    def _event(self, run: Run) -> bool:
        """Draw and strike; False if the run is finished. One that comes too late is drawn anew, as another number."""
        rng = random.Random(f"{self.draws.seed}/{self.name}/{self.number}")
        kind, early = draw(run.shape, self.draws.kinds, rng), rng.random() < 0.2
        event = EVENTS[kind]
        record = {"slot": self.name, "number": self.number, "shape": run.shape.name, "kind": kind, "early": early,
                  "recovered": False, "seconds": 0.0, "finding": ""}  # fmt: skip
        self.number += 1
        try:
            start = until_started(run, early)
            time.sleep(rng.uniform(0, 1.5))
            before, begin = run.steps(start), time.monotonic()
            if run.finished:
                raise TooLateError
            run.given += event.starts if event.ends else 0
            event.strike(run, rng)
            record["finding"] = overcome(run, event, start, before)
            record |= {"recovered": not record["finding"], "seconds": round(time.monotonic() - begin, 1)}
        except TooLateError:
            self.ledger.release()
            return not run.finished
        except BaseException:
            self.ledger.release()
            raise
        self.ledger.add(record | {"job": run.job})
        return not (record["finding"] or run.finished)

    def _end(self, run: Run) -> None:
        """Nothing more happens: the run comes to its end and is compared."""
        end = time.monotonic() + RECOVERY_SECONDS
        while not run.finished or run.state()["JobState"] in ("RUNNING", "COMPLETING"):
            if time.monotonic() > end:
                raise TimeoutError(f"does not finish: {run.said()[-1500:]}")
            time.sleep(1)
        problems = run.verify()
        self.ledger.add({"slot": self.name, "verified": run.as_json(), "finding": "; ".join(problems)}, reserved=False)
        if problems:
            self._abandon(run)
        else:
            subprocess.run(["rm", "-rf", str(run.folder)], check=True)

    def _abandon(self, run: Run) -> None:
        """Keep what there is to see, and free the slot."""
        self.site.cluster.call("scancel", run.job, check=False)
        (run.folder.parent / "filler").unlink(missing_ok=True)
        self.site.power_on()
        kept = self.site.folder / "kept" / f"{self.name.replace(' ', '_')}_{run.folder.name}"
        kept.parent.mkdir(exist_ok=True)
        time.sleep(10)
        with suppress(OSError):
            subprocess.run(["mv", str(run.folder), str(kept)], check=False)
            (kept / "job.log").write_text(run.said())


def until_started(run: Run, early: bool) -> str:
    """Wait for processes, or for a step; returns which start of the job it is."""
    end = time.monotonic() + RECOVERY_SECONDS
    while time.monotonic() < end:
        found = run.state()
        start = f"{run.job}.{found.get('Restarts', '0')}"
        if run.finished:
            raise TooLateError
        if found["JobState"] == "RUNNING" and (len(run.processes()) == run.shape.ranks if early else run.steps(start)):
            return start
        run.site.tidy()
        time.sleep(0.5)
    raise TimeoutError(f"no start: {found.get('JobState')} {found.get('Reason')} {run.said()[-1500:]}")


def overcome(run: Run, event: Event, start: str, before: int) -> str:
    """Wait until the run goes on after an event, submitting it again where that is due; returns what is wrong."""
    end, again = time.monotonic() + RECOVERY_SECONDS, False
    while time.monotonic() < end:
        found = run.state()
        now, state = f"{run.job}.{found.get('Restarts', '0')}", found["JobState"]
        if now == start and run.steps(start) > before and not event.ends:
            break
        if run.finished and now == start and event.ends:
            raise TooLateError
        if (now != start and run.steps(now)) or run.finished:
            break
        if state not in ("RUNNING", "PENDING", "COMPLETING", "SUSPENDED", "CONFIGURING", "PREEMPTED"):
            said = f"{state} {run.said()}"
            if again or not any(reason in said for reason in event.reasons):
                return f"{state} ({found['ExitCode']}): {said[-1500:]}"
            if event.after is not None:
                event.after(run)
            run.submit()
            again = True
        run.site.tidy()
        time.sleep(0.7)
    else:
        return f"no step after {RECOVERY_SECONDS:.0f} s: {found.get('JobState')} {run.said()[-1500:]}"
    if event.after is not None:
        event.after(run)
    return ""


class Array:
    """Both tasks come here for their next run; the second submits for both."""

    def __init__(self, site: Site) -> None:
        self.site, self.job, self.barrier = site, "", Barrier(2, self._submit)
        self.name = ""

    def _submit(self) -> None:
        folder = self.site.folder / "disk_task_%a" / self.name
        self.job = self.site.ask(lambda: submit_tasks(self.site, SHAPES["task"], folder, 0, 1))

    def together(self, name: str) -> str:
        """The job's number, once the sibling's run has ended, too; empty when it begins no more."""
        self.name = name
        try:
            self.barrier.wait()
        except BrokenBarrierError:
            return ""
        return self.job


@contextmanager
def disks(folder: Path) -> Iterator[bool]:
    """A small file system for the runs of each slot, before the nodes start and take a copy of what is mounted.

    False where nothing may be mounted: then no disk can fill.
    """
    places = [folder / f"disk_{slot.replace(' ', '_')}" for slot in SLOTS]
    mounted = []
    for place in places:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
        if subprocess.run(command, check=False).returncode == 0:
            mounted.append(place)
    try:
        yield mounted == places
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def campaign(site: Site, ledger: Ledger, draws: Draws, names: Collection[str] = tuple(SLOTS)) -> None:
    """Slots, each in a thread of its own; runs lie in folders of `site.folder` that begin with `disk_`."""
    for ranks in {SHAPES[shape].ranks for name in names for shape in SLOTS[name]}:
        site.reference(ranks)
    array = Array(site)
    slots = [Slot(site, ledger, name, draws, array.together if name.startswith("task") else None) for name in names]

    def live(slot: Slot) -> None:
        slot.live()
        if slot.together:
            array.barrier.abort()

    threads = [Thread(target=live, args=(slot,), daemon=True) for slot in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """Command line; returns how many findings there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120.0, help="no new events after that")
    parser.add_argument("--out", type=Path, default=Path("campaign.jsonl"), metavar="FILE")
    args = parser.parse_args()
    ledger, folder = Ledger(args.out, args.events, args.minutes), Path(tempfile.mkdtemp(prefix="camp", dir="/tmp"))
    with disks(folder) as small:
        cluster = Cluster(nodes=4)
        try:
            print(f"runs in {folder}, Slurm in {cluster.folder}", flush=True)
            kinds = tuple(kind for kind in EVENTS if small or kind != "disk full")
            campaign(Site(cluster, folder, STEPS), ledger, Draws(args.seed, kinds))
        finally:
            cluster.stop()
    if not (folder / "kept").exists():
        shutil.rmtree(folder)
    print(ledger.table())
    return sum(bool(record["finding"]) for record in ledger.records)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
