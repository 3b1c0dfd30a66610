"""`--recipe` of the download: pictures as large as encoding needs them, and no larger."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from trainer.config import load_config, save_config
from trainer.data import download
from trainer.data.images.decode import cover_scale, nearest_bucket, shorter_side


def enlarged(sizes: Sequence[tuple[int, int]], shorter: int) -> int:
    """How many of many shapes of pictures, reduced as img2dataset does it, would be enlarged."""
    count = 0
    for ratio in np.exp(np.linspace(-np.log(4), np.log(4), 2001)):
        height, width = (round(shorter * max(1, 1 / ratio)), round(shorter * max(1, ratio)))
        count += cover_scale(height, width, *sizes[nearest_bucket(sizes, height, width)]) > 1
    return count


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [
        ([(256, 256)], 256),
        ([(256, 320)], 320),  # a square picture, too, is cropped to it
        ([(256, 256), (224, 288), (288, 224)], 256),
        ([(512, 512), (416, 640), (640, 416)], 517),
        ([(256, 512), (512, 256)], 512),
    ],
)
def test_pictures_cover_their_crop_and_are_no_larger(sizes: list[tuple[int, int]], needed: int) -> None:
    found = shorter_side(sizes)
    assert found == needed and not enlarged(sizes, found)
    assert enlarged(sizes, found - 2)


def test_the_recipe_decides_unless_a_size_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said before the interpreter, which does not start, is asked for img2dataset."""
    urls, recipe = tmp_path / "urls.csv", tmp_path / "mine.yaml"
    urls.write_text("URL,TEXT\nhttp://x,y\n")
    save_config(load_config("debug", ["data.buckets=[64x96,96x64]", "data.bucket_block=8"]), recipe)

    def said(*options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            download.main([str(urls), "--out", str(tmp_path / "out"), "--python", "/bin/false", *options])
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and not (tmp_path / "out").exists()
        return (printed.out + printed.err).replace("URLs from column URL, captions from column TEXT\n", "")

    of_recipe = "data.image_size=256 of ec_dit_b_8e needs 256\n"
    assert said("--recipe", "ec_dit_b_8e").startswith(f"--image-size 256: {of_recipe}")
    assert said("--recipe", "ec_dit_b_8e", "--image-size", "300").startswith(f"--image-size 300: as given; {of_recipe}")
    assert said("--recipe", str(recipe)).startswith(f"--image-size 96: data.buckets of {recipe} needs 96\n")
    assert said().startswith("--image-size 320: the default: --recipe would choose\n")
    assert said("--image-size", "64").startswith("--image-size 64: as given\n")
    assert "--image-size is 0: use 1 or more" in said("--image-size", "0")
    assert "nowhere" in said("--recipe", "nowhere")
