"""Boxes from a classifier: howyouseeme beside Grad-CAM, Layer-CAM, published boxes and a constant one."""

from __future__ import annotations

import csv
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import quality
from harness import OURS, SIDES, Method, Row, Setup, share, table

import howyouseeme as hysm
from howyouseeme import evaluate, localize

NETWORKS = ("efficientnet-lite0", "efficientnet-lite2", "squeezenet")
PUBLISHED = "CNN Fixations as published, "
#: The thresholds that ours is tried at, as many as the peers'.
LEVELS = np.linspace(0.05, 0.95, len(evaluate.THRESHOLDS)).tolist()
#: Sides of the constant box, as shares of the image's.
CENTRED = np.linspace(0.5, 1, 21)


@functools.cache
def images(data: Path) -> dict[str, tuple[int, np.ndarray]]:
    """By file, the class and its true boxes [n, 4] in pixels of the image."""
    found: dict[str, tuple[int, list[list[float]]]] = {}
    with (data / "boxes.csv").open() as file:
        for row in csv.DictReader(file):
            boxes = found.setdefault(row["file"], (int(row["class"]), []))[1]
            boxes.append([float(row[side]) for side in SIDES])
    return {name: (target, np.array(boxes)) for name, (target, boxes) in found.items()}


@functools.cache
def sizes(data: Path) -> dict[str, tuple[int, int]]:
    """By file, width and height."""
    return {name: hysm.load_image(data / "images" / name).size for name in images(data)}


def published(data: Path) -> dict[str, dict[str, list[float]]]:
    """By network and file, the box that the authors of CNN Fixations published."""
    path = data / "cnn_fixations_boxes.csv"
    found: dict[str, dict[str, list[float]]] = {}
    if path.is_file():
        with path.open() as file:
            for row in csv.DictReader(file):
                box = [float(row[side]) for side in SIDES]
                found.setdefault(row["network"], {})[row["file"]] = box
    return found


class Subject:
    """One network on the images, and the methods that are measured with it."""

    def __init__(self, network: str, data: Path) -> None:
        self.data, self.tested = data, quality.SUBJECTS[network]()
        self.explainer = hysm.Explainer(self.tested.module)
        networks = quality.section("networks")
        self.methods = {
            OURS: Method(
                self.ours,
                (Subject.ours, Subject.given, networks, str(LEVELS)),
                ours=True,
                aside=harness.VIDEO,
            ),
            "Grad-CAM": self.peer("GradCAM", "last_conv"),
            "Layer-CAM": self.peer("LayerCAM", "last"),
        }

    def given(self, name: str) -> tuple[Any, int, np.ndarray]:
        """The input, the class, and the true boxes in pixels of the input."""
        photo = hysm.load_image(self.data / "images" / name)
        target, boxes = images(self.data)[name]
        scale = self.tested.size / np.array([*photo.size, *photo.size])
        return self.tested.prepare(photo), target, boxes * scale

    def ours(self, name: str) -> Row:
        """Overlaps at all levels; our first box at the default one, and what it took."""
        given, target, truth = self.given(name)
        right = int(self.tested.predict(given[None])[0].argmax()) == target
        start = time.process_time()
        explanation = self.explainer(given[None], target=target)
        default = explanation.boxes()[0]
        seconds = time.process_time() - start
        heat = localize.object_of(explanation)
        found = [localize.regions(heat, level) for level in LEVELS]
        first = [regions[0][1] for regions in found if regions]
        width, height = sizes(self.data)[name]
        scale = np.array([width, height, width, height]) / self.tested.size
        return {
            "right": right,
            "overlaps": [
                float(evaluate.intersection_over_union(box, truth).max()) for box in first
            ],
            "box": (np.array(default[0].box) * scale).tolist() if default else None,
            "seconds": seconds,
        }

    def peer(self, name: str, layer: str) -> Method:
        explain = quality.cam(self.tested, name, layer)

        def measure(item: str) -> Row:
            given, target, truth = self.given(item)
            return {"overlaps": evaluate.box_ious(explain(given, target), truth).tolist()}

        made_of = (Subject.peer, Subject.given, quality.cam, quality.section("networks"))
        return Method(measure, (*made_of, evaluate.box_ious))


