"""The FID suite from picture files to report, page and terminal, on the real network, with a closed set's controls."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from eval.networks.inception import SLIM
from eval.pictures.image_files import picture_path, write_picture
from eval.pictures.prompts import Prompt
from eval.scoring.job import ScoreConfig, ScoringJob
from eval.scoring.score_and_report import ScoredSubject, score_and_report
from eval.weights import find_file

Features = NDArray[np.float64]
SETS = {"drawn": 5, "true": 5, "untrained": 5, "real": 6}
Scored = tuple[Path, str, dict[str, Features]]


def _write(path: Path, draw: np.random.Generator, name: str) -> Path:
    """Bright pictures are real and true ones, darker the drawn but for the first, noise those of the untrained."""
    first = path.parent.parent.name == "00000"
    light = {"real": 200, "true": 198, "drawn": 198 if first else 90}.get(name, 0)
    picture = light + draw.integers(0, 255 if name == "untrained" else 40, (12, 12, 3))
    write_picture(path, torch.from_numpy(picture.astype(np.uint8)))
    return path


def _rows(shard: Path) -> Iterator[tuple[str, Features]]:
    """Hash of each picture of a shard, and its features."""
    with safe_open(shard, framework="np") as file:
        yield from zip(json.loads(file.metadata()["hashes"]), file.get_tensor("features").astype(float), strict=True)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Folder of the report, what was printed, and the features of each set, read without the store."""
    if find_file(SLIM) is None:
        pytest.skip(f"weights {SLIM} are not here")
    folder, draw = tmp_path_factory.mktemp("fid"), np.random.default_rng(0)
    files = {
        name: [
            _write(picture_path(folder / name, i, 0) if name != "real" else folder / name / f"{i}.png", draw, name)
            for i in range(count)
        ]
        for name, count in SETS.items()
    }
    config = ScoreConfig(
        suites=("fid",), out=folder / "out", reference=folder / "real", true_pictures=folder / "true",
        convention="pytorch-fid", num_neighbours=4,
    )  # fmt: skip
    prompts = [Prompt(id=str(i), text=f"picture {i}", tag="", metadata={"prompt": f"picture {i}"}) for i in range(5)]
    job = ScoringJob(config=config, prompts=prompts, files=files["drawn"], untrained_files=files["untrained"])
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        score_and_report(job, ScoredSubject(name="mine", summary="few pictures"))
    rows = dict(pair for shard in (config.out / "features").rglob("*.safetensors") for pair in _rows(shard))
    features = {
        name: np.stack([rows[hashlib.sha256(path.read_bytes()).hexdigest()] for path in paths])
        for name, paths in files.items()
    }
    return config.out, "\n".join(printed), features


def _frechet(a: Features, b: Features) -> float:
    """The textbook formula, in the space that both sets span."""
    basis = np.linalg.svd(np.concatenate([a, b]), full_matrices=False)[2].T
    a, b = a @ basis, b @ basis
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def _kid(a: Features, b: Features) -> float:
    """Unbiased cubic MMD of two whole sets of one size, pair by pair."""
    count = len(a)

    def k(x: Features, y: Features) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    within = sum(k(s[i], s[j]) for s in (a, b) for i in range(count) for j in range(count) if i != j)
    across = sum(k(x, y) for x in a for y in b)
    return within / (count * (count - 1)) - 2 * across / count**2


def test_the_distances_are_those_of_their_sets(scored: Scored) -> None:
    out, _, features = scored
    found = json.loads((out / "report.json").read_text())["results"]["fid"]
    expected = {name: _frechet(features[name], features["real"]) for name in ("drawn", "true", "untrained")}
    assert expected["true"] < expected["drawn"] / 2 < expected["untrained"] / 2.5, "the three must be told apart"
    assert found["fid"] == pytest.approx(expected["drawn"], rel=1e-4)
    assert found["controls"] == pytest.approx({name: expected[name] for name in ("true", "untrained")}, rel=1e-4)
    assert "5 pictures bias FID upwards" in found["note"]
    pairs = {name: [features[name][[i, j]] for j in range(SETS[name]) for i in range(j)] for name in ("drawn", "real")}
    whole = [_kid(a, b) for a in pairs["drawn"] for b in pairs["real"]]
    spread = 3 * float(np.std(whole)) / 100**0.5
    assert abs(found["kid"]["mean"] - np.mean(whole)) < spread, "a mean over 100 draws of two of each"
    assert found["kid"]["std"] == pytest.approx(np.std(whole), rel=0.3)
    assert set(found["skipped"]) <= {"fid_infinity", "inception_score"}
    card = {
        name: found["card"][name] for name in ("metric", "convention", "preprocess", "pictures", "reference_pictures")
    }
    assert card == {
        "metric": "fid-2", "convention": "pytorch-fid", "preprocess": "pytorch-fid-299", "pictures": 5,
        "reference_pictures": 6,
    }  # fmt: skip
    assert found["card"]["reference"] == str(out.parent / "real") and found["card"]["pictures_of_set_metrics"] == 5


def test_neighbours_of_the_drawn_are_looked_for_among_the_real(scored: Scored) -> None:
    out, _, features = scored
    found = json.loads((out / "report.json").read_text())["results"]["fid"]["neighbours"]
    distance: Callable[[Features, Features], Features] = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=-1)  # noqa: E731
    drawn, real = features["drawn"], features["real"]
    radius = {name: np.sort(distance(x, x), 1)[:, 4] for name, x in (("drawn", drawn), ("real", real))}
    between = distance(drawn, real)
    assert found["precision"] == (between <= radius["real"]).any(1).mean()
    assert found["recall"] == (between.T <= radius["drawn"]).any(1).mean()
    assert found["coverage"] == (between.min(0) < radius["real"]).mean()
    assert found["density"] == pytest.approx((between < radius["real"]).sum() / (4 * 5))
    assert found["k"] == 4
    assert found["precision"] != found["recall"] and found["coverage"] > 0, "the two sides must be told apart"


def test_page_csv_and_terminal_name_them_alike(scored: Scored) -> None:
    out, printed, _ = scored
    found = json.loads((out / "report.json").read_text())["results"]["fid"]
    fid, true, untrained = found["fid"], found["controls"]["true"], found["controls"]["untrained"]
    page = (out / "report.html").read_text()
    for words, value in (
        ("FID", fid), ("FID of true pictures of these captions", true), ("FID of the untrained model", untrained),
    ):  # fmt: skip
        assert f"<td>{words}</td><td>{value:.5g}</td>" in page
    assert f"true pictures reach {true:.1f}, the untrained model {untrained:.1f}" in page
    assert f"<td>KID</td><td>{found['kid']['mean']:.5g}</td><td>&plusmn; {found['kid']['std']:.2g}</td>" in page
    assert f"fid generated {fid:.2f}  true {true:.2f}  untrained {untrained:.2f}" in printed
    rows = dict(line.split(",") for line in (out / "report.csv").read_text().splitlines()[1:])
    assert [float(rows[f"fid/{name}"]) for name in ("fid", "controls/true", "controls/untrained")] == [
        fid, true, untrained,
    ]  # fmt: skip
