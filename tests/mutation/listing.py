"""The list of planted faults (mutations.toml), and lines of another form turned into its entries.

    python -m tests.mutation.listing convert LINES >> tests/mutation/mutations.toml

An entry has `file`, `old` (exact, once in the file), `new`, `tests` (files or test ids that should notice), and where
no test can notice `equivalent` with the reason. LINES holds `file | old | new | tests` a line, \\n for a line break;
an old text with the separator in it is found by occurring once in its file, or by having as many as the new one.
"""

import ast
import hashlib
import json
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.toml")


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One text replaced by another at one place of one file."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""

    def title(self) -> str:
        """The change on one line, short enough for a table."""
        old, new = (" ".join(text.split()) or "nothing" for text in (self.old, self.new))
        return f"{self.file}: {old[:60]} -> {new[:60]}"

    def digest(self, root: Path) -> str:
        """Name of the mutation together with the texts of its file and its tests: a change of them asks anew."""
        files = [self.file, *dict.fromkeys(test.partition("::")[0] for test in self.tests)]
        parts = [self.file, self.old, self.new, *self.tests, *((root / name).read_text() for name in files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def plant(self, root: Path) -> str:
        """Change the file under `root`; returns what it held before."""
        path = root / self.file
        before = path.read_text()
        path.write_text(before.replace(self.old, self.new))
        return before


def read_list(path: Path = LIST) -> list[Mutation]:
    """The entries of a list."""
    entries = tomllib.loads(path.read_text()).get("mutation", [])
    return [Mutation(**{**entry, "tests": tuple(entry.get("tests", ()))}) for entry in entries]


def faults(mutation: Mutation, root: Path = ROOT) -> list[str]:
    """What is wrong with an entry: a text that is not there once, a test that does not exist."""
    path, found = root / mutation.file, []
    count = path.read_text().count(mutation.old) if path.is_file() and mutation.old else 0
    if count != 1:
        found.append(f"old text occurs {count} times in {mutation.file}: {mutation.old!r}")
    elif mutation.file.endswith(".py") and not parses(path.read_text().replace(mutation.old, mutation.new)):
        found.append("the file is no Python any more, which every test would notice")
    if mutation.old == mutation.new:
        found.append("old and new are the same")
    if not mutation.tests and not mutation.equivalent:
        found.append("names no test, and no reason why none can notice")
    for test in mutation.tests:
        name, _, function = test.partition("::")
        known = _names_in((root / name).read_text()) if (root / name).is_file() else frozenset()
        if not known or (function and function.partition("[")[0] not in known):
            found.append(f"there is no test {test}")
    return [f"{mutation.title()}: {fault}" for fault in found]


def parses(code: str) -> bool:
    """Whether this is Python."""
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


@cache
def _names_in(code: str) -> frozenset[str]:
    """Names of the test functions of a file."""
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def from_line(line: str, root: Path = ROOT) -> Mutation:
    """The entry of a line; ValueError if it is not clear where its old text ends."""
    file, *middle, tests = line.replace(" | | ", " |  | ").split(" | ")
    content = (root / file).read_text()
    found: list[tuple[str, str]] = []
    for at in range(1, len(middle)):
        old, new = " | ".join(middle[:at]), " | ".join(middle[at:])
        # A backslash and an n are a line break, unless the file itself has them.
        pairs = [(old, new), (old.replace("\\n", "\n"), new.replace("\\n", "\n"))]
        found += [pair for pair in pairs if content.count(pair[0]) == 1][:1]
    if len(found) > 1:
        found = [(old, new) for old, new in found if old.count(" | ") == new.count(" | ")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} ways to read this line, its old text must be in the file once: {line}")
    ((old, new),) = found
    return Mutation(file=file, old=old, new=new, tests=tuple(tests.replace(",", " ").split()))


def as_toml(mutation: Mutation) -> str:
    """An entry as text; basic strings of TOML are written like those of JSON."""
    rows = [f"{key} = {json.dumps(getattr(mutation, key))}" for key in ("file", "old", "new")]
    rows.append(f"tests = {json.dumps(list(mutation.tests))}")
    rows += [f"equivalent = {json.dumps(mutation.equivalent)}"] if mutation.equivalent else []
    return "\n".join(["[[mutation]]", *rows, ""])


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "convert":
        sys.exit("usage: python -m tests.mutation.listing convert LINES")
    for text in Path(sys.argv[2]).read_text().splitlines():
        if text.strip() and not text.startswith("#"):
            print(as_toml(from_line(text)))
