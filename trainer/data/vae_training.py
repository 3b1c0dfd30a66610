"""Training of the small VAE that `data.codec=vae:FILE` names, on indexed pictures.

Shapes: B pictures, 3 x H x W rgb in [-1, 1].
"""

from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from trainer.config import DataConfig, require
from trainer.data.index import index_or_open
from trainer.data.latents.enlargement import check_enlargement, large_enough, too_small
from trainer.data.latents.shard_writer import picture_batches
from trainer.encoders.vae import SmallVae
from trainer.files import replacing
from trainer.formats.progress_bar import ProgressBar
from trainer.randomness import keyed_generator

BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, MAX_PICTURES = 32, 2e-3, 50, 8192
KL_WEIGHT = 1e-4  # keeps latents bounded and near one unit, costs hardly any sharpness
LOG_EVERY = 100


def load_pictures(data: DataConfig) -> Tensor:
    """The first MAX_PICTURES pictures of the index as uint8 [N, 3, size, size]."""
    folder, size, squares = Path(data.images), data.image_size, replace(data, buckets=[])
    found = list(islice(index_or_open(folder).rows(), MAX_PICTURES))
    require(bool(found), f"data.images={folder} has no sound sample: see python -m trainer.data.index")
    check_enlargement(squares, found)
    rows = large_enough(squares, found)
    print(f"{len(rows)} pictures{too_small(len(found) - len(rows))}")
    batches = []
    with ProgressBar(desc="pictures", total=len(rows), unit="image") as bar:
        for _, of_tar in groupby(rows, key=lambda row: row.tar):
            for batch in picture_batches(folder, list(of_tar), size, size, num_threads=1):
                batches.append(batch)
                bar.update(len(batch))
    return torch.cat(batches).permute(0, 3, 1, 2)


def loss_of(model: SmallVae, rgb_BCHW: Tensor, noise: torch.Generator) -> tuple[Tensor, float]:
    """Loss (absolute and squared error, KL divergence) and the mean squared error alone."""
    mean, log_variance = model.posterior(rgb_BCHW)
    sampled = mean + torch.randn(mean.shape, generator=noise) * (0.5 * log_variance).exp()
    error = model.decode(sampled) - rgb_BCHW
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squared = error.square().mean()
    return error.abs().mean() + squared + KL_WEIGHT * kl, squared.item()


def train_vae(pictures: Tensor, steps: int, seed: int) -> SmallVae:
    """A VAE after `steps` steps of AdamW; a function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallVae()
    generator = keyed_generator(seed, "vae")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    for step in ProgressBar(range(steps), "vae", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps) ** 0.5
        rows = torch.randint(len(pictures), (BATCH_SIZE,), generator=generator)
        loss, squared = loss_of(model, pictures[rows].float() / 127.5 - 1, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            ProgressBar.write(f"step {step + 1}/{steps}  loss {loss.item():.4f}  squared error {squared:.5f}")
    return model.eval()


@torch.no_grad()
def psnr(model: SmallVae, rgb_BCHW: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB (peak to peak 2)."""
    restored = model.decode(model.posterior(rgb_BCHW)[0]).clamp(-1, 1)
    error_B = functional.mse_loss(restored, rgb_BCHW, reduction="none").mean((1, 2, 3))
    return float((10 * torch.log10(4 / error_B)).mean())


def train_and_save(data: DataConfig, seed: int, steps: int, path: Path) -> None:
    """Train on the pictures of `data.images`, write the weights to `path` and print how well it restores others."""
    pictures = load_pictures(data)
    held_out = max(1, min(256, len(pictures) // 10))
    require(len(pictures) > held_out, f"data.images={data.images} holds one picture: a VAE needs more")
    model = train_vae(pictures[held_out:], steps, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(model.state_dict(), temporary)
        temporary.chmod(0o644)
    quality = psnr(model, pictures[:held_out].float() / 127.5 - 1)
    print(f"{path}: {quality:.1f} dB on {held_out} pictures it was not trained on")
