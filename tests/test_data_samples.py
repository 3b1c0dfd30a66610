"""One bad sample never ends a job: whatever is in a tar is kept or rejected with a reason (FUZZ_ROUNDS: how often)."""

import io
import json
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_index import NOISE, PICTURE, build, encoded, read_index, scan, write_tar

from trainer.config import ConfigError
from trainer.data import index as index_module
from trainer.data.images.decode import BadPictureError, read_rgb
from trainer.data.images.index_file import INDEX_NAME, check_unchanged, open_index, tar_index_path
from trainer.data.images.tar_scan import stats_path
from trainer.data.index import main

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "300"))
LARGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def damaged_avif() -> bytes:
    content = encoded(LARGE, "avif")
    start = content.index(b"mdat") + 4
    return content[:start] + b"\xff" * 100 + content[start + 100 :]


DEEP = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
UNDECODABLE = "picture that cannot be decoded"
# Files of one sample, and why it is rejected; "" if it is kept.
SAMPLES: list[tuple[dict[str, bytes], str]] = [
    ({"PNG": PICTURE, "TXT": b"upper case"}, ""),
    ({"Jpeg": PICTURE, "Json": b'{"caption": "from json"}'}, ""),
    ({"png": PICTURE, "txt": "caf\xe9 \U0001f600".encode()}, ""),
    ({"png": PICTURE, "txt": b"caf\xe9"}, "caption or scene that is not UTF-8"),
    ({"png": PICTURE, "json": b'{"caption": "half \\ud800 pair"}'}, "caption or scene that is not UTF-8"),
    ({"png": PICTURE, "txt": b"x", "json": b'{"scene": "\\udc00"}'}, "caption or scene that is not UTF-8"),
    ({"png": PICTURE, "json": b'{"caption": ["a", "list"]}'}, "caption that is no text"),
    ({"png": PICTURE, "json": b'{"caption": 5}'}, "caption that is no text"),
    ({"png": PICTURE, "json": DEEP}, "metadata that is no JSON object"),
    ({"png": PICTURE, "txt": b"x", "json": b'{"exif": "' + b"[" * 100_000 + b'"}'}, ""),
    ({"jpg": damaged_avif(), "txt": b"RuntimeError"}, UNDECODABLE),
    ({"jpg": b"DDS |" + bytes(200), "txt": b"NotImplementedError"}, UNDECODABLE),
    ({"png": encoded(Image.new("RGB", (65, 1))), "txt": b"x"}, "picture more than 64 times as long as wide"),
    ({"png": b"", "txt": b"x"}, UNDECODABLE),
]


@pytest.mark.parametrize(("files", "reason"), SAMPLES, ids=[f"{i}-{reason}" for i, (_, reason) in enumerate(SAMPLES)])
def test_samples_are_kept_or_rejected_with_a_reason(files: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"a.{suffix}", content) for suffix, content in files.items()])
    assert build(tmp_path).rejected == ({reason: 1} if reason else {})
    assert len(read_index(tmp_path)) == (not reason)


def test_names_and_members_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, content in (("caf\xe9.png", PICTURE), ("caf\xe9.txt", b"read"), ("\xe9.png", b"no picture")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("b.png")
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
    main([str(tmp_path), "--without-stats"])
    assert [(row.key, row.caption) for row in read_index(tmp_path)] == [("caf\\xe9", "read")]
    printed = capsys.readouterr().out
    assert "1  link or other member that is no plain file, first 0.tar: b.png" in printed
    assert "1  empty caption, first 0.tar: \\xe9" in printed


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    pictures, away = tmp_path / "pictures", tmp_path / "away"
    write_tar(away / "part" / "0.tar", [("a.png", PICTURE), ("a.txt", b"x")])
    write_tar(pictures / "here" / "1.tar", [("b.png", PICTURE), ("b.txt", b"x")])
    (pictures / "linked").symlink_to(away)
    (pictures / "here" / "loop").symlink_to(pictures)
    (pictures / "here" / "again").symlink_to(away / "part")
    assert len(build(pictures).tars) == 2
    (pictures / "2.tar").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"2\.tar is a link to nothing: mend it, or take it away"):
        build(pictures)
    (pictures / "2.tar").unlink()
    os.mkdir(os.fsencode(pictures) + b"/caf\xe9")
    (pictures / "here" / "1.tar").rename(os.fsdecode(os.fsencode(pictures) + b"/caf\xe9/1.tar"))
    with pytest.raises(ConfigError, match=r"the name 'caf\\udce9/1\.tar' is not UTF-8: rename it"):
        build(pictures)


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = encoded(Image.fromarray(noise))
    files = [(f"{i:02d}.{s}", c) for i in range(30) for s, c in (("png", picture), ("txt", b"a caption"))]
    path = tmp_path / "0.tar"
    write_tar(path, files)
    build(tmp_path)
    check_unchanged(open_index(tmp_path), open_index(tmp_path).tars[0])
    content = path.read_bytes()
    place = content.index(b"a caption", len(content) // 2)
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"A CAPTION")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # even where the time is put back
    with pytest.raises(ConfigError, match="changed since it was indexed"):
        check_unchanged(open_index(tmp_path), open_index(tmp_path).tars[0])
    build(tmp_path)
    assert [row.caption for row in read_index(tmp_path)].count("A CAPTION") == 1
    # What was only copied or touched is read, and not decoded again.
    path.write_bytes(path.read_bytes())
    check_unchanged(open_index(tmp_path), open_index(tmp_path).tars[0])
    before = read_index(tmp_path)
    monkeypatch.setattr(index_module, "scan_tar", None)
    build(tmp_path)
    assert read_index(tmp_path) == before


