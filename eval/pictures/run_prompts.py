"""Prompts that belong to a run: captions of its own data, and which set it is scored on when none is named.

There is no default for data of one's own: a standard benchmark and captions that a model has learned say different
things. The built-in scenes are drawn only by a model that has learned from them.
"""

import json
from pathlib import Path

from eval.pictures.prompt_files import text_prompts
from eval.pictures.prompts import Prompt
from trainer.config import ConfigError, load_config, require
from trainer.data.demo.scenes import all_captions
from trainer.data.latents.dataset_file import read_dataset_file

CAPTIONS = "captions"
_NUM_CAPTIONS, _MAX_SHARDS, _LOOKED_AT = 1000, 256, 50
_NAME_ONE = f"name geneval, a file or folder of prompts, {CAPTIONS}[:N] for some that the model has learned, or demo"


def learned_captions(run: Path, count: int) -> list[str]:
    """`count` different captions, or all there are, evenly spread over the data of a run; ConfigError without data."""
    require((run / "config.yaml").is_file(), f"{run} has no config.yaml, so its data are not known: {_NAME_ONE}")
    data = load_config(run / "config.yaml").data
    require(data.source == "shards", f"{run} learned from synthetic data, which has no captions: {_NAME_ONE}")
    found: dict[str, None] = {}
    for name in data.mix or [data.latents]:
        folder = read_dataset_file(Path(name))
        for number in folder.spread(min(_MAX_SHARDS, count)):
            path = (folder.path / folder.shards[number].file).with_suffix(".samples.json")
            try:
                found |= dict.fromkeys(json.loads(path.read_bytes())["captions"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} cannot be read: run python -m trainer.data.encode again") from error
    captions = [caption for caption in found if caption.strip()]
    return [captions[k * len(captions) // min(count, len(captions))] for k in range(min(count, len(captions)))]


def default_set(run: Path) -> str:
    """`demo` for a run on the built-in scenes; ConfigError, naming what to choose from, for any other."""
    try:
        captions = learned_captions(run, _LOOKED_AT)
    except ConfigError as error:
        raise ConfigError(f"--prompts is missing: {error}") from error
    require(
        bool(captions) and all_captions().issuperset(captions),
        f"--prompts is missing: {run} learned from data of its own, not from the built-in scenes: {_NAME_ONE}",
    )
    return "demo"


def run_captions(run: Path, spec: str) -> list[Prompt]:
    """The set `captions[:N]` of a run."""
    count = spec.partition(":")[2] or str(_NUM_CAPTIONS)
    require(count.isdecimal() and int(count) > 0, f"--prompts {spec}: the number must be 1 or more")
    return text_prompts(learned_captions(run, int(count)))
