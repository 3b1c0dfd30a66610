"""Training system: data, model, diffusion, DeepSpeed engine, checkpoints and sampling.

For use in other programs: `from trainer import Pipeline, read_metrics`. Both are imported when they are asked for, so
that a command's --help need not wait for torch.
"""

from typing import TYPE_CHECKING, Any

import moe  # noqa: F401  before anything imports DeepSpeed

if TYPE_CHECKING:
    from trainer.pipeline import Pipeline
    from trainer.telemetry.metrics_file import read_metrics

__all__ = ["Pipeline", "read_metrics"]
_MODULES = {"Pipeline": "trainer.pipeline", "read_metrics": "trainer.telemetry.metrics_file"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
