"""The index keeps sound samples only, names a reason for each other, and notices tars that changed."""

import io
import json
import tarfile
from pathlib import Path

import exifread
import numpy as np
import pytest
from PIL import Image, ImageOps

from trainer.config import ConfigError
from trainer.data import index as index_module
from trainer.data.demo import scene_shards, scenes
from trainer.data.images import decode as images
from trainer.data.images.index_file import INDEX_NAME, Index, check_unchanged, open_index, tar_index_path
from trainer.data.images.tar_scan import IndexRow, ScanResult, scan_tar
from trainer.data.index import build_index, main

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


def build(folder: Path, num_workers: int = 0) -> Index:
    """The index of tars that were not written by img2dataset."""
    index = build_index(folder, num_workers, needs_stats=False)
    assert index is not None
    return index


def read_index(folder: Path) -> list[IndexRow]:
    return list(open_index(folder).rows())


def scan(folder: Path, tar: str) -> ScanResult:
    return scan_tar(folder, tar, needs_stats=False)


def test_drawn_scenes_are_all_kept_in_order_and_found_again(tmp_path: Path) -> None:
    scene_shards.main(["--out", str(tmp_path), "--num-images", "7", "--shard-size", "3", "--image-size", "16"])
    index = build_index(tmp_path)
    assert index is not None and not index.rejected
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
        *sample("10", encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "tiff")),
        *[(name, b"{" if name.endswith("json") else content) for name, content in sample("11")],
    ]
    write_tar(tmp_path / "a" / "00000.tar", bad)
    write_tar(tmp_path / "a" / "00001.tar", sample("00") + sample("09"))
    write_tar(tmp_path / "b" / "c" / "00000.tar", sample("00"))
    assert build(tmp_path).rejected == {
        "picture that cannot be decoded": 2,
        "picture of one colour": 1,
        "empty caption": 1,
        "no picture": 1,
        "file that is no picture, txt or json": 2,
        "key seen before in the same folder": 2,  # within a tar, and between tars
        "picture of a mode that is neither grey nor colour": 1,
        "metadata that is no JSON object": 1,
    }
    assert [(row.part, row.key) for row in read_index(tmp_path)] == [
        ("a", "00"),
        ("a", "03"),
        ("a", "08"),
        ("a", "09"),
        ("b/c", "00"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    for path in before:
        path.unlink()
    build(tmp_path, num_workers=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")} == before  # processes change nothing


def test_caption_comes_from_the_metadata_without_a_txt(tmp_path: Path) -> None:
    files = [file for file in sample("00", caption="from json") if not file[0].endswith(".txt")]
    null = [("01.png", PICTURE), ("01.json", b'{"caption": null}')]
    write_tar(tmp_path / "0.tar", files + null)
    result = scan(tmp_path, "0.tar")
    assert [row.caption for row in result.rows] == ["from json"]
    assert result.rejected == [("empty caption", "0.tar: 01")]


def test_every_cut_tar_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", sample("00") + sample("01"))
    whole = (tmp_path / "whole.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) + 511 & ~511  # the end-of-archive zeros start at the next block
    for size in [*range(0, end + 1024, 256), end + 1023]:
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        result = scan(tmp_path, "cut.tar")
        assert not result.rows and len(result.rejected) == 1 and result.rejected[0][0].startswith("tar ")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 1024])
    assert len(scan(tmp_path, "cut.tar").rows) == 2
    overwritten = whole[:1024] + b"x" * 700 + whole[1724:]
    (tmp_path / "cut.tar").write_bytes(overwritten)
    assert not scan(tmp_path, "cut.tar").rows


def test_tar_needs_statistics_that_agree(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", sample("00") + sample("01"))
    assert scan_tar(tmp_path, "00000.tar").rejected == [
        ("tar without its _stats.json (download was killed)", "00000.tar")
    ]
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
    # img2dataset drops the tag when it encodes anew; what remembers is the `exif` column it fills with exifread
    image.save(tmp_path / "tagged.jpg", exif=tagged)
    words = str(exifread.process_file((tmp_path / "tagged.jpg").open("rb"), details=False)["Image Orientation"])
    write_tar(tmp_path / "0.tar", sample("00", exif=json.dumps({"Image Orientation": words})))
    (row,) = scan(tmp_path, "0.tar").rows
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
    picture = images.cover_crop(Image.fromarray((ramp * 255).astype(np.uint8)), 6, 6)
    assert picture.shape == (6, 6, 3)
    assert np.allclose(picture[..., :2].mean((0, 1)), 127.5, atol=17)  # the middle of both ramps, to half a pixel
    if shape == (8, 12):
        whole = Image.fromarray(NOISE).resize((9, 6), Image.Resampling.LANCZOS)
        assert np.array_equal(images.cover_crop(Image.fromarray(NOISE), 6, 6), np.asarray(whole)[:, 1:7])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", sample("00", caption=""))
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2
    assert "1  tar without its _stats.json (download was killed), first 0.tar" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--without-stats"])
    assert caught.value.code == 2
    assert "1  empty caption, first 0.tar: 00" in capsys.readouterr().out
    write_tar(tmp_path / "0.tar", sample("00"))
    (tmp_path / "0_stats.json").write_text('{"successes": 1}')
    main([str(tmp_path)])
    assert "1  kept, from 1 tars" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nothing")])
    assert caught.value.code == 2 and "is not a folder" in capsys.readouterr().err


def test_only_new_and_changed_tars_are_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sample(f"{number}0") + sample(f"{number}1"))
    build(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    tar_index_path(tmp_path, "0.tar").write_bytes(b"cut")  # cannot happen by a kill: files are written whole
    (tmp_path / INDEX_NAME).unlink()
    scanned: list[str] = []

    def spy(folder: Path, tar: str, needs_stats: bool) -> ScanResult:
        scanned.append(tar)
        return scan_tar(folder, tar, needs_stats)

    monkeypatch.setattr(index_module, "scan_tar", spy)
    assert build(tmp_path).num_kept == 6 and scanned == ["0.tar"]
    assert {path: path.read_bytes() for path in tmp_path.glob("*.parquet")} == before
    (tmp_path / ".1.index.parquet.7-ab.tmp").write_bytes(b"left by a kill")
    write_tar(tmp_path / "1.tar", sample("10") + sample("11", caption="noisy"))  # same size
    assert open_index(tmp_path).num_kept == 6
    with pytest.raises(ConfigError, match=r"1\.tar .* changed since it was indexed: run python -m trainer.data.index"):
        check_unchanged(open_index(tmp_path), open_index(tmp_path).tars[1])
    build(tmp_path)
    assert scanned == ["0.tar", "1.tar"] and read_index(tmp_path)[3].caption == "noisy"
    assert not list(tmp_path.glob(".*"))


def test_ranks_share_the_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sample(f"{number}0"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    main([str(tmp_path), "--without-stats"])
    assert [path.name for path in tmp_path.glob("*.parquet")] == ["1.index.parquet"]
    monkeypatch.setenv("RANK", "0")
    main([str(tmp_path), "--without-stats"])
    assert open_index(tmp_path).num_kept == 3


@pytest.mark.parametrize("seed", range(20))
def test_repeated_keys_are_found_whatever_tars_they_are_in(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    seen: set[str] = set()
    expected, repeats = [], 0
    for number in range(5):
        keys = sorted({f"{key:02d}" for key in random.integers(0, 25, random.integers(1, 5))})
        write_tar(tmp_path / f"{number}.tar", [file for key in keys for file in sample(key)])
        expected += [(f"{number}.tar", key) for key in keys if key not in seen]
        repeats += sum(key in seen for key in keys)
        seen.update(keys)
    index = build(tmp_path)
    assert [(row.tar, row.key) for row in index.rows()] == expected
    assert index.rejected.total() == repeats and index.num_kept == len(expected)


def test_stale_or_foreign_index_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample("00"))
    with pytest.raises(ConfigError, match=r"has no index\.parquet: run python -m trainer\.data\.index"):
        read_index(tmp_path)
    build(tmp_path)
    write_tar(tmp_path / "1.tar", sample("01"))
    with pytest.raises(ConfigError, match="was made from other tars"):
        read_index(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="is not an index"):
        read_index(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    build(tmp_path)
    tar_index_path(tmp_path, "0.tar").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"0\.index\.parquet cannot be read: delete it and run python"):
        read_index(tmp_path)
