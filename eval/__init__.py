"""Evaluation suite: generate pictures from a checkpoint, score them, write the report.

For use in other programs: `from eval import score_folder`; it is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.scoring.score_folder import score_folder

__all__ = ["score_folder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from eval.scoring.score_folder import score_folder

    return score_folder


def __dir__() -> list[str]:
    return [*globals(), *__all__]
