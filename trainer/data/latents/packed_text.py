"""Encoded captions as they are stored and travel: unpadded, in fp16 or in 8 bits, and padded where they are used.

At a width of 4,096 a padded caption of 120 tokens is 1 MB, several times what its tokens are and a hundred times its
latent; so data workers send the tokens of a micro-batch end to end, and the device pads them.

In 8 bits the values of a token are cut into groups of 128, each with an fp32 scale that its values are multiplied by:
encoders have a few channels tens of times louder than the rest, and a scale for the whole token would let these
drown the others. A token of width D is one row of int8: its D values, then the bytes of its scales. In fp16 or fp32 a
row is the values themselves.

Shapes: B captions, L tokens after padding, T tokens of all captions, D text width, G groups of K values,
R stored width of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

_SCALE_BYTES, _GROUP, _LARGEST = 4, 128, 127


def stored_width(text_dim: int, text_dtype: str) -> int:
    """Columns of a stored token of `text_dim` values (R)."""
    return text_dim + _SCALE_BYTES * -(-text_dim // _GROUP) if text_dtype == "int8" else text_dim


def _grouped(value_TD: Tensor) -> Tensor:
    """The same values as [T, G, K], the last group filled up with zeros."""
    grouped_TGK: Tensor = pad(value_TD, (0, -value_TD.shape[1] % _GROUP)).unflatten(1, (-1, _GROUP))
    return grouped_TGK


def to_int8(text_TD: Tensor) -> Tensor:
    """Tokens as rows of 8 bits [T, R]; the scale of a group is its largest value divided by 127."""
    value_TGK = _grouped(text_TD.float())
    scale_TG = value_TGK.abs().amax(2) / _LARGEST
    value_TGK = (value_TGK / scale_TG.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
    value_TD = value_TGK.flatten(1)[:, : text_TD.shape[1]].to(torch.int8)
    return torch.cat([value_TD, scale_TG.view(torch.int8)], dim=1)


def stored_text(text_TD: Tensor, text_dtype: str) -> Tensor:
    """Tokens as `data.text_dtype` has them stored."""
    return to_int8(text_TD) if text_dtype == "int8" else text_TD.half()


def restored(row_TR: Tensor) -> Tensor:
    """Stored tokens as floating-point values [T, D]: fp16 of 8 bits, otherwise as they are."""
    if row_TR.dtype != torch.int8:
        return row_TR
    num_groups = -(-row_TR.shape[1] // (_GROUP + _SCALE_BYTES))
    dim = row_TR.shape[1] - _SCALE_BYTES * num_groups
    value_TGK, scale_TG = _grouped(row_TR[:, :dim]), row_TR[:, dim:].contiguous().view(torch.float32)
    out_TGK = torch.empty_like(value_TGK, dtype=torch.float16)
    return torch.mul(value_TGK, scale_TG[..., None], out=out_TGK).flatten(1)[:, :dim]


def relative_errors(text_TD: Tensor, row_TR: Tensor) -> Tensor:
    """Per token the length of the error of what is stored, over the length of the token."""
    text_TD = text_TD.double()
    error_T, length_T = (vector_norm(x, dim=1) for x in (restored(row_TR).double() - text_TD, text_TD))
    relative_T: Tensor = error_T / length_T.clamp_min(torch.finfo(torch.float64).tiny)
    return relative_T


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """The stored tokens of B captions one after the other, then one of zeros that padding is made of.

    Caption b has the tokens `offset_B1[b]` to `offset_B1[b + 1]`; all are padded to `length`, known on the host, so
    that shapes on a device depend on no value there.
    """

    token_TR: Tensor
    offset_B1: Tensor
    length: int

    def each(self, change: Callable[[Tensor], Tensor]) -> "PackedText":
        """The same captions after a change of where their tensors lie."""
        return replace(self, token_TR=change(self.token_TR), offset_B1=change(self.offset_B1))

    def mask_BL(self) -> Tensor:  # noqa: N802
        """True where padded captions have a real token."""
        return self._places() < self.offset_B1[1:, None]

    def padded_BLD(self) -> Tensor:  # noqa: N802
        """The captions padded with zeros: fp16 if they are stored in fp16 or in 8 bits, else fp32."""
        index_BL = torch.where(self.mask_BL(), self._places(), len(self.token_TR) - 1)
        return restored(self.token_TR).index_select(0, index_BL.flatten()).view(*index_BL.shape, -1)

    def _places(self) -> Tensor:
        """Where in `token_TR` each token of [B, L] would lie if no caption were shorter."""
        return self.offset_B1[:-1, None] + torch.arange(self.length, device=self.offset_B1.device)


def pack_text(tokens: Sequence[Tensor], length: int, *, shared: bool = False) -> PackedText:
    """Captions as stored [n, R], to be padded to `length` tokens or the longest of them; copied once.

    `shared`: into memory that other processes can be given, so that a data worker's queue need not copy it again.
    """
    offset_B1 = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    same = len({token.dtype for token in tokens}) == 1
    dtype = tokens[0].dtype if same else torch.float32
    shape = int(offset_B1[-1]) + 1, tokens[0].shape[1]
    token_TR = _shared_memory(shape, dtype) if shared else torch.empty(shape, dtype=dtype)
    torch.cat([*tokens, torch.zeros(1, tokens[0].shape[1], dtype=dtype)], out=token_TR)
    return PackedText(token_TR=token_TR, offset_B1=offset_B1, length=max(length, *map(len, tokens)))


def _shared_memory(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    storage = torch.UntypedStorage._new_shared(shape[0] * shape[1] * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, (shape[1], 1))
