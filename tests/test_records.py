"""Files of one JSON object a line: what a killed writer leaves is neither read nor kept."""

from pathlib import Path

import pytest

from trainer.errors import ConfigError, sentence_of
from trainer.files import keep_records, read_records


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_records(path) == []
    path.write_text('{"n": 1}\n{"n": 2, "x": 0.10}\n{"n"')
    (tmp_path / ".events.jsonl.7-ab.tmp").write_text("left by a kill")
    assert read_records(path) == [{"n": 1}, {"n": 2, "x": 0.1}]
    keep_records(path, lambda record: record["n"] > 1)
    assert path.read_text() == '{"n": 2, "x": 0.10}\n', "lines stay as they were written"
    assert [found.name for found in tmp_path.iterdir()] == ["events.jsonl"]
    keep_records(tmp_path / "absent.jsonl", lambda record: True)
    assert not (tmp_path / "absent.jsonl").exists()


def test_errors_in_one_sentence() -> None:
    assert sentence_of(ConfigError("seed is -1: use 0 or more")) == "seed is -1: use 0 or more"
    assert sentence_of(OSError(28, "No space left on device", "/run/x")) == (
        "No space left on device (/run/x): free space"
    )
    assert sentence_of(OSError("shard 7 is gone")) == "shard 7 is gone"
    assert sentence_of(KeyError("x")) == "KeyError: 'x'"


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n": 1}\nnull\n')
    for read in (read_records, lambda file: keep_records(file, lambda record: record["n"] > 0)):
        with pytest.raises(ConfigError, match=r"metrics.jsonl has a damaged line \(null\), no JSON object: delete it"):
            read(path)
