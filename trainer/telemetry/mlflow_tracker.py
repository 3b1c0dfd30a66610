"""A run on MLflow: `train.mlflow=URI` of a tracking server, or a folder.

MLflow's own variables say the rest: MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_TOKEN and so on.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, known_keys, leaves

EXPERIMENT = "ec_dit"
_BATCH = 100  # parameters that a server takes at once
_LONGEST = 500  # characters of a parameter


class MlflowTracker:
    """Logs to one run; a resumed run goes on with the same one."""

    def __init__(
        self, where: str, run_dir: Path, config: Mapping[str, Any], *, known: str | None, keep: Callable[[str], None]
    ) -> None:
        """`known` is what the server calls the run, if it has it; `keep` is told the name of a new one."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default tries for minutes
        if "://" not in where:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which a folder has needed since MLflow 3.7
        from mlflow import MlflowClient, entities

        self.entities, self.client = entities, MlflowClient(tracking_uri=where)
        self.name = known or self._new(run_dir.resolve().name)
        if known is None:
            keep(self.name)
        else:
            self.client.update_run(self.name, status="RUNNING")
        self._describe(config)

    def _new(self, name: str) -> str:
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self.client.get_experiment_by_name(title)
        experiment = found.experiment_id if found is not None else self.client.create_experiment(title)
        return str(self.client.create_run(experiment, run_name=name).info.run_id)

    def _describe(self, config: Mapping[str, Any]) -> None:
        """Every setting as a parameter; of a resumed run those that are new. MLflow refuses another value for one."""
        there = self.client.get_run(self.name).data.params
        values = {name: str(value)[:_LONGEST] for name, value in leaves(dict(config), known_keys(TrainConfig)).items()}
        new = [self.entities.Param(name, value) for name, value in values.items() if name not in there]
        for start in range(0, len(new), _BATCH):
            self.client.log_batch(self.name, params=new[start : start + _BATCH])
        for name, value in values.items():
            if there.get(name, value) != value:
                self.client.set_tag(self.name, f"resumed.{name}", value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step; a database cannot hold what is no number."""
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(n, v, now, step) for n, v in values.items() if math.isfinite(v)]
        for start in range(0, len(metrics), 1000):  # as many as a server takes at once
            self.client.log_batch(self.name, metrics=metrics[start : start + 1000])

    def picture(self, step: int, path: Path) -> None:
        """The sample grid of a step."""
        self.client.log_artifact(self.name, str(path), "samples")

    def attach(self, path: Path) -> None:
        """A file that belongs to the run."""
        self.client.log_artifact(self.name, str(path), path.resolve().parent.name)

    def close(self) -> None:
        """Say that it has ended."""
        self.client.set_terminated(self.name)
