"""The ways to walk back: which of a step's inputs get how much of a node's evidence.

`evidence` is the default, `seed` is *How You See Me* as published, `exact` follows every path.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..errors import InputError
from .base import Method, Walked
from .evidence import Evidence
from .exact import Exact
from .seed import Seed

__all__ = ["METHODS", "Evidence", "Exact", "Method", "Seed", "Walked", "get_method"]

METHODS: dict[str, type[Method]] = {"evidence": Evidence, "seed": Seed, "exact": Exact}


def get_method(name: str | Method, **parameters: Any) -> Method:
    """The method called `name`, with its parameters; a method itself stays what it is.

    >>> get_method("seed", k=10)
    Seed(k=10, position='contribution', outliers=True)

    Raises:
        InputError: no such method, or the method has no such parameter.
    """
    if isinstance(name, Method):
        if parameters:
            raise InputError(
                f"{name!r} is a method with all its parameters: give {', '.join(parameters)} when you make it."
            )
        return name
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}: choose one of {', '.join(METHODS)}.")
    method = METHODS[name]
    known = [field.name for field in fields(method)]  # type: ignore[arg-type] # all are dataclasses
    for parameter in parameters:
        if parameter not in known:
            raise InputError(
                f"method={name!r} has no parameter {parameter!r}: it takes "
                f"{', '.join(known) or 'none'}."
            )
    return method(**parameters)
