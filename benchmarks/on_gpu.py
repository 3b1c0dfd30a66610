"""All that only a GPU can say of speed, in one process, the most important first; each table is printed as it comes.

    python -m benchmarks.on_gpu --device h100
    python -m benchmarks.on_gpu --device h100 --only step sampling

A new process costs a GPU machine a quarter of a minute and a first compilation more than one, so nothing is started
twice. A benchmark that fails is named at the end, after the others: exit code 1.
"""

import argparse

from trainer.cluster.leave import run_and_leave
from trainer.config import command_parser

LARGE = "train.activation_checkpointing=false parallel.ep_size=1 data.num_workers=2"
ZERO_3 = "parallel.deepspeed_config=ds_configs/zero3.json"
XL = f"ec_dit_xl_8e model.num_layers=8 {LARGE} {ZERO_3}"
RUNS = (
    ("step", f"{XL} train.micro_batch_size=256 --steps 5 --profile"),
    ("step", f"{XL} --steps 5 --micro-batches 32,64,128,256,512"),
    ("step", f"{XL} train.micro_batch_size=256 train.compile=false --steps 5 --profile"),
    ("step", f"ec_dit_3xl_8e model.num_layers=6 {LARGE} {ZERO_3} train.micro_batch_size=128 "
             "train.gradient_accumulation_steps=2 --steps 5 --profile"),
    ("step", f"{XL} train.micro_batch_size=256 parallel.deepspeed_config=ds_configs/zero1.json --steps 5"),
    ("moe_layer", "--device cuda --dim 1152 --batch-size 64 --dtypes bf16 --rounds 5 --repeats 10"),
    ("sampling", "ec_dit_xl_8e --device cuda --images 16"),
    ("determinism", f"{XL} train.micro_batch_size=256"),
    ("host_time", "train.compile=true --rounds 9"),
)  # fmt: skip


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.on_gpu", __doc__)
    parser.add_argument("--device", default="h100", help="what trainer.plan takes the device for (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=sorted({name for name, _ in RUNS}), help="benchmarks (default all)"
    )
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

import faulthandler
import gc
import sys
import time
import traceback
from importlib import import_module

import torch

from trainer.distributed import detect_world, process_group

PLANNED = ("step", "determinism")  # those that ask the planner, too
SILENCE = 180.0  # seconds after which all threads say where they are


def run(name: str, words: list[str]) -> bool:
    """Run one benchmark in this process and give its memory back; whether it came to its end."""
    start = time.perf_counter()
    print(f"\n# python -m benchmarks.{name} {' '.join(words)}", flush=True)
    faulthandler.dump_traceback_later(SILENCE, repeat=True, file=sys.__stderr__ or sys.stderr)
    try:
        import_module(f"benchmarks.{name}").main(words)
        return True
    except (Exception, SystemExit):
        traceback.print_exc()
        return False
    finally:
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        torch.cuda.empty_cache()
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run all; exit code 1 if one failed."""
    options = command_line().parse_args(argv)
    failed = []
    with process_group(detect_world()):  # one for all
        for name, line in RUNS:
            if options.only and name not in options.only:
                continue
            words = [*line.split(), *(["--device", options.device] if name in PLANNED else [])]
            if not run(name, words):
                failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_and_leave(main)
