"""Tracking and saliency proposals, measured beside what people would use instead, in one run.

    python benchmarks/applications.py --out docs/benchmarks/applications.md

See README.md beside this file. A task is a function that returns a section of the page; `TASKS` lists
them. Pictures of the best, the median and the worst case of each go to out/, since the images may
not be redistributed.
"""

from __future__ import annotations

import csv
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

import howyouseeme as hysm
from howyouseeme.propose import Proposer
from howyouseeme.track import Tracker

ROOT = Path(__file__).resolve().parent.parent
MODEL = "efficientnet-lite0"


@dataclass(frozen=True)
class Setup:
    data: Path
    pictures: Path
    images: int
    half: str


def in_half(items: Sequence, half: str) -> list:
    """Every second item, so that what was chosen on one half can be confirmed on the other."""
    return list(items) if half == "all" else list(items)[int(half) :: 2]


def overlap(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 4] with boxes [n, 4] or one [4]"""
    low = np.maximum(boxes[:, :2], truth[..., :2])
    high = np.minimum(boxes[:, 2:], truth[..., 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (truth[..., 2:] - truth[..., :2]).prod(-1)
    return shared / (areas - shared)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- tracking ---------------------------------------------------------------------------------------

#: Takes the frames and the first box, returns the box of each frame [frames, 4]
Track = Callable[[list[np.ndarray], np.ndarray], np.ndarray]


def track_here(network: hysm.Network) -> Track:
    def run(frames: list[np.ndarray], box: np.ndarray) -> np.ndarray:
        tracker = Tracker(network)
        tracker.start(frames[0], box)
        found = [box]
        for frame in frames[1:]:
            seen = tracker(frame).box
            found.append(found[-1] if seen is None else np.array(seen))  # a lost one stays put
        return np.array(found)

    return run


def track_opencv(make: Callable) -> Track:
    def run(frames: list[np.ndarray], box: np.ndarray) -> np.ndarray:
        tracker = make()
        x0, y0, x1, y1 = (round(side) for side in box)
        tracker.init(np.ascontiguousarray(frames[0][..., ::-1]), (x0, y0, x1 - x0, y1 - y0))
        found = [box]
        for frame in frames[1:]:
            ok, (x, y, w, h) = tracker.update(np.ascontiguousarray(frame[..., ::-1]))
            found.append(np.array([x, y, x + w, y + h], float) if ok else found[-1])
        return np.array(found)

    return run


def track_constant(frames: list[np.ndarray], box: np.ndarray) -> np.ndarray:
    return np.repeat(box[None], len(frames), 0)


def track_correlation(frames: list[np.ndarray], box: np.ndarray) -> np.ndarray:
    """Normalised cross-correlation with the first frame's target, in twice the last box."""
    x0, y0, x1, y1 = (round(side) for side in box)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    template, (w, h) = grey[0][y0:y1, x0:x1], (x1 - x0, y1 - y0)
    found, at = [box], (x0, y0)
    for frame in grey[1:]:
        left, top = max(0, at[0] - w // 2), max(0, at[1] - h // 2)
        search = frame[top : at[1] + h + h // 2, left : at[0] + w + w // 2]
        if search.shape[0] >= h and search.shape[1] >= w:
            scores = cv2.matchTemplate(search, template, cv2.TM_CCOEFF_NORMED)
            y, x = np.unravel_index(scores.argmax(), scores.shape)
            at = (left + int(x), top + int(y))
        found.append(np.array([at[0], at[1], at[0] + w, at[1] + h], float))
    return np.array(found)


def speed(frames: int, seconds: float, cpu: float) -> tuple[str, str]:
    rate = frames / seconds
    return (f"{rate:.0f}" if rate < 1000 else "> 1000", f"{1000 * cpu / frames:.1f}")


def tracking(setup: Setup) -> str:
    data = setup.data / "davis2016-dev"
    network = hysm.load_model(MODEL)
    methods: dict[str, Track] = {
        f"**howyouseeme, {MODEL}**": track_here(network),
        "constant box": track_constant,
        "normalised cross-correlation": track_correlation,
        "OpenCV MIL": track_opencv(cv2.TrackerMIL_create),
        "OpenCV KCF": track_opencv(cv2.TrackerKCF_create),
        "OpenCV CSRT": track_opencv(cv2.TrackerCSRT_create),
    }
    scores: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)
    cases, count = [], 0
    sequences = in_half(sorted(path.name for path in data.iterdir()), setup.half)
    for sequence in click_bar(sequences, "Tracking"):
        files = sorted((data / sequence / "frames").iterdir())
        frames = [np.asarray(hysm.load_image(file)) for file in files]
        with (data / sequence / "boxes.csv").open() as file:
            rows = list(csv.DictReader(file))
        truth = np.array([[float(row[side] or "nan") for side in SIDES] for row in rows])
        seen = ~np.isnan(truth[:, 0])
        seen[0] = False  # it is given
        height, width = frames[0].shape[:2]
        count += len(frames) - 1
        for name, method in methods.items():
            start, worked = time.perf_counter(), time.process_time()
            boxes = method(frames, truth[0])
            spent[name] += time.perf_counter() - start
            cpu[name] += time.process_time() - worked
            boxes = boxes.clip(0, [width, height, width, height])
            ious = overlap(boxes[seen], truth[seen])
            centres = (boxes[seen].reshape(-1, 2, 2) - truth[seen].reshape(-1, 2, 2)).mean(1)
            success = np.mean([(ious > level).mean() for level in np.linspace(0, 1, 21)])
            scores[name].append(
                (ious.mean(), success, (np.hypot(*centres.T) <= 20).mean()),
            )
            if name.startswith("**"):
                at = np.nonzero(seen)[0]
                cases += [
                    (iou, sequence, files[i], [boxes[i]], truth[i])
                    for iou, i in zip(ious, at, strict=True)
                ]
    save_cases(setup.pictures, "track", cases)
    rows = [
        [
            name,
            *(f"{value:.3f}" for value in np.mean(values, 0)),
            *speed(count, spent[name], cpu[name]),
        ]
        for name, values in scores.items()
    ]
    each = [
        [sequence, *(f"{values[i][0]:.2f} / {values[i][2]:.2f}" for values in scores.values())]
        for i, sequence in enumerate(sequences)
    ]
    return f"""## Tracking

The box of the first mask is given; the others, bounding boxes of the masks of {len(sequences)} sequences of DAVIS 2016
(854 x 480), are to be found. The first frame does not count, nor do frames in which the target is out of sight. Means over
sequences. *Success* is the area under the curve of frames above an IoU of 0 to 1, *precision* the share of frames whose
centre is at most 20 pixels off. Decoding is not counted; {torch.get_num_threads()} thread(s). The CPU's time a frame hardly
depends on what else the machine does, frames a second do.

{table(["method", "IoU", "success", "precision", "frames a second", "CPU ms a frame"], rows)}

IoU / precision of each sequence:

{table(["sequence", *scores], each)}
"""


# -- proposals --------------------------------------------------------------------------------------


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


def proposals(setup: Setup) -> str:
    data = setup.data / "ilsvrc-val-dev"
    truth = defaultdict(list)
    with (data / "boxes.csv").open() as file:
        for row in csv.DictReader(file):
            truth[row["file"]].append(np.array([float(row[side]) for side in SIDES]))
    proposer = Proposer(MODEL)
    methods: dict[str, Callable[[np.ndarray], dict[int, np.ndarray]]] = {
        f"**howyouseeme, {MODEL}**": lambda image: {
            100: np.array([region.box for region in proposer(image).regions])
        },
        "OpenCV selective search (fast)": lambda image: {100: selective_search(image)},
        "fixed grid": lambda image: fixed_grids(float(image.shape[0])),
    }
    hits: dict[str, dict[int, list[bool]]] = {name: defaultdict(list) for name in methods}
    spent: dict[str, float] = defaultdict(float)
    cases = []
    files = in_half(sorted((data / "images").iterdir()), setup.half)[: setup.images]
    for file in click_bar(files, "Proposals"):
        image = np.asarray(hysm.load_image(file))
        for name, method in methods.items():
            start = time.perf_counter()
            boxes = method(image)
            spent[name] += time.perf_counter() - start
            for true in truth[file.name]:
                for most in (1, 10, 100):
                    ious = overlap(boxes.get(most, boxes[100])[:most], true)
                    hits[name][most].append(bool(ious.max(initial=0) >= 0.5))
                    if most == 10 and name.startswith("**"):
                        cases.append((ious.max(), file.stem, file, boxes[100][:10], true))
    save_cases(setup.pictures, "propose", cases)
    rows = [
        [
            name,
            *(f"{np.mean(hits[name][most]):.3f}" for most in (1, 10, 100)),
            f"{spent[name] / len(files):.2f}",
        ]
        for name in methods
    ]
    return f"""## Proposals: boxes

The share of the {len(cases)} true boxes of {len(files)} images of the ILSVRC 2012 validation set that have an IoU of 0.5 or more
with one of the first 1, 10 or 100 proposals. Objects of a class that is not the image's count too. The fixed grid is another
for each number.

{table(["method", "recall at 1", "at 10", "at 100", "seconds an image"], rows)}

{saliency(setup, proposer)}"""


def spectral_residual(image: np.ndarray) -> np.ndarray:
    _, found = cv2.saliency.StaticSaliencySpectralResidual_create().computeSaliency(
        image[..., ::-1]
    )
    return found


def fine_grained(image: np.ndarray) -> np.ndarray:
    _, found = cv2.saliency.StaticSaliencyFineGrained_create().computeSaliency(image[..., ::-1])
    return found


def saliency(setup: Setup, proposer: Proposer) -> str:
    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        f"**howyouseeme, {MODEL}**": lambda image: proposer(image, 1).saliency,
        "OpenCV spectral residual": spectral_residual,
        "OpenCV fine-grained": fine_grained,
        "nothing (all 0)": lambda image: np.zeros(image.shape[:2]),
    }
    scores: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    data = setup.data / "davis2016-dev"
    frames = [
        file
        for sequence in in_half(sorted(data.iterdir()), setup.half)
        for file in sorted((sequence / "frames").iterdir())[::10]
    ]
    for file in click_bar(frames, "Saliency"):
        image = np.ascontiguousarray(hysm.load_image(file))
        mask = np.asarray(Image.open(file.parents[1] / "masks" / f"{file.stem}.png")) > 0
        if not mask.any():
            continue
        for name, method in methods.items():
            heat = np.asarray(method(image), dtype=np.float64)
            heat = heat / max(heat.max(), 1e-12)
            scores[name].append(
                (
                    f_beta(heat >= min(1, 2 * heat.mean()), mask),
                    best_f_beta(heat, mask),
                    np.abs(heat - mask).mean(),
                )
            )
    rows = [
        [name, *(f"{value:.3f}" for value in np.mean(values, 0))] for name, values in scores.items()
    ]
    return f"""## Proposals: saliency

Every tenth frame of DAVIS 2016's sequences ({len(rows and scores[next(iter(scores))])} frames) against its mask. F-beta with beta squared .3, at twice
the map's mean as usual, and at the best of 20 thresholds of each image; mean absolute error (MAE, less is better) of the map, its
maximum being 1. An empty map has a low MAE since targets are small, and an F of 0.

{table(["method", "F-beta", "best F-beta", "MAE"], rows)}
"""


