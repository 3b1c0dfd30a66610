"""Pictures to features: resize conventions against their owners' code, the store against kills, ranks and damage."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fidelity_weights import fidelity_layers, full_inception
from PIL import Image
from reducing_metrics import frechet_from_features
from torch import Tensor
from torch.nn import functional

from eval.metrics.frechet import inception_score
from eval.networks.inception import InceptionEncoder
from eval.networks.inception_network import Inception, build_inception
from eval.networks.protocols import ImageEncoder
from eval.networks.resize import CONVENTIONS, fid_input
from eval.pictures.image_files import folder_files, geneval_files, read_picture, unpack_npz, write_picture
from eval.scoring.feature_store import FeatureStore, add_picture_features, hash_files, prefetched
from eval.suites import reference_statistics as statistics
from eval.weights import find_weights_file
from trainer.config import ConfigError
from trainer.distributed import World
from trainer.encoders.pretrained import read_torchscript

WIDTH = 6


class Stub(ImageEncoder):
    """A real, tiny network in place of a big one: channel means of the four quarters, projected."""

    dim = WIDTH

    def __init__(self) -> None:
        self.key = {"network": "quarters", "weights_sha256": "0", "preprocess": "none", "precision": "fp32"}
        self.mix = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
        self.seen = 0

    def prepare(self, picture_HW3: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(picture_HW3.permute(2, 0, 1).float(), 2)

    def encode(self, x_N3hw: Tensor) -> Tensor:
        self.seen += len(x_N3hw)
        return x_N3hw.flatten(1) @ self.mix


def _pictures(folder: Path, count: int, size: int = 12) -> list[Path]:
    draw = np.random.default_rng(0)
    files = [folder / f"{i:03d}.png" for i in range(count)]
    for file in files:
        write_picture(file, torch.from_numpy(draw.integers(0, 256, (size, size + 3, 3), dtype=np.uint8)))
    return files


def write_npz(path: Path, files: list[Path]) -> None:
    """Pictures of one size as the batch file of ADM's evaluator."""
    np.savez(path, arr_0=np.stack([read_picture(file).numpy() for file in files]))


