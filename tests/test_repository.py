"""Rules of the repository itself: recipes load, JSON is strict, files and functions stay small, ASCII."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("moe", "trainer", "eval", "benchmarks", "tests")
PYTHON_FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
RECIPES = sorted((ROOT / "trainer" / "configs").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
DOCUMENT_FOLDERS = (ROOT, ROOT / "docs", ROOT / "ds_configs", ROOT / "slurm")
DOCUMENTS = [path for folder in DOCUMENT_FOLDERS for path in sorted(folder.glob("*.md"))]
TEXT_SUFFIXES = {".py", ".yaml", ".yml", ".json", ".toml", ".sh", ".sbatch", ".txt", ".cfg", ".ini"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_loads(path: Path) -> None:
    config = load_config(path)
    assert (ROOT / config.parallel.deepspeed_config).is_file()


@pytest.mark.parametrize("path", DS_CONFIGS, ids=name_of)
def test_deepspeed_config_is_strict_json(path: Path) -> None:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"repeated key among {keys}"
        return dict(pairs)

    content = json.loads(path.read_text(), object_pairs_hook=unique)
    assert content["zero_optimization"]["stage"] in (1, 2, 3)
    assert "optimizer" not in content and "scheduler" not in content


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_files_and_functions_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = {
        node.name: length
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_module_has_docstring(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


def own_bases() -> dict[str, set[str]]:
    """Class name -> names of its base classes that are defined in this repository."""
    bases = {
        node.name: {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}
        for path in PYTHON_FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }
    return {name: found & bases.keys() for name, found in bases.items()}


def test_inheritance_is_one_deep() -> None:
    bases = own_bases()
    deeper = {name: base for name, found in bases.items() for base in found if bases[base]}
    assert not deeper, f"derived from a class of ours that is derived itself: {deeper}"


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in PYTHON_FILES:
        if path.relative_to(ROOT).parts[0] in ("moe", "trainer", "eval"):
            for node in parsed(path).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(name_of(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_the_top_of_trainer_is_short() -> None:
    modules = [path.name for path in (ROOT / "trainer").glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 9, modules


def code_folders() -> set[str]:
    """Every folder of ours with code, and those whose files a user edits or reads."""
    folders = (
        {path.parent for path in PYTHON_FILES} | {path.parent for path in DOCUMENTS} | {path.parent for path in RECIPES}
    )
    return {f"{name_of(folder)}/" for folder in folders if folder != ROOT}


def test_the_readme_shows_every_folder_and_no_path_that_is_gone() -> None:
    section = (ROOT / "README.md").read_text().split("## Reading the code", 1)[1].split("\n## ", 1)[0]
    tree = re.findall(r"^((?:moe|trainer|eval|ds_configs|slurm|benchmarks|docs|tests)/[\w/.]*)", section, re.MULTILINE)
    assert not [path for path in tree if not (ROOT / path).exists()]
    assert not code_folders() - set(tree)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_paths_in_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])((?:moe|trainer|eval|docs)/[\w/]+\.(?:py|md|yaml|png))\b", text))
    links = {target for target in re.findall(r"\]\(([^)#:]+)\)", text) if "/" in target or "." in target}
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert not [target for target in links if not (path.parent / target).is_file()]


def source_files() -> Iterator[Path]:
    """Every text file that a person writes here, outside of environments and products."""
    folders = [ROOT / name for name in (*PACKAGES, "ds_configs", "slurm", ".ci")]
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix in TEXT_SUFFIXES or path.name in ("Makefile", "run"):
            yield path


@pytest.mark.parametrize("path", sorted(source_files()), ids=name_of)
def test_sources_are_ascii(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    assert not [number for number, line in enumerate(lines, start=1) if not line.isascii()]


def module_exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", [ROOT / "Makefile", *DOCUMENTS], ids=name_of)
def test_commands_in_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    modules = set(re.findall(r"-m ((?:moe|trainer|eval|benchmarks)[\w.]*\w)", text))
    assert not [module for module in modules if not module_exists(module)]
    files = set(re.findall(r"\b((?:trainer/configs|ds_configs|slurm|tests|benchmarks)/[\w/.-]*\w\.\w+)", text))
    assert not [file for file in files if not (ROOT / file).is_file()]
    targets = set(re.findall(r"^ *\$? ?make ([a-z]+)\b|`make ([a-z]+)`", text, re.MULTILINE))
    assert {first or second for first, second in targets} <= make_targets()
