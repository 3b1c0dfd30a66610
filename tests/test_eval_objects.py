"""GenEval's prompts, masks, detectors, colours and cached scores; real photographs where real weights are here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet_names import mmdet_state
from torch import Tensor, nn

from eval.metrics.geneval import Rules
from eval.networks.colors import NearestColors
from eval.networks.detectors import DETECTORS, build_detector, check_detector, describe_detector
from eval.networks.mask2former import Mask2Former, build_network, input_size, instances, mask_box, unused_weights
from eval.networks.mask2former_keys import convert_key, convert_mask2former, reorder_merging
from eval.networks.maskrcnn import MaskRcnn, build_maskrcnn
from eval.networks.protocols import DetectorSource, FoundObject
from eval.pictures.geneval_names import CATEGORY_NUMBERS, CLASSES
from eval.pictures.geneval_prompts import OFFICIAL_SHA256, geneval_prompts, geneval_rows
from eval.pictures.image_files import picture_path, write_picture
from eval.pictures.prompts import Prompt, prompts_sha256
from eval.scoring.detection_cache import LineCache, from_line, to_line
from eval.scoring.rle import decode_mask, encode_mask
from eval.suites import geneval_results as results
from eval.suites.geneval import Scored, best_of, result_lines, score_detections
from eval.suites.geneval_steps import detect_files, judge_colors, open_colors, open_detections, read_detections
from eval.weights import file_sha256, find_weights_file
from trainer.config import ConfigError
from trainer.distributed import World
from trainer.files import write_text

CAT, DOG, CUP = (CLASSES.index(name) for name in ("cat", "dog", "cup"))


def test_the_official_prompts_follow_from_the_rule() -> None:
    rows = geneval_rows()
    assert prompts_sha256(geneval_prompts()) == OFFICIAL_SHA256
    counts = {tag: sum(row["tag"] == tag for row in rows) for tag in dict.fromkeys(row["tag"] for row in rows)}
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert prompts_sha256(geneval_prompts(7)) != OFFICIAL_SHA256
    assert len({prompt.id for prompt in geneval_prompts()}) == 553
    assert len(CATEGORY_NUMBERS) == len(CLASSES) == 80


def test_masks_survive_and_have_cocos_form() -> None:
    draw = np.random.default_rng(0)
    for _ in range(100):
        mask = draw.random(tuple(draw.integers(1, 30, 2))) < draw.random()
        assert np.array_equal(decode_mask(encode_mask(mask), *mask.shape), mask)
    mask = np.zeros((9, 10), bool)
    mask[2:5, 3:7] = True
    assert encode_mask(mask) == "m03600000i0"  # as pycocotools writes it
    with pytest.raises(ValueError, match="in a mask of 3 x 3"):
        decode_mask("m0", 3, 3)


def test_patch_merging_equals_mmdets_unfold() -> None:
    torch.manual_seed(0)
    channels, size = 3, 4
    x_NCHW = torch.randn(1, channels, size, size)
    projection = torch.randn(5, 4 * channels)
    # mmdet, PatchMerging: unfold 2 x 2, then the projection.
    expected = nn.functional.unfold(x_NCHW, 2, stride=2).transpose(1, 2) @ projection.T
    x = x_NCHW.permute(0, 2, 3, 1)  # transformers, SwinPatchMerging: the four neighbours behind each other
    joined = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1).flatten(1, 2)
    torch.testing.assert_close(joined @ reorder_merging(projection).T, expected)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return build_network(depths=[1, 1, 2, 1], embed_dim=32, num_heads=[1, 2, 4, 8]).eval()


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_converted_checkpoint_is_the_same_network(network: Any, old: bool) -> None:
    state, unused = network.state_dict(), unused_weights(network)
    converted = convert_mask2former(mmdet_state(state, (1, 1, 2, 1), old))
    assert set(converted) == set(state) - set(unused)
    assert all(torch.equal(converted[name], state[name]) for name in converted)
    with pytest.raises(KeyError, match="bbox_head"):
        convert_key("bbox_head.fc.weight", torch.zeros(1))


@pytest.mark.slow
def test_mask2former_detects_at_the_pictures_size(network: Any) -> None:
    detector = Mask2Former(network, long=133, short=80)
    picture = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = detector.detect(picture)
    assert len(found) == 100
    assert all(item.mask_HW is not None and item.mask_HW.shape == (40, 60) for item in found)
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    for value in unused_weights(network).values():
        value.add_(1)
    again = detector.detect(picture)
    assert [item.score for item in again] == [item.score for item in found]
    assert input_size(512, 512) == (800, 800) and input_size(400, 1000) == (533, 1333)


def test_instances_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(7, 81, generator=generator), torch.randn(7, 5, 6, generator=generator)
    expected = []
    for q in range(7):
        for k, p in enumerate(classes[q].softmax(0)[:80].tolist()):
            inside = masks[q][masks[q] > 0]
            expected.append((p, p * float(inside.sigmoid().sum() / (len(inside) + 1e-6)), k, q))
    expected = sorted(sorted(expected, reverse=True)[:100], key=lambda row: -row[1])
    found = instances(classes, masks)
    assert [item.class_number for item in found] == [row[2] for row in expected]
    assert [item.score for item in found] == pytest.approx([row[1] for row in expected], rel=1e-5)
    assert found[0].box == mask_box(masks[expected[0][3]] > 0)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    assert mask_box(mask) == (0, 0, 0, 0)
    mask[2:4, 3:7] = True
    assert mask_box(mask) == (3, 2, 7, 4)


@pytest.mark.slow
def test_mask_rcnn_maps_cocos_numbers() -> None:
    torch.manual_seed(0)
    model = build_maskrcnn()
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 5
    model.transform.min_size, model.rpn._post_nms_top_n["testing"] = (128,), 20
    found = MaskRcnn(model).detect(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8))
    assert all(0 <= item.class_number < 80 for item in found)


def test_unknown_detectors_and_missing_weights_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDIT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for spec, message in (
        ("yolo9", "--detector yolo9 is unknown: choose from mask2former"),
        ("mask2former", r"run python -m eval\.weights fetch mask2former-swin-s-coco"),
        (f"mask2former-hf:{tmp_path}", "has no config.json, copy facebook/"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_detector(spec)


def test_a_further_detector_is_one_line_of_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = DetectorSource(
        comparable="approximate",
        find_folder=lambda folder: tmp_path / folder,
        card=lambda path: {"detector": path.name},
        load=lambda path: Scripted(),
    )
    monkeypatch.setitem(DETECTORS, "toy", toy)
    assert describe_detector("toy:small") == ("approximate", {"detector": "small"})
    assert isinstance(build_detector("toy:small"), Scripted)
    for spec in ("toy", "maskrcnn:small"):  # one lacks its folder, the other takes none
        with pytest.raises(ConfigError, match=f"--detector {spec} is unknown: choose from .* or toy:DIR"):
            check_detector(spec)


class Scripted:
    """A detector that knows its pictures by their first pixel."""

    card = {"detector": "scripted", "weights_sha256": "0"}  # noqa: RUF012

    def __init__(self) -> None:
        self.seen = 0

    def detect(self, picture_HW3: Tensor) -> list[FoundObject]:
        self.seen += 1
        mask = torch.zeros(picture_HW3.shape[:2], dtype=torch.bool)
        mask[2:8, 2:8] = True
        number = CAT if int(picture_HW3[0, 0, 0]) % 2 else DOG
        return [
            FoundObject(class_number=number, score=0.95, box=(2.0, 2.0, 8.0, 8.0), mask_HW=mask),
            FoundObject(class_number=CUP, score=0.2, box=(0.0, 0.0, 4.0, 4.0), mask_HW=~mask),
            FoundObject(class_number=CUP, score=0.01, box=(0.0, 0.0, 4.0, 4.0), mask_HW=~mask),
        ]


def _prompts() -> list[Prompt]:
    rows: list[dict[str, Any]] = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
        {
            "tag": "colors",
            "include": [{"class": "cat", "count": 1, "color": "blue"}],
            "prompt": "a photo of a blue cat",
        },
    ]
    return [Prompt(id=str(i), text=row["prompt"], tag=row["tag"], metadata=row) for i, row in enumerate(rows)]


def _red_pictures(folder: Path, prompts: list[Prompt], samples: int) -> list[Path]:
    """Red squares; each other picture is a dog's."""
    files = []
    for i in range(len(prompts) * samples):
        picture = torch.full((12, 10, 3), 200, dtype=torch.uint8)
        picture[0, 0] = 2 * i + (i % 2 == 0)
        picture[2:8, 2:8] = torch.tensor([210, 40, 40], dtype=torch.uint8)
        files.append(picture_path(folder, *divmod(i, samples)))
        write_picture(files[-1], picture)
    return files


