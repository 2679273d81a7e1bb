"""`howyouseeme track`: a target, followed through a video."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .network import Asked, network_options
from .photos import out_option
from .program import verbose_option
from .question import read_target
from .videos import go_through, refuse_photo, table_in, video_argument, writer_in


@click.command()
@video_argument
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
    refuse_photo(source)
    given = None if box is None else _read_box(box)
    from ..track import COLUMNS, Sighting, Tracker, follow  # noqa: PLC0415
    from ..video import open_video  # noqa: PLC0415

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

        table = table_in(out, source)
        picture = writer_in(out, source, ".track", video.rate, table, COLUMNS)
        found: list[bool] = []

        def finish() -> None:
            picture.drop_later()
            click.echo(
                f"{source} → found in {sum(found)} of {len(found)} frames → {table}, {picture.path}"
            )

        def note(sighting: Sighting) -> None:
            found.append(sighting.found)

        steps = follow(video, tracker, choose, table, picture)
        go_through(steps, video, "Tracking", note, finish)


def _read_box(text: str) -> tuple[float, ...]:
    from ..regions import read_box  # noqa: PLC0415

    try:
        return read_box(text)
    except InputError as error:
        raise click.UsageError(f"--box: {error}") from None
