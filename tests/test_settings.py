"""Settings can be looked up: each is described beside its field, and a command prints them at once."""

import re
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

import pytest

from trainer.config import ConfigError, TrainConfig, load_config
from trainer.settings.describe import Setting, describe_settings, field_docstrings, list_settings
from trainer.train import main

ROOT = Path(__file__).resolve().parent.parent
MIN_WORDS = 4
SETTINGS = list(list_settings(TrainConfig))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Two sizes.

    They are small.
    """

    width: int = 3
    """Of a thing,
    in metres; 1 or more."""
    height: int | None = None


@dataclass(frozen=True, kw_only=True)
class Silent:
    depth: int = 1

    def __post_init__(self) -> None:
        raise AssertionError("nothing is built to be described: the checks of a section may import torch")


@dataclass(frozen=True, kw_only=True)
class Tree:
    """All there is."""

    name: str = ""
    """What it is called."""
    sizes: Sizes = field(default_factory=Sizes)
    silent: Silent = field(default_factory=Silent)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_is_described_beside_its_field(setting: Setting) -> None:
    assert len(setting.description.split()) >= MIN_WORDS
    if setting.type in ("int", "float"):  # a number has a range
        assert re.search(r"\d|any number", setting.description)


def test_every_section_and_its_settings_are_listed() -> None:
    names = [setting.name for setting in SETTINGS]
    assert len(names) == len(set(names)) > 90
    assert {"run_dir", "optim", "optim.beta1", "moe.num_experts", "data.mix"} <= set(names)


def classes_of(cls: type) -> set[str]:
    nested = [f.type for f in fields(cls) if isinstance(f.type, type) and is_dataclass(f.type)]
    return {cls.__name__}.union(*map(classes_of, nested))


def test_no_settings_class_stands_apart() -> None:
    files = [path for name in ("moe", "trainer") for path in (ROOT / name).rglob("*.py")]
    found = [name for path in files for name in re.findall(r"^class (\w+Config)\b", path.read_text(), re.MULTILINE)]
    assert sorted(found) == sorted(classes_of(TrainConfig))


def test_descriptions_come_from_the_string_below_the_field() -> None:
    assert field_docstrings(Sizes) == {"width": "Of a thing, in metres; 1 or more."}
    assert list(list_settings(Tree)) == [
        Setting(name="name", type="str", default='""', description="What it is called."),
        Setting(name="sizes", type="", default="", description="Two sizes.\n\nThey are small."),
        Setting(name="sizes.width", type="int", default="3", description="Of a thing, in metres; 1 or more."),
        Setting(name="sizes.height", type="int | null", default="null", description=""),
        Setting(name="silent", type="", default="", description=""),
        Setting(name="silent.depth", type="int", default="1", description=""),
    ]


def test_text_is_wrapped_and_aligned() -> None:
    lines = describe_settings(TrainConfig, "optim", width=70).splitlines()
    assert max(map(len, lines)) <= 70
    facts = [line for line in lines if line.startswith("optim.")]
    assert [line.split()[0] for line in facts] == [s.name for s in SETTINGS if s.name.startswith("optim.")]
    assert len({re.search(r"\S\s+(\S)", line).start(1) for line in facts}) == 1  # type: ignore[union-attr]
    assert facts[0].endswith("adamw | sgd, default adamw")
    assert facts[2].endswith("float (0 to below 1), default 0.9")


@pytest.mark.parametrize(
    "prefix,words",
    [
        ("optim.lr", "no setting begins with optim.lr; "),
        ("learning_rat", "did you mean optim.learning_rate"),
        ("train.micro_bach", "did you mean train.micro_batch_size?"),
        ("zzz", "names begin with run_dir, seed, init_from, train, parallel, moe"),
    ],
)
def test_unknown_prefix_is_one_sentence_with_close_names(prefix: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        describe_settings(TrainConfig, prefix)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_train_prints_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, found, absent in ((["--settings"], "seed", "\t"), (["--settings", "data.mix"], "data.mix", "seed")):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        printed = capsys.readouterr().out
        assert not done.value.code and found in printed and absent not in printed
    with pytest.raises(SystemExit) as refused:
        main(["--settings", "optim.schedul-"])
    message = capsys.readouterr().err
    assert refused.value.code == 2
    assert message == "error: no setting begins with optim.schedul-; did you mean optim.schedule?\n"


def test_an_unknown_key_without_a_close_one_names_the_command() -> None:
    with pytest.raises(ConfigError, match=r"known keys are .* \(python -m trainer.train --settings describes them\)$"):
        load_config("debug", ["xylophone=1"])


def commands() -> list[str]:
    """Every module that `python -m` runs."""
    found = []
    for folder in ("moe", "trainer", "eval", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if '__name__ == "__main__"' in path.read_text() or path.name == "__main__.py":
                found.append(
                    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
                )
    return found


def test_the_commands_of_the_project_are_found() -> None:
    known = {"trainer.train", "trainer.plan", "trainer.checkpoint", "trainer.cluster", "eval.run", "benchmarks.parity"}
    assert known <= set(commands()) and len(commands()) > 25


HEAVY_PACKAGES = ("torch", "deepspeed", "transformers", "scipy", "matplotlib")
ANSWER = f"""
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as done:
    assert not done.code, f"exit code {{done.code}}"
heavy = [name for name in {HEAVY_PACKAGES} if name in sys.modules]
assert not heavy, f"{{module}} imports {{heavy}} before it answers"
"""


@pytest.mark.parametrize(
    "arguments", [*([name, "--help"] for name in commands()), ["trainer.train", "--settings"]], ids=" ".join
)
def test_help_answers_without_the_heavy_packages(arguments: list[str]) -> None:
    # Each in a process of its own: what one command imports says nothing of the next.
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