def best(data: Path, box: Sequence[float] | None, name: str) -> float:
    """The overlap of a box in pixels of the image with the best true one."""
    return (
        0.0
        if box is None
        else float(evaluate.intersection_over_union(box, images(data)[name][1]).max())
    )


def part(setup: Setup, data: Path, network: str, names: Sequence[str]) -> str:
    """A network's part: every method on the same images."""
    found = harness.measured(setup, f"detection/{network}", Subject(network, data).methods, names)
    order = list(images(data))
    odd = np.array([order.index(name) % 2 == 1 for name in names])
    # Where only one half is measured, every second image of it.
    half = odd if 0 < odd.sum() < len(odd) else np.arange(len(odd)) % 2 == 1
    covered = np.array(
        [evaluate.inside(images(data)[name][1], sizes(data)[name][::-1]).mean() for name in names]
    )
    ours = list(found[OURS].values())
    right = np.array([row["right"] for row in ours])
    centred = [
        [
            best(
                data,
                np.array([1 - side, 1 - side, 1 + side, 1 + side]) / 2 * (sizes(data)[name] * 2),
                name,
            )
            for side in CENTRED
        ]
        for name in names
    ]
    hits = {
        name: evaluate.box_hits([row["overlaps"] for row in rows.values()], half=half)
        for name, rows in found.items()
    }
    ious = np.array([best(data, row["box"], name) for name, row in zip(names, ours, strict=True)])
    hits[f"{OURS}, default level {localize.THRESHOLD:g}"] = ious >= 0.5
    hits["constant box in the centre"] = evaluate.box_hits(centred, half=half)
    rows = [
        [
            label,
            share(hit),
            share(hit[covered < 0.25]),
            share(hit[covered < 0.1]),
            share(hit & right),
        ]
        for label, hit in hits.items()
    ]
    for label, boxes in published(data).items():
        hit = np.array([best(data, boxes.get(name), name) for name in names]) >= 0.5
        rows.append(
            [
                PUBLISHED + label,
                share(hit),
                share(hit[covered < 0.25]),
                share(hit[covered < 0.1]),
                "",
            ]
        )
    cases = [
        harness.Case(
            float(iou), data / "images" / name, np.array(row["box"] or []), images(data)[name][1]
        )
        for iou, name, row in zip(ious, names, ours, strict=True)
    ]
    harness.save_cases(setup, f"detection-{network}", cases)
    columns = ["", "IoU ≥ .5, class given", "objects < 25 %", "< 10 %", "top-1 localisation"]
    return f"""### {network}

{len(names)} images ({right.mean():.3f} with the right class), {(covered < 0.25).sum()} with objects below a quarter of the image,
{(covered < 0.1).sum()} below a tenth. Explaining and boxes: {np.median([row["seconds"] for row in ours]):.2f} s of CPU.

{table(columns, rows)}
"""


ABOUT = """\
## Detection

Images of the ILSVRC 2012 validation set; the class is given, right or wrong as the network's own answer may be; an image is hit
where the box has an IoU of .5 with a true box of that class. Means with their 95 % interval. Of every method the threshold (of the
centred box the size) is chosen on one half of the images and scored on the other; the row of the default level has that of the
package, which was chosen on every second image of the set. *Objects < 25 %*: the true boxes cover less than a
quarter of the image. *Top-1 localisation*: hit, and the network's answer is right. Grad-CAM at the last convolution, Layer-CAM at the last
feature map, the box around the largest region above the threshold, as in `quality.md`. CNN Fixations' boxes are for the answers of
other networks, and not chosen by us.

"""


def section(setup: Setup) -> str:
    """The page's part."""
    data = setup.data / "ilsvrc-val-dev"
    names = setup.some(sorted(images(data)))[: setup.images]
    return ABOUT + "\n".join(part(setup, data, network, names) for network in NETWORKS)
