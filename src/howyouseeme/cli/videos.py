"""A video in, frame by frame, and the folder that takes what is made of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from ..errors import HowYouSeeMeError
from ..files import PHOTOS, identities, spare
from .photos import make_folder
from .program import Named, complain

if TYPE_CHECKING:
    from ..video import FrameWriter, Video, VideoWriter

T = TypeVar("T")

video_argument = click.argument(
    "source", metavar="VIDEO|FOLDER|webcam", type=Named("a video, a folder of frames, or a webcam")
)


def refuse_photo(source: str) -> None:
    """Stop where a picture was given."""
    if Path(source).suffix.lower() in PHOTOS and Path(source).is_file():
        raise click.UsageError(f"{source} is a picture: give a video, or a folder of frames.")


def table_in(out: Path, source: str, kind: str = "") -> Path:
    """Where the table of a video goes."""
    return out / f"{_name(source)}{kind}.csv"


def writer_in(
    out: Path, source: str, kind: str, rate: float | None, table: Path, columns: Sequence[str]
) -> FrameWriter | VideoWriter:
    """What takes the frames made of a source, the folder being made: frames of a folder, else a video.

    It stops where the video itself would be replaced, or a table that has other columns.
    """
    from ..video import FrameWriter, VideoWriter  # noqa: PLC0415

    picture: FrameWriter | VideoWriter = (
        FrameWriter(out / f"{_name(source)}{kind}")
        if Path(source).is_dir()
        else VideoWriter(out / f"{_name(source)}{kind}.mp4", rate or 25)
    )
    spare(identities([source]), [picture.path])
    if not _ours(table, columns):
        by = kind.lstrip(".")
        raise click.UsageError(
            f"{table} is there already and was not made by {by}; name another folder (--out)."
        )
    make_folder(out)
    return picture


def go_through(
    steps: Iterable[T],
    video: Video,
    label: str,
    note: Callable[[T], None],
    finish: Callable[[], None],
    every: int = 1,
) -> None:
    """`note` each step through a video, under a progress bar; `finish` when they end, however that is.

    What ends them early is told, and the program ends with status 1. If it is before the first one, it
    is raised: nothing was made then.
    """
    begun, problem = False, None
    length = None if video.count is None else -(-video.count // every)
    bar = (
        click.progressbar(steps, length=length, label=label, file=sys.stderr)
        if sys.stderr.isatty()
        else nullcontext(steps)
    )
    try:
        with bar as going:
            for step in going:
                begun = True
                note(step)
    except HowYouSeeMeError as error:  # what came before it is written
        if not begun:
            raise
        problem = error
    finally:
        if begun:
            finish()
    if problem is not None:
        complain(None, problem)
        sys.exit(1)


def _name(source: str) -> str:
    """That of the files which are made of a source."""
    from ..video import is_webcam  # noqa: PLC0415

    if is_webcam(source) and not Path(source).is_dir():
        return source.replace(":", "-")
    path = Path(os.path.abspath(source))  # `.` has a name too
    return path.name if path.is_dir() else path.stem


def _ours(table: Path, columns: Sequence[str]) -> bool:
    """Whether a table is missing, has these columns, or is empty, as it may have been ended there."""
    if not table.exists():
        return True
    header = ",".join(columns).encode()
    with table.open("rb") as file:
        found = file.read(len(header))
    return found in {header, b""}
