"""Boxes of objects from the files that people have: CSV, COCO, Pascal VOC."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from ..errors import InputError
from ..models import Network
from ..numbers import plain
from ..regions import Box

__all__ = ["Annotation", "Annotations", "read_boxes"]

#: By the name of an image's file, rows of class, x0, y0, x1, y1.
Rows = Mapping[str, Sequence[Sequence[Any]]]

_CSV = ("file", "class", "x0", "y0", "x1", "y1")
_VOC = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Annotation:
    """One annotated object in an image.

    >>> box = read_boxes("boxes.csv", load_model()).of["cat.jpg"][0]
    >>> box.target, box.corners, box.where
    (281, (30.0, 23.0, 165.0, 182.0), 'boxes.csv, line 2')

    - `target`: its class, an index;
    - `corners`: x0, y0, x1, y1 in pixels of the image, x1 and y1 exclusive;
    - `where`: the file and the line or object that it is from;
    - `size`: the width and height that the file gives for the image, None where it gives none.
    """

    target: int
    corners: Box
    where: str
    size: tuple[int, int] | None = None


@dataclass
class Annotations:
    """What `read_boxes` returns: the boxes by the image's file name, and what could not be used.

    >>> boxes = read_boxes("boxes.csv", load_model())
    >>> boxes.of["cat.jpg"], boxes.problems

    `problems` are sentences for the user, each naming the file and the line or object.
    """

    of: dict[str, list[Annotation]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_boxes(given: str | Path | Rows, network: Network) -> Annotations:
    """The boxes in a file or folder, or in rows, their classes being those of the network.

    >>> boxes = read_boxes("boxes.csv", load_model())
    >>> boxes.of["cat.jpg"][0].corners
    (30.0, 23.0, 165.0, 182.0)

    Args:
        given: rows of class, x0, y0, x1, y1 by the name of the image's file; or the path of one of
            a `.csv` file with the columns file, class, x0, y0, x1, y1, others being ignored;
            a `.json` file of COCO (images, annotations with a bbox x, y, width, height, categories),
            without those of crowds (iscrowd: 1), whose boxes are around many objects;
            a folder of Pascal VOC's `.xml` files, whose corners count from 1 and belong to the box.
        network: a class is the network's index, or one of its class names, whole, in any case. The
            categories of COCO go by name; by id only where the network has no class names.

    Files are known by their names alone, without folders. A line that can't be used is left out and
    told in `problems`.

    Raises:
        InputError: there is no such file, or it is none of these as a whole.
    """
    if isinstance(given, Mapping):
        return _usable(_rows(given), network, "the boxes")
    path = Path(given)
    if path.is_dir():
        lines = _voc(path)
    elif not path.is_file():
        raise InputError(f"There is no file or folder with boxes at {path}.")
    elif path.suffix.lower() == ".csv":
        lines = _csv(path)
    elif path.suffix.lower() == ".json":
        lines = _coco(path)
    else:
        raise InputError(
            f"{path} is no file with boxes: give a .csv file, COCO's .json, or a folder of Pascal VOC's .xml."
        )
    found = _usable(lines, network, str(path))
    if not found.of and not found.problems:
        raise InputError(f"There is no box in {path}.")
    return found


def _usable(lines: _Lines, network: Network, source: str) -> Annotations:
    """The boxes of lines that can be used, and what is wrong with the others."""
    found = Annotations()
    unknown: Counter[str] = Counter()  # how often a class can't be used, by the reason
    for line in lines:
        if isinstance(line, str):
            found.problems.append(line)
            continue
        try:
            target = _class(line, network)
        except InputError as error:
            unknown[str(error)] += 1
            continue
        file = PurePosixPath(line.file.replace("\\", "/")).name
        problem = _wrong(line.corners) if file else "it names no image."
        if problem:
            found.problems.append(f"{line.where}: {problem}")
            continue
        found.of.setdefault(file, []).append(
            Annotation(target, line.corners, line.where, line.size)
        )
    found.problems += [
        f"{source}: {count} box(es) left out: {reason}" for reason, count in unknown.items()
    ]
    return found


# -- formats: each yields lines, or a sentence about a line that can't be read ----------------------


@dataclass(frozen=True)
class _Line:
    where: str
    file: str
    name: str  # the class as it is written; '' where only the id is known
    corners: Box
    id: int | None = None  # of a COCO category
    size: tuple[int, int] | None = None


_Lines = Iterator[_Line | str]


def _rows(given: Rows) -> _Lines:
    for file, rows in given.items():
        where = f"the boxes of {file}"
        for row in rows:
            try:
                target, *corners = row
                yield _Line(where, file, str(plain(target)), _four(corners))
            except (ValueError, TypeError):
                yield f"{where}: {row!r} is no class with x0, y0, x1 and y1."


def _csv(path: Path) -> _Lines:
    # Spreadsheets put a mark at the beginning of UTF-8.
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        missing = [name for name in _CSV if name not in names]
        if missing:
            raise InputError(
                f"{path} has no column {', '.join(missing)}: its first line names the columns, "
                f"{', '.join(_CSV)}, with commas between."
            )
        reader.fieldnames = names
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            try:
                yield _Line(
                    where, row["file"].strip(), row["class"].strip(), _four(map(row.get, _CSV[2:]))
                )
            except (ValueError, TypeError, AttributeError):
                yield f"{where}: x0, y0, x1 and y1 are not four numbers, or a field is missing."


def _coco(path: Path) -> _Lines:
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        names = {one["id"]: str(one.get("name", "")) for one in content.get("categories", ())}
        annotations = list(content["annotations"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no COCO file, which has images, annotations and categories: "
            f"{type(error).__name__}, {error}."
        ) from error
    for position, one in enumerate(annotations):
        if isinstance(one, dict) and one.get("iscrowd") == 1:
            continue
        where = (
            f"{path}, annotation {one.get('id', position) if isinstance(one, dict) else position}"
        )
        try:
            image = images[one["image_id"]]
            x, y, wide, tall = _four(one["bbox"])
            yield _Line(
                where,
                str(image["file_name"]),
                names.get(one["category_id"], ""),
                (x, y, x + wide, y + tall),
                int(one["category_id"]),
                _size(image.get("width"), image.get("height")),
            )
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            yield f"{where}: it has no usable image, bbox or category ({type(error).__name__}: {error})."


def _voc(folder: Path) -> _Lines:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".xml")
    if not files:
        raise InputError(f"There is no .xml file of Pascal VOC in the folder {folder}.")
    for path in files:
        try:
            root = ElementTree.fromstring(path.read_bytes())
        except (ElementTree.ParseError, OSError) as error:
            yield f"{path}: it can't be read as XML ({error})."
            continue
        file = root.findtext("filename", "").strip()
        size = _size(root.findtext("size/width"), root.findtext("size/height"))
        for number, one in enumerate(root.iterfind("object"), start=1):
            where = f"{path}, object {number}"
            try:
                x0, y0, x1, y1 = _four(one.findtext(f"bndbox/{name}") for name in _VOC)
            except (ValueError, TypeError):
                yield f"{where}: its bndbox has not four numbers, {', '.join(_VOC)}."
                continue
            name = one.findtext("name", "").strip()
            yield _Line(where, file, name, (x0 - 1, y0 - 1, x1, y1), size=size)


# -- what the lines mean --------------------------------------------------------------------------


def _class(line: _Line, network: Network) -> int:
    """The network's index of the line's class."""
    if network.classes is None:
        if line.id is not None:
            return network.class_index(line.id)
        if line.name.isdecimal():
            return network.class_index(int(line.name))
        raise InputError(f"{network.name} has no class names, so {line.name!r} must be an index.")
    named = network.class_named(line.name)
    if named is not None:
        return named
    if line.name.isdecimal() and line.id is None:
        return network.class_index(int(line.name))
    shown = repr(line.name) if line.name else f"with the id {line.id}"
    raise InputError(f"{network.name} has no class {shown}.")


def _wrong(corners: Sequence[float]) -> str:
    x0, y0, x1, y1 = corners
    if not all(map(math.isfinite, corners)):
        return "a corner is not a finite number."
    if x1 <= x0 or y1 <= y0:
        return f"the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) has no area."
    return ""


def _four(items: Iterable[Any]) -> Box:
    a, b, c, d = map(float, items)
    return a, b, c, d


def _size(width: Any, height: Any) -> tuple[int, int] | None:
    try:
        size = int(width), int(height)
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None
