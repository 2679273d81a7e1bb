"""What is worth looking at: howyouseeme beside OpenCV's selective search and saliency, and a fixed grid."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import detection
import harness
import numpy as np
from harness import OURS, Method, Row, Setup, share, table
from PIL import Image

import howyouseeme as hysm
from howyouseeme.evaluate import intersection_over_union
from howyouseeme.propose import Proposer

MODEL = "efficientnet-lite0"
COUNTS = (1, 10, 100)


def grid(*parts: tuple[tuple[float, float], tuple[int, int]], side: float) -> np.ndarray:
    """Boxes of some (width, height), so many of them across and down, evenly spread: [n, 4]"""
    found = []
    for (width, height), (across, down) in parts:
        xs = np.linspace(0, 1 - width, across) if across > 1 else [(1 - width) / 2]
        ys = np.linspace(0, 1 - height, down) if down > 1 else [(1 - height) / 2]
        found += [(x, y, x + width, y + height) for y in ys for x in xs]
    return np.array(found) * side


def fixed_grids(side: float) -> dict[int, np.ndarray]:
    """The grid that was best of some tried for each number of boxes."""
    centre = ((0.8, 0.8), (1, 1))
    many = [
        ((0.6, 0.6), (3, 3)),
        ((0.4, 0.4), (4, 4)),
        ((0.25, 0.25), (6, 6)),
        ((0.3, 0.6), (5, 3)),
    ]
    more = [
        ((0.6, 0.3), (3, 5)),
        ((0.5, 0.9), (2, 1)),
        ((0.9, 0.5), (1, 2)),
        ((0.15, 0.15), (2, 2)),
    ]
    return {
        1: grid(centre, side=side),
        10: grid(((0.85, 0.85), (1, 1)), ((0.55, 0.55), (3, 3)), side=side),
        100: grid(centre, *many, *more, side=side),
    }


def selective_search(image: np.ndarray) -> np.ndarray:
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[..., ::-1]))
    search.switchToSelectiveSearchFast()
    boxes = search.process()[:100].astype(float)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def timed(propose: Callable[[np.ndarray], np.ndarray], file: Path) -> Row:
    """Boxes [n, 4], best first, and what they took."""
    image = np.asarray(hysm.load_image(file))
    start = time.process_time()
    boxes = propose(image)
    return {"boxes": np.round(boxes, 2).tolist(), "seconds": time.process_time() - start}


def section(setup: Setup) -> str:
    """The page's part."""
    folder = setup.data / "ilsvrc-val-dev"
    known = detection.images(folder)
    proposer = Proposer(MODEL)
    files = setup.some(sorted(known))[: setup.images]

    def ours(image: np.ndarray) -> np.ndarray:
        return np.array([region.box for region in proposer(image).regions])

    def method(propose: Callable[[np.ndarray], np.ndarray]) -> Method:
        return Method(
            lambda item: timed(propose, folder / "images" / item),
            (propose, timed),
            propose is ours,
            harness.VIDEO,
        )

    methods = {OURS: method(ours), "OpenCV selective search (fast)": method(selective_search)}
    found = harness.measured(setup, "proposals", methods, files)
    hits: dict[str, dict[int, list[bool]]] = {
        name: defaultdict(list) for name in (*methods, "fixed grid")
    }
    cases = []
    for file in files:
        boxes = {
            name: dict.fromkeys(COUNTS, np.array(rows[file]["boxes"]))
            for name, rows in found.items()
        }
        boxes["fixed grid"] = fixed_grids(float(hysm.load_image(folder / "images" / file).height))
        for true in known[file][1]:
            for name, by_count in boxes.items():
                for most in COUNTS:
                    best = intersection_over_union(true, by_count[most][:most]).max()
                    hits[name][most].append(best >= 0.5)
                    if most == 10 and name == OURS:
                        cases.append(
                            harness.Case(
                                float(best), folder / "images" / file, by_count[most][:10], true
                            )
                        )
    harness.save_cases(setup, "proposals", cases)
    rows = []
    for name, by_count in hits.items():
        seconds = [row["seconds"] for row in found.get(name, {}).values()]
        spent = f"{np.median(seconds):.2f}" if seconds else "0"
        rows.append([name, *(share(by_count[most]) for most in COUNTS), spent])
    return f"""## Proposals: boxes

The share of the {len(cases)} true boxes of {len(files)} images of the ILSVRC 2012 validation set that have an IoU of 0.5 or more
with one of the first 1, 10 or 100 proposals, by {MODEL}; with the 95 % interval over boxes. Objects of a class that is not the
image's count too. The fixed grid is another for each number: the best of some that were tried on these images.

{table(["method", "recall at 1", "at 10", "at 100", "CPU seconds an image"], rows)}

{saliency(setup, proposer)}"""


