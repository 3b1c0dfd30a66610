"""The page of a report: its head, a section per suite, the pictures with verdicts, and how all of it was made.

Self-contained: pictures are inside, nothing is loaded. Shapes: H x W pixels.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from eval.pages.numbers import flat_numbers
from eval.pictures.image_files import read_picture
from eval.pictures.prompts import Prompt
from trainer.formats.page import card, escape, figure_grid, file_uri, page, png_uri, table

SHOWN_PER_TAG = 16
SIDE = 192  # pixels of a thumbnail; smaller pictures are shown as they are
MAX_FOLDED = 1000  # pictures of a set up to which those beyond the shown ones fold out


def number_section(
    title: str, names: Mapping[str, str], spreads: Mapping[str, str], result: Mapping[str, Any]
) -> list[str]:
    """A suite's numbers as a table, what could not be computed and why, and the protocol card, which comes last."""
    numbers = flat_numbers(result)
    rows = []
    for path, words in (names or {path: path.replace("_", " ") for path in numbers}).items():
        if path in numbers:
            spread = f"&plusmn; {numbers[spreads[path]]:.2g}" if spreads.get(path) in numbers else ""
            rows.append([escape(words), f"{numbers[path]:.5g}", spread])
    note = [f'<p class="muted">{escape(result["note"])}.</p>'] if "note" in result else []
    skipped = [
        f'<p class="key">Not computed: {escape(name)} ({escape(why)}).</p>' for name, why in result["skipped"].items()
    ]
    shown = f'<div class="narrow">{table(["metric", "value", ""], rows)}</div>'
    return [f"<h2>{escape(title)}</h2>", *note, shown, *skipped, card("Protocol of these numbers", result["card"])]


def _thumbnail(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI, and its width and height."""
    pixels = read_picture(path).numpy()
    picture = Image.fromarray(pixels)
    size = picture.size
    if max(size) <= SIDE:
        return png_uri(pixels), size
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
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
        boxes = f'<svg viewBox="0 0 {width} {height}">{boxes}</svg>'
    return (
        f'<figure><div class="shot"><img src="{uri}" alt="{escape(caption)}">{boxes}</div>'
        f"<figcaption><span{css}>{escape(caption)}</span>{why}</figcaption></figure>"
    )


def _pictures(report: Mapping[str, Any], prompts: Sequence[Prompt], files: Sequence[Path]) -> list[str]:
    samples, folded = len(files) // len(prompts), len(files) <= MAX_FOLDED
    verdicts = next((result["verdicts"] for result in report["results"].values() if "verdicts" in result), None)
    words = f"The first {SHOWN_PER_TAG} of each category, not selected{'; the rest folds out below' if folded else ''}."
    boxes = " Boxes are what the detector found." if verdicts else ""
    parts = ["<h2>Pictures</h2>", f"<p>{words}{boxes}</p>"]
    for tag in dict.fromkeys(prompt.tag for prompt in prompts):
        numbers = [i for i in range(len(files)) if prompts[i // samples].tag == tag]
        shots = [
            _shot(files[i], prompts[i // samples].text, verdicts[i] if verdicts else None)
            for i in (numbers if folded else numbers[:SHOWN_PER_TAG])
        ]
        parts += [f"<h3>{escape(tag.replace('_', ' '))}</h3>"] if tag else []
        parts.append(figure_grid(shots[:SHOWN_PER_TAG]))
        rest = shots[SHOWN_PER_TAG:]
        if rest:
            parts.append(f'<details class="more"><summary>{len(rest)} more</summary>{figure_grid(rest)}</details>')
    return parts


def render_report(
    report: Mapping[str, Any],
    sections: Mapping[str, Sequence[str]],
    *,
    stats: Sequence[str],
    prompts: Sequence[Prompt],
    files: Sequence[Path],
    run_sections: Sequence[str],
) -> str:
    """The page as one HTML text.

    `sections` is ready HTML of each suite; those that judge pictures one by one come before the pictures, the others
    after them, then `run_sections`, ready parts about the run.
    """
    title = f"{report['run']} at step {report['step']:,}" if report["step"] else str(report["run"])
    about = [report["summary"], ", ".join(f"{name} {value}" for name, value in report["model"].items())]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape("; ".join(filter(None, about)))}</p>']
    body += [f'<div class="headline">{"".join(stats)}</div>'] if stats else []
    for name, part in sections.items():
        body += part if "verdicts" in report["results"][name] else []
    body += _pictures(report, prompts, files) if prompts else []
    for name, part in sections.items():
        body += part if "verdicts" not in report["results"][name] else []
    body += run_sections
    if report["sampling"]:
        body += ["<h2>How the pictures were drawn</h2>", card("Sampling", report["sampling"])]
    body.append(card("Versions", report["versions"]))
    if report["notes"]:
        body += ["<h2>Notes</h2>", *(f'<p class="muted">{escape(note)}</p>' for note in report["notes"])]
    return page(title, body)
