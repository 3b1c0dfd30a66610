"""The encoder half of a T5 model from a local folder: encoder `t5:DIR`, or `t5@120:DIR` for at most 120 tokens.

DIR holds config.json and weights as `save_pretrained` writes them, and tokenizer.json; in a pipeline's folder the
latter may lie in the neighbour of the same number (text_encoder_3, tokenizer_3).

Shapes: B captions of the same length, L tokens, D text width.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import require
from trainer.encoders.pretrained import (
    config_digest,
    encode_by_length,
    encoder_device,
    files_digest,
    load_local,
    read_json,
    read_tokenizer,
    require_file,
    require_package,
    text_dtype,
    weight_files,
)

DEFAULT_MAX_TOKENS = 256  # as SD3; PixArt-alpha has 120, PixArt-sigma and Sana 300


class T5Text:
    """A frozen T5 encoder; the last layer's features with the end token, padding left out."""

    device: torch.device | None = None

    def __init__(self, length_limit: str | None, directory: str) -> None:
        folder, max_tokens = Path(directory), int(length_limit or DEFAULT_MAX_TOKENS)
        length = "" if max_tokens == DEFAULT_MAX_TOKENS else f"@{max_tokens}"
        self.setting = f"data.text_encoder=t5{length}:{folder}"
        require_package(self.setting, "transformers")
        require(max_tokens >= 2, f"{self.setting}: use 2 tokens or more")
        self.folder, self.max_tokens = folder, max_tokens
        self.config = read_json(self.setting, folder / "config.json", "model's config.json")
        require(
            self.config.get("model_type") in ("t5", "umt5"),
            f"{self.setting} is a {self.config.get('model_type')} model: name the folder of a T5 or UMT5 encoder",
        )
        self.weights = weight_files(self.setting, folder)
        self.dim = int(self.config["d_model"])
        self.tokenizer_path = self._find_tokenizer()
        self.tokenizer = read_tokenizer(self.setting, self.tokenizer_path, max_tokens)

    def _find_tokenizer(self) -> Path:
        neighbour = self.folder.parent / self.folder.name.replace("text_encoder", "tokenizer") / "tokenizer.json"
        inside = self.folder / "tokenizer.json"
        path = neighbour if neighbour.is_file() and not inside.is_file() else inside
        how = "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        return require_file(self.setting, path, f"tokenizer.json (from spiece.model: {how})")

    def fingerprint(self) -> str:
        """Settings, weights, tokenizer and cut-off length."""
        files = files_digest([self.tokenizer_path, *self.weights])
        return f"t5-{config_digest(self.config)}-{files}-{self.max_tokens}"

    @cached_property
    def model(self) -> Any:
        """The encoder, read on first use."""
        import transformers

        cls = getattr(transformers, f"{self.config['model_type'].upper()}EncoderModel")
        dtype = text_dtype(encoder_device(self.device))
        return load_local(self.setting, cls, self.folder, self.device, dtype=dtype)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [n, dim] per caption."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(captions)]
        device = encoder_device(self.device)
        return encode_by_length(ids, lambda ids_BL: self.model(input_ids=ids_BL).last_hidden_state, device)
