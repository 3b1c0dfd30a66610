"""Text towers of open_clip: encoder `open_clip:ARCH:FILE` or `open_clip:DIR`, per-token features.

FILE is a checkpoint of the architecture ARCH (`open_clip.list_models()`), DIR a folder with open_clip_config.json and
its weights, as on the model hub. The features are the penultimate layer's, before the final norm, as SDXL and SD3
use them. Only the text tower is built and only its weights are read.

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
    must_fit,
    read_json,
    read_weights,
    require_file,
    text_dtype,
    weight_files,
)

_LAYER = -2
_TEXT_KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
# Towers with these have another tokenizer, or tokens that look at padding.
_UNSUPPORTED = ("hf_model_name", "hf_tokenizer_name", "no_causal_mask", "embed_cls")


class OpenClipText:
    """A frozen CLIP text tower; start and end tokens included, padding left out (attention is causal)."""

    device: torch.device | None = None

    def __init__(self, arch: str | None, path: str) -> None:
        self.setting = f"data.text_encoder=open_clip:{path if arch is None else f'{arch}:{path}'}"
        if arch is not None:
            import open_clip

            self.config = open_clip.get_model_config(arch) or {}
            require(bool(self.config), f"{self.setting}: open_clip knows no {arch}, see open_clip.list_models()")
            self.weights = require_file(self.setting, Path(path), f"weights of {arch}")
        else:
            content = read_json(self.setting, Path(path) / "open_clip_config.json", "model's open_clip_config.json")
            self.config = content.get("model_cfg", {})
            (self.weights, *_) = weight_files(self.setting, Path(path))
        self.text_config: dict[str, Any] = self.config.get("text_cfg", {})
        strange = [name for name in _UNSUPPORTED if self.text_config.get(name)]
        require(
            not strange,
            f"{self.setting} has {', '.join(strange)}: use an architecture with CLIP's own causal text tower, "
            "such as ViT-L-14, ViT-H-14 or ViT-bigG-14",
        )
        self.dim = int(self.text_config.get("width", 512))
        self.max_tokens = int(self.text_config.get("context_length", 77))

    def fingerprint(self) -> str:
        """Settings, weights, layer and cut-off length."""
        digest = config_digest({"text": self.text_config, "quick_gelu": self.config.get("quick_gelu", False)})
        return f"open_clip-{digest}-{files_digest([self.weights])}{_LAYER}-{self.max_tokens}"

    @cached_property
    def _tokenizer(self) -> Any:
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=self.max_tokens, **self.text_config.get("tokenizer_kwargs", {}))

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [n, dim] per caption: start token, at most max_tokens - 2 of its own, end token."""
        rows = self._tokenizer(captions).tolist() if captions else []
        ids = [row[: row.index(self._tokenizer.eot_token_id) + 1] for row in rows]
        return encode_by_length(ids, self._forward, encoder_device(self.device))

    def _forward(self, ids_BL: Tensor) -> Tensor:
        tower, L = self._tower, ids_BL.shape[1]
        x_BLD = tower.token_embedding(ids_BL) + tower.positional_embedding[:L]
        layers = [len(tower.transformer.resblocks) + _LAYER]
        _, (features_BLD,) = tower.transformer.forward_intermediates(
            x_BLD, attn_mask=tower.attn_mask[:L, :L], indices=layers, stop_early=True
        )
        found: Tensor = features_BLD
        return found

    @cached_property
    def _tower(self) -> Any:
        from open_clip.model import _build_text_tower  # the only way to have a text tower without its image tower

        device = encoder_device(self.device)
        dtype = text_dtype(device)
        with must_fit(f"{self.setting}: {self.weights} holds other weights than needed"):
            state = read_weights(self.weights, _text_name)
            with torch.device("meta"):
                tower = _build_text_tower(
                    self.config["embed_dim"], self.text_config, self.config.get("quick_gelu", False), dtype
                )
            tower.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
        tower.attn_mask = tower.build_causal_mask().to(dtype)
        return tower.eval().requires_grad_(False).to(device)


def _text_name(key: str) -> str:
    """Name within the text tower, whatever wrapper's prefix it has; "" if the weight belongs elsewhere."""
    name = key.removeprefix("module.").removeprefix("text.")
    return name if name.startswith(_TEXT_KEYS) else ""
