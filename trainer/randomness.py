"""Random numbers keyed by what they are for, never by rank, worker or world size.

Every draw of a sample (noise, timestep, mask, caption drop) is a function of (seed, index, stream): the run's seed, the
sample's number since the run's start and the draw's name; the initial value of a weight of seed, name and expert.
"""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of the key alone, the same on every platform."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
