"""Files out: whole or not at all, and never over a file that is read."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError

__all__ = ["EXPLANATIONS", "PHOTOS", "VIDEOS", "identities", "is_address", "spare", "write"]

#: How the names of files end that are taken as photos.
PHOTOS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

#: How the names of videos end, for those who give one where a photo is wanted.
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})

#: How the names of the files end that an explanation is saved as.
EXPLANATIONS = frozenset({".json", ".npz", ".png"})


def is_address(source: str) -> bool:
    """Whether it is one of the web, or the like, and no path.

    >>> is_address("https://example.org/cat.jpg"), is_address("C:/cat.jpg")
    (True, False)
    """
    return re.match("[a-z][a-z0-9+.-]*://", source, re.IGNORECASE) is not None


def write(path: Path, content: bytes) -> None:
    """All of the file or, if interrupted, none of it.

    >>> write(Path("out/photo.png"), picture)

    Raises:
        InputError: a folder is there.
    """
    if path.is_dir():
        raise InputError(
            f"{path} is a folder, and a file is to be there; move it away, or name another."
        )
    path = path.resolve()  # a link stays one
    # Not named after the file, whose name may be as long as names can be.
    unfinished = path.with_name(f".{secrets.token_hex(8)}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def identities(paths: Iterable[str | Path]) -> frozenset[tuple[int, int]]:
    """What tells the files from all others, by whatever names they go; those that are missing have none.

    >>> identities(["photo.jpg"]) == identities(["./photo.jpg"])
    True
    """
    found = set()
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def spare(read: frozenset[tuple[int, int]], written: Iterable[Path]) -> None:
    """See that no file that is to be written is one of those that are read, told by `identities`.

    >>> spare(identities(["photo.png"]), [Path("out/photo.png")])

    Raises:
        InputError: one is.
    """
    for path in written:
        if identities([path]) & read:
            raise InputError(f"{path} is read, and would be replaced; name another folder (--out).")