def test_a_folder_without_a_sound_sample_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [])
    stats_path(tmp_path / "0.tar").write_text('{"successes": 0}')  # as a download without a network leaves it
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2 and "holds no sound sample" in capsys.readouterr().err


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """With some bytes changed, and sometimes a piece cut out, doubled or zeroed."""
    found = bytearray(content)
    reach = len(found) if random.random() < 0.5 else min(64, len(found))  # headers are where decoders differ
    for _ in range(random.integers(1, 9)):
        found[random.integers(reach)] = random.integers(256)
    low, high = sorted(random.integers(0, len(found), 2))
    piece = [found[low:high], b"", found[low:high] * 2, bytes(high - low)][random.integers(4)]
    return bytes(found[:low] + piece + found[high:])


KINDS = ("png", "jpeg", "webp", "avif", "gif", "bmp", "tiff", "dds", "ico", "jpeg2000", "pcx", "qoi", "tga", "sgi")


def test_mutated_pictures_are_read_or_refused() -> None:
    originals = [encoded(LARGE, kind) for kind in KINDS]
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    LARGE.convert("L").save(buffer, "jpeg", exif=exif)
    originals += [buffer.getvalue(), encoded(LARGE.convert("P"), "png"), encoded(LARGE.convert("RGBA"), "webp")]
    refused = 0
    for seed in range(ROUNDS):
        random = np.random.default_rng([1, seed])
        content = mutated(originals[seed % len(originals)], random)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert read_rgb(content).mode == "RGB"
            except BadPictureError:
                refused += 1
    assert 0 < refused < ROUNDS


def test_mutated_tars_are_indexed_or_refused(tmp_path: Path) -> None:
    picture = encoded(Image.fromarray(NOISE), "jpeg")
    row = json.dumps({"caption": "noise", "exif": '{"Image Orientation": "Rotated 180"}'}).encode()
    files = [(f"{i}.{s}", c) for i in range(3) for s, c in (("jpg", picture), ("txt", b"noise"), ("json", row))]
    write_tar(tmp_path / "whole.tar", files)
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "whole.tar").unlink()
    headers = [512 * i for i in range(len(whole) // 512) if whole[512 * i + 257 :][:5] == b"ustar"]
    for seed in range(ROUNDS // 10):
        random = np.random.default_rng([2, seed])
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            start = int(random.choice(headers)) if seed % 2 else int(random.integers(len(whole) - 512))
            content[start + random.integers(512)] = random.integers(256)
            if seed % 4 == 1:  # a header that is valid and says something else
                header = content[start : start + 512]
                header[148:156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        (tmp_path / "0.tar").write_bytes(content)
        tar_index_path(tmp_path, "0.tar").unlink(missing_ok=True)
        result = scan(tmp_path, "0.tar")
        assert result.rows or result.rejected
        build(tmp_path).summary().encode()


def test_mutated_index_files_are_refused_or_say_the_same(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.{s}", c) for i in range(9) for s, c in (("png", PICTURE), ("txt", b"noise"))])
    build(tmp_path)
    expected = read_index(tmp_path)
    for path in (tmp_path / INDEX_NAME, tar_index_path(tmp_path, "0.tar")):
        whole = path.read_bytes()
        for seed in range(ROUNDS // 6):
            path.write_bytes(mutated(whole, np.random.default_rng([3, seed])))
            try:
                assert read_index(tmp_path) == expected
            except ConfigError as error:
                assert "run python -m trainer.data.index" in str(error)
        path.write_bytes(whole)


def test_a_program_is_no_picture() -> None:
    """Pillow would hand it to Ghostscript, whatever its name says."""
    with pytest.raises(BadPictureError, match="PostScript"):
        read_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
