"""The benchmark of the data path runs and measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data_loading
from benchmarks.data_loading import CHANNELS, SIDE, TOKENS, WIDTH, open_samples, write_samples
from benchmarks.real_shapes import lengths_of, real_shapes


def test_both_formats_hold_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards, tars = write_samples(tmp_path, 5)
    streamed = list(webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("latent.npy", "text.npy"))
    for checked in (True, False):
        dataset = open_samples(shards, checked=checked)
        assert len(dataset) == len(streamed) == 5
        for number, (latent, text) in enumerate(streamed):
            sample = dataset.read(number)
            assert sample.latent.shape == (CHANNELS, SIDE, SIDE) and sample.text.shape == (TOKENS, WIDTH)
            assert torch.equal(sample.latent, torch.from_numpy(latent).float())
            assert torch.equal(sample.text, torch.from_numpy(text).float())


def test_real_shapes_say_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MICRO": 2, "COUNT": 4, "WIDTH": 256, "CASES": {"typical": 4}}.items():
        monkeypatch.setattr(f"benchmarks.real_shapes.{name}", value)
    text, found = real_shapes(tmp_path, rounds=1)
    latents, tokens = 2 * 4 * 4 * 32 * 32, sum(lengths_of("typical")) + 2  # of each micro-batch one of zeros
    assert found["typical, sent padded"]["bytes"] == latents + 2 * 120 * 256
    assert found["typical, packed"]["bytes"] == latents + 2 * 256 * tokens / 4
    assert found["typical, packed, int8"]["bytes"] == latents + (256 + 8) * tokens / 4
    assert set(found["typical, stages"]["int8"]) == set("read check unpack pack noise send copy pad".split())
    assert "| packed, int8 |" in text


@pytest.mark.slow
def test_benchmark_prints_and_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.data_loading", "--samples", "64", "--pictures", "16", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "result.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert set(found["reader"]) == {"shards", "unchecked", "batches", "webdataset", "raw read"}
    assert found["reader"]["shards"]["cpu"]["median"] == 1.0 and found["encode"]["encode"]["cpu"]["median"] > 0.5
    scale = found["scale"]
    assert scale["read dataset.json, CPU s"] < 3 and scale["look-up, 9 bucket(s), CPU us"] < 50
    assert "| webdataset |" in done.stdout and "10^9 samples" in done.stdout
    with pytest.raises(SystemExit, match="2"):
        data_loading.main([*command[3:], "--rounds", "0"])
    assert capsys.readouterr().err.endswith("--rounds is 0: use 1 or more\n")
