"""The index keeps sound samples only, names a reason for each other, and notices tars that changed."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from trainer.config import ConfigError
from trainer.data import images, scenes
from trainer.data.index import INDEX_NAME, build_index, main, read_index, scan_tar

NOISE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PICTURE = encoded(Image.fromarray(NOISE))


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def sample(key: str, picture: bytes = PICTURE, caption: str = "noise", **metadata: object) -> list[tuple[str, bytes]]:
    row = json.dumps({"key": key, "caption": caption, **metadata}).encode()
    return [(f"{key}.png", picture), (f"{key}.txt", caption.encode()), (f"{key}.json", row)]


def reasons(folder: Path) -> Counter[str]:
    return Counter(reason for reason, _ in build_index(folder).rejected)


def test_drawn_scenes_are_all_kept_in_order_and_found_again(tmp_path: Path) -> None:
    scenes.main(["--out", str(tmp_path), "--num-images", "7", "--shard-size", "3", "--image-size", "16"])
    assert not build_index(tmp_path).rejected
    rows = read_index(tmp_path)
    assert [row.key for row in rows] == [f"{i // 3:05d}{i % 3:04d}" for i in range(7)]
    for index, row in enumerate(rows):
        scene = scenes.training_scene(0, index)
        assert (row.caption, row.width, row.height, row.orientation) == (scene.caption, 16, 16, 1)
        assert scenes.Scene.from_json(row.scene) == scene
        content = (tmp_path / row.tar).read_bytes()[row.offset : row.offset + row.size]
        assert np.array_equal(np.asarray(images.read_rgb(content)), scenes.render(scene, 16))


def test_each_kind_of_bad_sample_is_rejected_with_its_reason(tmp_path: Path) -> None:
    white = encoded(Image.new("RGB", (8, 8), (255, 255, 255)))
    bad = [
        *sample("03"),
        *sample("01", PICTURE[: len(PICTURE) // 2]),
        *sample("02", b"<html>not found</html>"),
        *sample("04", white),
        *sample("05", caption=" \n"),
        ("06.txt", b"no picture"),
        ("07.mp4", b"film"),
        *sample("08"),
        ("08.npy", b"array"),
        *sample("00"),
        *sample("03"),
    ]
    write_tar(tmp_path / "a" / "00000.tar", bad)
    write_tar(tmp_path / "a" / "00001.tar", sample("00") + sample("09"))
    write_tar(tmp_path / "b" / "00000.tar", sample("00"))
    assert reasons(tmp_path) == {
        "picture that cannot be decoded": 2,
        "picture of one colour": 1,
        "empty caption": 1,
        "no picture": 1,
        "file that is no picture, txt or json": 2,
        "key seen before in the same folder": 1,
    }
    assert [(row.part, row.key) for row in read_index(tmp_path)] == [
        ("a", "00"),
        ("a", "03"),
        ("a", "08"),
        ("a", "09"),
        ("b", "00"),
    ]
    # processes change nothing
    before = (tmp_path / INDEX_NAME).read_bytes()
    build_index(tmp_path, num_workers=2)
    assert (tmp_path / INDEX_NAME).read_bytes() == before


def test_caption_comes_from_the_metadata_without_a_txt(tmp_path: Path) -> None:
    files = [file for file in sample("00", caption="from json") if not file[0].endswith(".txt")]
    null = [("01.png", PICTURE), ("01.json", b'{"caption": null}')]
    write_tar(tmp_path / "0.tar", files + null)
    result = scan_tar(tmp_path, "0.tar")
    assert [row.caption for row in result.rows] == ["from json"]
    assert result.rejected == [("empty caption", "0.tar: 01")]


def test_every_cut_tar_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", sample("00") + sample("01"))
    whole = (tmp_path / "whole.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) + 511 & ~511  # the end-of-archive zeros start at the next block
    for size in [*range(0, end + 1024, 256), end + 1023]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        result = scan_tar(tmp_path, "cut.tar")
        assert not result.rows and len(result.rejected) == 1 and result.rejected[0][0].startswith("tar ")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 1024])
    assert len(scan_tar(tmp_path, "cut.tar").rows) == 2
    overwritten = whole[:1024] + b"x" * 700 + whole[1724:]
    (tmp_path / "cut.tar").write_bytes(overwritten)
    assert not scan_tar(tmp_path, "cut.tar").rows


def test_tar_that_disagrees_with_its_statistics_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", sample("00") + sample("01"))
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 3}')
    (_, where), *rest = scan_tar(tmp_path, "00000.tar").rejected
    assert where == "00000.tar" and not rest
    (tmp_path / "00000_stats.json").write_text('{"count": 3, "successes": 2}')
    assert len(scan_tar(tmp_path, "00000.tar").rows) == 2


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_of_the_original_is_undone(value: int, tmp_path: Path) -> None:
    image = Image.fromarray(NOISE)
    tagged = Image.Exif()
    tagged[0x0112] = value
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=tagged)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))  # Pillow's own reading of the tag
    assert np.array_equal(np.asarray(images.read_rgb(buffer.getvalue())), expected)
    words = {2: "Mirrored horizontal", 3: "Rotated 180", 6: "Rotated 90 CW", 8: "Rotated 90 CCW"}
    if value in words:  # the tag is lost, only img2dataset's metadata remembers
        write_tar(tmp_path / "0.tar", sample("00", exif=json.dumps({"Image Orientation": words[value]})))
        (row,) = scan_tar(tmp_path, "0.tar").rows
        assert row.orientation == value and (row.height, row.width) == expected.shape[:2]
        assert np.array_equal(np.asarray(images.read_rgb(PICTURE, row.orientation)), expected)


def test_unusual_pictures_become_rgb() -> None:
    grey = NOISE[..., 0]
    expected = np.repeat(grey[..., None], 3, -1)
    assert np.array_equal(np.asarray(images.read_rgb(encoded(Image.fromarray(grey)))), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(images.read_rgb(encoded(deep))), expected)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.array_equal(np.asarray(images.read_rgb(encoded(clear))), np.full((4, 4, 3), 255))
    assert images.is_constant(images.read_rgb(encoded(clear))) and not images.is_constant(Image.fromarray(NOISE))


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (4, 3), (40, 31), (6, 6)])
def test_cover_crop_keeps_the_middle(shape: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    ramp = np.stack([rows / (shape[0] - 1), columns / (shape[1] - 1), rows * 0.0], -1)
    picture = images.cover_crop(Image.fromarray((ramp * 255).astype(np.uint8)), 6)
    assert picture.shape == (6, 6, 3)
    assert np.allclose(picture[..., :2].mean((0, 1)), 127.5, atol=17)  # the middle of both ramps, to half a pixel
    if shape == (8, 12):
        whole = Image.fromarray(NOISE).resize((9, 6), Image.Resampling.LANCZOS)
        assert np.array_equal(images.cover_crop(Image.fromarray(NOISE), 6), np.asarray(whole)[:, 1:7])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", sample("00", caption=""))
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 1 and not (tmp_path / INDEX_NAME).exists()
    assert "1  empty caption, first 0.tar: 00" in capsys.readouterr().out
    write_tar(tmp_path / "0.tar", sample("00"))
    main([str(tmp_path)])
    assert "1  kept, from 1 tars" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nothing")])
    assert caught.value.code == 2 and "is not a folder" in capsys.readouterr().err


def test_stale_or_foreign_index_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("00"))
    with pytest.raises(ConfigError, match=r"has no index\.parquet: run python -m trainer\.data\.index"):
        read_index(tmp_path)
    build_index(tmp_path)
    write_tar(tmp_path / "1.tar", sample("01"))
    with pytest.raises(ConfigError, match="was made from other tars"):
        read_index(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="is not an index"):
        read_index(tmp_path)
