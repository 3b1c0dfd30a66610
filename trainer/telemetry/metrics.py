"""What a run reports: `metrics.jsonl`, TensorBoard, a log file and a progress bar, from one process."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from trainer.files import keep_records

logger = logging.getLogger("ec_dit")


def setup_logging(path: Path) -> None:
    """Log to the run's `train.log`, and to the terminal beside the progress bar."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [logging.FileHandler(path), logging.StreamHandler(sys.stdout)]
    for old in list(logger.handlers):
        logger.removeHandler(old)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop lines after `last_step`: steps that a killed run logged but did not save."""
    keep_records(path, lambda record: record["step"] <= last_step)


class MetricsLog:
    """Writers of the main process; every write reaches the file before the call returns."""

    def __init__(self, run_dir: Path, *, start_step: int, max_steps: int) -> None:
        self.run_dir = run_dir
        self.bar = tqdm(total=max_steps, initial=start_step, disable=not sys.stderr.isatty(), unit="step")
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        truncate_metrics(self.run_dir / "metrics.jsonl", start_step)
        self.file = (self.run_dir / "metrics.jsonl").open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=start_step + 1)

    def rewind(self, step: int) -> None:
        """Go on as if nothing had been logged after `step`."""
        self._close_files()
        self._open(step)
        self.bar.n = step
        self.bar.refresh()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one logged step; the log line shows loss, norm, rate and speed."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        logger.info(
            "step %d/%d  loss %.6f  grad_norm %.4f  lr %.2e  %.1f images/s",
            step, self.bar.total, values["loss"], values["grad_norm"], values["learning_rate"],
            values["images_per_second"],
        )  # fmt: skip

    def write_histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Show distributions in TensorBoard."""
        for name, value in values.items():
            self.tensorboard.add_histogram(name, value, step)

    def add_image(self, step: int, image_HWC: Tensor) -> None:
        """Show a sample grid in TensorBoard."""
        self.tensorboard.add_image("samples", image_HWC, step, dataformats="HWC")

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self.bar.update()

    def close(self) -> None:
        """Flush and close all writers."""
        self.bar.close()
        self._close_files()

    def _close_files(self) -> None:
        self.tensorboard.close()
        self.file.close()
