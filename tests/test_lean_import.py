"""DeepSpeed is imported without MLflow, which others can import as ever."""

import subprocess
import sys

import pytest
from tests_launcher import ROOT

PROGRAM = """
import sys
import trainer
import deepspeed
from deepspeed.autotuning import autotuner
assert not autotuner.has_mlflow and "mlflow" not in sys.modules
import mlflow
assert mlflow.__version__
"""


@pytest.mark.slow
def test_mlflow_is_left_to_who_wants_it() -> None:
    pytest.importorskip("mlflow")
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=ROOT)
