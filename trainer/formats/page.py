"""Pieces of a self-contained HTML page: style, tables, pictures, protocol cards. No script, no outside file."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

STYLE = """
:root { --ink: #1d2433; --muted: #687083; --rule: #dfe3ea; --paper: #fff; --wash: #f6f7f9;
  --blue: #2f5fd0; --red: #b5362f; --green: #1f7a53; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 32px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 6px; padding-top: 18px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 6px 0 12px; max-width: 46em; }
.muted, .lead { color: var(--muted); }
.lead { margin-bottom: 26px; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px; }
.stat { border: 1px solid var(--rule); border-radius: 10px; padding: 18px 22px; }
.stat .name { color: var(--muted); font-size: 13px; }
.stat .value { font-size: 44px; font-weight: 650; line-height: 1.15; letter-spacing: -0.02em; }
.stat .unit { font-size: 22px; font-weight: 500; color: var(--muted); }
.stat .range { font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); font-size: 12.5px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.plot { padding: 0 10px; width: 240px; }
td.plot svg { display: block; width: 100%; height: auto; }
tr.total td { font-weight: 650; border-bottom: 0; border-top: 1.5px solid var(--ink); }
.range { color: var(--muted); font-weight: 400; }
.key { font-size: 13px; color: var(--muted); }
.card { margin: 16px 0 0; background: var(--wash); border-radius: 8px; padding: 10px 16px; font-size: 12px; }
.card summary { cursor: pointer; font-weight: 600; color: var(--muted); }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 8px 0 4px; }
.card dt { color: var(--muted); }
.card dl > div { display: contents; }
.card dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(8, 1fr); gap: 16px 12px; margin: 8px 0 4px; }
figure { margin: 0; break-inside: avoid; }
.grid img { width: 100%; display: block; border-radius: 3px; image-rendering: pixelated; }
.shot { position: relative; } .shot svg { position: absolute; inset: 0; width: 100%; height: 100%; }
figcaption { font-size: 11.5px; line-height: 1.35; margin-top: 5px; }
.pass::before { content: "\\2713\\a0"; color: var(--green); font-weight: 700; }
.fail::before { content: "\\2717\\a0"; color: var(--red); font-weight: 700; }
.why { color: var(--red); display: block; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 18px 28px; }
.plots figcaption { font-size: 13.5px; font-weight: 600; margin: 0 0 2px; }
.plots figcaption span { color: var(--muted); font-weight: 400; }
.plots svg { display: block; width: 100%; height: auto; }
.plots text { font: 12px system-ui, "Liberation Sans", Arial, sans-serif; fill: #687083; }
.chart, .wide { width: 100%; display: block; margin: 10px 0; }
.strip figure { display: grid; grid-template-columns: 90px 1fr; align-items: center; margin: 6px 0; }
.strip img { width: 100%; display: block; border-radius: 3px; image-rendering: pixelated; }
.strip figcaption { margin: 0; order: -1; font-size: 13px; color: var(--muted); }
.beside { display: grid; grid-template-columns: 2fr 3fr; gap: 32px; align-items: start; }
.narrow { max-width: 560px; }
details.more > summary { cursor: pointer; color: var(--blue); font-size: 13px; margin: 10px 0; }
@media screen and (max-width: 760px) { .grid { grid-template-columns: repeat(4, 1fr); } main { padding: 20px 16px; }
  .beside { grid-template-columns: 1fr; } .scroll { overflow-x: auto; } }
@media print { body, p { font-size: 10.5px; } table { font-size: 10px; } th { font-size: 9px; }
  th, td { padding: 3px 5px; } figcaption { font-size: 7.5px; } .grid { gap: 8px 7px; } td.plot { width: 130px; }
  .card { font-size: 9px; } .key { font-size: 9px; } h1 { font-size: 24px; } h2 { font-size: 16px; }
  main { max-width: none; padding: 0; } h2, h3 { break-after: avoid; }
  .stat, .card, tr, .chart { break-inside: avoid; } details.more { display: none; } .stat .value { font-size: 34px; }
  h2 { margin-top: 28px; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 14mm; } }
"""


def escape(value: object) -> str:
    """Text for HTML."""
    return html.escape(str(value))


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole document; `style` is CSS in addition to that of all pages."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def png_uri(picture_HWC: NDArray[np.uint8]) -> str:
    """A uint8 picture [H, W, 3] as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, format="PNG", optimize=True)
    return file_uri(buffer.getvalue(), "image/png")


def file_uri(content: bytes, kind: str) -> str:
    """Bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(uri: str, alt: str, css: str = "chart") -> str:
    """An embedded picture."""
    return f'<img class="{css}" src="{uri}" alt="{escape(alt)}">'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], last_is_total: bool = False) -> str:
    """A table of ready HTML cells."""
    lines = [list(row) for row in rows]
    head = "".join(cell if cell.startswith("<th") else f"<th>{cell}</th>" for cell in header)
    body = []
    for i, row in enumerate(lines):
        css = ' class="total"' if last_is_total and i == len(lines) - 1 else ""
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        body.append(f"<tr{css}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def card(title: str, content: Mapping[str, Any]) -> str:
    """A protocol card: name and value of everything that shaped a number."""
    items = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        items.append(f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(value)}</dd>")
    return f'<details class="card" open><summary>{escape(title)}</summary><dl>{"".join(items)}</dl></details>'


def figure_grid(figures: Iterable[str]) -> str:
    """Figures side by side."""
    return f'<div class="grid">{"".join(figures)}</div>'


def stat(name: str, value: str, unit: str, note: str) -> str:
    """A box with one large number; `note` is ready HTML."""
    return (
        f'<div class="stat"><div class="name">{escape(name)}</div><div class="value">{value}'
        f'<span class="unit">&thinsp;{unit}</span></div><div class="range">{note}</div></div>'
    )