def spectral_residual(image: np.ndarray) -> np.ndarray:
    _, found = cv2.saliency.StaticSaliencySpectralResidual_create().computeSaliency(
        image[..., ::-1]
    )
    return found


def fine_grained(image: np.ndarray) -> np.ndarray:
    _, found = cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(image[..., ::-1])
    return found


def f_beta(found: np.ndarray, mask: np.ndarray) -> float:
    shared = (found & mask).sum()
    precision, recall = shared / max(found.sum(), 1), shared / mask.sum()
    return 1.3 * precision * recall / max(0.3 * precision + recall, 1e-12)


def best_f_beta(heat: np.ndarray, mask: np.ndarray) -> float:
    return max(f_beta(heat >= level, mask) for level in np.linspace(0.05, 1, 20))


def saliency(setup: Setup, proposer: Proposer) -> str:
    """The part about maps."""
    data = setup.data / "davis2016-dev"

    def ours(image: np.ndarray) -> np.ndarray:
        return proposer(image, 1).saliency

    def nothing(image: np.ndarray) -> np.ndarray:
        return np.zeros(image.shape[:2])

    def method(see: Callable[[np.ndarray], np.ndarray]) -> Method:
        return Method(
            lambda item: agreement(see, data / item),
            (see, agreement, f_beta, best_f_beta),
            see is ours,
            harness.VIDEO,
        )

    methods = {
        OURS: method(ours),
        "OpenCV spectral residual": method(spectral_residual),
        "OpenCV fine-grained": method(fine_grained),
        "nothing (all 0)": method(nothing),
    }
    frames = [
        str(file.relative_to(data))
        for sequence in setup.some(sorted(path.name for path in data.iterdir()))
        for file in sorted((data / sequence / "frames").iterdir())[::10]
        if (np.asarray(Image.open(mask_of(file))) > 0).any()
    ]
    found = harness.measured(setup, "saliency", methods, frames)
    rows = [
        [name, *(share([row[what] for row in made.values()]) for what in ("f", "best", "mae"))]
        for name, made in found.items()
    ]
    return f"""## Proposals: saliency

Every tenth frame of DAVIS 2016's sequences ({len(frames)} frames) against its mask. F-beta with beta squared .3, at twice
the map's mean as usual, and at the best of 20 thresholds of each image; mean absolute error (MAE, less is better) of the map, its
maximum being 1. An empty map has a low MAE since targets are small; at twice its mean, all of the frame is taken.

{table(["method", "F-beta", "best F-beta", "MAE"], rows)}
"""


def mask_of(frame: Path) -> Path:
    return frame.parents[1] / "masks" / f"{frame.stem}.png"


def agreement(see: Callable[[np.ndarray], np.ndarray], frame: Path) -> Row:
    """How well a map agrees with the frame's mask."""
    mask = np.asarray(Image.open(mask_of(frame))) > 0
    heat = np.asarray(see(np.ascontiguousarray(hysm.load_image(frame))), dtype=np.float64)
    heat = heat / max(heat.max(), 1e-12)
    return {
        "f": float(f_beta(heat >= min(1, 2 * heat.mean()), mask)),
        "best": float(best_f_beta(heat, mask)),
        "mae": float(np.abs(heat - mask).mean()),
    }