def score_files(
    detections: LineCache,
    colors: LineCache | None,
    prompts: list[Prompt],
    files: list[Path],
    rules: Rules | None = None,
) -> Scored:
    """As the suite does with what is kept."""
    return score_detections(prompts, read_detections(detections, colors, prompts, files), rules or Rules())


def test_cached_detections_score_again_without_the_detector(tmp_path: Path) -> None:
    prompts = _prompts()
    files = _red_pictures(tmp_path / "pictures", prompts, 2)
    detector, colors = Scripted(), NearestColors()
    cache = open_detections(tmp_path, detector.card)
    with pytest.raises(ConfigError, match="6 of 6 pictures have no detections"):
        score_files(cache, None, prompts, files)
    for rank in range(4):
        detect_files(cache, detector, files, World(rank=rank, local_rank=0, size=4))
    assert detector.seen == 6
    part = next(iter(sorted(cache.folder.glob("part_*"))))
    part.write_text(part.read_text()[:-30])  # as a kill leaves it
    assert detect_files(cache, detector, files) == 1
    judged = open_colors(tmp_path, colors.card, cache)
    with pytest.raises(ConfigError, match="colours of cat are missing"):
        score_files(cache, judged, prompts, files)
    pair = [World(rank=r, local_rank=0, size=2) for r in range(2)]
    assert sum(judge_colors(judged, colors, cache, prompts, files, world) for world in pair) == 4
    assert judge_colors(judged, colors, cache, prompts, files) == 0
    scored = score_files(cache, judged, prompts, files)
    assert [verdict.correct for verdict in scored.verdicts] == [True, False, True, False, False, False]
    assert best_of(scored, 2) == {"1": pytest.approx(2 / 3), "2": pytest.approx(2 / 3)}
    assert scored.summary.faults["colors"] == {"missing": 2, "color": 1}
    rows = [json.loads(line) for line in result_lines(scored, prompts, files, Rules()).splitlines()]
    assert json.loads(rows[0]["details"]) == {"cat": [[2, 2, 8, 8, 0.95]]}
    strict = score_files(cache, judged, prompts, files, Rules(score=0.96))
    assert strict.summary.images.correct == 0
    assert detector.seen == 7
    # For controls the colours of a class are judged wherever it was found, whatever the picture's prompt asks for.
    assert judge_colors(judged, colors, cache, prompts, files, every=["cat"]) == 1  # the first prompt's cat
    found = read_detections(cache, judged, prompts, files, every=["cat"])
    assert {item.color for items in found for item in items if item.name == "cat"} == {"red"}
    assert {item.color for items in found for item in items if item.name == "dog"} == {""}


