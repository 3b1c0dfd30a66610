"""Makes `import deepspeed` shorter by the time in which its autotuner would import MLflow.

`import deepspeed` imports the autotuner, which nothing here uses, and that imports MLflow where it is installed: a
third of the CPU seconds of `python -c "import trainer.loop.run"` (4.3, and 2.9 without), in every process. It does
without.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTOTUNER = "deepspeed.autotuning.autotuner"


class _NoTracker(MetaPathFinder):
    """Finds nothing, and refuses MLflow while the autotuner is being imported; to all others it is as it was."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "mlflow" and _AUTOTUNER in sys.modules and not hasattr(sys.modules[_AUTOTUNER], "has_mlflow"):
            raise ModuleNotFoundError("DeepSpeed's autotuner does without MLflow", name=fullname)
        return None


def install() -> None:
    """Refuse it from now on."""
    sys.meta_path.insert(0, _NoTracker())
