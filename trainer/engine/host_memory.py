"""How this process takes memory from the system and gives it back, where tensors lie in the host's."""

import ctypes

import torch


def keep_freed_memory() -> None:
    """Have this process keep what it frees, where there is no GPU and the C library can (glibc).

    Otherwise each large tensor is new memory, which the system clears page by page at the first touch: a sixth of an
    evaluation's time, up to half of that of a layer with 64 experts. And it is luck which tensors those are, because
    smaller ones move the border between what is kept and what is returned. The process then holds the most that it
    ever used until it ends.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None and not torch.cuda.is_available():
        mmap_max, trim_threshold = -4, -1  # names of malloc.h
        change(mmap_max, 0)
        change(trim_threshold, -1)
