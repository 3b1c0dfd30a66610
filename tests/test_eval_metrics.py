"""Metrics on feature sets: against loops, closed forms, torch-fidelity and torchmetrics; statistics files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reducing_metrics import ClipScoreMetric, GatheredMetric, frechet_from_features, frechet_from_moments, moments
from tests_launcher import Checked, run_checks
from torch import Tensor

from eval.metrics.clip_score import clip_score, cosines, r_precision
from eval.metrics.frechet import FrechetReference, fid_infinity, inception_score, moments_of
from eval.metrics.kernel import cmmd, kid, polynomial_mmd
from eval.metrics.neighbours import memorisation, neighbours
from eval.suites.reference_statistics import Statistics, read_statistics, write_statistics
from trainer.config import ConfigError


def _features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + shift


def test_streamed_moments_equal_the_whole() -> None:
    x = _features(101, 12, 0) + 1000
    whole = moments(x)
    found = moments_of(x.split(7))
    assert found.count == 101
    torch.testing.assert_close(found.mean_D, whole.mean_D, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.covariance_DD, whole.covariance_DD, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="1 pictures"):
        moments_of([x[:1]])


@pytest.mark.parametrize(("count", "reference_count"), [(300, 400), (10, 400), (300, 9), (10, 9)])
def test_reference_gives_the_same_distance_in_every_rank(count: int, reference_count: int) -> None:
    a, b = _features(count, 24, 1), _features(reference_count, 24, 2, 0.3)
    expected = frechet_from_features(a, b)
    for reference in (FrechetReference.from_moments(moments(b)), FrechetReference.from_rows(b)):
        assert reference.distance(moments(a)) == pytest.approx(expected, rel=1e-6)
        assert reference.distance_to_rows(a) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="1 pictures"):
        FrechetReference.from_rows(b[:1])


def test_fid_infinity_finds_the_limit_of_a_biased_distance() -> None:
    a, b = _features(4000, 8, 3), _features(100_000, 8, 3)
    reference = FrechetReference.from_moments(moments(b))
    found = fid_infinity(a, reference, points=8)
    assert abs(found.value) < abs(reference.distance_to_rows(a[:400])) / 4
    assert found == fid_infinity(a, reference, points=8)
    assert found.counts[0] == 400 and found.counts[-1] == 4000
    with pytest.raises(ValueError, match="20 pictures"):
        fid_infinity(a[:10], reference)


def test_kid_equals_torch_fidelity() -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = _features(80, 32, 4), _features(95, 32, 5, 0.2)
    expected = oracle.kid_features_to_metric(a, b, kid_subsets=7, kid_subset_size=50, rng_seed=11)
    found = kid(a, b, subsets=7, subset_size=50, seed=11)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)


def test_kid_is_unbiased_and_equals_a_loop() -> None:
    a, b = _features(6, 3, 6), _features(6, 3, 7)
    k = [[float((x @ y / 3 + 1) ** 3) for y in torch.cat([a, b])] for x in torch.cat([a, b])]
    pairs = [(i, j) for i in range(6) for j in range(6)]
    within = sum(k[i][j] + k[6 + i][6 + j] for i, j in pairs if i != j) / 30
    across = sum(k[i][6 + j] for i, j in pairs) / 36
    assert polynomial_mmd(a, b) == pytest.approx(within - 2 * across, rel=1e-12)
    with pytest.raises(ValueError, match="4 or more"):
        kid(a[:3], b)


@pytest.mark.parametrize(("counts", "size"), [((30, 30), 15), ((30, 90), 15), ((1000, 1200), 500)])
def test_kid_of_small_sets_has_the_spread_of_halves(counts: tuple[int, int], size: int) -> None:
    a, b = _features(counts[0], 4, 6), _features(counts[1], 4, 7, 0.5)
    found = kid(a, b, subsets=40)
    assert found.subset_size == size and found.std > 1e-3
    whole = polynomial_mmd(a, b[: len(a)])
    assert found.mean == pytest.approx(whole, abs=4 * found.std)


def test_cmmd_equals_a_loop_and_is_zero_for_equal_sets() -> None:
    a, b = _features(9, 5, 8), _features(7, 5, 9)

    def mean(x: Tensor, y: Tensor) -> float:
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        return float(np.mean([math.exp(-float((p - q).square().sum()) / 200) for p in x for q in y]))

    assert cmmd(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
    assert cmmd(a, 3 * a) == pytest.approx(0, abs=1e-9)


def test_neighbours_equal_a_loop_and_torch_fidelity() -> None:
    fake, real, k = _features(40, 4, 10), _features(50, 4, 11, 0.5), 3
    found = neighbours(fake, real, k=k)
    real_radius = torch.cdist(real, real).kthvalue(k + 1).values
    fake_radius = torch.cdist(fake, fake).kthvalue(k + 1).values
    cross = torch.cdist(fake, real)
    assert found.precision == pytest.approx(float((cross <= real_radius).any(1).double().mean()))
    assert found.recall == pytest.approx(float((cross.T <= fake_radius).any(1).double().mean()))
    assert found.density == pytest.approx(float((cross < real_radius).double().sum() / (k * 40)))
    assert found.coverage == pytest.approx(float((cross.min(0).values < real_radius).double().mean()))
    oracle = pytest.importorskip("torch_fidelity.metric_prc")
    expected = oracle.prc_features_to_metric(fake, real, prc_neighborhood=k, prc_batch_size=16, save_cpu_ram=True)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        neighbours(fake[:3], real, k=3)


def test_neighbours_at_the_very_radius_count_for_precision_and_recall_alone() -> None:
    """Whole numbers on a line, so that distances equal radii exactly: 1, 1, 1 and 2 of the real, 3 of the generated."""
    real, fake = (torch.tensor(places).double()[:, None] for places in ([-1, 0, 1, 3], [2, 5]))
    found = neighbours(fake, real, k=1)
    assert (found.precision, found.recall) == (1, 1)  # 2 is 1 from 1, 5 is 2 from 3; -1 is 3 from 2
    assert (found.density, found.coverage) == (1 / 2, 1 / 4)  # only 2 lies within the ball of 3


def test_copies_of_training_pictures_are_found() -> None:
    training = _features(60, 6, 12)
    fake = torch.cat([training[[5, 17]] + 1e-6, _features(8, 6, 13, 5.0)])
    found = memorisation(fake, training)
    assert found.nearest_N[:2].tolist() == [5, 17]
    assert found.share == pytest.approx(0.2)
    assert float(found.distance_N[2:].min()) > found.threshold


def test_memorised_is_what_lies_closer_than_training_pictures_to_each_other() -> None:
    """On a line, where the nearest others of 0, 1, 3, 7 and 15 are 1, 1, 2, 4 and 8 away."""
    training = torch.tensor([0.0, 1, 3, 7, 15]).double()[:, None]
    fake = torch.tensor([3.5, 5, 13, -1, 40]).double()[:, None]
    for quantile, threshold, share in ((0, 1, 1 / 5), (0.5, 2, 2 / 5), (0.75, 4, 4 / 5), (1, 8, 4 / 5)):
        found = memorisation(fake, training, quantile=quantile)
        assert (found.threshold, found.share) == (threshold, share)  # at the threshold itself is not closer
        assert found.nearest_N.tolist()[::4] == [2, 4] and found.distance_N.tolist() == [0.5, 2, 2, 1, 25]
    assert memorisation(fake, training).threshold == 1 and memorisation(fake, training).quantile == 0.01


def test_inception_score_equals_torch_fidelity_and_a_closed_form() -> None:
    logits = _features(60, 7, 14) * 3
    found = inception_score(logits, splits=4)
    oracle = pytest.importorskip("torch_fidelity.metric_isc")
    expected = oracle.isc_features_to_metric(logits, splits=4)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=1e-12)
    one_hot = 1e3 * torch.eye(5).repeat(4, 1)
    assert inception_score(one_hot, splits=1).mean == pytest.approx(5, rel=1e-9)
    with pytest.raises(ValueError, match="no 10 splits"):
        inception_score(logits[:9])


def test_clip_score_forms_and_standard_error() -> None:
    images, texts = _features(50, 8, 15), _features(50, 8, 16)
    cosine = cosines(images, texts)
    found = clip_score(cosine)
    values = [float(i @ t / (i.norm() * t.norm())) for i, t in zip(images, texts, strict=True)]
    assert found.cosine == pytest.approx(np.mean(values))
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(50))
    assert found.score100 == pytest.approx(100 * np.mean([max(v, 0) for v in values]))
    positive = [max(v, 0) for v in values]
    assert 0 < sum(v < 0 for v in values) < 50, "some are cut off"
    assert found.score100_standard_error == pytest.approx(100 * np.std(positive, ddof=1) / math.sqrt(50))
    assert found.paper == pytest.approx(2.5 * np.mean(positive)) and found.count == 50
    metric = ClipScoreMetric()
    for part in range(0, 50, 13):
        metric.update(images[part : part + 13], texts[part : part + 13])
    assert metric.compute().tolist() == pytest.approx([found.cosine, found.standard_error], rel=1e-9)


def test_r_precision_counts_distinct_captions() -> None:
    texts = torch.eye(6).double()
    captions = [f"caption {i}" for i in range(6)]
    assert r_precision(texts, texts, captions) == (1.0, 5)
    assert r_precision(texts.roll(1, 0), texts, captions)[0] == 0
    assert r_precision(texts[[0, 0, 1]], texts[[0, 0, 1]], ["a", "a", "b"], distractors=99) == (1.0, 1)
    with pytest.raises(ValueError, match="two captions"):
        r_precision(texts[:2], texts[[0, 0]], ["a", "a"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_gathered_rows_do_not_depend_on_how_they_were_spread() -> None:
    fake, real = _features(31, 5, 17), _features(29, 5, 18)
    metric = GatheredMetric(lambda a, b: kid(a, b, subsets=5, subset_size=20).mean)
    for rank in (2, 0, 1):  # as three ranks would be joined, the last padded with a picture that another has
        rows = [*range(rank, 31, 3), *([0] if rank == 1 else [])]
        metric.update(fake[rows], torch.tensor(rows), real=False)
        metric.update(real[rank::3], torch.arange(rank, 29, 3), real=True)
    assert float(metric.compute()) == kid(fake, real, subsets=5, subset_size=20).mean


def _write(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_statistics_files_of_all_ecosystems(tmp_path: Path) -> None:
    found = moments(_features(30, 6, 19))
    path = tmp_path / "ours.npz"
    write_statistics(path, Statistics(moments=found, convention="clean", weights_sha256="ab", source="30 pictures"))
    again = read_statistics(path, "clean")
    assert (again.convention, again.weights_sha256, again.moments.count) == ("clean", "ab", 30)
    assert frechet_from_moments(again.moments, found) == pytest.approx(0, abs=1e-9)
    with np.load(path) as theirs:  # as pytorch-fid and clean-fid do
        assert theirs["mu"][:].shape == (6,) and theirs["sigma"][:].shape == (6, 6)
    with pytest.raises(ConfigError, match="resize of clean, the pictures are read with that of pytorch-fid"):
        read_statistics(path, "pytorch-fid")
    mu, sigma = found.mean_D.numpy(), found.covariance_DD.numpy()
    plain = _write(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    assert read_statistics(plain, "pytorch-fid").convention == "pytorch-fid"
    assert read_statistics(plain).convention == ""
    adm = _write(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=np.zeros((1, 2, 2, 3)))
    assert read_statistics(adm).convention == "torch-fidelity"
    with pytest.raises(ConfigError, match="use --convention torch-fidelity"):
        read_statistics(adm, "clean")


def test_broken_statistics_are_one_sentence(tmp_path: Path) -> None:
    cases = {
        "have mu and sigma": _write(tmp_path / "a.npz", mean=np.zeros(3)),
        "must be": _write(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.zeros((3, 2))),
        "not finite": _write(tmp_path / "c.npz", mu=np.full(2, np.nan), sigma=np.zeros((2, 2))),
        "no plain arrays": _write(tmp_path / "d.npz", mu=np.array([None]), sigma=np.zeros(1)),
        "is not a file": tmp_path / "absent.npz",
    }
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 half a file")
    for message, path in {**cases, "cannot be read as npz": tmp_path / "e.npz"}.items():
        with pytest.raises(ConfigError, match=message):
            read_statistics(path)


CHECKS = (
    "frechet_distance_is_that_of_all_features",
    "clip_score_is_that_of_all_pairs",
    "gathered_metrics_are_those_of_all_rows_bitwise",
)


@pytest.fixture(scope="module")
def checked() -> Checked:
    """All checks in one start of three processes."""
    return run_checks("tests/metric_checks.py", CHECKS, processes=3)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_holds_on_three_processes(checked: Checked, check: str) -> None:
    assert not checked.problems[check], checked.problems[check]
