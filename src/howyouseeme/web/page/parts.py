"""What both tabs of the page are made of."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, TypeVar

import gradio as gr
from fastapi import HTTPException
from fastapi.responses import Response

from ..scene import palette
from ..shelf import Shelf

__all__ = [
    "FOLDER",
    "QUIET",
    "alert",
    "gradient",
    "hint",
    "kept",
    "network_choice",
    "response",
    "sentence",
    "template",
    "text",
]

T = TypeVar("T")

FOLDER = files("howyouseeme") / "web" / "static"

QUIET: dict[str, Any] = {
    "api_visibility": "private",
    "trigger_mode": "always_last",
    "concurrency_limit": None,  # the service has its own queue
}


def template(name: str, **more: Any) -> gr.HTML:
    """An HTML component of ours, from the files of that name."""
    return gr.HTML(
        value=None,
        html_template=(FOLDER / f"{name}.html").read_text("utf-8"),
        css_template=(FOLDER / "viewer.css").read_text("utf-8"),
        js_on_load=(FOLDER / f"{name}.js").read_text("utf-8"),
        apply_default_css=False,
        **more,
    )


def network_choice(names: Sequence[str | tuple[str, str]], value: str, elem_id: str) -> gr.Dropdown:
    """The networks to choose from, by name or (what is shown, value); a long list can be searched."""
    return gr.Dropdown(
        names, value=value, label="Network", elem_id=elem_id, filterable=len(names) > 8
    )


def gradient() -> str:
    """The colours of a map, for a style sheet."""
    return ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in palette()[::15])


def text(given: Any) -> str | None:
    """What came from the page, which anybody may have written."""
    return str(given).strip()[:500] or None if isinstance(given, (str, int)) else None


def sentence(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())


def alert(error: Exception) -> str:
    """What went wrong, for the page to say."""
    return f'<p class="said" role="alert">{html.escape(sentence(error))}</p>'


def hint(words: str) -> str:
    """What to do next, or what is being done."""
    return f'<p class="doing" role="status">{html.escape(words)}</p>'


def kept(shelf: Shelf, key: str, kind: type[T]) -> T:
    """What of a kind lies on the shelf; status 404 if there is none, or none any more."""
    thing = shelf.get(key)
    if not isinstance(thing, kind):
        raise HTTPException(404, "This is no longer kept; ask for it once more.")
    return thing


def response(content: bytes, kind: str) -> Response:
    """A file that this visitor may keep for an hour."""
    return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})
