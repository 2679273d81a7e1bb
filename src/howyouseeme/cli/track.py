"""`howyouseeme track`: a target, followed through a video."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import HowYouSeeMeError, InputError
from ..files import PHOTOS, identities, spare
from .network import Asked, network_options, read_target
from .photos import make_folder, out_option
from .program import complain, verbose_option

if TYPE_CHECKING:
    from ..video import FrameWriter, VideoWriter


@click.command()
@click.argument("source", metavar="VIDEO|FOLDER|webcam")
@click.option(
    "--box",
    metavar="X0,Y0,X1,Y1",
    help="Where the target is in the first frame, in pixels; X1 and Y1 are just outside.",
)
@click.option("--target", help="Class to look for in the first frame instead, by name or index.")
@network_options
@out_option()
@verbose_option
def track(*, source: str, box: str | None, target: str | None, asked: Asked, out: Path) -> None:
    """Follow a target through a video, a folder of frames, or a webcam (webcam, webcam:1).

    Writes a table of boxes (CSV) and an annotated video; for a folder, annotated frames.
    """
    if (box is None) == (target is None):
        more = "" if box is None else ", not both"
        raise click.UsageError(f"Say what to follow: --box X0,Y0,X1,Y1 or --target CLASS{more}.")
    if Path(source).suffix.lower() in PHOTOS and Path(source).is_file():
        raise click.UsageError(f"{source} is a picture: give a video, or a folder of frames.")
    given = None if box is None else _read_box(box)
    from ..track import Tracker, follow  # noqa: PLC0415
    from ..video import FrameWriter, VideoWriter, open_video  # noqa: PLC0415

    with open_video(source) as video:
        network = asked.load()
        index = read_target(target, network).index
        if given is None and index is None:
            raise click.UsageError(f"--target {target}: name one class to follow.")
        tracker = Tracker(network)

        def choose(frame: Any) -> Sequence[float]:
            if given is not None:
                return given
            from ..propose import Proposer  # noqa: PLC0415

            assert index is not None
            with warnings.catch_warnings(record=True) as doubts:
                warnings.simplefilter("always")
                found = Proposer(network).find(frame, index)
            clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the line of the progress bar
            for doubt in doubts:
                click.echo(f"{clear}{source}: {doubt.message}", err=True)
            return found

        table = out / f"{_name(source)}.csv"
        picture: FrameWriter | VideoWriter = (
            FrameWriter(out / f"{_name(source)}.track")
            if Path(source).is_dir()
            else VideoWriter(out / f"{_name(source)}.track.mp4", video.rate or 25)
        )
        spare(identities([source]), [picture.path])
        if not _ours(table):
            raise click.UsageError(
                f"{table} is there already and was not made by track; name another folder (--out)."
            )
        make_folder(out)
        seen = frames = 0
        problem: HowYouSeeMeError | None = None
        following = follow(video, tracker, choose, table, picture)
        bar = (
            click.progressbar(following, length=video.count, label="Tracking", file=sys.stderr)
            if sys.stderr.isatty()
            else nullcontext(following)
        )
        try:
            with bar as sightings:
                for sighting in sightings:
                    seen, frames = seen + sighting.found, frames + 1
        except HowYouSeeMeError as error:  # what came before it is written
            if not frames:
                raise
            problem = error
        finally:
            if frames:
                if isinstance(picture, FrameWriter):  # in a folder of our own
                    picture.drop_later()
                click.echo(
                    f"{source} → found in {seen} of {frames} frames → {table}, {picture.path}"
                )
    if problem is not None:
        complain(None, problem)
        sys.exit(1)


def _name(source: str) -> str:
    """That of the files which are made of a source."""
    if source.startswith("webcam"):
        return source.replace(":", "-")
    path = Path(os.path.abspath(source))  # `.` has a name too
    return path.name if path.is_dir() else path.stem


def _read_box(text: str) -> tuple[float, ...]:
    from ..regions import read_box  # noqa: PLC0415

    try:
        return read_box(text)
    except InputError as error:
        raise click.UsageError(f"--box: {error}") from None


def _ours(table: Path) -> bool:
    """Whether a table is missing, was made by this command, or is empty, as it may have been ended there."""
    if not table.exists():
        return True
    from ..track import COLUMNS  # noqa: PLC0415

    header = ",".join(COLUMNS).encode()
    with table.open("rb") as file:
        found = file.read(len(header))
    return found in {header, b""}
