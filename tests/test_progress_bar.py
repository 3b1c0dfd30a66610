"""Long work shows where it is: a bar on a terminal, lines ever more seldom in a log, nothing for what is soon done."""

import io
import logging
import os
import re
import sys

import pytest

from trainer.distributed import detect_world
from trainer.formats import progress_bar
from trainer.formats.progress_bar import BesideBars, ProgressBar


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, which tqdm reads from here."""
    now = [0.0]
    real = ProgressBar.__init__

    def build(self: ProgressBar, *arguments: object, **options: object) -> None:
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        real(self, *arguments, **options)

    monkeypatch.setattr(ProgressBar, "__init__", build)
    return now


def test_a_log_has_a_line_now_and_then_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for number in ProgressBar(range(200), "index", unit="tar"):
        clock[0] += 2
        if lines := capsys.readouterr().err:
            said.append((number, lines))
    times = [2 * number for number, _ in said]
    assert times == [10, 30, 70, 130, 190, 250, 310, 370], "pauses of 10, 20, 40 and then 60 s"
    assert said[0][1] == "index: 5 of 200 tar, 2.00s/tar, 00:10 gone, 06:30 to go\n"
    assert capsys.readouterr().err == "index: 200 of 200 tar, 2.00s/tar, 06:40 gone, 00:00 to go\n"


def test_a_log_says_nothing_of_short_work_nor_of_other_processes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(ProgressBar(range(3), "index")) == [0, 1, 2]
    for _ in ProgressBar(range(100), "index", shown=False):
        clock[0] += 10
    with pytest.raises(ValueError):
        for _ in ProgressBar(range(100), "index"):
            raise ValueError
    assert capsys.readouterr().err == ""


def test_bytes_are_counted_by_hand_and_what_stands_still_is_said_too(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(desc="export", total=5_000_000, unit="B", unit_scale=True) as bar:
        for size in (1_000_000, 0, 4_000_000):
            clock[0] += 60
            bar.set_postfix_str("file 1", refresh=False)
            bar.update(size)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:22] for line in lines] == [f"export: {done} of 5.00M" for done in ("1.00M", "1.00M", "5.00M")]
    assert lines[0].endswith("to go, file 1")


def test_a_terminal_has_a_bar_and_log_lines_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("ec_dit_test_bars")
    logger.addHandler(BesideBars(terminal))
    for number in ProgressBar(range(4), "index", unit="tar", mininterval=0):
        if number == 2:
            logger.warning("between")
    text = terminal.getvalue()
    assert "index:  50%" in text and "4/4" in text and progress_bar.FIRST_LINE == 10
    assert re.search(r"\r {20,}\r+between\n\rindex: ", text), "the bar is away while a line is written"


def test_only_the_first_rank_shows_the_bars_of_model_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, hidden in (("0", None), ("1", "1")):
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
        monkeypatch.setenv("RANK", rank)
        detect_world()
        assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == hidden
