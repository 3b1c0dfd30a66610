"""Masks as COCO's compressed run-length strings, readable by pycocotools.

Runs of 0 and 1 alternate in column order, beginning with 0; from the third on a run is stored as the difference to
the one before the last, in base 32 with a sign and continuation bit per character. Shapes: H x W pixels.
"""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def encode_mask(mask_HW: Mask) -> str:
    """The compressed counts of a boolean mask; its size is kept by the caller."""
    flat = np.asarray(mask_HW, dtype=bool).flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs = [0, *runs]
    out = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != -1 if bits & 0x10 else value != 0
            out.append(chr((bits | 0x20 if more else bits) + 48))
    return "".join(out)


def decode_mask(text: str, height: int, width: int) -> Mask:
    """The mask of compressed counts; raises ValueError when they do not fill [height, width]."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if sum(runs) != height * width or any(run < 0 for run in runs):
        raise ValueError(f"runs of {sum(runs)} pixels in a mask of {height} x {width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape((height, width), order="F")
