"""The page of a scored set of pictures: numbers, bars per tag, pictures with boxes and reasons, protocol cards.

Self-contained: pictures are inside, nothing is loaded. Shapes: H x W pixels.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eval.metrics.geneval import FAULTS
from eval.pages.page import card, escape, file_uri, interval_plot, page, table
from eval.pictures.prompts import Prompt

SHOWN_PER_TAG, SIDE = 12, 192
_NAMES = {
    "fid": "FID", "fid_infinity/value": "FID extrapolated to infinitely many pictures", "kid/mean": "KID",
    "neighbours/precision": "precision", "neighbours/recall": "recall", "neighbours/density": "density",
    "neighbours/coverage": "coverage", "inception_score/mean": "Inception score", "cmmd": "CMMD",
    "memorisation/share": "memorised",
    "fd_dinov2": "FD-DINOv2", "score/cosine": "CLIP cosine", "score/score100": "CLIP score, 100 x",
    "word_accuracy": "asked words that are read", "similarity": "similarity of the text that is read",
    "all_words/value": "pictures with every word",
    "r_precision/value": "R-precision", "truncated_captions": "captions longer than CLIP reads",
}  # fmt: skip
_SPREADS = {
    "kid/mean": "kid/std", "inception_score/mean": "inception_score/std", "score/cosine": "score/standard_error",
    "score/score100": "score/score100_standard_error",
}  # fmt: skip


def _lookup(result: Mapping[str, Any], path: str) -> Any:
    found: Any = result
    for part in path.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _numbers(name: str, result: Mapping[str, Any]) -> list[str]:
    rows = []
    for path, title in _NAMES.items():
        value = _lookup(result, path)
        if value is not None:
            spread = _lookup(result, _SPREADS.get(path, "none"))
            rows.append([title, f"{value:.5g}", "" if spread is None else f"&plusmn; {spread:.2g}"])
    titles = {"fid": "Distance to real pictures", "clip": "Agreement with the captions", "cmmd": "Distance in CLIP's "
              "space", "dino": "Distance in DINOv2's space", "text": "Rendered text"}  # fmt: skip
    parts = [f"<h2>{titles.get(name, escape(name))}</h2>"]
    if "note" in result:
        parts.append(f'<p class="muted">{escape(result["note"])}.</p>')
    parts.append(f'<div class="narrow">{table(["metric", "value", ""], rows)}</div>')
    if "memorisation" in result:
        parts.append(
            '<p class="key">Memorised: share of pictures closer to a real picture than 99 % of the real ones are to '
            "each other.</p>"
        )
    return [*parts, *_skipped(result), card("Protocol of these numbers", result["card"])]


def _skipped(result: Mapping[str, Any]) -> list[str]:
    return [
        f'<p class="key">Not computed: {escape(name)} ({escape(why)}).</p>' for name, why in result["skipped"].items()
    ]


def _geneval(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for tag, score in [*result["tags"].items(), ("overall", result["overall"])]:
        rows.append(
            [
                escape(tag.replace("_", " ")),
                str(score["total"]),
                f"{100 * score['value']:.2f}",
                f'<span class="range">{100 * score["low"]:.1f} to {100 * score["high"]:.1f}</span>',
                interval_plot(score["value"], score["low"], score["high"], {}),
            ]
        )
    kinds = [kind for kind in FAULTS if any(kind in found for found in result["faults"].values())]
    faults = [[escape(tag), *(str(found.get(kind, "")) for kind in kinds)] for tag, found in result["faults"].items()]
    comparable = result["card"]["comparable"]
    words = "comparable with published scores" if comparable == "official" else "not comparable with published scores"
    best = ", ".join(f"{n}: {100 * value:.1f}" for n, value in result["best_of"].items())
    parts = [
        "<h2>GenEval</h2>",
        f"<p>Protocol: <b>{escape(comparable)}</b>, {words}.</p>",
        table(["category", "n", "% correct", "95 % interval", ""], rows, last_is_total=True),
        f'<p class="key">Prompts with a correct picture among the first n, in %: {best}.</p>',
    ]
    if faults:
        parts += ["<h3>Why pictures fail</h3>", f'<div class="narrow">{table(["category", *kinds], faults)}</div>']
    return [*parts, card("Protocol of this score", result["card"])]


def _thumbnail(path: Path) -> tuple[str, tuple[int, int]]:
    with Image.open(path) as image:
        size = image.size
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return file_uri(buffer.getvalue(), "image/jpeg"), size


def _shot(path: Path, caption: str, verdict: Mapping[str, Any] | None) -> str:
    """A picture with the boxes of found objects, its caption and the reason of a failure."""
    uri, (width, height) = _thumbnail(path)
    boxes, css, why = "", "", ""
    if verdict:
        css = ' class="pass"' if verdict["correct"] else ' class="fail"'
        why = f'<span class="why">{escape(verdict["reason"])}</span>' if verdict["reason"] else ""
        stroke = max(width, height) / 100
        boxes = "".join(
            f'<rect x="{x1}" y="{y1}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none" stroke="#2f5fd0" '
            f'stroke-width="{stroke:.2f}"><title>{escape(name)} {score}</title></rect>'
            for name, score, x1, y1, x2, y2 in verdict["boxes"]
        )
    return (
        f'<figure><div class="shot"><img src="{uri}" alt="{escape(caption)}">'
        f'<svg viewBox="0 0 {width} {height}">{boxes}</svg></div>'
        f"<figcaption><span{css}>{escape(caption)}</span>{why}</figcaption></figure>"
    )


def _pictures(report: Mapping[str, Any], prompts: Sequence[Prompt], files: Sequence[Path]) -> list[str]:
    samples = len(files) // len(prompts)
    verdicts = report["results"].get("geneval", {}).get("verdicts")
    parts = ["<h2>Pictures</h2>", f"<p>The first {SHOWN_PER_TAG} of each category, not selected.</p>"]
    for tag in dict.fromkeys(prompt.tag for prompt in prompts):
        numbers = [i for i in range(len(files)) if prompts[i // samples].tag == tag][:SHOWN_PER_TAG]
        shots = [_shot(files[i], prompts[i // samples].text, verdicts[i] if verdicts else None) for i in numbers]
        parts += [f"<h3>{escape(tag.replace('_', ' '))}</h3>"] if tag else []
        parts.append(f'<div class="grid">{"".join(shots)}</div>')
    return parts


def render_scores(
    report: Mapping[str, Any], prompts: Sequence[Prompt], files: Sequence[Path], sections: Sequence[str] = ()
) -> str:
    """The page as one HTML text; `sections` are ready parts about the run, after the pictures."""
    body = [f"<h1>{escape(report['run'])}</h1>", f'<p class="lead">{escape(report["summary"])}</p>']
    for name, result in report["results"].items():
        body += _geneval(result) if name == "geneval" else _numbers(name, result)
    if prompts:
        body += _pictures(report, prompts, files)
    body += sections
    if report["sampling"]:
        body += ["<h2>How the pictures were drawn</h2>", card("Sampling", report["sampling"])]
    body.append(card("Versions", report["versions"]))
    return page(f"Scores of {report['run']}", body)
