"""What other programs import: `from trainer import ...`, `from eval import ...`; cheap until it is used."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from trainer import read_metrics
from trainer.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_importing_costs_nothing_until_a_name_is_used(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    program = (
        "import sys, trainer; import eval as scores\n"
        "assert 'Pipeline' in dir(trainer) and 'score_folder' in dir(scores)\n"
        "from trainer import read_metrics\n"
        f"assert read_metrics({str(tmp_path)!r}) == [{{'step': 1, 'loss': 0.5}}]\n"
        "assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules), 'too much is imported'\n"
        "from trainer import Pipeline; assert Pipeline.__module__ == 'trainer.pipeline'\n"
        "from eval import score_folder; assert score_folder.__module__ == 'eval.scoring.score_folder'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_names_are_none() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Pipelin'"):
        exec("from trainer import Pipelin")
    assert not hasattr(trainer, "torch")


def test_metrics_are_a_list_that_a_table_is_made_of(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 0.5, "moe/1/coverage": 1.0}, {"step": 20, "loss": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lo')
    assert read_metrics(tmp_path) == read_metrics(str(tmp_path)) == rows
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl: name the folder of a run"):
        read_metrics(tmp_path / "none")
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(read_metrics(tmp_path))
    assert list(table["step"]) == [10, 20] and table["moe/1/coverage"].isna().tolist() == [False, True]


def test_the_readme_shows_names_that_there_are() -> None:
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"^from (trainer|eval) import ([\w, ]+)", text, re.MULTILINE)
    assert {module for module, _ in names} == {"trainer", "eval"}
    for module, listed in names:
        init = (ROOT / module / "__init__.py").read_text()
        assert all(f'"{name}"' in init for name in listed.split(", "))
