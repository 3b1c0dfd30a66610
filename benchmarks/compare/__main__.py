"""Does expert choice pay? Dense, token choice and expert choice on drawn scenes, at equal activated FLOPs.

    python -m benchmarks.compare --out runs/compare                       # all studies; goes on where it stopped
    python -m benchmarks.compare --out runs/compare --minutes 150         # a sitting
    python -m benchmarks.compare --out runs/gpu --minutes 10 --device cuda --studies pair    # 87M activated parameters

Scenes of 64 x 64 pixels with up to six objects of 256 kinds are drawn on the fly, so none is met twice. Each run is
one process and writes its state and OUT/runs/NAME.json; the page OUT/compare.html and OUT/compare.json are written
after each run. Two runs side by side on two CPU cores (`--jobs`), one after another on a GPU.
"""

import argparse
from pathlib import Path

from trainer.config import command_parser


def command_line() -> argparse.ArgumentParser:
    """Options; see the module docstring."""
    parser = command_parser("benchmarks.compare", __doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--studies", nargs="+", help="some of those that the page names (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the main pair (default 0 1 2)")
    parser.add_argument(
        "--steps", type=int, help="of the main pair (default: 4000; with --minutes on a GPU, what fits)"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--size", choices=("small", "large"), help="of the models (default: small on a CPU, else large)"
    )
    parser.add_argument("--jobs", type=int, help="runs side by side (default: the cores of a CPU, 1 on a GPU)")
    return parser


if __name__ == "__main__":
    command_line().parse_known_args()  # --help and mistakes are answered before torch is imported

from benchmarks.compare.run import Comparison, compare
from trainer.config import interruptible


@interruptible("each run is kept up to its last step, and the same command goes on")
def main(argv: list[str] | None = None) -> None:
    """Compare; exit code 2 and one sentence on a wrong option, 130 when stopped."""
    compare(Comparison.of(command_line().parse_args(argv)))


if __name__ == "__main__":
    main()
