"""Is the text that a prompt puts in quotes readable in the picture? Judged by OCR (PP-OCRv4 of rapidocr-onnxruntime).

Word accuracy: share of the asked words that are read, each read word used once. Similarity: 1 - edit distance / length
of the longer text, of what is read in reading order. Case and punctuation do not count. Weights come in the package.
"""

import importlib.metadata
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eval.metrics.geneval import share_score
from eval.pictures.image_files import DECODING
from eval.pictures.prompts import Prompt, prompts_sha256
from eval.scoring.detection_cache import Line, LineCache
from eval.scoring.feature_store import hash_files
from eval.scoring.job import Result, ScoreConfig, ScoringJob, Suite
from trainer.config import require

PACKAGE = "rapidocr_onnxruntime"
_QUOTED = re.compile(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)'([^']+)'(?!\w)")


def asked_text(prompt: str) -> str:
    """The quoted parts of a prompt, joined by spaces; empty if there are none."""
    return " ".join(next(filter(None, match)) for match in _QUOTED.findall(prompt))


def normalise(text: str) -> list[str]:
    """Words in lower case without punctuation."""
    return re.findall(r"\w+", text.lower())


def word_accuracy(read: str, asked: str) -> float:
    """Share of the asked words that were read; 1 for no asked words."""
    wanted, found = Counter(normalise(asked)), Counter(normalise(read))
    return (wanted & found).total() / wanted.total() if wanted else 1.0


def similarity(read: str, asked: str) -> float:
    """1 - Levenshtein distance / longer length of the normalised texts; 1 for two empty ones."""
    a, b = " ".join(normalise(read)), " ".join(normalise(asked))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return 1 - row[-1] / max(len(a), len(b), 1)


def check(config: ScoreConfig, prompts: list[Prompt]) -> None:
    """The package and quoted text must be here."""
    del config
    require(importlib.util.find_spec(PACKAGE) is not None, "--suite text needs OCR: run pip install '.[ocr]'")
    lacking = [prompt.text for prompt in prompts if not asked_text(prompt.text)]
    require(
        bool(prompts) and not lacking,
        f"--suite text needs prompts with quoted text, {len(lacking)} have none, first: {lacking[:1]}",
    )


def _card() -> dict[str, str]:
    version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    return {"metric": "text-1", "ocr": PACKAGE, "version": version, "decoding": DECODING}


def reading_order(found: Sequence[Any]) -> str:
    """Texts of OCR's boxes, line by line (boxes whose middles lie within half a height), left to right."""
    lines: list[tuple[float, list[tuple[float, str]]]] = []
    for box, text, _ in sorted(found, key=lambda item: sum(point[1] for point in item[0])):
        middle = sum(point[1] for point in box) / 4
        height = max(point[1] for point in box) - min(point[1] for point in box)
        if not lines or middle - lines[-1][0] > height / 2:
            lines.append((middle, []))
        lines[-1][1].append((box[0][0], text))
    return " ".join(text for _, words in lines for _, text in sorted(words))


def prepare(job: ScoringJob) -> None:
    """Read this rank's pictures that the cache lacks."""
    from rapidocr_onnxruntime import RapidOCR

    engine: Any = RapidOCR()

    def read(name: str, picture_HW3: Tensor) -> Line:
        found, _ = engine(picture_HW3.numpy()[:, :, ::-1].copy())  # as OpenCV orders colours
        return {"id": name, "text": reading_order(found or [])}

    LineCache(job.config.out / "texts", _card()).add(job.files, read, "texts", job.world)


def score(job: ScoringJob) -> Result:
    """Means over pictures, and the share of pictures with every word."""
    lines = LineCache(job.config.out / "texts", _card()).read()
    names = hash_files(job.files)
    missing = sum(name not in lines for name in names)
    require(missing == 0, f"{missing} pictures have not been read: run the command again")
    pairs = [(lines[name]["text"], asked_text(text)) for name, text in zip(names, job.texts(), strict=True)]
    words = [word_accuracy(read, asked) for read, asked in pairs]
    whole = share_score([value == 1 for value in words])
    return {
        "word_accuracy": sum(words) / len(words),
        "similarity": sum(similarity(read, asked) for read, asked in pairs) / len(pairs),
        "all_words": {"value": whole.value, "low": whole.low, "high": whole.high},
        "skipped": {},
        "card": {**_card(), "pictures": len(pairs), "prompts_sha256": prompts_sha256(job.prompts)},
    }


SUITE = Suite(
    check=check,
    prepare=prepare,
    score=score,
    title="Rendered text",
    names={
        "word_accuracy": "asked words that are read",
        "similarity": "similarity of the text that is read",
        "all_words/value": "pictures with every word",
    },
)
