"""What TensorBoard's thread cannot write is an error of who writes, once, and of nobody else."""

import shutil
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.telemetry.event_file import close_events, open_events


def test_what_was_written_is_read(tmp_path: Path) -> None:
    writer = open_events(tmp_path / "events", 3)
    writer.add_scalar("loss", 0.5, 4)
    close_events(writer)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.5)]


def test_a_folder_that_is_gone_is_the_writers_error_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr("trainer.telemetry.event_file._print_error", printed.append)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    writer = open_events(tmp_path / "events", 0)
    writer.flush()
    shutil.rmtree(tmp_path / "events")
    with pytest.raises(FileNotFoundError):
        writer.add_scalar("loss", 0.5, 1)
        close_events(writer)
    assert not printed

    def fail() -> None:
        raise OSError("of another thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    (other,) = printed
    assert other.thread is thread