def f_beta(found: np.ndarray, mask: np.ndarray) -> float:
    shared = (found & mask).sum()
    precision, recall = shared / max(found.sum(), 1), shared / mask.sum()
    return 1.3 * precision * recall / max(0.3 * precision + recall, 1e-12)


def best_f_beta(heat: np.ndarray, mask: np.ndarray) -> float:
    return max(f_beta(heat >= level, mask) for level in np.linspace(0.05, 1, 20))


# -- the page ---------------------------------------------------------------------------------------

SIDES = ("x0", "y0", "x1", "y1")

#: What is measured, in the order of the page. Detection belongs here as well.
TASKS: dict[str, Callable[[Setup], str]] = {"track": tracking, "propose": proposals}


def click_bar(items: Sequence, label: str) -> list:
    with click.progressbar(items, label=label) as bar:
        yield from bar


def save_cases(folder: Path, task: str, cases: list) -> None:
    """Pictures of the best, the median and the worst case: truth in green, ours in yellow."""
    folder.mkdir(parents=True, exist_ok=True)
    cases.sort(key=lambda case: case[0])
    for name, case in zip(
        ("worst", "median", "best"), (cases[0], cases[len(cases) // 2], cases[-1]), strict=True
    ):
        score, _, file, boxes, truth = case
        picture = hysm.load_image(file)
        pen = ImageDraw.Draw(picture)
        for box in boxes:
            pen.rectangle([tuple(np.round(box[:2])), tuple(np.round(box[2:]))], outline="yellow")
        pen.rectangle([tuple(truth[:2]), tuple(truth[2:])], outline="lime", width=2)
        picture.save(folder / f"{task}-{name}-{score:.2f}.png")


@click.command()
@click.option(
    "--data", default=ROOT.parent / "shared" / "data", type=click.Path(exists=True, path_type=Path)
)
@click.option("--tasks", default=",".join(TASKS), show_default=True)
@click.option("--images", default=10**6, help="Images for proposals, at most.")
@click.option(
    "--half",
    default="all",
    type=click.Choice(["all", "0", "1"]),
    help="Every second image and sequence.",
)
@click.option("--pictures", default=ROOT / "out" / "applications", type=click.Path(path_type=Path))
@click.option(
    "--out",
    default=ROOT / "docs" / "benchmarks" / "applications.md",
    type=click.Path(path_type=Path),
)
def main(data: Path, tasks: str, images: int, half: str, pictures: Path, out: Path) -> None:
    setup = Setup(data, pictures, images, half)
    cv2.setNumThreads(torch.get_num_threads())
    sections = [TASKS[task](setup) for task in tasks.split(",")]
    used = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "opencv-contrib-python-headless")
    )
    part = "" if half == "all" else f" Half {half} of the sequences and of the images."
    body = "\n".join(sections)
    page = f"""# Applications, measured

Made by `benchmarks/applications.py` with {used}, Python {platform.python_version()}, on {platform.machine()}.{part}

{body}"""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    click.echo(page)


if __name__ == "__main__":
    main()
