"""What the campaign does to a run, and what must follow: each event is one function and one line in EVENTS."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil
from campaign_runs import Run, Shape

NO_SPACE = "No space left"


class TooLateError(RuntimeError):
    """What was to be struck is no longer there: the event did not happen."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """`strike` does it. `ends`: this start ends, and another follows. `reasons`: one of these in the job's output, or
    `CANCELLED` as its state, tells why the job itself ended and has to be submitted again; without any it must come
    back by itself. `shapes`: of the runs that it can happen to. `starts`: as many may follow. `weight`: how often."""

    strike: Callable[[Run, random.Random], None]
    ends: bool = True
    reasons: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ("pair", "twin", "task")
    starts: int = 1
    weight: int = 4
    after: Callable[[Run], None] | None = None  # before the job is submitted again, or when all is over


def send(process: psutil.Process, number: int) -> None:
    """A signal, if there is somebody to get it."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess as error:
        raise TooLateError from error


def one_rank(run: Run, rng: random.Random) -> psutil.Process:
    """Any of the run's processes."""
    if not (found := run.processes()):
        raise TooLateError
    return found[rng.randrange(len(found))]


def to_rank(number: int, run: Run, rng: random.Random) -> None:
    """A signal to one process."""
    send(one_rank(run, rng), number)


def parent(process: psutil.Process) -> psutil.Process:
    """The process that started another."""
    with suppress(psutil.NoSuchProcess):
        if (found := process.parent()) is not None:
            return found
    raise TooLateError


def to_launcher(number: int, run: Run, rng: random.Random) -> None:
    """A signal to torchrun, or to the step's daemon on one node."""
    send(parent(one_rank(run, rng)), number)


def to_batch(number: int, run: Run, rng: random.Random) -> None:
    """A signal to the batch script alone."""
    script = re.compile(rf"{run.site.cluster.folder}/spool/\w+/job0*{run.state()['JobId']}/slurm_script")
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if any(map(script.match, process.cmdline()[:2])) and "slurmstepd" in parent(process).name():
                return send(process, number)
    raise TooLateError


def step_dies(run: Run, rng: random.Random) -> None:
    """All processes of the step on one node, the daemon included."""
    process = one_rank(run, rng)
    daemon = parent(process)
    for each in (daemon, *(p for p in run.processes() if parent(p) == daemon)):
        send(each, signal.SIGKILL)


def told(words: tuple[str, ...], run: Run, rng: random.Random) -> None:
    """A command of Slurm's with the job at its end."""
    run.site.ask(lambda: run.site.cluster.call(*words, run.job, check=False))


def preempted(run: Run, rng: random.Random) -> None:
    """An urgent job wants a node of it."""
    if (nodes := _nodes(run)) == []:
        raise TooLateError
    urgent = ("sbatch", "-p", "urgent", "-w", rng.choice(nodes), "-N1", "--exclusive", "--mem=0", "-o", "/dev/null")
    run.site.ask(lambda: run.site.cluster.call(*urgent, "--wrap", "sleep 1"))


def suspended(run: Run, rng: random.Random) -> None:
    """The job as a whole stands still for a while."""
    told(("scontrol", "suspend"), run, rng)
    time.sleep(rng.uniform(2, 30))
    told(("scontrol", "resume"), run, rng)


def _nodes(run: Run) -> list[str]:
    names = run.state().get("NodeList", "(null)")
    call = run.site.cluster.call
    found: str = "" if names == "(null)" else run.site.ask(lambda: call("scontrol", "show", "hostnames", names))
    return found.split()


def node_dies(run: Run, rng: random.Random) -> None:
    """Power cut of one of its nodes, which comes back."""
    if not (nodes := _nodes(run)):
        raise TooLateError
    with run.site.power:
        run.site.cluster.power_off(rng.choice(nodes))
    time.sleep(rng.uniform(0, 20))
    run.site.power_on()


def network_cut(run: Run, rng: random.Random) -> None:
    """One of its nodes cannot be reached for longer than a process may be silent."""
    if not (nodes := _nodes(run)):
        raise TooLateError
    link = run.site.cluster.link(rng.choice(nodes))
    subprocess.run(["ip", "link", "set", link, "down"], check=True)
    time.sleep(rng.uniform(35, 50))
    subprocess.run(["ip", "link", "set", link, "up"], check=False)  # a node that was restarted has a new one
    run.site.power_on()


def controller_away(seconds: tuple[float, float], run: Run, rng: random.Random) -> None:
    """No slurmctld for a while."""
    with run.site.power:
        run.site.cluster.power_off("ctl")
        time.sleep(rng.uniform(*seconds))
        run.site.power_on()


def warned_without_controller(run: Run, rng: random.Random) -> None:
    """A run that ends while no slurmctld answers."""
    process = one_rank(run, rng)
    with run.site.power:
        run.site.cluster.power_off("ctl")
        with suppress(psutil.NoSuchProcess):
            process.send_signal(rng.choice((signal.SIGUSR1, signal.SIGKILL)))
        time.sleep(rng.uniform(20, 60))
        run.site.power_on()


