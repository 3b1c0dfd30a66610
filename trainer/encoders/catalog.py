"""Well-known encoders: what to write in a recipe, where the hub has them, under which licence. Nothing is downloaded.

Licences are those that the publishers state; read theirs before you use a model. Any other model of a kind that
`build.py` knows will do as well.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownEncoder:
    """`setting` as in a recipe, `arguments` of the hub's client `hf download` ("": nothing to fetch)."""

    setting: str
    note: str
    licence: str
    arguments: str = ""

    def lines(self) -> list[str]:
        """For a terminal."""
        fetch = f"hf download {self.arguments}" if self.arguments else "nothing to fetch"
        return [f"{self.setting:52s} {self.licence}", f"    {self.note}", f"    {fetch}"]


_SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
_COMMUNITY = "Stability AI Community License, asks for a login"

CODECS = (
    KnownEncoder(setting="pixel", note="pictures as they are; also dct, their frequencies", licence="-"),
    KnownEncoder(setting="vae:FILE", note="small, trained by python -m trainer.data.train_vae", licence="yours"),
    KnownEncoder(
        setting="diffusers:models/sd3/vae", note="16 channels, factor 8: the codec of the EC-DiT recipes",
        licence=_COMMUNITY, arguments=f'{_SD3} --include "vae/*" --local-dir models/sd3',
    ),
    KnownEncoder(
        setting="diffusers:models/sdxl_vae", note="4 channels, factor 8", licence="MIT",
        arguments="stabilityai/sdxl-vae config.json diffusion_pytorch_model.safetensors --local-dir models/sdxl_vae",
    ),
)  # fmt: skip
TEXT_ENCODERS = (
    KnownEncoder(
        setting="minilm, minilm@LAYER", note="384 values a token, small; inside a package that make .venv installs",
        licence="Apache-2.0",
    ),
    KnownEncoder(
        setting="t5@120:models/sd3/text_encoder_3", note="encoder of T5 v1.1 XXL, 4,096 values a token",
        licence=_COMMUNITY,
        arguments=f'{_SD3} --include "text_encoder_3/*" --include "tokenizer_3/*" --local-dir models/sd3',
    ),
    KnownEncoder(
        setting="t5@120:models/flan_t5_xxl", note="FLAN-T5 XXL, 4,096 values a token", licence="Apache-2.0",
        arguments='google/flan-t5-xxl --include "*.json" --include "*.safetensors" --local-dir models/flan_t5_xxl',
    ),
    KnownEncoder(
        setting="open_clip:ViT-L-14:FILE", licence="MIT",
        note="text tower of OpenAI's CLIP; FILE is what `python -m eval.weights fetch clip-vit-l-14-openai` prints",
    ),
)  # fmt: skip
