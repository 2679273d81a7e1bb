"""Everything that howyouseeme raises on purpose: one clear sentence each."""

from __future__ import annotations


class HowYouSeeMeError(Exception):
    """Base of every error that howyouseeme raises on purpose."""


class InputError(HowYouSeeMeError, ValueError):
    """The tensor, target or option that was given can't be used."""


class ImageError(InputError):
    """A picture can't be read or is not a picture."""


class ModelError(HowYouSeeMeError, ValueError):
    """The model can't be loaded, or is in a state that can't be explained."""


class UnsupportedCallError(ModelError, NotImplementedError):
    """The model makes calls that no rule knows how to walk back through."""


class MissingExtraError(HowYouSeeMeError, ImportError):
    """An optional package is missing; the message names the command that installs it."""


def first_line(error: Exception) -> str:
    """What another library's error says first, to be quoted in a sentence of ours; its type if nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
