"""Crafted and damaged checkpoints and exports: each is refused in one sentence, and nothing outside is read."""

import random
import struct
from pathlib import Path

import pytest
import torch
from bad_checkpoints import BAD, BAD_EXPORTS, INDEX, RANK, Damage, sign
from checkpoint_samples import write_sample
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from trainer.checkpoint.__main__ import main
from trainer.checkpoint.export_reader import ExportReader, is_export, read_export_config
from trainer.checkpoint.folder import fault, read_manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.state import Topology, read_state
from trainer.config import ConfigError
from trainer.formats.safetensors_header import read_header

ALONE = Topology(world_size=1, ep_size=1, zero_stage=3)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, printed.out + printed.err


@pytest.mark.parametrize("damage,words", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, words: str) -> None:
    folder = write_sample(tmp_path, 10, ALONE)
    damage(folder)
    code, out = run(capsys, "verify", tmp_path)
    assert code == 1 and words in out.splitlines()[1] and len(out.splitlines()) == 2, out
    assert run(capsys, "list", tmp_path)[0] in (0, 1), "what only reading shows is not seen"
    code, out = run(capsys, "export", folder, tmp_path / "out")
    assert code == 2 and out.startswith("error: ") and words in out and out.count("\n") == 1, out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage,words", [case[1:] for case in BAD_EXPORTS], ids=[case[0] for case in BAD_EXPORTS])
def test_bad_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Damage, words: str) -> None:
    folder = tmp_path / "export"
    assert run(capsys, "export", write_sample(tmp_path, 10, ALONE), folder)[0] == 0
    assert is_export(folder) and run(capsys, "verify", folder)[0] == 0
    damage(folder)
    code, out = run(capsys, "verify", folder)
    assert code == 1 and words in out and out.count("\n") == 1, out


def test_files_that_the_manifest_does_not_name_are_not_read(tmp_path: Path) -> None:
    folder = write_sample(tmp_path, 10, ALONE)
    (folder / "rank_00001.safetensors").write_bytes((folder / RANK).read_bytes())
    assert fault(folder) == ""
    reader = CheckpointReader(folder)
    assert {place.path.name for place in reader._places["ema"]["scale"]} == {RANK}
    reader.close()
    assert CheckpointReader(folder, ["rank_00001.safetensors"]).names("ema") == []


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut out, put in or repeated; often those that JSON is made of."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(4):
            case 0 if at < len(found):
                found[at] = rng.choice(b'0129-[]{},:"tneF\\ \xff\x00')
            case 1:
                del found[at : at + rng.choice((1, 2, 9, 40))]
            case 2:
                found[at:at] = rng.choice((b"-", b"[", b'"', b"0", b"1e9", b"null", b"{}", b"NaN", b"\\ud800", b","))
            case _:
                end = at + rng.randint(1, 30)
                found[at:at] = found[at:end]
    return bytes(found)


def test_headers_are_read_as_the_library_reads_them_or_not_at_all(tmp_path: Path) -> None:
    rng, path, accepted = random.Random(17), tmp_path / "file", 0
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "empty": torch.ones(0, 2)}
    save_file(tensors, path, metadata={"format": "pt"})
    original = path.read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    for number in range(2000):
        text = mutated(rng, original[8:length])
        content = struct.pack("<Q", len(text)) + text + original[length:] if number % 4 else mutated(rng, original)
        path.write_bytes(content)
        with path.open("rb") as file:
            try:
                found = read_header(file.fileno())
            except ValueError as error:
                assert str(error)
                continue
        accepted += 1
        try:
            theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in deserialize(content)}
        except SafetensorError as error:
            raise AssertionError(f"accepted {text!r}") from error
        assert {name: (place.dtype, place.shape) for name, place in found.places.items()} == theirs
    assert 20 < accepted < 1500, accepted


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", INDEX, "config.json"])
def test_mutated_json_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source = write_sample(tmp_path, 10, ALONE)
    export = tmp_path / "export"
    assert run(capsys, "export", source, export)[0] == 0
    folder = source if (source / name).exists() else export
    original, rng, refused = (folder / name).read_bytes(), random.Random(name), 0
    for _ in range(500):
        (folder / name).write_bytes(mutated(rng, original))
        try:
            match name:
                case "MANIFEST.json":
                    assert all("/" not in file for file in read_manifest(folder))
                    fault(folder)
                case "state.json":
                    read_state(folder)
                case "config.json":
                    sign(folder)
                    read_export_config(folder, checksums=False)
                case _:
                    ExportReader(folder).close()
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 600
    assert refused > 100, refused
