"""The same bits every time, where a GPU would otherwise sum in the order in which its threads happen to finish.

What that concerns here: the backward of attention, and cuBLAS with more than one workspace. Dispatch and combine of the
MoE sum rows in a fixed order as they are (moe/dispatch.py). On a CPU all of it is deterministic anyway. Random numbers
are no part of it: every draw of a run is a function of (seed, global sample index), made on the CPU.
"""

import os

import torch


def make_deterministic() -> None:
    """Have this process's GPU compute reproducibly; before its first product, as cuBLAS reads its setting then.

    An operation that has no deterministic form raises an error instead of giving other bits in silence.
    """
    if not torch.cuda.is_available():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds reads of what was never written
