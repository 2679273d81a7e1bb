"""The names of ImageNet's classes, without a download."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of the 1000 classes of ILSVRC 2012, in the order of the outputs, all different.

    >>> imagenet_classes()[281]
    'tabby'
    """
    text = (files("howyouseeme") / "data" / "imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