def paused(run: Run, rng: random.Random) -> None:
    """One process stands still for less than counts as silence."""
    process = one_rank(run, rng)
    send(process, signal.SIGSTOP)
    time.sleep(rng.uniform(1, 6))
    send(process, signal.SIGCONT)


def disk_fills(run: Run, rng: random.Random) -> None:
    """The run's file system is full for a while."""
    with suppress(OSError), (run.folder.parent / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16) if os.fstat(file.fileno()).st_size else bytes(1 << 22))


def space_again(run: Run) -> None:
    """Somebody has tidied up."""
    (run.folder.parent / "filler").unlink(missing_ok=True)


def switched(name: str, run: Run, rng: random.Random) -> None:
    """RUN/stop or RUN/save."""
    if run.folder.exists():
        (run.folder / name).touch()


def switch_removed(run: Run) -> None:
    """As the sentence says."""
    (run.folder / "stop").unlink(missing_ok=True)


def save_too_late(run: Run) -> None:
    """Nobody looks any more at a file that was touched after the last step."""
    if run.finished:
        (run.folder / "save").unlink(missing_ok=True)


RANK, BATCH, LAUNCHER, SLURM = partial(partial, to_rank), partial(partial, to_batch), partial(partial, to_launcher), \
    partial(partial, told)  # fmt: skip
SEVERAL: tuple[str, ...] = ("pair", "twin")
TORCHRUN = ("torchrun",)
ANY: tuple[str, ...] = ("",)  # every output has it: a script that does not requeue just ends

EVENTS: dict[str, Event] = {
    **{f"rank {name}": Event(strike=RANK(getattr(signal, f"SIG{name}"))) for name in ("TERM", "USR1", "INT", "HUP")},
    "rank KILL": Event(strike=RANK(signal.SIGKILL), reasons=("giving up",)),
    **{f"batch {name}": Event(strike=BATCH(getattr(signal, f"SIG{name}"))) for name in ("TERM", "USR1", "INT", "HUP")},
    "batch KILL": Event(strike=BATCH(signal.SIGKILL), reasons=ANY),
    "step dies": Event(strike=step_dies, reasons=("giving up",), starts=2),
    "scancel": Event(strike=SLURM(("scancel",)), reasons=("CANCELLED",)),
    "requeue": Event(strike=SLURM(("scontrol", "requeue"))),
    "preemption": Event(strike=preempted),
    "suspend": Event(strike=suspended, ends=False),
    "power cut": Event(strike=node_dies, starts=2),
    "network cut": Event(strike=network_cut, starts=2),
    "controller restarts": Event(strike=partial(controller_away, (0, 5)), ends=False, weight=2),
    "no controller": Event(strike=partial(controller_away, (30, 75)), ends=False, weight=1),
    "no controller, told": Event(strike=warned_without_controller, reasons=("giving up",), weight=1),
    "pause": Event(strike=paused, ends=False),
    "hang, stopped": Event(strike=RANK(signal.SIGSTOP), shapes=SEVERAL),
    "hang, asleep": Event(strike=RANK(signal.SIGRTMIN)),
    "hang, interpreter": Event(strike=RANK(signal.SIGRTMIN + 1), shapes=SEVERAL),
    "disk full": Event(strike=disk_fills, reasons=(NO_SPACE,), after=space_again),
    "RUN/stop": Event(strike=partial(switched, "stop"), reasons=("ended by RUN/stop",), after=switch_removed),
    "RUN/save": Event(strike=partial(switched, "save"), ends=False, after=save_too_late),
    **{f"torchrun {name}": Event(strike=LAUNCHER(getattr(signal, f"SIG{name}")), reasons=ANY, shapes=TORCHRUN)
       for name in ("TERM", "USR1", "INT", "HUP", "KILL")},
    "torchrun, rank KILL": Event(strike=RANK(signal.SIGKILL), reasons=ANY, shapes=TORCHRUN),
    "torchrun, rank TERM": Event(strike=RANK(signal.SIGTERM), reasons=ANY, shapes=TORCHRUN),
    "torchrun, scancel": Event(strike=SLURM(("scancel",)), reasons=ANY, shapes=TORCHRUN),
    "torchrun, requeue": Event(strike=SLURM(("scontrol", "requeue")), shapes=TORCHRUN),
    "torchrun, power cut": Event(strike=node_dies, shapes=TORCHRUN, starts=2),
    "torchrun, hang": Event(strike=RANK(signal.SIGSTOP), reasons=ANY, shapes=TORCHRUN),
    "torchrun, RUN/stop": Event(strike=partial(switched, "stop"), reasons=ANY, shapes=TORCHRUN, after=switch_removed),
}  # fmt: skip


def draw(shape: Shape, kinds: Collection[str], rng: random.Random) -> str:
    """An event of some kinds that can happen to a run of a shape."""
    fitting = [name for name in kinds if shape.name in EVENTS[name].shapes]
    return rng.choices(fitting, [EVENTS[name].weight for name in fitting])[0]
