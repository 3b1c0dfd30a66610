"""Evaluate a run while it trains, beside it: each new checkpoint's EMA, in a process of its own.

    python -m eval.watch runs/mine --prompts demo --num-prompts 48 --suite fid --reference data/real
    python -m eval.watch runs/mine --once                      # what is there, then end (a job after each checkpoint)
    python -m eval.watch runs/mine -- --suite geneval          # eval.run with these options, see eval/newest.py

Training is not slowed down or stopped by it: it reads whole checkpoints from disk, on a CPU or a spare GPU. Results go
to the run's TensorBoard at the checkpoint's step, to RUN/eval/watch/step_*/ and to RUN/eval/watch/watch.jsonl; a
checkpoint that is listed there is not evaluated again. FID of so few pictures is biased: its note says so.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.scoring.options import SUITES, add_score_options, split_names
from trainer.cluster.leave import run_and_leave
from trainer.config import ConfigError, command_parser, interruptible, require
from trainer.files import check_writable, whole_records, write_text

if TYPE_CHECKING:
    from eval.pictures.prompts import Prompt
    from eval.scoring.job import ScoreConfig


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What to do with each checkpoint of a run."""

    run: Path
    """Folder of the run."""
    prompts: "list[Prompt]"
    """Prompts of which a picture each is drawn and scored."""
    prompt_set: str
    """Their name for the report."""
    score: "ScoreConfig | None"
    """Suites and their settings; None: the validation loss only."""
    num_samples: int = 64
    """Samples of the validation loss; 1 or more."""
    batch_size: int = 16
    """Samples and pictures at once; 1 or more."""
    seconds: float = 30.0
    """Time between two looks for checkpoints; above 0."""
    once: bool = False
    """End when no checkpoint is left, instead of after the run's last step."""

    def __post_init__(self) -> None:
        require(self.run.is_dir(), f"{self.run} does not exist: give the folder of a run")
        for name in ("num_samples", "batch_size"):
            flag = "--loss-samples" if name == "num_samples" else "--batch-size"
            require(getattr(self, name) >= 1, f"{flag} is {getattr(self, name)}: use 1 or more")
        check_writable(log_file(self.run).parent, f"results in {log_file(self.run).parent}")
        require(self.seconds > 0, f"--seconds is {self.seconds}: use more than 0")


def log_file(run: Path) -> Path:
    """Where finished steps are listed."""
    return run / "eval" / "watch" / "watch.jsonl"


def _records(run: Path) -> list[dict[str, Any]]:
    return whole_records(log_file(run), lambda record: isinstance(record.get("step"), int))


def finished_steps(run: Path) -> set[int]:
    """Steps in the list; a line that a kill cut off does not count."""
    return {record["step"] for record in _records(run)}


def evaluate_checkpoint(config: WatchConfig, checkpoint: Path) -> dict[str, float]:
    """Validation loss and small scores of one checkpoint; lists it as finished."""
    from eval.pages.numbers import flat_numbers, log_numbers
    from eval.scoring.draw_and_score import EvalConfig, draw_and_score
    from eval.validation_loss import fixed_samples, validation_loss
    from trainer.data.dataset import open_dataset
    from trainer.pipeline import Pipeline
    from trainer.telemetry.trackers import send_scores

    pipeline = Pipeline.load(checkpoint).compile()
    dataset = open_dataset(pipeline.config)
    batches = fixed_samples(dataset, config.num_samples, config.batch_size)
    results: dict[str, Any] = {"validation_loss": validation_loss(pipeline, batches)}
    step = pipeline.step
    send_scores(config.run, step, log_numbers(config.run, {"results": results, "step": step}), [])
    del pipeline
    if config.score is not None:
        evaluation = EvalConfig(
            checkpoint=checkpoint,
            run_dir=config.run,
            prompts=config.prompts,
            prompt_set=config.prompt_set,
            score=replace(config.score, out=log_file(config.run).parent / checkpoint.name),
            batch_size=config.batch_size,
        )
        draw_and_score(evaluation)
        results |= json.loads((evaluation.score.out / "report.json").read_text())["results"]
    numbers = flat_numbers(results)
    records = [*_records(config.run), {"step": step, **numbers}]
    write_text(log_file(config.run), "".join(json.dumps(record) + "\n" for record in records))
    return numbers


