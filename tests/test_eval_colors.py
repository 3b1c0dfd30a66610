"""Masks and colours of found objects: what is cut out of a picture, and the judge that needs no weights."""

import numpy as np
import pytest
import torch

from eval.networks.colors import NearestColors, crop
from eval.networks.mask2former import masks_at_picture_size
from eval.networks.protocols import FoundObject
from eval.pictures.geneval_names import CLASSES

CAT = CLASSES.index("cat")


def test_colours_are_judged_on_the_masked_crop() -> None:
    """In a white picture rows 3 to 10 are blue in columns 5 and 6, the mask, and red in 7 and 8."""
    picture = torch.full((14, 18, 3), 255, dtype=torch.uint8)
    picture[3:11, 5:7] = torch.tensor([45, 90, 200], dtype=torch.uint8)
    picture[3:11, 7:9] = torch.tensor([214, 39, 40], dtype=torch.uint8)
    mask = torch.zeros(14, 18, dtype=torch.bool)
    mask[3:11, 5:7] = True
    item = FoundObject(class_number=CAT, score=1.0, box=(4.6, 2.9, 9.4, 11.2), mask_HW=mask)
    pixels = np.asarray(crop(picture, item))
    assert pixels.shape == (8, 4, 3)
    assert (pixels[:, :2] == [45, 90, 200]).all() and (pixels[:, 2:] == [153, 153, 153]).all()
    red, blue, white = 0, 4, 9  # places in GenEval's list
    bare = FoundObject(class_number=CAT, score=1.0, box=(5.0, 3.0, 17.0, 11.0))
    assert np.asarray(crop(picture, bare)).shape == (8, 12, 3)
    rows = NearestColors().classify(picture, [item, bare], "cat")
    assert rows[0, blue] == 1 and rows[0].sum() == 1
    assert rows[1, [red, blue, white]].tolist() == pytest.approx([2 / 12, 2 / 12, 8 / 12])
    empty = FoundObject(class_number=CAT, score=1.0, box=(3.0, 3.0, 3.0, 3.0))
    assert crop(picture, empty).size == (1, 1)
    assert not NearestColors().classify(picture, [empty], "cat").any()


def test_masks_of_a_padded_wide_picture_keep_their_places() -> None:
    """Two planes, the one rising to the right, the other downwards, a unit per pixel of the padded input."""
    across = (torch.arange(16) + 0.5)[None].expand(8, 16) * 4
    down = (torch.arange(8) + 0.5)[:, None].expand(8, 16) * 4
    found = masks_at_picture_size(torch.stack([across, down]), (32, 64), (24, 40), (12, 20))
    assert found.shape == (2, 12, 20)
    right, below = 2 * (torch.arange(20) + 0.5), 2 * (torch.arange(12) + 0.5)
    torch.testing.assert_close(found[0, :, 1:], right[1:].expand(12, 19))  # the outermost pixel repeats the edge
    torch.testing.assert_close(found[1, 1:], below[1:, None].expand(11, 20))
