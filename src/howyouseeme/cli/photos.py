"""Photos in, one after the other, and the folder that takes what is made of them."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..files import PHOTOS, identities, spare
from .program import Named, complain, reason, tell

_LONGEST_NAME = 180

#: The folder for what is made, where no other is named.
_OUT = "howyouseeme-out"

photos_argument = click.argument(
    "photos",
    nargs=-1,
    type=Named("a photo or a folder", path_type=Path),
    metavar="PHOTO|FOLDER...",
)


def _take_larger(_: click.Context, __: click.Parameter, value: int | None) -> None:
    if value is not None:
        from PIL import Image  # noqa: PLC0415

        Image.MAX_IMAGE_PIXELS = value  # of this process, which is ours


max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    metavar="N",
    expose_value=False,
    callback=_take_larger,
    help="Take photos of up to N pixels, instead of some 90 million.",
)


def out_option(content: str = "the pictures") -> Callable[[Callable[..., Any]], Any]:
    return click.option(
        "--out",
        default=_OUT,
        show_default=True,
        type=Named("a folder", file_okay=False, writable=True, path_type=Path),
        help=f"Folder for {content}; made if it is missing. Files of the same name in it are "
        "replaced, but none that is read.",
    )


class Note(str):
    """A line for the error output."""

    __slots__ = ()


def for_each(files: Sequence[Path], work: Callable[[Path, str], Iterable[str]]) -> None:
    """Do the work for each file, given a name for its results; print the lines that it yields.

    What fails is told, the others go on, and the program ends with status 1.
    """
    failed = 0
    with _progress(len(files)) as (step, clear):
        for file, name in zip(files, _output_names(files), strict=True):
            tell(f"{file} ...")
            lines: list[str] = []
            problem = None
            try:
                for line in work(file, name):
                    lines.append(line)
            except Exception as error:  # the other photos are not to suffer from this one
                problem = error
            clear()
            if problem is not None:
                failed += 1
                complain(file, problem)
            for line in sorted(lines, key=lambda line: isinstance(line, Note)):
                click.echo(line, err=isinstance(line, Note))
            step()
    if failed:
        click.echo(f"{failed} of {len(files)} failed", err=True)
        sys.exit(1)


def find_photos(given: Sequence[Path], out: Path | None = None) -> list[Path]:
    """The files that are meant, each once, in the order given; a folder stands for its photos.

    One that has none stands for those of its subfolders, as data sets have one for each class, but not for
    what lies in `out`, or where it would by default.
    """
    made = [folder.resolve() for folder in (out, Path(_OUT)) if folder is not None]
    if not given:
        raise click.UsageError("Name at least one photo or folder.")
    found: dict[str, Path] = {}
    for path in given:
        files = [path]
        if path.is_dir():
            try:
                inside = _seen(path.iterdir(), path)
                files = _photos(inside) or [
                    file
                    for file in _photos(_seen(path.rglob("*"), path))
                    if not any(file.resolve().is_relative_to(folder) for folder in made)
                ]
            except OSError as error:
                raise click.UsageError(f"{path}: {reason(error)}.") from error
            known = " ".join(sorted(PHOTOS))
            heic = any(one.suffix.lower() in {".heic", ".heif"} for one in inside)
            hint = "; convert .heic to .jpg" if heic else ""
            if not files:
                raise click.UsageError(
                    f"There is no photo in the folder {path}, nor in those inside ({known}){hint}."
                )
            if files[0].parent != path:
                count = len({file.parent for file in files})
                click.echo(f"{path}: {len(files)} photos in {count} subfolders", err=True)
            elif len(files) < len(inside):
                skipped = f"{len(inside) - len(files)} of {len(inside)} skipped"
                read = f"read are files that end in {known}, not subfolders"
                click.echo(f"{path}: {skipped}; {read}{hint}", err=True)
        for file in files:
            found.setdefault(os.path.realpath(file), file)  # which a loop of links has, too
    return list(found.values())


def _seen(paths: Iterable[Path], folder: Path) -> list[Path]:
    """In their order, those that are not hidden."""
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _photos(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in PHOTOS and not path.is_dir()]


def _output_names(files: Sequence[Path]) -> list[str]:
    """A name for the results of each file: its own, and what tells it from others of that name.

    That is the folder, if they are in several, and the suffix, if one folder has two of them.
    """
    # Without regard to case: on some systems X.png would overwrite x.png.
    alike: dict[str, list[str]] = defaultdict(list)
    for file in files:
        alike[_short(file.stem).casefold()].append(_folder(file))
    taken = {stem for stem, folders in alike.items() if len(folders) == 1}
    names = []
    for file in files:
        name = _short(file.stem)
        folders = alike[name.casefold()]
        if len(folders) > 1:
            apart = len(set(folders))
            parts = [
                os.path.basename(_folder(file)) if apart > 1 else "",
                name,
                file.suffix[1:].lower() if apart < len(folders) else "",
            ]
            base = name = _short("-".join(filter(None, parts)))
            number = 1
            while name.casefold() in taken:
                number += 1
                name = f"{base}-{number}"
            taken.add(name.casefold())
        names.append(name)
    return names


def _folder(file: Path) -> str:
    return os.path.dirname(os.path.realpath(file))


def _short(name: str) -> str:
    """A name that leaves room for what is appended to it: systems take some 255 bytes in all."""
    while len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[:-1]
    return name


def spare_photos(files: Sequence[Path], out: Path, ending: str) -> None:
    """Stop where the picture of a photo, named with this ending, would replace one of the photos."""
    spare(identities(files), [out / f"{name}{ending}" for name in _output_names(files)])


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"Can't make the folder {out}: {reason(error)}.") from error


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """How to move the bar on, and how to clear its line before another is printed."""
    if total <= 3 or not sys.stderr.isatty():
        yield lambda: None, lambda: None
        return
    with click.progressbar(length=total, label="Photos", file=sys.stderr) as bar:
        yield (
            lambda: bar.update(1),
            lambda: click.echo("\r\x1b[K", nl=False, err=True),
        )
