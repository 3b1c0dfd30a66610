"""The cosine codec: orthonormal, exact on what it keeps, close on the embedded scenes."""

import math

import torch

from trainer.data.demo.scenes import render, training_scene
from trainer.encoders.dct import PATCH, DctCodec, cosine_basis, kept_basis


def test_basis_is_orthonormal() -> None:
    torch.testing.assert_close(kept_basis() @ kept_basis().T, torch.eye(16), rtol=0, atol=1e-6)
    identity = torch.eye(PATCH, dtype=torch.float64)
    torch.testing.assert_close(cosine_basis(PATCH) @ cosine_basis(PATCH).T, identity)


def test_flat_pictures_and_kept_values_survive() -> None:
    codec = DctCodec()
    flat = torch.tensor([0.3, -0.7, 0.9]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(codec.decode(codec.encode(flat)), flat, rtol=0, atol=1e-6)
    latent = torch.randn(2, 16, 2, 2)
    torch.testing.assert_close(codec.encode(codec.decode(latent)), latent, rtol=0, atol=1e-5)


def test_scenes_survive_at_24_decibels() -> None:
    codec = DctCodec()
    rgb = torch.stack([torch.from_numpy(render(training_scene(0, i), 32).copy()) for i in range(64)])
    rgb = rgb.permute(0, 3, 1, 2).float() / 127.5 - 1
    error = (codec.decode(codec.encode(rgb)).clamp(-1, 1) - rgb).square().mean((1, 2, 3))
    assert float((10 * (4 / error).log10()).mean()) > 24
    assert not math.isnan(float(error.sum()))
