"""A target in a video: howyouseeme beside OpenCV's trackers, correlation and a constant box."""

from __future__ import annotations

import csv
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import harness
import numpy as np
import torch
from harness import OURS, SIDES, Method, Row, Setup, share, table

import howyouseeme as hysm
from howyouseeme.evaluate import intersection_over_union
from howyouseeme.track import Tracker

MODEL = "efficientnet-lite0"

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


@functools.lru_cache(maxsize=1)
def load_frames(folder: Path) -> list[np.ndarray]:
    return [np.asarray(hysm.load_image(file)) for file in sorted((folder / "frames").iterdir())]


def load_truth(folder: Path) -> np.ndarray:
    """The box of each frame [frames, 4], nan where the target is out of sight."""
    with (folder / "boxes.csv").open() as file:
        return np.array(
            [[float(row[side] or "nan") for side in SIDES] for row in csv.DictReader(file)]
        )


def timed(track: Track, folder: Path) -> Row:
    """The box of each frame, and what it took."""
    frames = load_frames(folder)
    start, worked = time.perf_counter(), time.process_time()
    boxes = track(frames, load_truth(folder)[0])
    seconds, cpu = time.perf_counter() - start, time.process_time() - worked
    height, width = frames[0].shape[:2]
    clipped = boxes.clip(0, [width, height, width, height])
    return {"boxes": clipped.tolist(), "seconds": seconds, "cpu": cpu}


def scores(folder: Path, row: Row) -> tuple[np.ndarray, float, np.ndarray]:
    """Of the frames that count: overlaps, success, and whether the centre is near."""
    truth, boxes = load_truth(folder), np.array(row["boxes"])
    seen = counted(truth)
    pairs = zip(boxes[seen], truth[seen], strict=True)
    ious = np.array([intersection_over_union(box, [true])[0] for box, true in pairs])
    off = (boxes[seen].reshape(-1, 2, 2) - truth[seen].reshape(-1, 2, 2)).mean(1)
    success = float(np.mean([(ious > level).mean() for level in np.linspace(0, 1, 21)]))
    return ious, success, np.hypot(*off.T) <= 20


def counted(truth: np.ndarray) -> np.ndarray:
    seen = ~np.isnan(truth[:, 0])
    seen[0] = False  # it is given
    return seen


def section(setup: Setup) -> str:
    """The page's part."""
    data = setup.data / "davis2016-dev"
    tracks: dict[str, tuple[Callable[..., Any], Track]] = {
        OURS: (track_here, track_here(hysm.load_model(MODEL))),
        "constant box": (track_constant, track_constant),
        "normalised cross-correlation": (track_correlation, track_correlation),
        "OpenCV MIL": (track_opencv, track_opencv(cv2.TrackerMIL_create)),
        "OpenCV KCF": (track_opencv, track_opencv(cv2.TrackerKCF_create)),
        "OpenCV CSRT": (track_opencv, track_opencv(cv2.TrackerCSRT_create)),
    }
    threads = str(torch.get_num_threads())
    methods = {
        name: Method(
            lambda item, track=track: timed(track, data / item),
            (source, timed, threads),
            name == OURS,
        )
        for name, (source, track) in tracks.items()
    }
    sequences = setup.some(sorted(path.name for path in data.iterdir()))
    found = harness.measured(setup, "tracking", methods, sequences)
    cases, rows, each = [], [], [[sequence] for sequence in sequences]
    for name, made in found.items():
        frames = sum(len(row["boxes"]) - 1 for row in made.values())
        known = [scores(data / sequence, row) for sequence, row in made.items()]
        seconds, cpu = (sum(row[what] for row in made.values()) for what in ("seconds", "cpu"))
        rate = frames / seconds
        rows.append(
            [
                name,
                share([ious.mean() for ious, _, _ in known]),
                f"{np.mean([success for _, success, _ in known]):.3f}",
                share([near.mean() for _, _, near in known]),
                f"{rate:.0f}" if rate < 1000 else "> 1000",
                f"{1000 * cpu / frames:.1f}",
            ]
        )
        for line, (ious, _, near) in zip(each, known, strict=True):
            line.append(f"{ious.mean():.2f} / {near.mean():.2f}")
        if name == OURS:
            for (sequence, row), (ious, _, _) in zip(made.items(), known, strict=True):
                truth = load_truth(data / sequence)
                files = sorted((data / sequence / "frames").iterdir())
                at = np.nonzero(counted(truth))[0][len(ious) // 2]  # a frame halfway through
                cases.append(
                    harness.Case(float(ious.mean()), files[at], row["boxes"][at], truth[at])
                )
    harness.save_cases(setup, "tracking", cases)
    return f"""## Tracking

The box of the first mask is given; the others, bounding boxes of the masks of {len(sequences)} sequences of DAVIS 2016
(854 x 480), are to be found, by {MODEL}. The first frame does not count, nor do frames in which the target is out of sight.
Means over sequences, with their 95 % interval. *Success* is the area under the curve of frames above an IoU of 0 to 1, *precision* the
share of frames whose centre is at most 20 pixels off. Decoding is not counted; {threads} thread(s). The CPU's time a frame
hardly depends on what else the machine does, frames a second do.

{table(["method", "IoU", "success", "precision", "frames a second", "CPU ms a frame"], rows)}

IoU / precision of each sequence:

{table(["sequence", *found], each)}
"""
