"""Rendered text: what a prompt asks for, how it is compared, and real OCR where it is installed."""

import importlib.util
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from eval.pictures.image_files import picture_path, write_picture
from eval.pictures.prompts import Prompt
from eval.scoring.job import ScoreConfig, ScoringJob, find_suite
from eval.suites.text import asked_text, reading_order, similarity, word_accuracy
from trainer.config import ConfigError


def test_quoted_text_is_what_is_asked_for() -> None:
    assert asked_text('a sign that says "Hello World" and "Bye"') == "Hello World Bye"
    assert asked_text("a shop's sign 'OPEN' at night") == "OPEN"
    assert asked_text("a dog's bowl and a cat's bed") == ""


def test_words_count_once_each() -> None:
    assert word_accuracy("HELLO, world!", "hello world") == 1
    assert word_accuracy("hello", "hello hello") == 0.5
    assert word_accuracy("", "") == 1


def test_similarity_equals_a_recursive_edit_distance() -> None:
    @cache
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in "ab")
        assert similarity(a, b) == pytest.approx(1 - distance(a, b) / max(len(a), len(b)))
    assert similarity("", "") == 1 and similarity("Hello!", "hello") == 1


def test_boxes_are_read_line_by_line() -> None:
    def box(x: float, y: float) -> list[list[float]]:
        return [[x, y], [x + 30, y], [x + 30, y + 10], [x, y + 10]]

    found = [(box(50, 1), "two", 1.0), (box(0, 30), "three", 1.0), (box(0, 0), "one", 1.0)]
    assert reading_order(found) == "one two three"


@pytest.mark.slow
def test_rendered_words_are_read(tmp_path: Path) -> None:
    prompts = [
        Prompt(id=str(i), text=f'a sign "{word}"', tag="", metadata={})
        for i, word in enumerate(("HELLO WORLD", "STOP"))
    ]
    config = ScoreConfig(suites=("text",), out=tmp_path)
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        with pytest.raises(ConfigError, match=r"run pip install '\.\[ocr\]'"):
            find_suite("text").check(config, prompts)
        pytest.skip("rapidocr-onnxruntime is not installed")
    files = [picture_path(tmp_path, i, 0) for i in range(2)]
    for file, words in zip(files, ("HELLO WORLD", "SHOP"), strict=True):
        canvas = Image.new("RGB", (480, 120), "white")
        ImageDraw.Draw(canvas).text((20, 30), words, "black", ImageFont.load_default(48))
        write_picture(file, torch.from_numpy(np.array(canvas)))
    job = ScoringJob(config=config, prompts=prompts, files=files)
    find_suite("text").check(config, prompts)
    find_suite("text").prepare(job)
    found = find_suite("text").score(job)
    assert found["word_accuracy"] == 0.5
    assert 0.5 < found["similarity"] < 1
