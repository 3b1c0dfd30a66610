"""CLIP models of open_clip, named `ARCH:FILE`, or `ARCH:TAG` with a tag of open_clip such as ViT-L-14:openai.

Weights are read from this machine and never downloaded. Pictures are read as 8-bit files, then resized and cropped as
the model's authors do it; captions longer than the context are cut, and counted.

Shapes: N pictures or captions, D features.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eval.networks.protocols import ImageEncoder
from eval.weights import cache_folder, file_sha256, find_weights_file
from eval.weights_table import TABLE
from trainer.config import require
from trainer.encoders.pretrained import must_fit, read_weights

DEFAULT_CLIP, CMMD_CLIP = "ViT-L-14:openai", "ViT-L-14-336:openai"
_BATCH = 64


def find_clip(spec: str) -> tuple[str, str, Path]:
    """Architecture, tag ("" for a file) and file of a model; ConfigError with what to do when it is not here."""
    import open_clip

    arch, colon, where = spec.partition(":")
    require(bool(colon and where), f"CLIP model {spec} must be ARCH:TAG or ARCH:FILE, for instance {DEFAULT_CLIP}")
    require(open_clip.get_model_config(arch) is not None, f"open_clip knows no {arch}: see open_clip.list_models()")
    if Path(where).is_file():
        return arch, "", Path(where)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    require(where in tags, f"CLIP model {spec}: {where} is no file, and no tag of {arch} ({', '.join(tags)})")
    listed = f"clip-{arch.lower()}-openai"
    if where == "openai" and listed in TABLE:
        return arch, where, find_weights_file(listed)
    folder = cache_folder() / f"open_clip_{arch}_{where}"
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin", ".pt")]
    source = open_clip.get_pretrained_cfg(arch, where)
    hub = source.get("hf_hub", "").rstrip("/") or source.get("url", "")
    require(bool(files), f"CLIP model {spec} is not here: copy its weights from {hub} to {folder}, or give {arch}:FILE")
    return arch, where, files[0]


def _weight_name(key: str) -> str:
    name = key.removeprefix("module.")
    # OpenAI's archives hold these numbers too
    return "" if name in ("input_resolution", "context_length", "vocab_size") else name


def load_clip(spec: str) -> "ClipModel":
    """The model with its weights; ConfigError when they are missing or do not fit."""
    import open_clip

    arch, tag, path = find_clip(spec)
    sha256 = file_sha256(path)
    # OpenAI trained with a quicker GELU, whatever the architecture's name says.
    quick = tag == "openai" or any(entry.sha256 == sha256 and "openai" in entry.name for entry in TABLE.values())
    model = open_clip.create_model(arch, pretrained_text=False, force_quick_gelu=quick)
    with must_fit(f"{path} does not hold weights of {arch}"):
        model.load_state_dict(read_weights(path, _weight_name))
    preset = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    return ClipModel(arch, model, sha256, preset)


def network_name(arch: str) -> str:
    """What an architecture of open_clip is called in the keys of features and on protocol cards."""
    return f"open_clip-{arch}"


class ClipModel(ImageEncoder):
    """Both towers on this process's device."""

    def __init__(self, arch: str, model: Any, weights_sha256: str, preset: dict[str, Any] | None = None) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config = open_clip.get_model_config(arch)
        text = config["text_cfg"]
        # Other tokenizers load from the transformers hub, which this evaluation does not read from.
        strange = text.get("hf_tokenizer_name") or text.get("hf_model_name")
        require(not strange, f"{arch} has the tokenizer {strange}: use one with CLIP's own")
        self.context = int(text.get("context_length", 77))
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.context, **text.get("tokenizer_kwargs", {}))
        known = {k: v for k, v in (preset or {}).items() if k in PreprocessCfg.__dataclass_fields__}
        settings = replace(PreprocessCfg(), size=model.visual.image_size, **known)
        self.transform = image_transform_v2(settings, is_train=False)
        size = settings.size if isinstance(settings.size, int) else settings.size[0]
        super().__init__(
            model,
            int(config["embed_dim"]),
            network=network_name(arch),
            weights_sha256=weights_sha256,
            preprocess=f"{settings.interpolation}-{settings.resize_mode}-{size}-crop",
        )

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        """Resize, crop and scale a uint8 picture as the model was trained with."""
        found: Tensor = self.transform(Image.fromarray(picture_HW3.numpy()))
        return found

    @torch.inference_mode()
    def encode(self, x_N3hw: Tensor) -> Tensor:
        """Pictures to features, not normalised, fp32 [N, D] on the CPU."""
        found: Tensor = self.model.encode_image(x_N3hw.to(self.device)).float().cpu()
        return found

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions to features, not normalised, fp32 [N, D] on the CPU."""
        parts = [
            self.model.encode_text(self.tokenizer(list(texts[i : i + _BATCH])).to(self.device)).float().cpu()
            for i in range(0, len(texts), _BATCH)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def is_truncated(self, text: str) -> bool:
        """Whether the caption, with its start and end tokens, is longer than the context."""
        return len(self.tokenizer.encode(text)) + 2 > self.context
