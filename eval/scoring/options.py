"""The suites by name, and the command-line options of scoring, shared by `eval.run`, `eval.score` and `eval.watch`.

Nothing heavy is imported here, so that --help answers at once. Options that are not given keep the defaults of
`eval.scoring.job.ScoreConfig`.
"""

import argparse
from pathlib import Path

SUITES = {
    "fid": "eval.suites.fid",
    "cmmd": "eval.suites.cmmd",
    "dino": "eval.suites.dino",
    "clip": "eval.suites.clip",
    "geneval": "eval.suites.geneval",
    "text": "eval.suites.text",
}
"""Name on the command line -> module with `SUITE`, imported when it is used. A further suite is a file and a line."""

EMBEDDED = "embedded"
"""In place of a folder or a detector: the built-in scenes, and the detector that knows them."""


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add what shapes the numbers of the suites."""
    add = parser.add_argument
    add("--reference", type=Path, help="real pictures: a folder, an npz of statistics or pictures, or embedded")
    add("--true-pictures", type=Path, help="a true picture of each prompt, for controls: GenEval's layout, or embedded")
    add("--convention", help="resize of FID: torch-fidelity, clean, pytorch-fid (default torch-fidelity)")
    add("--clip", help="CLIP of score and colours: ARCH:TAG or ARCH:FILE (default ViT-L-14:openai)")
    add("--cmmd-clip", help="CLIP of CMMD: ARCH:TAG or ARCH:FILE (default ViT-L-14-336:openai)")
    add("--detector", help="mask2former (default), mask2former-hf:DIR, maskrcnn, yolov3-tiny, embedded")
    add("--colors", help="judge of colours: clip (default), or nearest (no weights, for checks)")
    add("--min-score", type=float, help="GenEval's least detection score (default 0.3)")
    add("--min-counting-score", type=float, help="the same for counts (default 0.9)")
    add("--neighbours", dest="num_neighbours", type=int, help="k of precision, recall, density, coverage (default 3)")


def split_names(names: str) -> tuple[str, ...]:
    """Names of a comma list, each once, in their order."""
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
