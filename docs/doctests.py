"""For the API reference: examples in docstrings (`>>>`) as code, not as Markdown's quotations."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class Doctests(Extension):
    """Fences the paragraphs of a docstring that begin with `>>>`."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        paragraphs = obj.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(
            f"```pycon\n{text}\n```" if text.startswith(">>>") else text for text in paragraphs
        )
