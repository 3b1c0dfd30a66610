"""A self-contained HTML page of pictures with captions. No script, no outside file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.formats.page import escape, page, png_uri

_SMALLEST_SHOWN = 160  # pixels on the longer side; smaller pictures are enlarged without smoothing
_STYLE = """
main { max-width: 1200px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
pre { font: 12.5px/1.45 ui-monospace, "Liberation Mono", Menlo, monospace; color: var(--muted); overflow-x: auto;
  border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); padding: 12px 0; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 22px 16px; }
.sheet img { max-width: 100%; display: block; border-radius: 3px; }
.sheet img.small { image-rendering: pixelated; }
.sheet figcaption { font-size: 13px; overflow-wrap: anywhere; }
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
    scale = max(1, -(-_SMALLEST_SHOWN // max(height, width)))
    kind = ' class="small"' if scale > 1 else ""
    caption, origin = escape(figure.caption), escape(figure.origin)
    return (
        f'<figure><img{kind} width="{width * scale}" height="{height * scale}" alt="{caption}" '
        f'src="{png_uri(figure.picture)}"><figcaption>{caption}<small>{origin}</small></figcaption></figure>'
    )


def contact_sheet(title: str, notes: str, figures: Sequence[Figure]) -> str:
    """The page: title, notes as they are printed on a terminal, pictures."""
    cells = "\n".join(map(_figure, figures))
    body = [f"<h1>{escape(title)}</h1>", f"<pre>{escape(notes)}</pre>", f'<div class="sheet">\n{cells}\n</div>']
    return page(title, body, _STYLE)
