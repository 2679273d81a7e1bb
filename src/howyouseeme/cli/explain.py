"""`howyouseeme explain` and `howyouseeme demo`: pictures of why, and the numbers behind them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..files import identities, spare
from .network import DEFAULT_MODEL, Asked, network_options
from .photos import (
    Note,
    find_photos,
    for_each,
    make_folder,
    max_pixels_option,
    out_option,
    photos_argument,
    spare_photos,
)
from .program import verbose_option
from .question import DEFAULT_METHOD, Question, Wanted, question_options

if TYPE_CHECKING:
    from ..explainer import Explainer
    from ..explanation import Explanation


@dataclass(frozen=True)
class _Job:
    explainer: Explainer
    out: Path
    wanted: Wanted = field(default_factory=Wanted)
    layers: bool = False
    maps: bool = False
    check: bool = False
    read: frozenset[tuple[int, int]] = frozenset()  # the photos, which nothing may replace


@click.command()
@photos_argument
@question_options
@network_options
@out_option()
@click.option("--layers", is_flag=True, help="Add where each stage of the network looks.")
@click.option("--maps", is_flag=True, help="Write saliency and attention as numbers too (NPZ).")
@click.option(
    "--check",
    is_flag=True,
    help="Ask again with the evidence blurred away, and with all else blurred: was it that?",
)
@max_pixels_option
@verbose_option
def explain(
    *,
    photos: tuple[Path, ...],
    question: Question,
    asked: Asked,
    out: Path,
    layers: bool,
    maps: bool,
    check: bool,
) -> None:
    """Explain photos, or all the photos in a folder.

    Writes a picture (PNG) and the numbers behind it (JSON) for each photo.
    """
    if not photos:
        raise click.UsageError(
            "Name at least one photo or folder. To see what comes out without a photo of your "
            "own: howyouseeme demo"
        )
    if check and (question.box is not None or question.like is not None):
        raise click.UsageError("--box and --like go without --check.")
    files = find_photos(photos, out)
    network = asked.load()
    wanted = question.wanted(network)
    explainer = question.explainer(network)
    if wanted == Wanted():  # else the answer is in the name, which only it tells
        spare_photos(files, out, f"{_method_part(question.method)}.png")
    make_folder(out)  # only now: a mistyped class should leave no empty folder behind
    job = _Job(explainer, out, wanted, layers, maps, check, identities(files))
    for_each(files, partial(_explain_one, job))


@click.command()
@out_option()
@verbose_option
def demo(*, out: Path) -> None:
    """Explain the photos that come with the package."""
    from ..explainer import Explainer  # noqa: PLC0415
    from ..images import sample_photo  # noqa: PLC0415

    explainer = Explainer(DEFAULT_MODEL)
    make_folder(out)
    photos = sorted(sample_photo().parent.glob("*.jpg"))
    for_each(photos, partial(_explain_one, _Job(explainer, out)))
    click.echo(
        "\nA photo of your own: howyouseeme explain photo.jpg\n"
        "The network is wrong about the rocket. Why is it no missile?\n"
        f"  howyouseeme explain {shlex.quote(str(sample_photo('rocket')))} --versus missile --check"
    )


def _explain_one(job: _Job, file: Path, name: str) -> Iterator[str]:
    """Write what explains one file; yield what there is to say of it."""
    from ..detectors import SURE  # noqa: PLC0415
    from ..written import save  # noqa: PLC0415 - a photo's name may end in .png.jpg

    explanations = job.wanted.explained(job.explainer, file)
    for i, explanation in enumerate(explanations, start=1):
        # What was asked for is in the name, so that asking for something else replaces nothing.
        parts = [name]
        if job.wanted != Wanted():
            rank = "" if job.wanted.top is None else f"{i}-"
            parts.append(rank + _slug(_answer(explanation)))
        full = ".".join(parts) + _method_part(explanation.method.name)
        spare(job.read, [job.out / f"{full}.png"])
        written = save(explanation, job.out, full, job.layers, job.maps)
        picture = next(path for path in written if path.suffix == ".png")
        yield f"{file} → {_told(explanation)} → {picture}"
        if not len(explanation.points[0]):
            yield Note(f"{file}: {_nothing(explanation)}")
        elif job.check:
            yield from _checked(job, explanation)
        elif job.wanted.box is not None and (explanation.probability[0] or 0) < SURE:
            yield Note(
                f"{file}: the network is hardly sure of this box; many programs don't show such ones"
            )


def _nothing(explanation: Explanation) -> str:
    """Why there is no evidence: the photo holds none, or the sample of it."""
    answer, nodes = _answer(explanation), explanation.method.parameters.get("nodes")
    if nodes is None:
        among = "" if explanation.target[0] is None else " more than for other classes"
        return f"nothing in it speaks for {answer}{among}"
    sample = f"the sample of {nodes} node{'' if nodes == 1 else 's'}"
    return f"{sample} holds nothing that speaks for {answer}; raise --nodes"


def _checked(job: _Job, explanation: Explanation) -> Iterator[str]:
    """What the network says of the photo without the evidence, and of that alone."""
    photo = explanation.samples[0].image
    assert photo is not None  # a file was given
    asked = [explanation.target[0]]
    if job.wanted.rival is not None:
        asked = [job.wanted.index, job.wanted.rival]
    photos = {
        "as it is": photo,
        "without that evidence": explanation.hidden(),
        "with it alone": explanation.hidden(others=True),
    }
    for name, changed in photos.items():
        *answers, top = job.explainer.many(changed, [*asked, None])
        asked = [one.target[0] for one in answers]  # the likeliest is that of the photo as it is
        if top.target[0] not in asked:
            answers.append(top)
        yield f"  {name}: {', '.join(map(_told, answers))}"


def _method_part(method: str) -> str:
    """What tells the files of a method from those of the default one."""
    return "" if method == DEFAULT_METHOD else f".{method}"


def _answer(explanation: Explanation) -> str:
    return explanation.label[0] or str(explanation.target[0])  # not every network names its classes


def _told(explanation: Explanation) -> str:
    """An answer, and how likely it is."""
    from ..draw import percent  # noqa: PLC0415

    probability = explanation.probability[0]
    return _answer(explanation) + ("" if probability is None else f" {percent(probability)}")


def _slug(label: str) -> str:
    """The label as a part of a file name."""
    return re.sub(r"\W+", "-", label.lower()).strip("-")[:40].rstrip("-") or "class"
