"""FID against closed forms and torchmetrics, the resize against loops, features against the archive."""

import math
from pathlib import Path

import pytest
import torch
from reducing_metrics import FrechetDistance, frechet_from_features, frechet_from_moments, moments

from eval.metrics.frechet import FrechetReference, Moments, covariance_factor
from eval.networks.inception import SLIM, InceptionEncoder
from eval.networks.inception_network import Inception, build_inception
from eval.networks.resize import RESOLUTION
from eval.networks.resize import tf1_preprocess as preprocess
from eval.pictures.image_files import write_picture
from eval.scoring.feature_store import FeatureStore, add_picture_features, hash_files
from eval.weights import find_weights_file
from trainer.config import ConfigError


def _features(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + 0.1 * seed


def test_commuting_gaussians_have_a_closed_form() -> None:
    a_sigma, b_sigma = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    shift = torch.tensor([1.0, -2.0, 0.0]).double()
    a = Moments(count=9, mean_D=torch.zeros(3).double(), covariance_DD=torch.diag(a_sigma**2))
    b = Moments(count=9, mean_D=shift, covariance_DD=torch.diag(b_sigma**2))
    expected = float(shift.square().sum() + (a_sigma - b_sigma).square().sum())
    assert frechet_from_moments(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "width"), [(300, 24), (12, 24)])
def test_both_forms_equal_torchmetrics(count: int, width: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    a, b = _features(count, width, 1), _features(count + 5, width, 2)
    ma, mb = moments(a), moments(b)
    expected = float(_compute_fid(ma.mean_D, ma.covariance_DD, mb.mean_D, mb.covariance_DD))
    assert frechet_from_moments(ma, mb) == pytest.approx(expected, rel=1e-5)
    assert frechet_from_features(a, b) == pytest.approx(frechet_from_moments(ma, mb), rel=1e-5)


@pytest.mark.parametrize("count", [300, 25, 12])  # well, just and not positive definite
def test_covariance_factor_squares_to_the_covariance(count: int) -> None:
    covariance = moments(_features(count, 24, 7)).covariance_DD
    factor = covariance_factor(covariance)
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-9, atol=1e-12)
    assert factor.shape[1] == min(24, count - 1)
    assert covariance_factor(torch.zeros(3, 3)).shape == (3, 0)
    near = torch.diag(torch.tensor([1.0, 1e-30, 1.0]).double())
    assert covariance_factor(near).shape == (3, 2)


def test_distance_to_itself_is_zero_and_it_is_symmetric() -> None:
    a, b = _features(50, 16, 3), _features(60, 16, 4)
    assert frechet_from_features(a, a) == pytest.approx(0, abs=1e-9)
    few = _features(12, 64, 3)
    assert FrechetReference.from_rows(few).distance_to_rows(few) == pytest.approx(0, abs=1e-11)
    assert frechet_from_features(a, b) == pytest.approx(frechet_from_features(b, a), rel=1e-9)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_reduces_exactly_over_uneven_shards() -> None:
    a, b = _features(40, 8, 5), _features(33, 8, 6)
    ranks = [FrechetDistance(8) for _ in range(3)]
    for start, stop, rank in ((0, 7, 0), (7, 30, 1), (30, 40, 2)):
        ranks[rank].update(a[start:stop], real=True)
        ranks[rank].update(b[start:stop], real=False)
    total = FrechetDistance(8)
    for name in total._defaults:
        setattr(total, name, torch.stack([getattr(rank, name) for rank in ranks]).sum(0))
    assert float(total.compute()) == pytest.approx(frechet_from_features(a, b), rel=1e-9)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        frechet_from_features(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="0 real pictures"):
        FrechetDistance(4).compute()


def test_resize_is_tf1_bilinear_without_half_pixel() -> None:
    image = torch.randint(0, 256, (1, 5, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    size = 11
    got = preprocess(image, size)[0]
    for y in range(size):
        for x in range(size):
            sy, sx = y * 5 / size, x * 4 / size
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, 4), min(x0 + 1, 3)
            fy, fx = sy - y0, sx - x0
            pixel = image[0].double()
            top = pixel[y0, x0] * (1 - fx) + pixel[y0, x1] * fx
            bottom = pixel[y1, x0] * (1 - fx) + pixel[y1, x1] * fx
            expected = (top * (1 - fy) + bottom * fy - 128) / 128
            torch.testing.assert_close(got[:, y, x].double(), expected, atol=1e-5, rtol=0)


def test_network_has_94_convolutions_and_refuses_other_weights() -> None:
    net = Inception()
    assert len(list(net.convolutions())) == 94
    assert sum(conv.weight.numel() for conv in net.convolutions()) == 21_751_136
    state = {f"layer_{i}.{part}": torch.zeros(1) for i in range(3) for part in ("weight", "beta", "mean", "var")}
    with pytest.raises(ValueError, match="3 layers"):
        build_inception(state)


def test_missing_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECDIT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run python -m eval\.weights fetch inception-2015-12-05"):
        InceptionEncoder("torch-fidelity")


@pytest.mark.slow
def test_features_equal_the_archived_graph_and_are_kept(tmp_path: Path) -> None:
    import warnings

    images = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, image in zip(files, images, strict=True):
        write_picture(file, image)
    encoder = InceptionEncoder("torch-fidelity")
    store = FeatureStore(tmp_path / "store", encoder.key, encoder.dim)
    assert add_picture_features(store, encoder, files) == 2
    features = store.matrix(hash_files(files))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", FutureWarning)
        archived = torch.jit.load(str(find_weights_file(SLIM))).net.layers
        expected = archived(preprocess(images)).flatten(1)
        ours = encoder.model(preprocess(images, RESOLUTION))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)
    (stored,) = store.folder.glob("*.safetensors")
    before = stored.stat().st_mtime_ns
    assert add_picture_features(store, encoder, files) == 0
    assert torch.equal(store.matrix(hash_files(files)), features)
    assert stored.stat().st_mtime_ns == before
    assert len(set(hash_files(files))) == 2
