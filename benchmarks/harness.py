"""What the benchmarks of applications share: what is measured, rows that outlive a broken run, tables, cases."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import quality
from PIL import Image, ImageDraw

import howyouseeme as hysm
from howyouseeme import evaluate

#: What a method made of one image, frame or video, ready for JSON.
Row = dict[str, Any]

OURS = "**howyouseeme**"
SIDES = ("x0", "y0", "x1", "y1")

#: What only tracking stands on.
VIDEO = frozenset({"track.py", "video.py"})


@dataclass(frozen=True)
class Setup:
    """What is measured.

    - `data`: the folder with `ilsvrc-val-dev` and `davis2016-dev`;
    - `out`: where rows and pictures are kept between runs;
    - `images`: so many images at most; `half`: all of them and of the videos, or every second.
    """

    data: Path
    out: Path
    images: int
    half: str

    def some(self, items: Sequence[str]) -> list[str]:
        """Those of a half, so that what was chosen on one half can be confirmed on the other."""
        return list(items) if self.half == "all" else list(items)[int(self.half) :: 2]


@dataclass(frozen=True)
class Method:
    """`measure` makes a row of an item's name; rows are dropped when the source of one of `made_of` changes,
    or, of `ours`, anything in the package that could matter: all but what is `aside`."""

    measure: Callable[[str], Row]
    made_of: tuple[Any, ...]
    ours: bool = False
    aside: frozenset[str] = frozenset()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in self.made_of:
            digest.update((part if isinstance(part, str) else inspect.getsource(part)).encode())
        if self.ours:
            package = Path(hysm.__file__).parent
            aside = self.aside | {"evaluate", "models", "web", "cli", "draw.py", "__init__.py"}
            for path in sorted(package.rglob("*.py")):
                if path.relative_to(package).parts[0] not in aside:
                    digest.update(path.read_bytes())
        for name in ("torch", "numpy", "opencv-contrib-python-headless", "grad-cam"):
            digest.update(str(quality.installed(name)).encode())
        return digest.hexdigest()[:16]


def measured(
    setup: Setup, task: str, methods: Mapping[str, Method], items: Sequence[str]
) -> dict[str, dict[str, Row]]:
    """The rows of each method, by item; those that a run before this one made are not made again."""
    kept = {
        name: quality.Scores(
            setup.out / task / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json",
            method.fingerprint(),
        )
        for name, method in methods.items()
    }
    with click.progressbar(items, label=task) as bar:
        for item in bar:
            for name, method in methods.items():
                kept[name].get(item, lambda method=method, item=item: method.measure(item))
    return {name: {item: rows.found[item] for item in items} for name, rows in kept.items()}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(values: Any) -> str:
    """A mean with its 95 % interval: .733 (.66 to .80)"""
    if not len(values):
        return "-"
    mean, low, high = evaluate.bootstrap(values)
    return f"{mean:.3f} ({low:.2f} to {high:.2f})"


@dataclass(frozen=True)
class Case:
    """A picture to look at: its file, our boxes and the true ones [n, 4], and how well they agree."""

    score: float
    file: Path
    boxes: np.ndarray
    truth: np.ndarray


def save_cases(setup: Setup, task: str, cases: Sequence[Case], each: int = 3) -> None:
    """Pictures of the best, the median and the worst cases, in rows: truth in green, ours in yellow."""
    ranked = sorted(cases, key=lambda case: -case.score)
    middle = max(0, (len(ranked) - each) // 2)
    rows = [ranked[:each], ranked[middle : middle + each], ranked[-each:]]
    side = 240
    page = Image.new("RGB", (side * each, side * len(rows)))
    for y, row in enumerate(rows):
        for x, case in enumerate(row):
            picture = hysm.load_image(case.file)
            pen = ImageDraw.Draw(picture)
            line = max(2, min(picture.size) // 100)
            for boxes, colour in ((case.boxes, "yellow"), (case.truth, "lime")):
                for box in np.asarray(boxes).reshape(-1, 4).round():
                    pen.rectangle([*box[:2], *np.maximum(box[2:] - 1, box[:2])], None, colour, line)
            picture.thumbnail((side, side))
            page.paste(picture, (x * side, y * side))
            ImageDraw.Draw(page).text((x * side + 4, y * side + 4), f"{case.score:.2f}", "white")
    setup.out.mkdir(parents=True, exist_ok=True)
    page.save(setup.out / f"{task}.png")
