"""A trained model ready to draw: the sharded EMA put together in one process, with codec and text encoder.

from trainer import Pipeline
pipe = Pipeline.load("exports/mine")                     # or a run folder, or a checkpoint of it
images = pipe("a cat", num_images=4, seed=0)             # a list of PIL pictures
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from moe.layer import MoeLayer
from moe.routing import Routed
from trainer.checkpoint.export_reader import SavedExport, is_export, read_export, read_export_config
from trainer.checkpoint.folder import find_checkpoint
from trainer.checkpoint.portable import ENCODERS
from trainer.checkpoint.reader import check_same_model, read_ema
from trainer.checkpoint.state import SavedState, read_state
from trainer.config import TrainConfig, config_from_dict, require
from trainer.data.latents.samples import LatentInfo
from trainer.diffusion.compiled import CompiledBlocks, is_wanted
from trainer.diffusion.draw_options import DrawOptions, settings_of
from trainer.diffusion.model import EcDit, ModelShape, init_weights
from trainer.diffusion.sampling import Observer, draw, text_batch, to_pictures
from trainer.distributed import detect_world
from trainer.encoders.build import build_codec, build_text_encoder
from trainer.encoders.places import placed_settings
from trainer.settings.model import check_prompt

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_AS_TRAINED = DrawOptions()


class Pipeline:
    """Captions in, pictures out. All experts are local; the training topology does not matter.

    `origin` says which weights these are, for the protocol of numbers that are measured on the pictures. `device` is
    that of the model, and where it is given of large encoders too.
    """

    def __init__(
        self, config: TrainConfig, info: LatentInfo, step: int, weights: dict[str, Tensor] | None, origin: str = "ema",
        *, device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.config, self.info, self.step = config, info, step
        self.origin = "untrained" if weights is None else origin
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape = ModelShape.of(info)
        self.model = EcDit(config.model, config.moe, self.shape, MoeLayer)
        if weights is None:
            init_weights(self.model, config.seed)
        else:
            self.model.load_state_dict(weights)
        dtype = dtype or DTYPES[config.train.precision]
        self.model = self.model.to(self.device, dtype).eval().requires_grad_(False)
        self.codec = build_codec(info.codec, device)
        self.text_encoder = build_text_encoder(info.text_encoder, device)

    @classmethod
    def load(
        cls, checkpoint: Path | str, *, weights: Literal["ema", "untrained"] = "ema",
        encoders: Path | str | None = None, device: str | None = None, dtype: str | None = None,
    ) -> "Pipeline":  # fmt: skip
        """From a run folder (newest whole checkpoint), a step folder or an export; ConfigError if there is none.

        An export has the weights that were chosen when it was made; `ema` stands for those. `encoders` is the folder
        with codec and text encoder, where they do not lie as the run or the export says. `device` is cpu, cuda or
        cuda:N (default: a GPU if there is one), `dtype` bf16 or fp32 (default: the run's).
        """
        folder, place = Path(checkpoint), _device(device)
        require(dtype is None or dtype in DTYPES, f"dtype is {dtype}: use {' or '.join(DTYPES)}")
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
        info = _with_encoders(state, folder, None if encoders is None else Path(encoders))
        config, shown = config_from_dict(state.config), detect_world().is_main
        found = read(folder, shown=shown) if weights == "ema" else None
        if found is not None:
            with torch.device("meta"):
                model = EcDit(config.model, config.moe, ModelShape.of(info))
            shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
            check_same_model(folder, {name: list(weight.shape) for name, weight in found.items()}, shapes)
        kind = None if dtype is None else DTYPES[dtype]
        pipeline = cls(config, info, state.step, found, origin, device=place, dtype=kind)
        if isinstance(state, SavedExport) and state.encoders:
            here = {"codec": pipeline.codec.fingerprint(), "text_encoder": pipeline.text_encoder.fingerprint()}
            state.check_encoders(folder, here)
        return pipeline

    def __call__(
        self, prompt: str | Sequence[str], *, num_images: int = 1, seed: int = 0, negative_prompt: str = "",
        steps: int | None = None, guidance: float | None = None, solver: str | None = None,
        height: int | None = None, width: int | None = None, batch_size: int = 8,
    ) -> list[Image.Image]:  # fmt: skip
        """`num_images` pictures of each prompt, those of a prompt next to each other; ConfigError for what cannot be.

        Picture k of each prompt starts from the noise of seed + k: the same seed gives the same picture again. What is
        None is as the run has it; `batch_size` pictures are drawn at once.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            require(value >= 1, f"{name} is {value}: use 1 or more")
        require(0 <= seed < 2**63, f"seed is {seed}: use 0 to {2**63 - 1}")
        for text in prompts:
            check_prompt(text, "the prompt")
        options = DrawOptions(
            steps=steps, guidance=guidance, solver=solver, negative_prompt=negative_prompt, height=height, width=width
        )
        captions = [text for text in prompts for _ in range(num_images)]
        seeds = [seed + k for _ in prompts for k in range(num_images)]
        batches = self.batches(captions, seeds, options, batch_size)
        return [Image.fromarray(picture.numpy()) for batch in batches for picture in batch]

    def compile(self) -> "Pipeline":
        """Compile the blocks where the run's `train.compile` does: a minute or two, worth it for hundreds of pictures.

        Rounding differs from the uncompiled model's. Returns itself.
        """
        if is_wanted(self.config.train.compile, self.device) and not self.model.is_compiled:
            CompiledBlocks(self.model)
        return self

    def weights_digest(self) -> str:
        """Which weights these are, short: a hash of the first values of every tensor, as the model computes with them.

        Runs of other seeds or data, and other steps, differ in it; a moved or resumed run does not.
        """
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode() + weight.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def drawing_card(self, options: DrawOptions, batch_size: int) -> dict[str, Any]:
        """How pictures are drawn with these options, for their metadata; ConfigError for options that cannot be."""
        height, width = options.latent_size(self.info, self.codec.factor)
        size = height * self.codec.factor, width * self.codec.factor
        card = settings_of(options, self.config.diffusion, size)
        card |= {"step": self.step, "weights": self.origin, "weights_digest": self.weights_digest()}
        card["dtype"] = next(name for name, dtype in DTYPES.items() if dtype == next(self.model.parameters()).dtype)
        return card | ({"drawn_together": batch_size} if self.pictures_touch() else {})

    def pictures_touch(self) -> bool:
        """Whether tokens of pictures that are drawn together compete for experts."""
        return self.config.moe.every > 0 and self.config.moe.pool != "image"

    def batches(
        self, captions: Sequence[str], seeds: Sequence[int], options: DrawOptions, batch_size: int
    ) -> Iterator[Tensor]:
        """What `generate` gives, `batch_size` pictures at a time."""
        for start in range(0, len(captions), batch_size):
            part = slice(start, start + batch_size)
            yield self.generate(list(captions[part]), list(seeds[part]), options=options)

    @torch.inference_mode()
    def generate(
        self, captions: list[str], seeds: list[int], *, observe: Observer | None = None,
        options: DrawOptions = _AS_TRAINED,
    ) -> Tensor:  # fmt: skip
        """Draw one picture per caption and seed at once: uint8 [N, H, W, 3].

        Where tokens compete within their picture (moe.pool=image), picture n depends on caption n and seed n only, up
        to the rounding of batched matmuls. In wider pools it also depends on the pictures that it is drawn with.
        """
        diffusion = options.diffusion(self.config.diffusion)
        height, width = options.latent_size(self.info, self.codec.factor)
        empty = self.text_encoder.encode([options.negative_prompt])[0]
        batch = text_batch(self.text_encoder.encode(captions), empty, self.info.max_tokens)
        text, mask = (part.to(self.device) for part in batch)

        def forward(x: Tensor, t_B: Tensor, rows: slice) -> tuple[Tensor, list[Routed]]:
            part = [(key[rows], value[rows]) for key, value in cache]
            velocity, routed = self.model(x, t_B, text[rows], mask[rows], text_cache=part)
            return velocity, routed

        shape = replace(self.shape, height=height, width=width)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():  # Triton's launches
            cache = self.model.cache_text(text)
            latent = draw(forward, seeds, shape, diffusion, self.device, observe)
        return to_pictures(latent, self.codec, self.info.mean_C, self.info.std_C)


def _device(name: str | None) -> torch.device | None:
    """The device of a name; ConfigError where it is none, or not here."""
    if name is None:
        return None
    kind, _, number = name.partition(":")
    known = kind in ("cpu", "cuda") and (not number or (kind == "cuda" and number.isdecimal()))
    require(known, f"device is {name}: use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(
        kind == "cpu" or int(number or 0) < count, f"device is {name}, but there are {count} GPUs: use cpu, or none"
    )
    return torch.device(name)


def _with_encoders(state: SavedExport | SavedState, folder: Path, encoders: Path | None) -> LatentInfo:
    """The description of the data with its encoders where they lie on this machine."""
    info = state.data_info
    if encoders is None and isinstance(state, SavedExport) and state.format > 2:
        encoders = folder / ENCODERS
    if encoders is None:
        return info
    codec, text_encoder = placed_settings([info.codec, info.text_encoder], encoders, str(folder))
    return replace(info, codec=codec, text_encoder=text_encoder)
