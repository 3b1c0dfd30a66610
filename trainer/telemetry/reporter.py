"""What a run reports while it trains: loss, speed, utilisation and router statistics, every `train.log_every` steps.

To `metrics.jsonl`, TensorBoard and other trackers, the log, a progress bar; at sample grids and at the end to a page.
"""

import json
import logging
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from moe.routing import RoutingStats
from trainer.config import TrainConfig, config_to_dict
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.model import ModelShape
from trainer.distributed import World
from trainer.errors import require
from trainer.files import keep_records
from trainer.formats.progress_bar import ProgressBar
from trainer.settings.tokens import num_image_tokens, num_kept_tokens
from trainer.telemetry.event_file import close_events, open_events
from trainer.telemetry.flops import peak_tflops, training_flops
from trainer.telemetry.page import NAME as PAGE
from trainer.telemetry.page import PageWriter
from trainer.telemetry.routing_metrics import router_histograms, router_metrics, vector_size
from trainer.telemetry.trackers import Trackers

logger = logging.getLogger("ec_dit")


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop lines after `last_step`: steps that a killed run logged but did not save."""
    keep_records(path, lambda record: record["step"] <= last_step)


class Reporter:
    """Writes on the main process, each line on its way to the file before the call returns; nothing on the others.

    | metric               | meaning                                                                       |
    |----------------------|-------------------------------------------------------------------------------|
    | `loss`               | mean over the steps since the last report and over all samples                |
    | `grad_norm`          | global norm before clipping, of the last step                                 |
    | `images_per_second`  | over all processes; sample grids and checkpoints are not part of the time     |
    | `seconds_per_step`   | from the same time                                                            |
    | `tflops_per_second`  | model TFLOP/s per device (telemetry/flops.py), from the same time             |
    | `mfu`                | its share of the device's dense bf16 peak; only in bf16 on a device we know   |
    | `bad_steps`          | steps skipped since the run's start                                           |
    | `memory_gb`          | largest memory so far: allocated on the device, or of the process on a CPU     |
    | `save_seconds`       | spent in checkpoints since the last report                                    |
    """

    def __init__(self, config: TrainConfig, info: LatentInfo, world: World, device: torch.device, step: int) -> None:
        self.config, self.info, self.world_size = config, info, world.size
        self.peak = peak_tflops(device) if config.train.precision == "bf16" else None
        self.layers = [i for i in range(config.model.num_layers) if config.moe.has_moe(i)]
        self.device, self.save_seconds = device, 0.0
        self.start, self.step = time.perf_counter(), step
        self.is_main, self.run_dir = world.is_main, Path(config.run_dir)
        if self.is_main:
            self.page, self.trackers = PageWriter(self.run_dir), Trackers(self.run_dir, config_to_dict(config))
            # In a log the lines of `_write` say the same.
            total, shown = config.train.max_steps, sys.stderr.isatty()
            self.bar = ProgressBar(desc="train", total=total, initial=step, unit="step", shown=shown)
            self._open(step)

    def _open(self, step: int) -> None:
        """Open the files, to go on as if nothing had been written after `step`."""
        truncate_metrics(self.run_dir / "metrics.jsonl", step)
        self.file = (self.run_dir / "metrics.jsonl").open("a", buffering=1)
        self.tensorboard = open_events(self.run_dir / "tensorboard", step)

    def report(
        self, step: int, *, loss: float, norm: float | Tensor | None, rate: float, epoch: int, bad_steps: int,
        router: list[float], stats: list[RoutingStats], times: dict[str, float],
    ) -> None:  # fmt: skip
        """Write the interval that ends after `step`; `loss` is its mean, `stats` this rank's of its last batch.

        `times` are the sections of a measured step (trainer/telemetry/step_timer.py), if there was one.
        """
        # The interval ends here on every rank, also where nothing is written: a roll-back or a pause moves its begin.
        now = time.perf_counter()
        seconds = (now - self.start) / (step - self.step)
        speed = self.config.global_batch_size(self.world_size) / seconds
        self.start, self.step = now, step
        if not self.is_main:
            return
        # Masking may end in the middle of an interval; the last step stands for it. Steps are counted from 0 there.
        tflops = speed * self._flops_per_image(step - 1) / self.world_size / 1e12
        values = {
            "loss": loss,
            "grad_norm": float(norm if norm is not None else math.nan),
            "learning_rate": rate,
            "images_per_second": speed,
            "seconds_per_step": seconds,
            "tflops_per_second": tflops,
            "epoch": float(epoch),
            "bad_steps": float(bad_steps),
            "memory_gb": self._memory() / 1e9,
            "save_seconds": self.save_seconds,
        }
        self.save_seconds = 0.0
        if self.peak is not None:
            values["mfu"] = tflops / self.peak
        # What is open is written to without an error, and lost.
        there = (self.run_dir / "metrics.jsonl").exists()
        require(there, f"run_dir={self.run_dir} (or its metrics.jsonl) was removed while the run was going on")
        self._write(step, values | times | router_metrics(router, self.layers))
        for name, distribution in router_histograms(stats, self.layers).items():
            self.tensorboard.add_histogram(name, distribution, step)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.trackers.log(step, values)
        total = self.config.train.max_steps
        logger.info(
            "step %d/%d  loss %.6f  grad_norm %.4f  lr %.2e  %.1f images/s  %s to go",
            step, total, values["loss"], values["grad_norm"], values["learning_rate"], values["images_per_second"],
            ProgressBar.format_interval((total - step) * values["seconds_per_step"]),
        )  # fmt: skip

    def _flops_per_image(self, step: int) -> int:
        """Forward and backward pass of one image in optimizer step number `step`, with the tokens that it keeps."""
        config, info = self.config, self.info
        whole = num_image_tokens(info.height, info.width, config.model.patch_size)
        num_tokens = num_kept_tokens(whole, config.diffusion.mask_ratio_at(step))
        return training_flops(config.model, config.moe, ModelShape.of(info), num_tokens, info.max_tokens)

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0

    @property
    def router_size(self) -> int:
        """Length of the vector of router statistics."""
        return vector_size(len(self.layers))

    def advance(self) -> None:
        """One step is done."""
        if self.is_main:
            self.bar.update()

    def pause(self, seconds: float, *, save: bool = False) -> None:
        """Take time that was no training out of the interval."""
        self.start += seconds
        self.save_seconds += seconds if save else 0.0

    def rewind(self, step: int) -> None:
        """Go on as if nothing had been reported after `step`."""
        self.start, self.step = time.perf_counter(), step
        if self.is_main:
            self._close_files()
            self._open(step)
            self.bar.n = step
            self.bar.refresh()

    def add_image(self, step: int, picture_HWC: Tensor) -> None:
        """Show a sample grid, whose file is written, in TensorBoard and on the page; main process only."""
        self.tensorboard.add_image("samples", picture_HWC, step, dataformats="HWC")
        self.trackers.picture(step, self.run_dir / "samples" / f"step_{step:08d}.png")
        self.page.refresh()

    def close(self) -> None:
        """Flush and close all files, and write the page."""
        if self.is_main:
            self.bar.close()
            self._close_files()
            self.page.refresh()
            self.trackers.attach(self.run_dir / PAGE)
            self.trackers.close()

    def _close_files(self) -> None:
        close_events(self.tensorboard)
        self.file.close()
