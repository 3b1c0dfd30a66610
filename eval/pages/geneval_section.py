"""GenEval's part of a report: a row per category with its interval and controls, reasons of failure, the protocol."""

from collections.abc import Mapping
from typing import Any

from eval.metrics.geneval import FAULTS
from trainer.formats.page import card, escape, stat, table

CONTROLS = {
    "chance": "true pictures judged by other captions of the category",
    "shuffled": "these pictures judged by other captions",
    "untrained": "the same model before its first step",
    "ceiling": "true pictures of these captions, judged by the same detector",
}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _range(score: Mapping[str, float]) -> str:
    return f'<span class="range">{_percent(score["low"])} to {_percent(score["high"])}</span>'


def geneval_stat(result: Mapping[str, Any]) -> str:
    """The box at the head of the page."""
    note = f"95 % interval {_range(result['overall'])}"
    controls = result.get("controls")
    if controls:
        note += (
            f"; shuffled captions {_percent(controls['shuffled']['overall'])}, "
            f"true pictures {_percent(controls['ceiling']['overall'])}"
        )
    return stat("GenEval, pictures as their prompts ask", _percent(result["overall"]["value"]), "%", note)


def geneval_section(result: Mapping[str, Any]) -> list[str]:
    """The section."""
    controls: Mapping[str, Mapping[str, float]] = result.get("controls", {})
    rows = []
    for tag, score in [*result["tags"].items(), ("overall", result["overall"])]:
        known = {name: values[tag] for name, values in controls.items() if tag in values}
        rows.append(
            [
                escape(tag.replace("_", " ")),
                str(score["total"]),
                _percent(score["value"]),
                _range(score),
                interval_plot(score["value"], score["low"], score["high"], known),
                *(_percent(known[name]) if name in known else "" for name in controls),
            ]
        )
    scenes = "Every prompt combines objects or colours that training never showed together. "
    comparable = result["card"]["comparable"]
    words = "comparable with published scores" if comparable == "official" else "not comparable with published scores"
    return [
        "<h2>Does the picture show what the caption asks for?</h2>",
        f"<p>{scenes if 'background' in result else ''}A detector finds the objects; GenEval's rules compare them "
        "with the caption. Overall is the unweighted mean of the categories. Protocol: "
        f"<b>{escape(comparable)}</b>, {words}.</p>",
        table(["category", "n", "% correct", "95 % interval", "", *controls], rows, last_is_total=True),
        *_remarks(result),
        *_faults(result["faults"]),
        card("Protocol of this score", result["card"]),
    ]


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """What the table's grey ticks are, and further readings of the same pictures."""
    parts = []
    if "controls" in result:
        meanings = " ".join(f"<b>{name}</b>: {CONTROLS[name]}." for name in result["controls"])
        parts.append(f'<p class="key">Grey ticks are the controls. {meanings}</p>')
    sentences = [f"Pictures correct: {_percent(result['images']['value'])} % of {result['images']['total']}."]
    if len(result["best_of"]) > 1:
        best = ", ".join(f"{n}: {_percent(value)}" for n, value in result["best_of"].items())
        sentences.append(f"Prompts with a correct picture among the first n, in %: {best}.")
    if "background" in result:
        value = _percent(result["background"]["value"])
        sentences.append(f"Background as asked, whatever stands on it: {value} %.")
    if "thresholds" in result:
        others = ", ".join(f"{_percent(value)} at {name}" for name, value in result["thresholds"].items())
        sentences.append(f"Overall with another threshold of the detector: {others}.")
    return [*parts, f'<p class="key">{escape(" ".join(sentences))}</p>']


def _faults(found: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Failure kinds by category; nothing when no picture failed."""
    if not found:
        return []
    kinds = [kind for kind in FAULTS if any(kind in faults for faults in found.values())]
    rows = [
        [escape(tag.replace("_", " ")), *(str(faults.get(kind, "")) for kind in kinds)] for tag, faults in found.items()
    ]
    titles = {"no_target": "no object to stand beside"}
    header = ["pictures that failed", *(titles.get(kind, kind) for kind in kinds)]
    return ["<h3>Why pictures fail</h3>", f'<div class="narrow">{table(header, rows)}</div>']


def interval_plot(value: float, low: float, high: float, ticks: Mapping[str, float]) -> str:
    """A share on an axis from 0 to 1 with its interval, and grey ticks for the controls, as inline SVG."""
    width, height, pad = 220, 26, 6

    def x(share: float) -> str:
        return f"{pad + share * (width - 2 * pad):.1f}"

    marks = "".join(
        f'<line x1="{x(tick)}" x2="{x(tick)}" y1="5" y2="21" stroke="#9aa2b1" stroke-width="1.5">'
        f"<title>{escape(name)} {tick:.1%}</title></line>"
        for name, tick in ticks.items()
    )
    return (
        f'<td class="plot"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{value:.1%}">'
        f'<line x1="{x(0)}" x2="{x(1)}" y1="13" y2="13" stroke="#dfe3ea" stroke-width="1"/>{marks}'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="13" y2="13" stroke="#2f5fd0" stroke-width="3.5" '
        f'stroke-linecap="round" opacity="0.45"/><circle cx="{x(value)}" cy="13" r="4.5" fill="#2f5fd0"/>'
        "</svg></td>"
    )
