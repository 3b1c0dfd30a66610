"""Prompt sets in GenEval's form: text, tag and the clauses that a picture of it must satisfy.

A set's hash is the sha256 of its `evaluation_metadata.jsonl`, one JSON object per prompt, so that two
scores can be told to be over the same prompts.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt; `id` names it whatever the length of its set, `metadata` is what the judge reads."""

    id: str
    text: str
    tag: str
    metadata: dict[str, Any] = field(hash=False)


def metadata_lines(prompts: Sequence[Prompt]) -> str:
    """The set as the text of an `evaluation_metadata.jsonl`."""
    return "".join(json.dumps(prompt.metadata) + "\n" for prompt in prompts)


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Hash of the set: order, texts and clauses."""
    return hashlib.sha256(metadata_lines(prompts).encode()).hexdigest()


def picture_seed(prompt_id: str, sample: int) -> int:
    """Seed of one picture, 63 bits, the same on every platform."""
    digest = hashlib.sha256(f"{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