def test_each_convention_equals_its_owners_code() -> None:
    picture = torch.randint(0, 256, (64, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    oracle = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = picture.permute(2, 0, 1)[None].float()
    tf1 = oracle.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(fid_input(picture, "torch-fidelity"), ((tf1 - 128) / 128)[0], atol=1e-5, rtol=0)
    # clean-fid, resize.py: each channel as a float image through PIL, then clipped.
    channels = [Image.fromarray(picture.numpy()[:, :, i].astype(np.float32)) for i in range(3)]
    resized = [np.asarray(c.resize((299, 299), resample=Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    assert np.array_equal(fid_input(picture, "clean").numpy(), (np.stack(resized) - 128) / 128)
    # pytorch-fid, inception.py
    theirs = functional.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False)
    assert torch.equal(fid_input(picture, "pytorch-fid"), (2 * theirs - 1)[0])
    inputs = [fid_input(picture, name) for name in CONVENTIONS]
    assert all(float((a - b).abs().max()) > 0.01 for a, b in itertools.combinations(inputs, 2))
    with pytest.raises(ConfigError, match="convention tf is unknown: choose from torch-fidelity"):
        InceptionEncoder("tf")


def test_torch_fidelity_weights_map_onto_the_table() -> None:
    state = {}
    net = build_inception_random()
    for i, conv in enumerate(net.convolutions()):
        state |= {f"m{i:02d}.conv.weight": conv.weight * 2, f"m{i:02d}.bn.bias": torch.zeros(len(conv.weight))}
        state |= {f"m{i:02d}.bn.running_mean": torch.ones(len(conv.weight)) * 4}
        state |= {f"m{i:02d}.bn.running_var": torch.ones(len(conv.weight)) - 1e-3}
        state |= {f"m{i:02d}.bn.weight": torch.full((len(conv.weight),), 0.5)}
    again = build_inception(fidelity_layers(state))
    for a, b in zip(net.convolutions(), again.convolutions(), strict=True):
        assert b.bias is not None
        torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(b.bias, torch.full_like(b.bias, -2.0))
    del state["m03.bn.running_var"]
    with pytest.raises(ValueError, match="m03 has no complete normalisation"):
        fidelity_layers(state)


def build_inception_random() -> Any:
    return Inception()


def test_store_resumes_and_does_not_depend_on_ranks(tmp_path: Path) -> None:
    files = _pictures(tmp_path / "pictures", 11)
    hashes = hash_files(files)
    encoder = Stub()
    whole = FeatureStore(tmp_path / "one", encoder.key, WIDTH)
    assert add_picture_features(whole, encoder, files, batch_size=4) == 11
    expected = whole.matrix(hashes)
    torch.testing.assert_close(
        expected, encoder.encode(torch.stack([encoder.prepare(read_picture(f)) for f in files])), atol=1e-3, rtol=1e-5
    )
    # Three ranks, the second of which never ran; then two ranks of another job finish it.
    for rank in (2, 0):
        store = FeatureStore(tmp_path / "many", encoder.key, WIDTH)
        add_picture_features(store, encoder, files, World(rank=rank, local_rank=0, size=3), batch_size=2)
    with pytest.raises(ConfigError, match="4 features are missing"):
        store.matrix(hashes)
    before = encoder.seen
    for rank in range(2):
        store = FeatureStore(tmp_path / "many", encoder.key, WIDTH)
        add_picture_features(store, encoder, files, World(rank=rank, local_rank=0, size=2), batch_size=3)
    assert encoder.seen == before + 4
    torch.testing.assert_close(store.matrix(hashes), expected, atol=1e-4, rtol=1e-6)
    assert [len(part) for part in store.read(hashes, rows_at_once=4)] == [4, 4, 3]
    other = FeatureStore(tmp_path / "one", {**encoder.key, "preprocess": "other"}, WIDTH)
    assert other.folder != whole.folder and not other.refresh()


def test_damaged_pictures_and_shards_are_named(tmp_path: Path) -> None:
    files = _pictures(tmp_path / "pictures", 3)
    encoder = Stub()
    store = FeatureStore(tmp_path / "store", encoder.key, WIDTH)
    files[1].write_bytes(files[1].read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"001\.png cannot be read"):
        add_picture_features(store, encoder, files)
    assert not list(store.folder.glob("*.tmp")) and not store.refresh()
    files[1].write_bytes(b"")
    with pytest.raises(ConfigError, match=r"001\.png is missing or empty"):
        add_picture_features(store, encoder, files)
    add_picture_features(store, encoder, [files[0], files[2]])
    (shard,) = store.folder.glob("shard_*")
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ConfigError, match="is damaged"):
        FeatureStore(tmp_path / "store", encoder.key, WIDTH).refresh()


def test_changed_picture_is_a_new_row(tmp_path: Path) -> None:
    files = _pictures(tmp_path / "pictures", 2)
    encoder = Stub()
    store = FeatureStore(tmp_path / "store", encoder.key, WIDTH)
    add_picture_features(store, encoder, files)
    write_picture(files[0], torch.zeros(5, 5, 3, dtype=torch.uint8))
    assert add_picture_features(store, encoder, files) == 1
    assert torch.equal(store.matrix(hash_files(files))[0], torch.zeros(WIDTH))


def test_prefetching_keeps_order_and_passes_errors_on() -> None:
    assert list(prefetched(range(20), lambda i: i * i, 4, 7)) == [i * i for i in range(20)]
    assert list(prefetched([], str, 2, 3)) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetched([1, 0, 1], lambda i: 1 // i, 2, 2))


def test_picture_sets_are_complete_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "geneval"
    for number, sample in itertools.product(range(2), range(2)):
        write_picture(
            folder / f"{number:05d}" / "samples" / f"{sample:04d}.png", torch.zeros(4, 4, 3, dtype=torch.uint8)
        )
    assert len(geneval_files(folder, 2, 2)) == 4
    for arguments, message in (
        ((3, 2), "2 of 6 pictures are missing"),
        ((1, 2), "has 2 prompts, first surplus 00001"),
        ((2, 1), "has 2 pictures, 1 are asked for: set --samples to 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            geneval_files(folder, *arguments)
    with pytest.raises(ConfigError, match="has no folder 00000"):
        geneval_files(folder / "00000", 2, 2)
    with pytest.raises(ConfigError, match="has 0 pictures"):
        folder_files(_empty(tmp_path / "empty"))
    batch = tmp_path / "batch.npz"
    write_npz(batch, folder_files(folder))
    assert len(unpack_npz(batch, tmp_path / "unpacked")) == 4
    assert read_picture(tmp_path / "unpacked" / "0000003.png").shape == (4, 4, 3)
    np.savez(tmp_path / "bad.npz", arr_0=np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="must be uint8"):
        unpack_npz(tmp_path / "bad.npz", tmp_path / "x")


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_reference_builder_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _pictures(tmp_path / "pictures", 3)
    write_npz(tmp_path / "batch.npz", files)
    for source, out in ((tmp_path / "pictures", "a.npz"), (tmp_path / "batch.npz", "b.npz")):
        statistics.main([str(source), "--out", str(tmp_path / out), "--convention", "clean"])
    a, b = (statistics.read_statistics(tmp_path / name, "clean") for name in ("a.npz", "b.npz"))
    assert a.moments.count == 3 and a.source == "3 pictures of pictures"
    torch.testing.assert_close(a.moments.covariance_DD, b.moments.covariance_DD)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        statistics.main([str(tmp_path / "pictures"), "--out", str(tmp_path / "a.npy")])
    assert "must end in .npz" in capsys.readouterr().err


@pytest.mark.slow
def test_features_fid_and_inception_score_equal_torch_fidelity(tmp_path: Path) -> None:
    oracle = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    path = tmp_path / "weights.pth"
    theirs = _fidelity_network(oracle, read_torchscript(find_weights_file("inception-2015-12-05")), path)
    files = _pictures(tmp_path / "pictures", 6, 40)
    pictures = torch.stack([read_picture(file) for file in files])
    with torch.inference_mode():
        expected, logits = theirs(pictures.permute(0, 3, 1, 2))
    slim, full = InceptionEncoder("torch-fidelity"), InceptionEncoder("torch-fidelity", full_inception(path))
    store = FeatureStore(tmp_path / "store", slim.key, slim.dim)
    add_picture_features(store, slim, files)
    found = store.matrix(hash_files(files))
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(full.encode(torch.stack([full.prepare(p) for p in pictures[:2]])), found[:2])
    # 256 of the features: torch-fidelity's eigenvalues of all 2048 take a minute.
    halves = [fid.fid_features_to_statistics(part) for part in expected[:, :256].split(3)]
    value = fid.fid_statistics_to_metric(*halves, verbose=False)["frechet_inception_distance"]
    assert frechet_from_features(found[:3, :256], found[3:, :256]) == pytest.approx(value, abs=1e-3)
    weight = torch.load(path, weights_only=True)["fc.weight"]
    score = isc.isc_features_to_metric(logits, splits=2)
    assert inception_score(found.double() @ weight.double().T, splits=2).mean == pytest.approx(
        score["inception_score_mean"], abs=1e-3
    )


def _fidelity_network(oracle: Any, source: dict[str, Tensor], path: Path) -> Any:
    """torch-fidelity's network with the slim weights and a random classifier, and its weights in its own format."""

    class Network(oracle.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep the initial values: the constructor insists on loading."""

    torch.save({}, path)
    network = Network("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    state = network.state_dict()
    layers = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in source))
    names = [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]
    for layer, name in zip(layers, names, strict=True):
        state[f"{name}.conv.weight"] = source[f"{layer}.weight"]
        for ours, part in (("beta", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            state[f"{name}.bn.{part}"] = source[f"{layer}.{ours}"]
    state["fc.weight"] = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(1)) * 0.05
    torch.nn.Module.load_state_dict(network, state)
    torch.save(state, path)
    return network
