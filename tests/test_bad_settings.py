"""What would ruin a run hours later, or end it with a traceback, is refused at once, with one sentence."""

import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from moe.ranges import MOST, Range
from trainer.config import ConfigError, TrainConfig, load_config
from trainer.sample import main as sample
from trainer.train import main as train

ROOT = Path(__file__).parent.parent
REFUSED = tomllib.loads((ROOT / "tests/inputs/settings.toml").read_text())["refused"]
DEBUG = load_config("debug")


@pytest.mark.parametrize("override,words", REFUSED)
def test_a_ruinous_setting_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("debug", [override])
    assert words in str(error.value) and "\n" not in str(error.value)


def numbers(settings: Any) -> list[tuple[Any, str, Range | None]]:
    """(owner, field, range) of each number in a tree of settings, those that may be None included."""
    found = []
    for field in fields(settings):
        if is_dataclass(value := getattr(settings, field.name)):
            found += numbers(value)
        elif {field.type, *get_args(field.type)} & {int, float} and not isinstance(value, dict):
            found.append((settings, field.name, field.metadata.get("range")))
    return found


def test_each_number_has_a_finite_range_and_is_held_to_it() -> None:
    found = numbers(DEBUG)
    assert len(found) > 50 and isinstance(DEBUG, TrainConfig)
    for owner, name, allowed in found:
        assert allowed is not None and -MOST <= allowed.low < allowed.high <= 2**63 - 1, name
        for value in (float("nan"), float("inf"), float("-inf"), 1e30, -1 if allowed.low >= 0 else -1e30):
            with pytest.raises(ValueError, match=rf"{name} is {value}".replace("+", r"\+")):
                replace(owner, **{name: value})


RECIPES = {
    "empty": (b"", r"mine.yaml is empty: write at least one setting"),
    "comments": (b"# later\n", r"mine.yaml is empty"),
    "not UTF-8": (b"seed: 1 # \xff\xfe\n", r"mine.yaml: 'utf-8' codec can't decode"),
    "a list": (b"- seed\n", r"mine.yaml: expected a mapping"),
    "a key twice": (b"train:\n  max_steps: 1\n  max_steps: 2\n", r"mine.yaml: .*duplicate key max_steps .*line 3"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_what_is_no_recipe_is_refused(tmp_path: Path, case: str) -> None:
    content, words = RECIPES[case]
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_a_folder_or_cannot_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^recipe {tmp_path} is a folder: give a YAML file or one of debug"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"^no recipe xxx"):
        load_config("x" * 5000)


@pytest.mark.parametrize(
    "name,words", [("file", "Not a directory"), ("file/run", "Not a directory"), ("x" * 300, "File name too long")]
)
def test_a_run_folder_that_cannot_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        train(["debug", f"run_dir={tmp_path / name}"])
    message = capsys.readouterr().err
    assert error.value.code == 2 and f"run_dir={tmp_path / name}: {words}" in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--scale", "0"], "--scale is 0: use 1 to 100"),
        (["--seed", "-1"], "--seed is -1: use 0 to 9223372036854775807"),
        (["--num", "0"], "--num is 0: use 1 to 10000"),
        (["--out", "gone/a.png"], "--out gone/a.png: there is no folder gone"),
        (["--prompt", "a \udcff"], r"--prompt has 'a \udcff', which is not Unicode text"),
        (["--prompt", "\u200b"], r"--prompt has '\u200b', which shows no letter"),
    ],
)
def test_sampling_refuses_before_it_draws(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as error:
        sample(["runs/none", "--prompt", "a dog", *arguments])
    assert error.value.code == 2 and words in capsys.readouterr().err
