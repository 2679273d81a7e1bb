"""The options that say what a network is asked, and by which method it is explained."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .program import Named, as_one

if TYPE_CHECKING:
    from ..explainer import Explainer
    from ..explanation import Explanation
    from ..images import Source
    from ..models import Network
    from ..targets import Target

DEFAULT_METHOD = "evidence"
METHODS = ("evidence", "seed", "exact")

_CLASS = "Class to explain, by name or index (`howyouseeme classes` lists them)"

_OPTIONS = (
    click.option(
        "--versus",
        metavar="CLASS",
        help="Explain what speaks for the target and not for this class.",
    ),
    click.option(
        "--box",
        type=click.IntRange(min=0),
        metavar="N",
        help="Of a detector: explain the box of this number in its list, from 0; most begin with the most "
        "certain one.",
    ),
    click.option(
        "--like",
        metavar="PHOTO",
        type=Named("a photo", path_type=Path),
        help="Explain what is like another photo to the network: the cosine of its answers, or of its "
        "features where it has no classes.",
    ),
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default=DEFAULT_METHOD,
        show_default=True,
        help="How to walk back.",
    ),
    click.option(
        "--k",
        type=click.IntRange(min=1),
        help="Nodes taken at each fully connected layer, 20 if not given; for --method seed.",
    ),
    click.option(
        "--nodes",
        type=click.IntRange(min=1),
        help="Go on from a sample of about so many nodes, 2000 say, instead of all: faster on some "
        "networks, and coarser; for --method evidence.",
    ),
    click.option(
        "--multilabel",
        is_flag=True,
        help="Classes don't exclude each other: set none against the others.",
    ),
)


@dataclass(frozen=True)
class Question:
    """What the options ask, and how."""

    target: str | None
    versus: str | None
    box: int | None
    like: Path | None
    method: str
    k: int | None
    nodes: int | None
    multilabel: bool

    def __post_init__(self) -> None:
        if self.k is not None and self.method != "seed":
            raise click.UsageError(f"--k belongs to --method seed, not to {self.method}.")
        if self.nodes is not None and self.method != "evidence":
            raise click.UsageError(f"--nodes belongs to --method evidence, not to {self.method}.")
        if self.box is not None and (self.target is not None or self.versus is not None):
            raise click.UsageError(
                "--box goes without --target and --versus: it is asked for alone."
            )
        if self.like is not None and (self.target, self.versus, self.box) != (None, None, None):
            raise click.UsageError("--like goes without --target, --versus and --box.")

    def explainer(self, network: Network) -> Explainer:
        """What explains the answers of a network so."""
        from ..explainer import Explainer  # noqa: PLC0415

        parameters = {name: n for name in ("k", "nodes") if (n := getattr(self, name)) is not None}
        return Explainer(network, self.method, multilabel=self.multilabel, **parameters)

    def wanted(self, network: Network) -> Wanted:
        """What of a network is to be explained, checked before the first photo."""
        if self.box is not None:
            return Wanted(box=self.box)
        if self.like is not None:
            return Wanted(like=_alike(network, self.like))
        wanted = read_target(self.target, network)
        if self.versus is None:
            return wanted
        rival = read_target(self.versus, network)
        if wanted.top is not None or rival.index is None:
            raise click.UsageError("--versus stands one class against one: name them.")
        if rival.index == wanted.index:
            raise click.UsageError("--target and --versus name the same class: give two.")
        return replace(wanted, rival=rival.index)


@dataclass(frozen=True)
class Wanted:
    """What is to be explained."""

    index: int | None = None  # None: the class that the network answers
    top: int | None = None  # this many of the likeliest classes instead
    rival: int | None = None  # against this class
    box: int | None = None  # the detection of this number instead of a class
    like: Target | None = None  # the likeness to another photo instead of a class

    def explained(self, explainer: Explainer, photo: Source) -> list[Explanation]:
        """That of a photo: one explanation, or as many as the likeliest classes that are asked for."""
        from ..asking import targets_of  # noqa: PLC0415

        target = self.index if self.like is None else self.like
        return explainer.many(
            photo, targets_of(target, top=self.top, versus=self.rival, box=self.box)
        )


def _asking(target: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return as_one("question", Question, (click.option("--target", help=target), *_OPTIONS))


#: Options for what is asked, which the command gets as one argument, `question`.
question_options = _asking(
    f"{_CLASS}, or top3 for the three likeliest (topN for N). The likeliest one if not given."
)

#: The same where one thing alone can be asked.
one_question_options = _asking(f"{_CLASS}; each frame's likeliest one if not given.")


def _alike(network: Network, photo: Path) -> Target:
    """What asks how like a photo is to another one."""
    from ..forward import forward  # noqa: PLC0415
    from ..images import load_image  # noqa: PLC0415
    from ..scores import recorded_scores  # noqa: PLC0415
    from ..targets import alike  # noqa: PLC0415

    tensor, _ = network.photo_input(load_image(photo))
    answer = recorded_scores(forward(network, [tensor[None].to(network.like)]))
    return alike(answer.data, photo.name)


def read_target(target: str | None, network: Network) -> Wanted:
    """What --target asks for, checked before the first photo."""
    if target is None:
        return Wanted()
    top = re.fullmatch(r"top(\d+)", target.strip(), re.IGNORECASE | re.ASCII)
    if top is None:
        try:
            return Wanted(index=network.class_index(target))
        except InputError as error:
            more = " `howyouseeme classes` lists them." if network.classes else ""
            raise InputError(f"{error}{more}") from error
    count, most = int(top[1]), len(network.classes or ())
    if count < 1 or (most and count > most):  # without names, the number of classes isn't known yet
        end = f" to {most} for this network" if most else ""
        raise click.UsageError(f"--target {target}: N goes from 1{end}.")
    return Wanted(top=count)
