"""A trained model ready to draw: the sharded EMA put together in one process, with codec and text encoder."""

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moe.layer import MoeLayer
from moe.routing import Routed
from trainer.checkpoint.export_reader import SavedExport, is_export, read_export, read_export_config
from trainer.checkpoint.folder import find_checkpoint
from trainer.checkpoint.reader import check_same_model, read_ema
from trainer.checkpoint.state import SavedState, read_state
from trainer.config import TrainConfig, config_from_dict, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.compiled import CompiledBlocks, is_wanted
from trainer.diffusion.model import EcDit, ModelShape, init_weights
from trainer.diffusion.sampling import Observer, draw, text_batch, to_pictures
from trainer.encoders.build import build_codec, build_text_encoder


class Pipeline:
    """Captions in, pictures out. All experts are local; the training topology does not matter.

    `origin` says which weights these are, for the protocol of numbers that are measured on the pictures.
    """

    def __init__(
        self, config: TrainConfig, info: LatentInfo, step: int, weights: dict[str, Tensor] | None, origin: str = "ema"
    ) -> None:
        self.config, self.info, self.step = config, info, step
        self.origin = "untrained" if weights is None else origin
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape = ModelShape.of(info)
        self.model = EcDit(config.model, config.moe, self.shape, MoeLayer)
        if weights is None:
            init_weights(self.model, config.seed)
        else:
            self.model.load_state_dict(weights)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.model = self.model.to(self.device, dtype).eval().requires_grad_(False)
        if is_wanted(config.train.compile, self.device):
            CompiledBlocks(self.model)
        self.codec = build_codec(info.codec)
        self.text_encoder = build_text_encoder(info.text_encoder)

    @classmethod
    def load(cls, checkpoint: Path, *, weights: Literal["ema", "untrained"] = "ema") -> "Pipeline":
        """From a run folder (newest whole checkpoint), a step folder or an export; ConfigError if there is none.

        An export has the weights that were chosen when it was made; `ema` stands for those.
        """
        folder = Path(checkpoint)
        state: SavedExport | SavedState
        if is_export(folder):
            state = exported = read_export_config(folder, checksums=True)
            rounded = "" if exported.dtype == "fp32" else f" {exported.dtype}"
            read, origin = read_export, exported.weights + rounded
        else:
            folder = find_checkpoint(folder)
            state, read, origin = read_state(folder), read_ema, "ema"
        require(
            bool(state.data_info.text_encoder),
            f"{checkpoint} learned from synthetic data, which has no captions: name a run on data of your own, or on "
            "those of trainer/configs/demo.yaml",
        )
        config, found = config_from_dict(state.config), read(folder) if weights == "ema" else None
        if found is not None:
            with torch.device("meta"):
                model = EcDit(config.model, config.moe, ModelShape.of(state.data_info))
            here = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
            check_same_model(folder, {name: list(weight.shape) for name, weight in found.items()}, here)
        return cls(config, state.data_info, state.step, found, origin)

    def weights_digest(self) -> str:
        """Which weights these are, short: a hash of the first values of every tensor, as the model computes with them.

        Runs of other seeds or data, and other steps, differ in it; a moved or resumed run does not.
        """
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode() + weight.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def generate(self, captions: list[str], seeds: list[int], *, observe: Observer | None = None) -> Tensor:
        """Draw one picture per caption and seed: uint8 [N, H, W, 3].

        Picture n depends on caption n and seed n only, up to the rounding of batched matmuls.
        """
        empty = self.text_encoder.encode([""])[0]
        batch = text_batch(self.text_encoder.encode(captions), empty, self.info.max_tokens)
        text, mask = (part.to(self.device) for part in batch)
        cache = self.model.cache_text(text)

        def forward(x: Tensor, t_B: Tensor, rows: slice) -> tuple[Tensor, list[Routed]]:
            part = [(key[rows], value[rows]) for key, value in cache]
            velocity, routed = self.model(x, t_B, text[rows], mask[rows], text_cache=part)
            return velocity, routed

        latent = draw(forward, seeds, self.shape, self.config.diffusion, self.device, observe)
        return to_pictures(latent, self.codec, self.info.mean_C, self.info.std_C)
