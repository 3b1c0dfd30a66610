"""GenEval's prompts by the rule that made them: 553 for the published seed, byte for byte the official file.

The rule is GenEval's (arXiv 2310.11513, MIT licence, Copyright (c) 2023 Dhruba Ghosh); another seed gives a fresh set
of the same kind, for a check that a model is not fitted to the published one.
"""

import json
from typing import Any

import numpy as np

from eval.pictures.geneval_names import CLASSES, COLORS
from eval.pictures.prompts import Prompt

OFFICIAL_SEED = 43
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
_PER_TASK = 100  # drawn; repeated rows are dropped afterwards
_RELATIONS = ("left of", "right of", "above", "below")
_NUMERALS = ("zero", "one", "two", "three", "four")
_PERSON = CLASSES.index("person")
Row = dict[str, Any]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    """The official file's plural, which is naive on purpose: "benchs", "knifes"."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


class _Draw:
    """The random choices, in the order of the official program."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def several(self, count: int, size: int) -> list[int]:
        return [int(i) for i in self.generator.choice(size, size=count, replace=False)]

    def one(self, size: int) -> int:
        return int(self.generator.choice(size))

    def objects(self, count: int) -> list[str]:
        return [CLASSES[i] for i in self.several(count, len(CLASSES))]

    def things(self, count: int) -> list[str]:
        """Classes other than a person, which has no colour."""
        return [CLASSES[(i + 1 + _PERSON) % len(CLASSES)] for i in self.several(count, len(CLASSES) - 1)]


def _row(tag: str, include: list[Row], prompt: str, exclude: list[Row] | None = None) -> Row:
    return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": prompt}


def _counting(draw: _Draw) -> Row:
    name = CLASSES[draw.one(len(CLASSES))]
    count = int(draw.generator.integers(2, 4, endpoint=True))
    prompt = f"a photo of {_NUMERALS[count]} {_plural(name)}"
    exclude = [{"class": name, "count": count + 1}]
    return _row("counting", [{"class": name, "count": count}], prompt, exclude)


def _colors(draw: _Draw) -> Row:
    name = CLASSES[(draw.one(len(CLASSES) - 1) + 1 + _PERSON) % len(CLASSES)]
    color = COLORS[draw.one(len(COLORS))]
    prompt = f"a photo of {_article(color)} {name}"
    return _row("colors", [{"class": name, "count": 1, "color": color}], prompt)


def _position(draw: _Draw) -> Row:
    first, second = draw.objects(2)
    relation = _RELATIONS[draw.one(len(_RELATIONS))]
    include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
    return _row("position", include, f"a photo of {_article(first)} {relation} {_article(second)}")


def _color_attr(draw: _Draw) -> Row:
    names, colors = draw.things(2), [COLORS[i] for i in draw.several(2, len(COLORS))]
    include = [{"class": n, "count": 1, "color": c} for n, c in zip(names, colors, strict=True)]
    words = [f"{_article(c)} {n}" for n, c in zip(names, colors, strict=True)]
    return _row("color_attr", include, f"a photo of {words[0]} and {words[1]}")


def _two_objects(draw: _Draw) -> Row:
    first, second = draw.objects(2)
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _row("two_object", include, f"a photo of {_article(first)} and {_article(second)}")


def geneval_rows(seed: int = OFFICIAL_SEED) -> list[Row]:
    """Rows of evaluation_metadata.jsonl, in order, without repeated ones."""
    draw = _Draw(seed)
    rows = [
        _row("single_object", [{"class": name, "count": 1}], f"a photo of {_article(name)}")
        for name in draw.objects(len(CLASSES))
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
