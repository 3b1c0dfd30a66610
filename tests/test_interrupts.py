"""Ctrl-C ends a command with one sentence that says what is kept and how to go on, and with exit code 130."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests_launcher import ROOT, Launcher

from eval.scoring.feature_store import prefetched
from trainer.config import command, interruptible, run_cli


def interrupt(arguments: list[str], until: Path) -> tuple[int, str]:
    """Start a command with its own terminal group, interrupt all of it when `until` exists; exit code and stderr."""
    process = subprocess.Popen(
        Launcher().command("-m", *arguments), cwd=ROOT, env=Launcher().environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not until.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    return process.returncode, said


@pytest.mark.slow
def test_real_commands_end_in_one_sentence_each(tmp_path: Path) -> None:
    """With worker processes, too, which the terminal interrupts as well; what they have read is kept."""
    images = tmp_path / "images"
    code, said = interrupt(
        ["trainer.data.demo.scene_shards", "--out", str(images), "--num-images", "99999", "--shard-size", "20"],
        images / "00001.parquet",
    )
    assert code == 130
    assert said == "\nstopped: shards that were written are kept, but the same command draws all of them again\n"
    assert not list(images.glob(".*")), "no half file is left"
    for tar in list(images.glob("*.tar"))[1:]:
        for path in images.glob(f"{tar.stem}*"):
            path.unlink()
    os.mkfifo(images / "99999.parquet")  # is read for ever
    for suffix in (".tar", "_stats.json"):
        shutil.copy(images / f"00000{suffix}", images / f"99999{suffix}")
    indexing = ["trainer.data.index", str(images), "--num-workers", "2"]
    code, said = interrupt(indexing, images / "00000.index.parquet")
    assert (code, said) == (
        130,
        "\nstopped: tars that were read are kept, and the same command goes on with the others\n",
    )


def test_what_is_kept_is_said_once_by_the_first_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(_: list[str] | None) -> None:
        raise KeyboardInterrupt

    for main, sentence in (
        (command(body), "stopped: nothing is kept, and the same command starts again"),
        (interruptible("much is kept")(body), "stopped: much is kept"),
        (lambda: run_cli(lambda: body(None), stopped="all is kept"), "stopped: all is kept"),
    ):
        with pytest.raises(SystemExit, match="130") as caught:
            main()
        assert capsys.readouterr().err == f"\n{sentence}\n" and caught.value.__context__ is None
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="130"):
        command(body)()
    assert capsys.readouterr().err == ""


def test_work_ahead_is_given_up_at_once() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.02)
        return item

    results = prefetched(range(1000), work, workers=1, ahead=500)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 50
