"""Well-known encoders: what to write in a recipe, where the hub has them, under which licence. Nothing is downloaded.

Licences are those that the publishers state; read theirs before you use a model. Any other model of a kind that
`build.py` knows will do as well. The planner has sizes from here where an encoder's files are not on the machine.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KnownEncoder:
    """`setting` as in a recipe, `fetch` a command ("": nothing to fetch).

    `sizes` of a codec: channels and factor; of a text encoder: values of a token and tokens of the longest caption.
    """

    setting: str
    note: str
    licence: str
    fetch: str = ""
    sizes: tuple[int, int] | None = None

    def lines(self) -> list[str]:
        """For a terminal."""
        return [f"{self.setting:52s} {self.licence}", f"    {self.note}", f"    {self.fetch or 'nothing to fetch'}"]


_SD3 = "hf download stabilityai/stable-diffusion-3-medium-diffusers"
_COMMUNITY = "Stability AI Community License, asks for a login"

CODECS = (
    KnownEncoder(setting="pixel", note="pictures as they are; also dct, their frequencies", licence="-"),
    KnownEncoder(setting="vae:FILE", note="small, trained by python -m trainer.data.train_vae", licence="yours"),
    KnownEncoder(
        setting="diffusers:models/sd3/vae", note="16 channels, factor 8: the codec of the larger recipes",
        licence=_COMMUNITY, fetch=f'{_SD3} --include "vae/*" --local-dir models/sd3', sizes=(16, 8),
    ),
    KnownEncoder(
        setting="diffusers:models/sdxl_vae", note="4 channels, factor 8: the codec of ec_dit_b_8e", licence="MIT",
        fetch="hf download stabilityai/sdxl-vae config.json diffusion_pytorch_model.safetensors "
        "--local-dir models/sdxl_vae", sizes=(4, 8),
    ),
)  # fmt: skip
TEXT_ENCODERS = (
    KnownEncoder(
        setting="minilm, minilm@LAYER", note="384 values a token, small; inside a package that make .venv installs",
        licence="Apache-2.0",
    ),
    KnownEncoder(
        setting="t5@120:models/sd3/text_encoder_3", note="encoder of T5 v1.1 XXL, 4,096 values a token",
        licence=_COMMUNITY, sizes=(4096, 120),
        fetch=f'{_SD3} --include "text_encoder_3/*" --include "tokenizer_3/*" --exclude "*fp16*" '
        "--local-dir models/sd3",
    ),
    KnownEncoder(
        setting="t5@120:models/flan_t5_xxl", note="FLAN-T5 XXL, 4,096 values a token", licence="Apache-2.0",
        sizes=(4096, 120),
        fetch='hf download google/flan-t5-xxl --include "*.json" --include "*.safetensors" '
        "--local-dir models/flan_t5_xxl",
    ),
    KnownEncoder(
        setting="open_clip:ViT-L-14-quickgelu:models/weights/ViT-L-14.pt", licence="MIT", sizes=(768, 77),
        note="text tower of OpenAI's CLIP, 768 values a token; the file that CLIP scores are computed with, too",
        fetch="ECDIT_WEIGHTS=models/weights python -m eval.weights fetch clip-vit-l-14-openai",
    ),
)  # fmt: skip


def known_sizes(setting: str) -> tuple[int, int] | None:
    """Sizes of a well-known encoder by its setting; None for any other."""
    return next((known.sizes for known in (*CODECS, *TEXT_ENCODERS) if known.setting == setting), None)
