"""An explanation under a notebook's cell: a picture, and a slider through the layers.

The slider is made of radio buttons and CSS alone. It needs no kernel, no script and no trust, so it
works in a notebook that is only looked at. Where HTML is not let through, as on GitHub, the picture
above it stays.
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING, Any

from . import draw

if TYPE_CHECKING:
    from PIL.Image import Image

    from .explanation import Explanation

#: So many images of a batch are shown; a notebook has to hold them all.
MOST_IMAGES = 8

_PICTURE_WIDTH = 1200
_FRAME_WIDTH = 480
_JPEG: dict[str, Any] = {"kind": "JPEG", "quality": 80, "optimize": True}  # notebooks know no WebP
_WEBP: dict[str, Any] = {"kind": "WEBP", "quality": 75}  # half as large, for HTML

_STYLE = """
.hysm {font: 14px/1.4 sans-serif; max-width: 560px; margin: 0.5em 0}
.hysm fieldset {border: 0; margin: 0 0 6px; padding: 0; min-width: 0; display: flex}
.hysm label {flex: 1; min-width: 0; text-align: center; cursor: pointer; font-size: 12px;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding: 2px 3px;
  background: linear-gradient(#8888, #8888) 0 10px / 100% 2px no-repeat}
.hysm input {display: block; margin: 0 auto 2px; width: 16px; height: 16px; cursor: pointer;
  accent-color: #b5367a}
.hysm label:has(:checked) {text-decoration: underline}
.hysm figure {display: none; margin: 0}
.hysm figure img {display: block; width: 100%; height: auto}
"""


def html_of(explanation: Explanation, picture: bool = True) -> str:
    """The explanation as a piece of HTML that needs nothing else.

    >>> Path("cat.html").write_text(html_of(explainer("cat.jpg")))

    For each image the picture (if asked for) and the slider. The first 8 images of a batch are shown.
    """
    parts = []
    for i in range(min(len(explanation), MOST_IMAGES)):
        if picture:
            parts.append(_image(explanation.picture(i), _PICTURE_WIDTH, str(explanation[i])))
        parts.append(_slider(explanation, i))
    parts.append(_rest(explanation))
    return "\n".join(part for part in parts if part)


def display(explanation: Explanation) -> None:
    """Put the explanation under the cell that runs: for each image the picture, then the slider."""
    from IPython.display import display as show  # noqa: PLC0415 - there, for IPython called us

    for i in range(min(len(explanation), MOST_IMAGES)):
        picture = _shrunk(explanation.picture(i), _PICTURE_WIDTH)
        data = base64.b64encode(draw.encoded(picture, **_JPEG)).decode()
        show({"text/plain": repr(explanation[i]), "image/jpeg": data}, raw=True)
        # Its plain text stays empty: that of the picture says it all.
        show({"text/plain": "", "text/html": _slider(explanation, i)}, raw=True)
    if rest := _rest(explanation):
        show({"text/plain": rest, "text/html": rest}, raw=True)


def _slider(explanation: Explanation, i: int) -> str:
    frames = explanation.frames(i)
    chosen = next(k for k, (name, _, _) in enumerate(frames) if name == "attention")
    rules = ",".join(
        f".hysm:has(label:nth-of-type({k}) :checked) figure:nth-of-type({k})"
        for k in range(1, len(frames) + 1)
    )
    stops, figures = [], []
    pixels = next(k for k, (name, _, _) in enumerate(frames) if name == "pixels")
    for k, (name, says, picture) in enumerate(frames):
        checked = " checked" if k == chosen else ""
        stage = k - pixels  # their names are long, and begin alike
        stops.append(
            f'<label title="{html.escape(name)}">'
            f'<input type="radio" name="frame"{checked}>{stage if stage > 0 else name}</label>'
        )
        text = f"{f'stage {stage}, ' if stage > 0 else ''}{name}: {says}"
        figures.append(
            f"<figure>{_image(picture, _FRAME_WIDTH, text)}"
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
        )
    # The form keeps the radio buttons of two explanations apart; of this kind it is never sent.
    return (
        f'<form class="hysm" method="dialog"><style>{_STYLE}{rules}{{display: block}}</style>'
        f"<fieldset>{''.join(stops)}</fieldset>{''.join(figures)}</form>"
    )


def _rest(explanation: Explanation) -> str:
    more = len(explanation) - MOST_IMAGES
    return f"{more} more: explanation[{MOST_IMAGES}] and on." if more > 0 else ""


def _image(picture: Image, width: int, text: str) -> str:
    source = draw.data_uri(_shrunk(picture, width), **_WEBP)
    return f'<img style="max-width: 100%" alt="{html.escape(text)}" src="{source}">'


def _shrunk(picture: Image, width: int) -> Image:
    """Shrunk to a width, if wider: pictures stay in the notebook's file."""
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)))
    return picture.convert("RGB")
