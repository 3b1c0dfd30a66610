"""Prompt sets by name or from files, whatever benchmark they belong to.

    demo               the built-in scenes (eval.demo.prompts)
    geneval[:SEED]     GenEval by its rule; without a seed the official 553
    FILE.txt           a prompt per line
    FILE.csv, .tsv     a header with prompt (caption, text) and optionally id (item_id, caption_id), tag (category): as
                       PartiPrompts and DPG-Bench; rows that repeat an id and its prompt (DPG's questions) are one
    FILE.jsonl         the same keys per line, all kept as metadata: GenEval, GenEval 2, lists of `eval.coco`
    FOLDER             a file NAME.txt per prompt (DPG-Bench)

Without an id a prompt is named by a hash of its text, so that its pictures stay the same in another set.
"""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.pictures.geneval_prompts import OFFICIAL_SEED, geneval_prompts
from eval.pictures.prompts import Prompt
from trainer.config import ConfigError, require

_TEXT = ("prompt", "caption", "text")
_ID = ("id", "item_id", "caption_id")
_TAG = ("tag", "category")
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs by their category, and yet nothing to see
_Row = tuple[int, Mapping[str, Any]]


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    lower = {key.lower(): value for key, value in row.items()}
    return next((lower[name] for name in names if lower.get(name) not in (None, "")), None)


def read_utf8(path: Path) -> str:
    """A text without the mark that some programs put before it (BOM); ConfigError for other encodings."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason}): convert it") from error


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    """Number and text of each line that is not blank; only line feeds part them, as in a text editor."""
    return [(number, line) for number, line in enumerate(read_utf8(path).split("\n"), 1) if line.strip()]


def _text_rows(path: Path) -> Iterable[_Row]:
    return [(number, {"prompt": line.strip()}) for number, line in _lines(path)]


def _table_rows(path: Path) -> Iterable[_Row]:
    text = io.StringIO(read_utf8(path), newline="")
    csv.field_size_limit(131_072)  # the limit is of the process, and lists of URLs have another
    reader = csv.DictReader(text, strict=True, delimiter="\t" if path.suffix == ".tsv" else ",")
    rows = []
    try:
        for row in reader:
            words = "has more fields than the header: put those with commas, tabs or line breaks in quotes"
            require(None not in row, f"{path} row {reader.line_num} {words}")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        line = reader.reader.line_num
        raise ConfigError(f"{path} line {line} ends no row of a table ({error}): correct its quotes") from error
    names = [name.lower() for name in reader.fieldnames or []]
    require(
        any(name in names for name in _TEXT),
        f"{path} has the columns {', '.join(names) or 'none'}: name one of them prompt, caption or text",
    )
    return rows


def json_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Number and object of each line of a .jsonl file; ConfigError for a line that has none."""
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            raise ConfigError(f"{path} line {number} is no JSON ({why}): correct it") from error
        require(isinstance(row, dict), f"{path} line {number} is no JSON object: correct it")
        rows.append((number, row))
    return rows


def _folder_rows(path: Path) -> Iterable[_Row]:
    files = sorted(path.glob("*.txt"))
    return [(n, {"id": f.stem, "prompt": read_utf8(f).strip()}) for n, f in enumerate(files, 1)]


_READERS = {".txt": _text_rows, ".csv": _table_rows, ".tsv": _table_rows, ".jsonl": json_rows}


def _is_visible(text: str) -> bool:
    """Whether there is a letter, a number or a sign, not only spaces, marks and what shows nothing."""
    return any(unicodedata.category(letter)[0] in "LNPS" and letter not in _BLANK for letter in text)


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether all its texts can be written: JSON's escapes can stand for half a character."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_prompts(texts: Iterable[str]) -> list[Prompt]:
    """Different texts as a set."""
    return [Prompt(id=_name_of(text), text=text, tag="", metadata={"prompt": text}) for text in texts]


def read_prompt_file(path: Path) -> list[Prompt]:
    """The prompts of a file or folder; ConfigError for an empty set, a row without text, or a repeated one."""
    if path.is_dir():
        rows = _folder_rows(path)
    else:
        require(path.suffix in _READERS, f"--prompts {path}: use {', '.join(_READERS)}, a folder of .txt, or geneval")
        require(path.is_file(), f"--prompts {path} is not a file")
        rows = _READERS[path.suffix](path)
    prompts: dict[str, Prompt] = {}
    lines: dict[str, int] = {}
    for number, row in rows:
        text = _first(row, _TEXT)
        require(isinstance(text, str) and _is_visible(text), f"{path} row {number} has no prompt: fill or delete it")
        require(_is_whole(row), f"{path} row {number} has half a surrogate pair, as \\ud83d: write whole characters")
        given = _first(row, _ID)
        name = str(given) if given is not None else _name_of(text)
        if name in prompts:
            same = path.suffix in (".csv", ".tsv") and given is not None and prompts[name].text == text
            require(same, f"{path} row {number} repeats row {lines[name]} ({name}): delete one, or give each an id")
            continue
        tag = _first(row, _TAG)
        prompts[name] = Prompt(id=name, text=text, tag=str(tag or ""), metadata={**row, "prompt": text})
        lines[name] = number
    require(bool(prompts), f"--prompts {path} is empty: give at least one prompt")
    return list(prompts.values())


def read_prompts(spec: str) -> list[Prompt]:
    """The set that --prompts names, other than the built-in scenes; ConfigError if it cannot be used."""
    name, _, seed = spec.partition(":")
    if name == "geneval":
        require(not seed or seed.isdecimal(), f"--prompts {spec}: the seed must be a number")
        return geneval_prompts(int(seed) if seed else OFFICIAL_SEED)
    return read_prompt_file(Path(spec))
