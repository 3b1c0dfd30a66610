"""A run on Weights & Biases: `train.wandb=PROJECT` or `ENTITY/PROJECT`.

Its own variables say the rest: WANDB_MODE=offline writes to the run's folder, for `wandb sync`.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class WandbTracker:
    """Logs to one run; a resumed run goes on with the same one."""

    def __init__(
        self, where: str, run_dir: Path, config: Mapping[str, Any], *, known: str | None, keep: Callable[[str], None]
    ) -> None:
        """`known` is the run's name there, if it has one; `keep` is told that of a new one."""
        import wandb

        entity, _, project = where.rpartition("/")
        name = known or secrets.token_hex(4)
        # The log of the run says what is wrong. In no case may it ask for a login, take over the output, or keep the
        # process from ending.
        settings = wandb.Settings(
            console="off", silent=True, quiet=True, save_code=False, login_timeout=0, init_timeout=30, finish_timeout=15
        )
        self.wandb = wandb
        self.run = wandb.init(
            project=project, entity=entity or None, id=name, name=run_dir.resolve().name, resume="allow",
            dir=str(run_dir), config=dict(config), settings=settings,
        )  # fmt: skip
        keep(name)
        # A run that went back to a checkpoint logs a step again, which W&B's own count of steps would refuse.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self.run.log({"step": step, **values})

    def picture(self, step: int, path: Path) -> None:
        """The sample grid of a step."""
        self.run.log({"step": step, "samples": self.wandb.Image(str(path))})

    def attach(self, path: Path) -> None:
        """A file that belongs to the run."""
        # Named by its folder, too: the reports of training and of scores are all called alike.
        name = re.sub(r"[^\w.-]", "_", f"{self.run.id}-{path.resolve().parent.name}-{path.name}")
        artifact = self.wandb.Artifact(name, type="report")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()
