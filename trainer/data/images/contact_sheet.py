"""A self-contained HTML page of pictures with captions. No script, no outside file."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SMALLEST_SHOWN = 160  # pixels on the longer side; smaller pictures are enlarged without smoothing
_STYLE = """
:root { --ink: #1d2433; --muted: #687083; --rule: #dfe3ea; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 32px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
pre { font: 12.5px/1.45 ui-monospace, "Liberation Mono", Menlo, monospace; color: var(--muted); overflow-x: auto;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); padding: 12px 0; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 22px 16px; }
figure { margin: 0; break-inside: avoid; }
figure img { max-width: 100%; display: block; border-radius: 3px; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: 13px; line-height: 1.4; margin-top: 6px; overflow-wrap: anywhere; }
figcaption small { display: block; color: var(--muted); font-size: 11px; }
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture uint8 [height, width, 3], its caption, and where it is from."""

    picture: NDArray[np.uint8]
    caption: str
    origin: str


def _figure(figure: Figure) -> str:
    height, width = figure.picture.shape[:2]
    buffer = io.BytesIO()
    Image.fromarray(figure.picture).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    scale = max(1, -(-_SMALLEST_SHOWN // max(height, width)))
    kind = ' class="small"' if scale > 1 else ""
    caption, origin = html.escape(figure.caption), html.escape(figure.origin)
    return (
        f'<figure><img{kind} width="{width * scale}" height="{height * scale}" alt="{html.escape(figure.caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}<small>{origin}</small></figcaption></figure>'
    )


def contact_sheet(title: str, notes: str, figures: Sequence[Figure]) -> str:
    """The page: title, notes as they are printed on a terminal, pictures."""
    cells = "\n".join(map(_figure, figures))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body><main>'
        f"<h1>{html.escape(title)}</h1>\n<pre>{html.escape(notes)}</pre>\n"
        f'<div class="sheet">\n{cells}\n</div></main></body></html>\n'
    )
