"""What surrounds the solver: text for guidance, latents to pictures, pictures to a grid; each by literal values."""

import torch

from trainer.diffusion.sampling import picture_grid, text_batch, to_pictures
from trainer.encoders.pixel import PixelCodec


def test_captions_come_first_and_as_many_empty_ones_after_them() -> None:
    captions, empty = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])], torch.tensor([[9.0]])
    text, mask = text_batch(captions, empty, 3)
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, False, False], [True, False, False]]
    assert text[mask].flatten().tolist() == [1.0, 2.0, 3.0, 9.0, 9.0]


def test_pictures_are_latents_scaled_moved_and_rounded() -> None:
    """Codec `pixel`: 255 (1 + std z + mean) / 2 to the nearest whole number, within 0 to 255."""
    latent = torch.zeros(1, 3, 1, 4)
    latent[0, :, 0] = torch.tensor([[0.0, 1.0, -4.0, 4.0], [0.0, 1.0, 0.1, -0.1], [0.0, -1.0, 2.0, 0.004]])
    pictures = to_pictures(latent, PixelCodec(), torch.tensor([0.2, 0.0, -0.4]), torch.tensor([0.5, 0.25, 2.0]))
    assert pictures.dtype == torch.uint8 and pictures.shape == (1, 1, 4, 3) and pictures.is_contiguous()
    #   0.2      0.7       -1.8     2.2   | 0 127.5 -> even   0.25     0.025    -0.025 | -0.4  -2.4   3.6  -0.392
    assert pictures[0, 0, :, 0].tolist() == [153, 217, 0, 255]
    assert pictures[0, 0, :, 1].tolist() == [128, 159, 131, 124]
    assert pictures[0, 0, :, 2].tolist() == [76, 0, 255, 78]


def test_a_grid_is_filled_row_by_row_and_white_where_pictures_end() -> None:
    pictures = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 3).clone()
    pictures[:, 0, 1] += 1
    found = picture_grid(pictures, columns=2, scale=2)
    assert found.shape == (4, 8, 3) and (found == found[..., :1]).all()
    top, bottom = [10, 10, 11, 11, 20, 20, 21, 21], [30, 30, 31, 31, 255, 255, 255, 255]
    assert found[..., 0].tolist() == [top, top, bottom, bottom]
