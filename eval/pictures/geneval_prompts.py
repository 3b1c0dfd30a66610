"""GenEval's prompts by the rule that made them: 553 for the published seed, byte for byte the official file.

The rule is GenEval's (arXiv 2310.11513, MIT licence, Copyright (c) 2023 Dhruba Ghosh); another seed gives a fresh set
of the same kind, for a check that a model is not fitted to the published one.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.pictures.geneval_names import CLASSES, COLORS
from eval.pictures.prompts import Prompt

OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
_PER_TASK = 100  # drawn; repeated rows are dropped afterwards
_RELATIONS = ("left of", "right of", "above", "below")
_NUMERALS = ("zero", "one", "two", "three", "four")
_THINGS = CLASSES[1:]  # all but a person, which has no colour
Row = dict[str, Any]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """The official file's plural, which is naive on purpose: "benchs", "knifes"."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _several(draw: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """Different words; like `_one`, drawn as the official program does."""
    return [words[i] for i in draw.choice(len(words), size=count, replace=False)]


def _one(draw: np.random.Generator, words: Sequence[str]) -> str:
    return words[draw.choice(len(words))]


def _row(tag: str, include: list[Row], prompt: str, exclude: list[Row] | None = None) -> Row:
    return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": prompt}


def _counting(draw: np.random.Generator) -> Row:
    name = _one(draw, CLASSES)
    count = int(draw.integers(2, 4, endpoint=True))
    prompt = f"a photo of {_NUMERALS[count]} {_plural(name)}"
    exclude = [{"class": name, "count": count + 1}]
    return _row("counting", [{"class": name, "count": count}], prompt, exclude)


def _colors(draw: np.random.Generator) -> Row:
    name, color = _one(draw, _THINGS), _one(draw, COLORS)
    prompt = f"a photo of {_article(color)} {name}"
    return _row("colors", [{"class": name, "count": 1, "color": color}], prompt)


def _position(draw: np.random.Generator) -> Row:
    first, second = _several(draw, CLASSES, 2)
    relation = _one(draw, _RELATIONS)
    include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    return _row("position", include, f"a photo of {_article(first)} {relation} {_article(second)}")


def _color_attr(draw: np.random.Generator) -> Row:
    names, colors = _several(draw, _THINGS, 2), _several(draw, COLORS, 2)
    include = [{"class": n, "count": 1, "color": c} for n, c in zip(names, colors, strict=True)]
    words = [f"{_article(c)} {n}" for n, c in zip(names, colors, strict=True)]
    return _row("color_attr", include, f"a photo of {words[0]} and {words[1]}")


def _two_objects(draw: np.random.Generator) -> Row:
    first, second = _several(draw, CLASSES, 2)
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _row("two_object", include, f"a photo of {_article(first)} and {_article(second)}")


def geneval_rows(seed: int = OFFICIAL_SEED) -> list[Row]:
    """Rows of evaluation_metadata.jsonl, in order, without repeated ones."""
    draw = np.random.default_rng(seed)
    rows = [
        _row("single_object", [{"class": name, "count": 1}], f"a photo of {_article(name)}")
        for name in _several(draw, CLASSES, len(CLASSES))
    ]
    for task in (_two_objects, _counting, _colors, _position, _color_attr):
        rows += [task(draw) for _ in range(_PER_TASK)]
    return list({json.dumps(row): row for row in rows}.values())


def geneval_prompts(seed: int = OFFICIAL_SEED) -> list[Prompt]:
    """The set as prompts, whose ids are its seed and their number."""
    return [
        Prompt(id=f"geneval/{seed}/{number:05d}", text=row["prompt"], tag=row["tag"], metadata=row)
        for number, row in enumerate(geneval_rows(seed))
    ]
