"""Score the newest checkpoint of a run by `eval.run` while the run goes on; slurm/eval.sbatch --watch starts it.

Every process of the job draws and measures, the first one scores. A report goes to RUN/eval/step_*, and a checkpoint
that has one is not scored again. Checkpoints that appear meanwhile are passed over but for the newest.

What imports torch is imported within the functions, so that --help of eval.watch is quick.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import ConfigError, config_from_dict

if TYPE_CHECKING:
    from trainer.distributed import World


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    from trainer.checkpoint.folder import fault, list_checkpoints

    return next((path for path in reversed(list_checkpoints(run / "checkpoints")) if not fault(path)), None)


def last_is_there(run: Path) -> bool:
    """Whether the newest checkpoint is of the run's last step."""
    from trainer.checkpoint.state import read_state

    found = newest(run)
    if found is None:
        return False
    try:
        state = read_state(found)
    except ConfigError:
        if found.is_dir():
            raise
        return False  # pruned between the two looks: there is a newer one
    settings = config_from_dict(state.config).train
    return state.step >= (settings.stop_at_step or settings.max_steps)


def _report(run: Path, checkpoint: Path) -> Path:
    return run / "eval" / checkpoint.name / "report.json"


def _look(run: Path, once: bool) -> tuple[Path | None, bool, bool]:
    """The newest checkpoint if there is one, whether it has to be scored, and if not, whether it was the last."""
    found = newest(run)
    due = found is not None and not _report(run, found).exists()
    return found, due, not due and (once or last_is_there(run))


def score_newest(run: Path, options: list[str], *, seconds: float, once: bool) -> None:
    """Give the newest checkpoint to `eval.run` with `options`, until the run's last one is scored. Collective.

    Looks every `seconds`; with `once` it ends when the newest one is scored. A checkpoint that the run prunes while it
    is read is passed over. Among several processes it ends all of them instead, with the error of the one that missed
    it, because the others are waiting for that one: the job has to start them again.
    """
    from eval.run import parse
    from trainer.distributed import detect_world, group_of_several

    parse([str(run), *options])  # a wrong option ends it now, not at the first checkpoint
    world = detect_world()
    with group_of_several(world):
        _score_newest(run, options, world, seconds, once)


def _score_newest(run: Path, options: list[str], world: "World", seconds: float, once: bool) -> None:
    from eval.run import parse
    from eval.scoring.draw_and_score import draw_and_score
    from trainer.checkpoint.folder import step_of
    from trainer.distributed import from_main

    while True:
        # The first process looks for all: on a shared disk others may see a new file later.
        found = from_main(world, lambda: _look(run, once)) if world.size > 1 else _look(run, once)
        checkpoint, due, finished = found
        if checkpoint is not None and due:
            report = _report(run, checkpoint)
            report.parent.mkdir(parents=True, exist_ok=True)  # tells slurm/eval.sbatch which one was taken
            try:
                draw_and_score(parse([str(checkpoint), *options, "--out", str(report.parent)]))
            except (ConfigError, OSError):
                if world.size > 1 or checkpoint.is_dir():
                    raise
            # The first process scores alone, maybe for longer than others may wait in a collective.
            while world.size > 1 and not report.exists():
                time.sleep(1)
        elif finished:
            break
        else:
            time.sleep(seconds)
    if world.is_main and checkpoint is not None:
        print(f"the last checkpoint, step {step_of(checkpoint)}, is scored", flush=True)