def pending(run: Path) -> list[Path]:
    """Whole checkpoints that are not listed as finished, oldest first."""
    from trainer.checkpoint.folder import fault, list_checkpoints

    done = finished_steps(run)
    found = [path for path in list_checkpoints(run / "checkpoints") if int(path.name[5:]) not in done]
    return [path for path in found if not fault(path)]


def watch(config: WatchConfig) -> None:
    """Evaluate checkpoints as they appear, until the run's last step; with `once` only those that are there."""
    if config.score is not None:
        from eval.scoring.job import check_all

        check_all(config.score, config.prompts)
    from eval.newest import last_is_there

    while True:
        for checkpoint in pending(config.run):
            try:
                numbers = evaluate_checkpoint(config, checkpoint)
            except (ConfigError, OSError):
                if checkpoint.is_dir():
                    raise
                continue  # it was not damaged: the run has pruned it meanwhile (train.keep_last)
            print(f"step {int(checkpoint.name[5:])}: validation loss {numbers['validation_loss/mean']:.5f}", flush=True)
        if config.once or (last_is_there(config.run) and not pending(config.run)):
            return
        time.sleep(config.seconds)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_parser("eval.watch", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--prompts", help="as for eval.run")
    add("--num-prompts", type=int, default=48, help="the first so many are drawn, one picture each")
    add("--suite", default="", help=f"comma list of {', '.join(SUITES)} (default: validation loss only)")
    add("--loss-samples", type=int, default=WatchConfig.num_samples, help="samples of validation loss")
    add("--batch-size", type=int, default=WatchConfig.batch_size)
    add("--seconds", type=float, default=WatchConfig.seconds, help="time between two looks")
    add("--once", action="store_true", help="end when no checkpoint is left")
    add_score_options(parser)
    return parser


def parse(argv: list[str] | None) -> WatchConfig:
    """Settings from the command line; raises ConfigError on values that cannot work."""
    given = build_parser().parse_args(argv)
    from eval.demo.prompts import demo_prompts
    from eval.pictures.prompt_files import read_prompts
    from eval.pictures.run_prompts import CAPTIONS, default_set, run_captions
    from eval.scoring.job import score_config

    require(given.num_prompts >= 1, f"--num-prompts is {given.num_prompts}: use 1 or more")
    suites = split_names(given.suite)
    chosen = given.prompts or (default_set(given.run) if suites else "")
    prompts: list[Prompt] = []
    if chosen == "demo":
        prompts = demo_prompts(0, -(-given.num_prompts // 6))
    elif chosen.partition(":")[0] == CAPTIONS:
        prompts = run_captions(given.run, f"{CAPTIONS}:{given.num_prompts}")
    elif chosen:
        prompts = read_prompts(chosen)
    return WatchConfig(
        run=given.run,
        prompts=prompts[: given.num_prompts],
        prompt_set=chosen,
        score=score_config(given, suites, log_file(given.run).parent, 1) if suites else None,
        num_samples=given.loss_samples,
        batch_size=given.batch_size,
        seconds=given.seconds,
        once=given.once,
    )


@interruptible("what is scored is kept, and the same command goes on from there")
def main(argv: list[str] | None = None) -> None:
    """Command line of the watcher."""
    given = sys.argv[1:] if argv is None else argv
    at = given.index("--") if "--" in given else len(given)
    config = parse(given[:at])
    from trainer.engine.host_memory import keep_freed_memory

    keep_freed_memory()
    if at == len(given):
        watch(config)
        return
    require(config.score is None, "--suite stands before the --: with it, give all options of eval.run after it")
    from eval.newest import score_newest

    score_newest(config.run, given[at + 1 :], seconds=config.seconds, once=config.once)


if __name__ == "__main__":
    run_and_leave(main)
