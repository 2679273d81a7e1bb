"""Everything that howyouseeme raises on purpose: one clear sentence each."""

from __future__ import annotations

__all__ = [
    "HowYouSeeMeError",
    "ImageError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "UnsupportedCallError",
]


class HowYouSeeMeError(Exception):
    """Base of every error that howyouseeme raises on purpose.

    >>> try:
    ...     explanation = explain(model, "photo.jpg", target="tabby")
    ... except HowYouSeeMeError as error:
    ...     print(error)
    """


class InputError(HowYouSeeMeError, ValueError):
    """The tensor, target or option that was given can't be used.

    >>> Explainer(model, "gradcam")
    Traceback (most recent call last):
    howyouseeme.errors.InputError: There is no method 'gradcam': choose one of evidence, seed, exact.
    """


class ImageError(InputError):
    """A picture can't be read or is not a picture.

    >>> load_image("no.jpg")
    Traceback (most recent call last):
    howyouseeme.errors.ImageError: There is no file no.jpg; check its name and folder.
    """


class ModelError(HowYouSeeMeError, ValueError):
    """The model can't be loaded, or is in a state that can't be explained.

    >>> Explainer(model.train())(images)
    Traceback (most recent call last):
    howyouseeme.errors.ModelError: The model is in training mode (Sequential, 0, 1, ...), where batch norm ...
    """


class UnsupportedCallError(ModelError, NotImplementedError):
    """The model makes calls that no rule knows how to walk back through; the message names all of them.

    >>> try:
    ...     explanation = explain(model, images)
    ... except UnsupportedCallError as error:
    ...     print(error)                       # each with its shapes and its module

    A rule of your own makes a call known: docs/writing-a-rule.md.
    """


class MissingExtraError(HowYouSeeMeError, ImportError):
    """An optional package is missing; the message names the command that installs it.

    >>> open_video("walk.mp4")                 # without the package av
    Traceback (most recent call last):
    howyouseeme.errors.MissingExtraError: Videos need the package av: pip install 'howyouseeme[video]' ...
    """


def first_line(error: Exception) -> str:
    """What another library's error says first, to be quoted in a sentence of ours; its type if nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
