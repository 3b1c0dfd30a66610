"""TensorBoard's file of a run. A thread writes it, and its error is raised where the next number is written."""

import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

_print_error = threading.excepthook


def open_events(folder: Path, step: int) -> SummaryWriter:
    """Open the file, to go on as if nothing had been written after `step`."""
    threading.excepthook = _leave_to_writer
    return SummaryWriter(str(folder), purge_step=step + 1)


def close_events(writer: SummaryWriter) -> None:
    """Close the file; OSError if not all of it was written, which `SummaryWriter.close` would not say."""
    writer.flush()
    writer.close()


def _leave_to_writer(failed: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, unless it keeps it for those who wait for its work: they raise it again."""
    if failed.exc_value is None or getattr(failed.thread, "exception", None) is not failed.exc_value:
        _print_error(failed)
