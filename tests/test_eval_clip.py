"""CLIP through open_clip: local weights in every form, text features, colours against open_clip's own classifier."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from reducing_metrics import frechet_from_features

from eval.metrics.kernel import cmmd
from eval.networks.clip import ClipModel, find_clip, load_clip
from eval.networks.colors import TEMPLATES, ClipColors
from eval.networks.dino import DinoEncoder
from eval.networks.protocols import FoundObject
from eval.pages.sections import number_section
from eval.pictures.geneval_names import COLORS
from eval.pictures.image_files import picture_path, read_picture, write_picture
from eval.pictures.prompts import Prompt
from eval.scoring.job import ScoreConfig, ScoringJob, check_all, find_suite, prepare_all, score_all
from eval.suites.clip import text_features
from trainer.config import ConfigError
from trainer.distributed import World

ARCH = "ViT-tiny-test"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny architecture that open_clip knows, and a file of random weights for it."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{ARCH}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{ARCH}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(ARCH)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, folder / "a.pt")
    return folder / "a.pt"


@pytest.fixture(scope="module")
def clip(weights: Path) -> ClipModel:
    return load_clip(f"{ARCH}:{weights}")


def test_features_equal_open_clips_own(clip: ClipModel, weights: Path) -> None:
    model, _, transform = open_clip.create_model_and_transforms(ARCH, pretrained=str(weights))
    model.eval()
    picture = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.encode_image(transform(Image.fromarray(picture.numpy()))[None])
        texts = model.encode_text(open_clip.get_tokenizer(ARCH)(["a cat", "two dogs"]))
    torch.testing.assert_close(clip.encode(clip.prepare(picture)[None]), expected)
    torch.testing.assert_close(clip.encode_texts(["a cat", "two dogs"]), texts)
    assert clip.dim == 16 and len(clip.key["weights_sha256"]) == 64


def test_text_features_are_kept_and_truncation_is_counted(clip: ClipModel, tmp_path: Path) -> None:
    captions = ["a cat", "a dog", "a cat"]
    first = text_features(tmp_path, clip, captions)
    assert torch.equal(first[0], first[2])
    (shard,) = tmp_path.rglob("shard_*")
    before = shard.stat().st_mtime_ns
    assert torch.equal(text_features(tmp_path, clip, captions), first)
    assert shard.stat().st_mtime_ns == before
    assert not clip.is_truncated("word " * 75)
    assert clip.is_truncated("word " * 76)


def test_colours_use_the_official_templates(clip: ClipModel) -> None:
    judge = ClipColors(clip)
    expected = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, COLORS, [t.replace("{color}", "{}").replace("{name}", "cup") for t in TEMPLATES]
    )
    torch.testing.assert_close(judge.classifier("cup"), expected.T)
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    found = [FoundObject(class_number=41, score=1.0, box=(float(i), 0.0, 12.0, 12.0)) for i in range(3)]
    rows = judge.classify(picture, found, "cup")
    cut = [picture[0:12, i:12] for i in range(3)]
    features = clip.encode(torch.stack([clip.prepare(part.contiguous()) for part in cut]))
    cosine = torch.nn.functional.normalize(features, dim=1) @ expected
    torch.testing.assert_close(rows, (100 * cosine).softmax(1), atol=1e-5, rtol=1e-4)
    assert judge.classify(picture, [], "cup").shape == (0, 10)


def test_wrong_or_missing_models_are_one_sentence(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDIT_WEIGHTS", str(tmp_path))
    for spec, message in (
        ("ViT-L-14", "must be ARCH:TAG or ARCH:FILE"),
        ("ViT-Q-1:openai", "open_clip knows no ViT-Q-1"),
        (f"{ARCH}:nothing", "is no file, and no tag"),
        ("ViT-L-14:openai", r"python -m eval\.weights fetch clip-vit-l-14-openai"),
        ("ViT-g-14:laion2b_s34b_b88k", "copy its weights from laion/CLIP-ViT-g-14"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_clip(spec)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="does not hold weights of"):
        load_clip(f"{ARCH}:{tmp_path / 'other.pt'}")
    with pytest.raises(ConfigError, match="use one with CLIP's own"):
        ClipModel("ViT-B-16-SigLIP", clip_stub(), "")


def clip_stub() -> torch.nn.Module:
    return torch.nn.Identity()


def test_clip_and_cmmd_suites_end_to_end(weights: Path, clip: ClipModel, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    prompts = [Prompt(id=str(i), text=f"caption {i}" + " word" * 90 * (i == 3), tag="", metadata={}) for i in range(6)]
    files = [picture_path(tmp_path / "drawn", i, k) for i in range(6) for k in range(2)]
    real = [tmp_path / "real" / f"{i}.png" for i in range(5)]
    for file in [*files, *real]:
        write_picture(file, torch.from_numpy(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)))
    spec = f"{ARCH}:{weights}"
    config = ScoreConfig(
        suites=("clip", "cmmd"),
        out=tmp_path / "out",
        num_samples=2,
        reference=tmp_path / "real",
        clip=spec,
        cmmd_clip=spec,
    )
    check_all(config, prompts)
    for rank in (1, 0):  # the second rank may be first
        prepare_all(
            ScoringJob(config=config, prompts=prompts, files=files, world=World(rank=rank, local_rank=0, size=2))
        )
    results = score_all(ScoringJob(config=config, prompts=prompts, files=files))
    images = clip.encode(torch.stack([clip.prepare(read_picture(file)) for file in files]))
    texts = clip.encode_texts([prompts[i // 2].text for i in range(12)])
    expected = torch.nn.functional.cosine_similarity(images, texts).double()
    assert results["clip"]["score"]["cosine"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert results["clip"]["score"]["count"] == 12 and results["clip"]["truncated_captions"] == 1
    table = clip.encode_texts([prompt.text for prompt in prompts])
    closest = [max(range(6), key=lambda k: float(torch.cosine_similarity(image, table[k], dim=0))) for image in images]
    nearest = sum(closest[i] == i // 2 for i in range(12)) / 12
    assert results["clip"]["r_precision"] == {"value": nearest, "distractors": 5}
    score, suite = results["clip"]["score"], find_suite("clip")
    positive = 100 * expected.clamp_min(0)
    assert score["score100"] == pytest.approx(float(positive.mean()), abs=1e-3)
    assert score["score100_standard_error"] == pytest.approx(float(positive.std()) / 12**0.5, abs=1e-3)
    shown = "".join(number_section(suite.title, suite.names, suite.spreads, results["clip"]))
    for words, name, error in (
        ("CLIP cosine", "cosine", "standard_error"),
        ("CLIP score, 100 x, each picture&#x27;s at least 0", "score100", "score100_standard_error"),
    ):  # fmt: skip
        assert f"<td>{words}</td><td>{score[name]:.5g}</td><td>&plusmn; {score[error]:.2g}</td>" in shown
    reference = clip.encode(torch.stack([clip.prepare(read_picture(file)) for file in real]))
    assert results["cmmd"]["cmmd"] == pytest.approx(cmmd(images, reference), abs=1e-3)
    assert results["clip"]["card"]["weights_sha256"] == clip.key["weights_sha256"]


def test_dino_suite_with_a_small_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, depth=1)
    monkeypatch.setattr("eval.suites.dino.DinoEncoder", lambda: DinoEncoder(model))
    draw = np.random.default_rng(0)
    files = [tmp_path / name / f"{i}.png" for name in ("drawn", "real") for i in range(4)]
    for file in files:
        write_picture(file, torch.from_numpy(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)))
    config = ScoreConfig(suites=("dino",), out=tmp_path / "out", reference=tmp_path / "real", num_neighbours=2)
    job = ScoringJob(config=config, prompts=[], files=files[:4])
    prepare_all(job)
    found = score_all(job)["dino"]
    encoder = DinoEncoder(model)
    features = encoder.encode(torch.stack([encoder.prepare(read_picture(file)) for file in files]))
    assert found["fd_dinov2"] == pytest.approx(frechet_from_features(features[:4], features[4:]), rel=1e-4)
    assert set(found["neighbours"]) == {"precision", "recall", "density", "coverage", "k"}
