"""Prints settings with type, default and meaning, read from the source: the string below a field describes it."""

import ast
import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args

from trainer.errors import ConfigError

_BY_ITSELF = re.compile(r"\s*\|")  # a row of a table, whose line breaks stay


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, or a section of them (`type` and `default` are empty then); `name` is its path, `optim.beta1`."""

    name: str
    type: str
    default: str
    description: str
    range: str = ""


def field_docstrings(cls: type) -> dict[str, str]:
    """Description of each field of a dataclass that has one: the string right below it, in its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for here, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                found[here.target.id] = " ".join(below.value.value.split())
    return found


def list_settings(cls: type, path: str = "") -> Iterator[Setting]:
    """All settings of a tree of dataclasses with their defaults, each section before its own; its class describes it.

    What is described nowhere has an empty description. No class is instantiated: its checks may import PyTorch.
    """
    described = field_docstrings(cls)
    for field in fields(cls):
        name = f"{path}{field.name}"
        if isinstance(field.type, type) and is_dataclass(field.type):
            text = inspect.getdoc(field.type) or ""
            if text.startswith(f"{field.type.__name__}("):  # only the signature that a dataclass makes up
                text = ""
            yield Setting(name=name, type="", default="", description=text)
            yield from list_settings(field.type, f"{name}.")
        else:
            value = field.default if field.default_factory is MISSING else field.default_factory()
            default = value if isinstance(value, str) and value else json.dumps(value)  # as a recipe has it
            description = described.get(field.name, "")
            allowed = str(field.metadata.get("range", ""))
            yield Setting(name=name, type=_type(field.type), default=default, description=description, range=allowed)


def _type(annotation: Any) -> str:
    """The choices of a Literal, otherwise the type as Python writes it."""
    if choices := [choice for choice in get_args(annotation) if isinstance(choice, str)]:
        return " | ".join(choices)
    name = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return name.replace("None", "null")


def describe_settings(cls: type, prefix: str = "", width: int = 80) -> str:
    """Text for a terminal on all settings whose name begins with `prefix`, or ConfigError that names close ones."""
    settings = list(list_settings(cls))
    chosen = [setting for setting in settings if setting.name.startswith(prefix)]
    if not chosen:
        raise ConfigError(f"no setting begins with {prefix}; {_hint(prefix, [setting.name for setting in settings])}")
    column = max(len(setting.name) for setting in chosen) + 2
    return "\n".join(line for setting in chosen for line in _lines(setting, column, width))


def _hint(word: str, names: list[str]) -> str:
    """Names that `word` may stand for, compared whole or without their section."""
    by_leaf = {name.rpartition(".")[2]: name for name in names}
    close = [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], by_leaf)]
    close = list(dict.fromkeys(close + difflib.get_close_matches(word, names, cutoff=0.8)))
    sections = ", ".join(name for name in names if "." not in name)
    return f"did you mean {' or '.join(close)}?" if close else f"names begin with {sections}"


def _lines(setting: Setting, column: int, width: int) -> Iterator[str]:
    """A section's name and text after an empty line; of a setting its name, type and default, its text below."""
    if not setting.type:
        yield ""
        yield f"[{setting.name}]"
        for paragraph in setting.description.split("\n\n"):
            yield paragraph if _BY_ITSELF.match(paragraph) else _wrap(paragraph, "", width)
        yield ""
        return
    allowed = f" ({setting.range})" if setting.range else ""
    facts = f"{setting.type}{allowed}, default {setting.default}"
    yield _wrap(facts, " " * column, width, f"{setting.name:{column}}")
    if setting.description:
        yield _wrap(setting.description, "    ", width)


def _wrap(text: str, indent: str, width: int, first: str | None = None) -> str:
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=indent if first is None else first, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
