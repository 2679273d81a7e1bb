"""`howyouseeme models` and `howyouseeme classes`: what --model and --target take."""

from __future__ import annotations

import click

from ..errors import InputError, ModelError
from .network import Asked, network_options
from .program import verbose_option


@click.command()
@verbose_option
def models() -> None:
    """List the networks that --model takes."""
    from ..models import available  # noqa: PLC0415

    for name in available():
        click.echo(name)


@click.command()
@click.argument("text", required=False)
@network_options
@verbose_option
def classes(*, asked: Asked, text: str | None) -> None:
    """List the classes that --target takes, or those with TEXT in their names."""
    from ..models import available  # noqa: PLC0415
    from ..models.classes import imagenet_classes  # noqa: PLC0415

    # All these have been trained on ImageNet, so that none has to be downloaded for this.
    known = asked.classes is None and asked.model in available()
    names = imagenet_classes() if known else asked.load(photos=False).classes
    if names is None:
        raise ModelError(f"{asked.model} has no class names; give --target the index of a class.")
    wanted = (text or "").strip().casefold()
    found = [(i, name) for i, name in enumerate(names) if wanted in name.casefold()]
    if not found:
        raise InputError(f"{asked.model} has no class with {text!r} in its name.")
    for index, name in found:
        click.echo(f"{index:>{len(str(len(names)))}}  {name}")
