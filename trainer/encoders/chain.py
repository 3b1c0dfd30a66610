"""Several text encoders at once, as SD3 has CLIP and T5: encoder `A+B`.

The tokens of the second follow those of the first; narrower features are filled with zeros to the widest.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.encoders.protocols import TextEncoder


class TextChain:
    """One sequence of tokens from several encoders."""

    def __init__(self, encoders: list[TextEncoder]) -> None:
        self.encoders = encoders
        self.dim = max(encoder.dim for encoder in encoders)
        self.max_tokens = sum(encoder.max_tokens for encoder in encoders)

    def fingerprint(self) -> str:
        """All of the encoders', in order."""
        return "+".join(encoder.fingerprint() for encoder in self.encoders)

    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [sum of n, dim] per caption."""
        parts = [encoder.encode(captions) for encoder in self.encoders]
        wide = [[functional.pad(text, (0, self.dim - text.shape[1])) for text in part] for part in parts]
        return [torch.cat(texts) for texts in zip(*wide, strict=True)]
