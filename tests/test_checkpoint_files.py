"""The checkpoint's own file format: pieces of logical tensors, written by stream, read by range."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xxhash
from checkpoint_layout import tensor_hashes
from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint.folder import write_manifest
from trainer.checkpoint.reader import CheckpointReader, Piece, rank_file, read_ema, write_pieces
from trainer.checkpoint.tensorfile import TensorFile, Written
from trainer.config import ConfigError

SHAPES = {"blocks.1.mlp.experts.w1": (4, 3, 5), "bias": (7,), "scale": (1,)}


def full_tensors() -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        (kind, name): torch.randn(shape, generator=generator)
        for kind in ("weight", "ema", "exp_avg")
        for name, shape in SHAPES.items()
    }


def write(folder: Path, cuts: dict[str, list[int]]) -> None:
    """Cut each flattened tensor at the given places; part number r goes to rank r."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks: dict[int, list[Piece]] = {}
    for (kind, name), tensor in full_tensors().items():
        bounds = [0, *cuts.get(name, []), tensor.numel()]
        for rank, (start, end) in enumerate(pairwise(bounds)):
            values = tensor.flatten()[start:end]
            ranks.setdefault(rank, []).append(
                Piece(kind=kind, name=name, offset=start, shape=tuple(tensor.shape), values=values)
            )
    for rank, pieces in ranks.items():
        written = write_pieces(folder / rank_file(rank), pieces, {"rng/torch": torch.arange(9, dtype=torch.uint8)})
        content = (folder / rank_file(rank)).read_bytes()
        assert written.size == len(content)
        assert written.checksum == xxhash.xxh3_128_hexdigest(content)
    sign(folder)


def sign(folder: Path) -> None:
    """Make the manifest name what is there."""
    names = [path.name for path in folder.glob("rank_*")]
    write_manifest(folder, dict.fromkeys(names, Written(size=0, checksum="")))


CUTS = [{}, {"blocks.1.mlp.experts.w1": [30]}, {"blocks.1.mlp.experts.w1": [1, 29, 30], "bias": [3]}]


@pytest.mark.parametrize("cuts", CUTS)
def test_pieces_read_back_whole_and_by_range(tmp_path: Path, cuts: dict[str, list[int]]) -> None:
    write(tmp_path, cuts)
    reader = CheckpointReader(tmp_path)
    assert reader.names("exp_avg_sq") == []
    for (kind, name), tensor in full_tensors().items():
        assert name in reader.names(kind) and reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.read(kind, name), tensor)
        flat = tensor.flatten()
        for start in range(0, len(flat), 2):
            for end in range(start, len(flat) + 1, 5):
                assert torch.equal(reader.read_range(kind, name, start, end), flat[start:end])
    with pytest.raises(ValueError, match="bias has 7 elements, not 3 to 8"):
        reader.read_range("weight", "bias", 3, 8)
    assert torch.equal(read_ema(tmp_path)["bias"], full_tensors()["ema", "bias"])


def test_hashes_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    for number, cuts in enumerate(CUTS):
        write(tmp_path / str(number), cuts)
    first = tensor_hashes(tmp_path / "0")
    assert set(first) == set(full_tensors())
    assert len(set(first.values())) == len(first)
    assert all(tensor_hashes(tmp_path / str(n)) == first for n in (1, 2))


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    write(tmp_path, {})
    loaded = load_file(tmp_path / rank_file(0))
    assert torch.equal(loaded["weight/bias"], full_tensors()["weight", "bias"])
    assert torch.equal(loaded["rng/torch"], torch.arange(9, dtype=torch.uint8))
    assert TensorFile(tmp_path / rank_file(0)).metadata["format"] == "ec_dit.pieces"


def test_pieces_that_do_not_cover_a_tensor_once_are_refused(tmp_path: Path) -> None:
    name = "blocks.1.mlp.experts.w1"
    write(tmp_path, {name: [10, 30]})
    other = tmp_path / rank_file(1)
    content = other.read_bytes()
    other.unlink()
    sign(tmp_path)
    with pytest.raises(ConfigError, match=f"elements 10 to 30 of weight {name} are there not at all"):
        CheckpointReader(tmp_path)
    (tmp_path / rank_file(7)).write_bytes(content)
    other.write_bytes(content)
    sign(tmp_path)
    with pytest.raises(ConfigError, match=f"elements 10 to 30 of weight {name} are there twice"):
        CheckpointReader(tmp_path)
    other.unlink()
    (tmp_path / rank_file(2)).unlink()
    sign(tmp_path)
    with pytest.raises(ConfigError, match=f"30 elements of weight {name} are there, it has 60"):
        CheckpointReader(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    sign(tmp_path)
    with pytest.raises(ConfigError, match="is it a checkpoint"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_cut_files_are_named(tmp_path: Path, keep: int) -> None:
    write(tmp_path, {})
    path = tmp_path / rank_file(0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"rank_00000.safetensors is damaged"):
        CheckpointReader(tmp_path)
