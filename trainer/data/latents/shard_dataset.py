"""The samples of latent shards by number; a few files are open at a time."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.data.latents.samples import LatentInfo, Sample
from trainer.data.latents.shard_file import ShardEntry, ShardFile
from trainer.data.latents.staging import Stage
from trainer.data.order import SampleLayout
from trainer.encoders.protocols import TextEncoder

_MAX_OPEN_FILES = 64


@dataclass(eq=False)
class ShardDataset:
    """The safetensors shards that `trainer.data.encode` wrote; each is verified when it is opened and read."""

    info: LatentInfo
    shards: list[tuple[Path, ShardEntry]]
    fingerprint: str
    layout: SampleLayout
    empty_text: Tensor | str
    online_encoder: TextEncoder | None = None
    stage: Stage | None = None

    def __post_init__(self) -> None:
        self.first = [0, *accumulate(entry.num_samples for _, entry in self.shards)]
        self.open_files: dict[int, ShardFile] = {}

    def __len__(self) -> int:
        return self.layout.size

    def __getstate__(self) -> dict[str, Any]:
        # File handles stay with their process, and captions are encoded by the main one.
        return {**vars(self), "open_files": {}, "online_encoder": None}

    def _shard(self, number: int) -> ShardFile:
        """An open shard; the one that was used longest ago is closed for it."""
        file = self.open_files.pop(number, None)
        if file is None:
            if len(self.open_files) >= _MAX_OPEN_FILES:
                self.open_files.pop(next(iter(self.open_files))).close()
            path, entry = self.shards[number]
            copy = self.stage.fetch(path, entry) if self.stage else path
            file = ShardFile(copy, entry, self.fingerprint, copy_of=path if self.stage else None)
        self.open_files[number] = file
        return file

    def read(self, sample: int) -> Sample:
        """One sample; DamagedShardError names file and key."""
        number = bisect_right(self.first, sample) - 1
        return self._shard(number).read(sample - self.first[number])
