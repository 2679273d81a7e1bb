"""howyouseeme walks a convolutional network backwards, from its answer to the pixels responsible.

>>> import howyouseeme as hysm
>>> explanation = hysm.explain("efficientnet-lite0", "photo.jpg")
>>> explanation.save("out")

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import targets
    from .errors import (
        HowYouSeeMeError,
        ImageError,
        InputError,
        MissingExtraError,
        ModelError,
        UnsupportedCallError,
    )
    from .explainer import Explainer, explain
    from .explanation import Explanation
    from .images import Preprocess, load_image, sample_photo
    from .models import Network, load_model
    from .tape import record

_WHERE = {
    "Explainer": "explainer",
    "Explanation": "explanation",
    "HowYouSeeMeError": "errors",
    "ImageError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "ModelError": "errors",
    "Network": "models",
    "Preprocess": "images",
    "UnsupportedCallError": "errors",
    "explain": "explainer",
    "load_image": "images",
    "load_model": "models",
    "record": "tape",
    "sample_photo": "images",
}

__all__ = [
    "Explainer",
    "Explanation",
    "HowYouSeeMeError",
    "ImageError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "Network",
    "Preprocess",
    "UnsupportedCallError",
    "__version__",
    "explain",
    "load_image",
    "load_model",
    "record",
    "sample_photo",
    "targets",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module  # noqa: PLC0415

    if name == "targets":
        return import_module(".targets", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
