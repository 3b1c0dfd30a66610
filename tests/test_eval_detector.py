"""The detector against least squares window by window, and its ceiling on true, degraded and blended pictures."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.demo.ceiling import degrade, measure, negative_rates
from eval.demo.detector import RULES, DetectorConfig, _match, detect, detect_at
from eval.demo.detector_check import main
from eval.demo.prompts import demo_prompts, render_prompts
from eval.demo.templates import build_bank, gaussian_blur
from eval.metrics.geneval import judge
from trainer.data.demo.scenes import COLORS, OBJECTS, Scene, SceneObject, render, training_scene


def _pictures(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(scene, 32) for scene in scenes]))


def _one(name: str, background: str, *, size: float = 0.8, x: float = 0.5, y: float = 0.5) -> Scene:
    item = SceneObject(name=name, x=x, y=y, size=size, background=background)
    return Scene(category="single_object", caption="", objects=(item,), count=1)


def test_scores_equal_least_squares_window_by_window() -> None:
    bank = build_bank(60, 2, 0.6)
    picture = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    score, gain, color = _match(picture, bank)
    k = bank.through_Tkk.shape[-1]
    rng = random.Random(0)
    for _ in range(40):
        t, y, x = rng.randrange(len(bank.names)), rng.randrange(20 - k + 1), rng.randrange(20 - k + 1)
        window = picture[0, :, y : y + k, x : x + k].double().reshape(3, -1)
        light, through = bank.light_T3kk[t].double().reshape(3, -1), bank.through_Tkk[t].double().reshape(-1)
        fitted = torch.linalg.lstsq(through[:, None], (window - light).T).solution[0].clamp(0, 1)
        template = light + fitted[:, None] * through
        error = (window - template).square().sum()
        energies = [(z - z.mean(1, keepdim=True)).square().sum() for z in (window, template)]
        assert float(score[0, t, y, x]) == pytest.approx(float(1 - error / (sum(energies) + 1e-3)), abs=1e-4)
        assert float(gain[0, t, y, x]) == pytest.approx(float(energies[0] - error), abs=1e-3)
        torch.testing.assert_close(color[0, t, :, y, x].double(), fitted, atol=1e-4, rtol=0)


def test_templates_redraw_the_scenes() -> None:
    bank = build_bank(60, 2, 0.0)
    number = next(
        i for i, (n, o) in enumerate(zip(bank.names, bank.offsets, strict=True)) if (n, o) == ("cat", (0.5, 0.0))
    )
    scene = _one("cat", "blue", size=60 / 128, x=(8.5 + 7.5) / 32, y=(9 + 7.5) / 32)
    k = bank.through_Tkk.shape[-1]
    window = torch.from_numpy(render(scene, 32).copy())[9 : 9 + k, 8 : 8 + k].permute(2, 0, 1) / 255
    blue = torch.tensor(COLORS["blue"])[:, None, None] / 255
    drawn = bank.light_T3kk[number] + bank.through_Tkk[number] * blue
    assert float((drawn - window).abs().mean()) < 0.01


def test_every_object_on_every_background_is_found_once() -> None:
    pairs = [(name, color) for name in OBJECTS for color in COLORS]
    scenes = [_one(*pair, size=(0.45, 0.8)[i % 3 == 0]) for i, pair in enumerate(pairs)]
    for scene, found in zip(scenes, detect(_pictures(scenes)), strict=True):
        assert [(item.name, item.color) for item in found] == [(scene.objects[0].name, scene.objects[0].background)]


def test_ceiling_on_true_and_on_degraded_pictures() -> None:
    prompts = demo_prompts(5, 12)
    clean = render_prompts(prompts, 32)
    for pictures, least in ((clean, 1.0), (degrade(clean, 0.7, 0.05, 0.0), 0.9)):
        ceiling = measure(prompts, pictures)
        assert min(score.value for score in ceiling.summary.tags.values()) >= least
        assert ceiling.extra_per_picture == 0


@pytest.mark.slow
def test_ceiling_of_the_full_suite() -> None:
    prompts = demo_prompts(0, 40)
    ceiling = measure(prompts, render_prompts(prompts, 32))
    assert min(score.value for score in ceiling.summary.tags.values()) >= 0.98


def test_boxes_lie_on_the_objects() -> None:
    scenes = [training_scene(7, i) for i in range(24)]
    for scene, found in zip(scenes, detect(_pictures(scenes)), strict=True):
        places = {((box[0] + box[2]) / 64, (box[1] + box[3]) / 64) for box in (item.box for item in found)}
        for item in scene.objects:
            assert min(max(abs(x - item.x), abs(y - item.y)) for x, y in places) < 0.03


def test_noise_and_half_objects_are_nothing() -> None:
    noise = torch.rand(30, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert not any(detect((noise * 255).byte()))
    plain = torch.full((1, 32, 32, 3), 250, dtype=torch.uint8)
    assert detect(plain) == [[]]
    names = list(zip(OBJECTS, OBJECTS[5:] + OBJECTS[:5], strict=True))
    a, b = (_pictures([_one(pair[i], "white") for pair in names]).float() for i in (0, 1))
    found = detect(((a + b) / 2).round().byte())
    assert sum(map(bool, found)) <= len(names) // 4


@pytest.mark.slow
@pytest.mark.xdist_group("negative_rates")
def test_a_lead_allows_a_lower_score_at_the_same_rejection_of_blends() -> None:
    chosen, strict, bare = (
        negative_rates(config)
        for config in (
            DetectorConfig(),
            replace(DetectorConfig(), min_score=0.8, min_lead=0.0),
            replace(DetectorConfig(), min_lead=0.0),
        )
    )
    assert chosen.strangers < 0.15 and chosen.blends < strict.blends
    assert bare.blends > 2 * chosen.blends


def test_a_wrong_picture_is_judged_wrong() -> None:
    prompts = demo_prompts(1, 4)
    pictures = render_prompts(prompts, 32)
    found = detect(pictures.roll(1, 0))  # each prompt gets its neighbour's picture
    kinds = set()
    for prompt, items, other in zip(prompts, found, [prompts[-1], *prompts[:-1]], strict=True):
        verdict = judge(prompt.metadata, items, RULES)
        if prompt.text != other.text:
            kinds |= {fault.kind for fault in verdict.faults}
    assert "missing" in kinds


def test_other_picture_sizes_are_reduced() -> None:
    scene = _one("frog", "red", size=0.5, x=0.3, y=0.6)
    (found,) = detect(torch.from_numpy(render(scene, 64).copy())[None])
    assert [(item.name, item.color) for item in found] == [("frog", "red")]
    x1, _, x2, _ = found[0].box
    assert (x1 + x2) / 2 == pytest.approx(0.3 * 64, abs=1)
    with pytest.raises(ValueError, match="need"):
        detect(torch.zeros(1, 32, 16, 3, dtype=torch.uint8))


def test_threshold_is_applied() -> None:
    pictures = _pictures([_one("dog", "pink")])
    assert detect(pictures, replace(DetectorConfig(), min_score=0.9999)) == [[]]


def test_several_thresholds_at_once_find_what_each_finds_alone() -> None:
    pictures = _pictures([_one("dog", "pink"), _one("ghost", "white"), _one("frog", "red", size=0.5)])
    noisy = (
        (pictures + 40 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    )
    scores = (0.7, 0.3, 0.5, 0.91, 0.95)
    together = detect_at(noisy, scores)
    alone = [detect(noisy, replace(DetectorConfig(), min_score=score)) for score in scores]
    assert together == alone and len({str(found) for found in alone}) > 2


def test_blur_keeps_a_constant() -> None:
    constant = torch.full((1, 2, 6, 6), 0.25)
    torch.testing.assert_close(gaussian_blur(constant, 0.8), constant)


@pytest.mark.slow
@pytest.mark.xdist_group("negative_rates")  # which are computed once in a process
def test_command_line_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--per-category", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "color_attr" in lines[0]
    assert "60 other things" in lines[-4]
    assert lines[1].startswith("true pictures")