def test_lines_keep_boxes_and_masks(tmp_path: Path) -> None:
    picture = torch.zeros(12, 10, 3, dtype=torch.uint8)
    found = Scripted().detect(picture)
    line = json.loads(json.dumps(to_line("x", picture, found)))
    again = from_line(line, masks=True)
    assert len(again) == 2 and again[0].mask_HW is not None and found[0].mask_HW is not None
    assert torch.equal(again[0].mask_HW, found[0].mask_HW)
    assert from_line(line)[0].mask_HW is None
    cache = LineCache(tmp_path, {"a": "b"})
    with cache.appending():
        pass
    assert not list(cache.folder.glob("part_*"))


def test_objects_at_the_floor_are_not_kept() -> None:
    picture = torch.zeros(4, 6, 3, dtype=torch.uint8)
    found = [FoundObject(class_number=CAT, score=score, box=(1.0, 2.0, 5.0, 3.0)) for score in (0.051, 0.05, 0.049)]
    line = to_line("x", picture, found)
    assert line == {"id": "x", "height": 4, "width": 6, "objects": [[CAT, 0.051, 1.0, 2.0, 5.0, 3.0, None]]}
    assert from_line(line)[0].box == (1.0, 2.0, 5.0, 3.0)


@pytest.mark.slow
@pytest.mark.usefixtures("yolo")
def test_real_photographs_through_a_real_detector(tmp_path: Path, photographs: dict[str, Tensor]) -> None:
    coffee, bike = photographs.values()
    height = min(coffee.shape[0], bike.shape[0])
    beside = torch.cat([bike[:height, :640], coffee[:height]], 1)

    def clause(name: str, **more: Any) -> dict[str, Any]:
        return {"class": name, "count": 1, **more}

    pairs = [
        (coffee, "single_object", [clause("cup")], True),
        (bike, "single_object", [clause("motorcycle")], True),
        (coffee, "single_object", [clause("zebra")], False),
        (beside, "two_object", [clause("motorcycle"), clause("cup")], True),
        (beside, "position", [clause("cup"), clause("motorcycle", position=["left of", 0])], True),
        (beside, "position", [clause("cup"), clause("motorcycle", position=["right of", 0])], False),
    ]
    prompts = [
        Prompt(id=str(i), text=f"prompt {i}", tag=tag, metadata={"tag": tag, "include": include, "prompt": f"{i}"})
        for i, (_, tag, include, _) in enumerate(pairs)
    ]
    files = [picture_path(tmp_path, i, 0) for i in range(len(pairs))]
    for file, (picture, *_) in zip(files, pairs, strict=True):
        write_picture(file, picture)
    detector = build_detector("yolov3-tiny")
    comparable, card = describe_detector("yolov3-tiny")
    sha256 = file_sha256(find_weights_file("yolov3-tiny"))
    assert comparable == "approximate"
    assert card == {"detector": "yolov3-tiny", "weights_sha256": sha256, "input": "letterbox 416"}
    cache = open_detections(tmp_path, card)
    assert detect_files(cache, detector, files) == 3  # distinct pictures
    scored = score_files(cache, None, prompts, files)
    assert [verdict.correct for verdict in scored.verdicts] == [expected for *_, expected in pairs]
    assert "left of" in scored.verdicts[5].reason
    write_text(tmp_path / "results.jsonl", result_lines(scored, prompts, files, Rules()))


def test_results_of_others_are_read_if_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"filename": f"{i}/{k}", "tag": row["tag"], "prompt": row["prompt"], "correct": (i + k) % 2 == 0, "reason": ""}
        for i, row in enumerate(geneval_rows())
        for k in range(2)
    ]
    path = tmp_path / "results.jsonl"

    def write(part: list[dict[str, Any]]) -> None:
        write_text(path, "".join(json.dumps(row) + "\n" for row in part))

    write(rows)
    results.main([str(path), "--samples", "2"])
    said = capsys.readouterr().out
    assert "overall         50.00%" in said and "prompts        100.00%" in said
    write(rows[2:])
    with pytest.raises(ConfigError, match=r"1 prompts have not 2 pictures each, first .*1104 rows where 1106 are due"):
        results.check_complete(results.read_results(path), "geneval", 2)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ConfigError, match="line 1104 is no JSON"):
        results.read_results(path)
    write([])
    with pytest.raises(ConfigError, match="is empty"):
        results.read_results(path)
