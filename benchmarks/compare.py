"""Dense, token choice, expert choice and two successors on the embedded data, at matched activated FLOPs.

    make compare                                                      # 5 variants x 3 seeds, under two hours on 2 cores
    python -m benchmarks.compare --out runs/quick --steps 40 --seeds 0 --per-category 4

Each run is `trainer.train` on two processes (experts with ep_size 2, ZeRO-3), scored by `eval.run` and by the loss at
fixed timesteps on scenes held out of training. Runs of one seed come before the next seed's, and the table is written
after each, so an interrupted comparison is even. The same command goes on: finished runs are read, a half-trained one
resumes from its checkpoint. Speed is measured at the end, in short runs that take turns, so that whatever else the
machine does meets all variants alike. Result: OUT/compare.md, compare.json and plots, whatever comes out.
"""

import argparse
from pathlib import Path

from trainer.config import command_parser

DEFAULT_VARIANTS = ("dense", "token_choice", "expert_choice", "diffmoe", "nucleus")


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.compare", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--steps", type=int, default=400, help="of each run (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT_VARIANTS), help="(default %(default)s)")
    parser.add_argument("--per-category", type=int, default=20, help="prompts per category (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--speed-rounds", type=int, default=3, help="turns of each variant (default %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="of the recipe, for every run")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.compare_report import write_report
from benchmarks.interleaved import write_json
from benchmarks.validation_loss import validation_loss
from moe.config import MoeConfig
from moe.routers.registry import ROUTERS, router_class
from trainer.config import TrainConfig, load_config, require, run_cli
from trainer.diffusion.model import ModelShape
from trainer.pipeline import Pipeline
from trainer.plan.job import count_parameters
from trainer.telemetry.flops import forward_multiply_adds

RECIPE = "demo"
SPEED_STEPS, SPEED_EVERY = 40, 10  # of one measurement; the first interval is left out
IMAGES, LATENTS = Path("data/demo/images"), Path("data/demo/latents")


def router_settings(name: str) -> list[str]:
    """Overrides that configure a registered router as its example, those that differ from the default."""
    settings = {"router": name, **router_class(name).traits.example}
    return [f"moe.{key}={value}" for key, value in settings.items() if value != getattr(MoeConfig(), key)]


# Overrides of the demo's recipe. Its capacity factor is 2 in every second block, which is 24 d^2 multiply-adds per
# token and pair of blocks; so are a dense MLP of ratio 6 in every block, and a shared expert beside a factor of 1.
VARIANTS: dict[str, list[str]] = {
    "dense": ["moe.every=0", "model.mlp_ratio=6", "parallel.ep_size=1"],
    **{name: router_settings(name) for name in ROUTERS},
    "nucleus": [
        "moe.router_input=unmodulated", "moe.gate=sigmoid", "moe.normalize_gates=true", "moe.gate_scale=2.5",
        "moe.num_shared_experts=1", "moe.capacity_factor=1",
    ],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared; every run has the same seeds, steps and data."""

    out: Path
    steps: int
    seeds: tuple[int, ...]
    variants: tuple[str, ...]
    per_category: int
    processes: int
    speed_rounds: int
    overrides: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("steps", "per_category", "processes", "speed_rounds"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} is {value}: use 1 or more")
        for variant in self.variants:
            require(variant in VARIANTS, f"--variants {variant} is not known: choose from {', '.join(VARIANTS)}")

    def overrides_of(self, variant: str, seed: int) -> list[str]:
        """Command-line settings of one run."""
        changes = [f"run_dir={self.run_dir(variant, seed)}", f"seed={seed}", f"train.max_steps={self.steps}",
                   f"train.checkpoint_every={max(1, self.steps // 3)}", "train.keep_last=1", "train.sample_every=0",
                   f"parallel.ep_size={self.processes}"]  # fmt: skip
        return [*changes, *VARIANTS[variant], *self.overrides]

    def run_dir(self, variant: str, seed: int) -> Path:
        """Folder of one run."""
        return self.out / f"{variant}_seed{seed}"


def parse(argv: list[str] | None) -> CompareConfig:
    """Command line; see the module docstring."""
    given = command_line().parse_args(argv)
    return CompareConfig(
        out=given.out, steps=given.steps, seeds=tuple(given.seeds), variants=tuple(given.variants),
        per_category=given.per_category, processes=given.processes,
        speed_rounds=given.speed_rounds, overrides=tuple(given.set),
    )  # fmt: skip


def command(arguments: list[str], log: Path) -> None:
    """Run a program, its output appended to `log`; RuntimeError naming the log if it fails.

    Ctrl-C reaches the program too, and training then saves before it ends: it is waited for.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output, subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output) as child:
        try:
            child.wait()
        except KeyboardInterrupt:
            print("stopping: the run is saved first", flush=True)
            child.wait()
            raise
    if child.returncode:
        raise RuntimeError(f"`python {' '.join(arguments)}` ended with code {child.returncode}: see {log}")


def prepare_data(config: CompareConfig) -> None:
    """Draw and encode the embedded scenes, as `make demo` does, unless they are there."""
    if not (LATENTS / "dataset.json").is_file():
        command(
            ["-m", "trainer.data.demo.scene_shards", "--out", str(IMAGES), "--num-images", "16000"],
            config.out / "data.log",
        )
        command(["-m", "trainer.data.encode", RECIPE], config.out / "data.log")


def train(config: CompareConfig, variant: str, seed: int, *changes: str) -> None:
    """Train one run, or what is left of it."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.processes}"]
    launch = launch if config.processes > 1 else []
    arguments = [*launch, "-m", "trainer.train", RECIPE, *config.overrides_of(variant, seed), *changes]
    command(arguments, config.out / f"{variant}_seed{seed}.log")


def measure_speed(config: CompareConfig) -> dict[str, list[float]]:
    """Images/s in training of each variant and round, read if it was measured with these settings."""
    path = config.out / "results" / "speed.json"
    settings = {name: config.overrides_of(name, 0) for name in config.variants}
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["of"] == settings and known["rounds"] == config.speed_rounds:
            return dict(known["images_per_second"])
    found: dict[str, list[float]] = {variant: [] for variant in config.variants}
    for _ in range(config.speed_rounds):
        for variant in config.variants:
            run_dir = config.out / "speed" / variant
            shutil.rmtree(run_dir, ignore_errors=True)
            train(config, variant, 0, f"run_dir={run_dir}", f"train.max_steps={SPEED_STEPS}",
                  f"train.log_every={SPEED_EVERY}", "train.checkpoint_every=0")  # fmt: skip
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            found[variant].append(statistics.median(line["images_per_second"] for line in lines[1:]))
    write_json(path, {"of": settings, "rounds": config.speed_rounds, "images_per_second": found})
    return found


def score(config: CompareConfig, variant: str, seed: int) -> dict[str, Any]:
    """All numbers of a trained run."""
    run_dir, settings = config.run_dir(variant, seed), config.overrides_of(variant, seed)
    suites = ["--prompts", "demo", "--suite", "fid,geneval", "--per-category", str(config.per_category)]
    command(["-m", "eval.run", str(run_dir), *suites], config.out / f"{variant}_seed{seed}.log")
    results = json.loads((run_dir / "eval" / "report.json").read_text())["results"]
    pipeline = Pipeline.load(run_dir)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    loss = validation_loss(pipeline)
    return {
        "variant": variant, "seed": seed, "steps": pipeline.step,
        "validation_loss": loss, "mean_validation_loss": statistics.mean(loss.values()),
        "fid": results["fid"]["fid"], "geneval": results["geneval"]["overall"]["value"],
        "curve": [[line["step"], line["loss"]] for line in lines],
        **sizes(load_config(RECIPE, settings), pipeline.shape, pipeline.info.max_tokens),
    }  # fmt: skip


def sizes(config: TrainConfig, shape: ModelShape, text_tokens: int) -> dict[str, float]:
    """Parameters in all and activated per token, forward FLOPs of an image."""
    counts = count_parameters(config, shape)
    tokens = (shape.height // config.model.patch_size) * (shape.width // config.model.patch_size)
    flops = 2 * forward_multiply_adds(config.model, config.moe, shape, tokens, text_tokens)
    return {"parameters": counts.total, "active_parameters": counts.active, "forward_flops": flops}


def result_of(config: CompareConfig, variant: str, seed: int) -> dict[str, Any]:
    """Read the result of a finished run with these settings, or make it."""
    path = config.out / "results" / f"{variant}_seed{seed}.json"
    settings = {"settings": config.overrides_of(variant, seed), "per_category": config.per_category}
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["of"] == settings:
            return known
    start = time.perf_counter()
    train(config, variant, seed)
    result = {"of": settings, **score(config, variant, seed), "seconds": time.perf_counter() - start}
    write_json(path, result)
    return result


def compare(config: CompareConfig) -> None:
    """Every run, the table after each."""
    for variant in config.variants:
        load_config(RECIPE, config.overrides_of(variant, 0))  # refuse before anything is drawn or trained
    config.out.mkdir(parents=True, exist_ok=True)
    prepare_data(config)
    results: list[dict[str, Any]] = []
    settings = {**asdict(config), "recipe": RECIPE}
    for seed in config.seeds:
        for variant in config.variants:
            results.append(result_of(config, variant, seed))
            done, last = len(results), results[-1]
            print(
                f"{done}/{len(config.seeds) * len(config.variants)} {variant} seed {seed}: validation loss "
                f"{last['mean_validation_loss']:.4f}, fid {last['fid']:.1f}, geneval {last['geneval']:.1%}",
                flush=True,
            )
            write_report(config.out, results, settings, {})
    write_report(config.out, results, settings, measure_speed(config))
    print(f"report: {config.out / 'compare.md'}")


def main(argv: list[str] | None = None) -> None:
    """Compare; exit code 2 and one sentence on a wrong option, 130 when stopped."""
    run_cli(lambda: compare(parse(argv)), stopped="the same command goes on from here")


if __name__ == "__main__":
    main()
