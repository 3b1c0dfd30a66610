"""Detections kept as lines of JSON, so that thresholds and colour models are tried without a detector or a GPU.

FOLDER/<key>/part_*.jsonl: every job appends to a file of its own, a line per picture, found again by the hash of the
picture's file. A line that a killed job left half written is passed over. Masks are COCO's compressed run lengths.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.networks.protocols import FoundObject
from eval.pictures.image_files import read_picture
from eval.scoring.feature_store import ALONE, missing_pictures, num_workers, prefetched
from eval.scoring.rle import decode_mask, encode_mask
from trainer.distributed import World
from trainer.files import whole_records, write_text
from trainer.formats.progress_bar import ProgressBar

_AHEAD = 16  # pictures read before they are asked for
FLOOR = 0.05  # objects below this score are not kept; the judge's thresholds lie above
Line = dict[str, Any]


class LineCache:
    """Lines with an `id` under a folder named after `card`, which is written beside them."""

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        self.card = card
        self.name = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / self.name
        if not (self.folder / "card.json").is_file():
            write_text(self.folder / "card.json", json.dumps(card, indent=2, sort_keys=True) + "\n")

    def read(self) -> dict[str, Line]:
        """All whole lines by id."""
        parts = (whole_records(path, lambda line: "id" in line) for path in sorted(self.folder.glob("part_*.jsonl")))
        return {line["id"]: line for part in parts for line in part}

    @contextmanager
    def appending(self) -> Iterator[Callable[[Line], None]]:
        """Gives a function that appends a line to a new file of this process; the file is removed if it stays empty."""
        path = self.folder / f"part_{os.getpid()}_{secrets.token_hex(4)}.jsonl"
        with path.open("w") as file:

            def write(line: Line) -> None:
                file.write(json.dumps(line) + "\n")
                file.flush()

            yield write
        if path.stat().st_size == 0:
            path.unlink()

    def add(
        self, files: Sequence[Path], measure: Callable[[str, Tensor], Line], title: str, world: World = ALONE
    ) -> int:
        """A line by `measure` of hash and picture for each of this rank's pictures that has none; returns how many.

        Raises ConfigError for a damaged picture.
        """
        todo = missing_pictures(files, self.read(), world)
        ready = prefetched(todo.values(), read_picture, num_workers(), _AHEAD)
        bar = ProgressBar(zip(todo, ready, strict=True), title, len(todo), unit="image", shown=world.is_main)
        with self.appending() as write:
            for name, picture in bar:
                write(measure(name, picture))
        return len(todo)


def to_line(identity: str, picture_HW3: Tensor, found: Sequence[FoundObject]) -> Line:
    """A picture's objects for the cache: class number, score, box, mask."""
    objects = [
        [
            item.class_number,
            round(item.score, 9),  # as many digits as keep two fp32 scores apart: ties count
            *(round(value, 3) for value in item.box),
            None if item.mask_HW is None else encode_mask(item.mask_HW.numpy()),
        ]
        for item in found
        if item.score > FLOOR
    ]
    return {"id": identity, "height": picture_HW3.shape[0], "width": picture_HW3.shape[1], "objects": objects}


def from_line(line: Line, *, masks: bool = False) -> list[FoundObject]:
    """Objects of a line, best first; masks are unpacked only when asked for."""
    found = []
    for number, score, x1, y1, x2, y2, text in line["objects"]:
        mask = None
        if masks and text is not None:
            mask = torch.from_numpy(decode_mask(text, line["height"], line["width"]).copy())
        found.append(FoundObject(class_number=number, score=score, box=(x1, y1, x2, y2), mask_HW=mask))
    return found
