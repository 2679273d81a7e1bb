"""A target in a video, found again in each frame by walking back to how the network saw it before.

1. *Nodes.* The network runs on a window around the target, as far as its stage of stride 16. Each
   cell of the window is a node, told by what the channels of three stages say there.
2. *Target.* In the first frame walks set out from every node in the box, from node to node, to those
   that look alike, and end where they leave the box. The nodes whose walks stay are the target, the
   others the background that happens to be in the box.
3. *Back.* In each next frame every node walks back to nodes of the first frame and of the last ones
   that look alike and lie near. The share of these that is the target is the node's own share in it.
4. *Box.* Around the nodes with a share above a level. If there are none, or if they look less like
   the target than like anything else, it is lost: nothing is learnt, and all of the frame is searched
   for nodes whose way back leads to the target of the first frame.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .draw import draw_box
from .errors import InputError
from .images import Source, load_image
from .models import Model, Prepare, as_network
from .regions import Box, check_box, components, edges, held
from .stages import Stages
from .video import FrameWriter, Video, VideoWriter, write_each

__all__ = [
    "COLUMNS",
    "Channel",
    "Sighting",
    "Tracker",
    "TrackerSettings",
    "annotate",
    "follow",
]


@dataclass(frozen=True)
class TrackerSettings:
    """How a tracker looks. The defaults lie on a plateau; docs/research.md tells how wide it is.

    >>> Tracker(settings=TrackerSettings(memory=5))

    - `side`: of the network's input, in pixels;
    - `strides`: of the stages that are asked; the second one's cells are the nodes;
    - `around`: what the window shows around the box, as a share of its width + height;
    - `likeness`: temperature of the softmax over the cosine of nodes; lower is pickier;
    - `steps`: of the walks in the first frame;
    - `near`: standard deviation of the way back, as a share of the window;
    - `memory`: how many of the last frames are remembered beside the first one;
    - `first`: what a node of the first frame counts, another one counting 1;
    - `level`: from this share on, a node belongs to the target;
    - `parts`: parts of the target hold at least this share of what the largest one holds;
    - `agility`: how far a box moves to where the target is seen, 1 being all the way;
    - `doubt`: the confidence below which the target is lost.

    Raises:
        InputError: one of them is of no use.
    """

    side: int = 224
    strides: tuple[int, int, int] = (4, 8, 16)
    around: float = 0.5
    likeness: float = 0.05
    steps: int = 15
    near: float = 0.2
    memory: int = 3
    first: float = 3.0
    level: float = 0.35
    parts: float = 0.2
    agility: float = 0.85
    doubt: float = 0.72

    def __post_init__(self) -> None:
        for name in ("side", "around", "likeness", "steps", "near", "first", "level", "agility"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)!r}: a tracker needs more than 0.")
        if len(self.strides) != 3 or min(self.strides) < 1 or self.memory < 0:
            raise InputError(
                f"strides={self.strides!r}, memory={self.memory!r}: three strides of 1 or more, and no "
                "fewer frames than 0."
            )


@dataclass(frozen=True)
class Sighting:
    """Where the target is in one frame.

    >>> sighting.found, sighting.box, sighting.confidence

    - `box`: (x0, y0, x1, y1) in pixels of the frame, x1 and y1 exclusive; None if the target is lost;
    - `confidence`: 0..1; see `Tracker`.
    """

    box: Box | None
    confidence: float

    @property
    def found(self) -> bool:
        """Whether the target is seen."""
        return self.box is not None

    @property
    def state(self) -> str:
        """'found' or 'lost'."""
        return "found" if self.found else "lost"


@dataclass(frozen=True)
class Channel:
    """How much a channel told the target from its surroundings in the first frame.

    >>> channel = tracker.channels(1)[0]
    >>> channel.module, channel.channel, channel.contrast
    ('_blocks.2', 18, 0.13)

    - `module`: its name in `model.named_modules()`; `channel`: the index along axis 1 of its output;
    - `contrast`: the mean over the target minus that over the surroundings, of the channel standardised over
      the window, each node then scaled to the length 1: -2..2.
    """

    module: str
    channel: int
    contrast: float


#: Of the table of a track.
COLUMNS = ["frame", "seconds", "state", "confidence", "x0", "y0", "x1", "y1"]


def _row(number: int, seconds: float | None, sighting: Sighting) -> list[Any]:
    """What the table of a track says of one frame, by its number and its time in the video.

    >>> _row(2, 0.08, Sighting((1, 2, 3, 4), 0.9))
    [2, '0.080', 'found', '0.900', '1.0', '2.0', '3.0', '4.0']
    """
    time = "" if seconds is None else f"{seconds:.3f}"
    box = [f"{side:.1f}" for side in sighting.box or ()] or [""] * 4
    return [number, time, sighting.state, f"{sighting.confidence:.3f}", *box]


def follow(
    video: Video,
    tracker: Tracker,
    choose: Callable[[np.ndarray], Sequence[float]],
    table: Path,
    picture: FrameWriter | VideoWriter | None = None,
) -> Generator[Sighting]:
    """Track a target through a video, writing a table of boxes and, if asked for, an annotated video.

    >>> for sighting in follow(video, tracker, lambda frame: (120, 80, 260, 300), Path("walk.csv")):
    ...     ...                                # both are complete up to this frame

    `choose` is given the first frame and tells the box. The table has the columns `frame, seconds,
    state, confidence, x0, y0, x1, y1`; seconds are empty where they are unknown, boxes where the
    target is lost.

    Raises:
        InputError: the video is none, or damaged from some frame on, or the box is empty or outside of the
            first frame.
        OSError: the table or the video can't be written.
        Exception: whatever `choose` raises.
    """

    def look(number: int, frame: np.ndarray) -> Sighting:
        return tracker(frame) if number else tracker.start(frame, choose(frame))

    return write_each(video, look, _row, annotate, table, COLUMNS, picture)


class Tracker:
    """Follows one target through a video.

    >>> tracker = Tracker("efficientnet-lite0")
    >>> tracker.start(first_frame, box=(120, 80, 260, 300))
    >>> tracker(next_frame)
    Sighting(box=(124.1, 80.7, 263.9, 301.2), confidence=0.93)

    Args:
        model: what `Explainer` takes. Any that has stages of strides 4, 8 and 16 will do. Its weights
            are taken as they are now.
        settings: how it follows.
        preprocess: how a photo becomes the model's input; that of the `Network` by default.

    A frame is a picture in any form that `load_image` takes; a uint8 array [height, width, 3] is
    fastest. All frames of a video have one size.

    `confidence` is how alike the nodes are to those of the target in the first frame (the cosine with
    the most alike, averaged), over what it was in the last frames. Below `doubt` the target is lost.

    How it works, by random walks from node to node with the softmax of their likeness, and how well:
    docs/track.md.

    Raises:
        InputError: the model or its preprocessing is none.
        ModelError, MissingExtraError: the model of that name can't be loaded; ModelError also where the
            network has no such stages, its preprocessing isn't known, or it is in training mode.
    """

    def __init__(
        self,
        model: Model = "efficientnet-lite0",
        settings: TrackerSettings | None = None,
        *,
        preprocess: Prepare | None = None,
    ) -> None:
        network = as_network(model, preprocess)
        prepare = network.photo_input
        self.settings = settings or TrackerSettings()
        side = self.settings.side
        self._stages = Stages(network, side, self.settings.strides)
        self._prepare = replace(
            prepare,
            size=(side, side),
            resize="squash",
            crop_from=None,
            interpolation="bilinear",
        )
        self._first: _Seen | None = None
        self._core = torch.empty(0)  # the target's nodes in the first frame
        self._size = (0, 0)  # of the frames: height, width
        self._box = np.zeros(4)  # of the target; while it is lost, where to look more closely
        self._lost = 0  # for how many frames
        self._extent = np.zeros(2)  # of the box, lately; what leaves the frame looks smaller
        self._usual = 1.0  # how alike the target was to that of the first frame, lately
        self._last: deque[_Seen] = deque(maxlen=self.settings.memory)

    @torch.no_grad()
    def start(self, frame: Source, box: Sequence[float]) -> Sighting:
        """Learn the target: what is in the `box` of this frame.

        >>> tracker.start(frame, (120, 80, 260, 300))
        Sighting(box=(120.0, 80.0, 260.0, 300.0), confidence=1.0)

        `box` is x0, y0, x1, y1 in pixels of the frame, the latter two exclusive; it is cut at the frame's
        edges. What was learnt before is forgotten.

        Raises:
            InputError: the box isn't four numbers, is empty, or lies outside of the frame.
            ImageError: the frame can't be read.
        """
        pixels = _pixels(frame)
        self._size = pixels.shape[0], pixels.shape[1]
        self._box = np.array(check_box(box, self._size))
        window = self._window()
        nodes = self._nodes(pixels, window)
        inside = _inside(self._box, window, self._stages.cells).reshape(-1).to(nodes)
        s = self.settings
        share = _staying(nodes, inside, s.likeness, s.steps)
        self._first = _Seen(nodes, share)
        self._last.clear()
        self._last.append(self._first)
        self._lost = 0
        self._extent = self._box[2:] - self._box[:2]
        # How alike it is to itself, from node to node.
        self._core = nodes[share > 0.5]
        among = (self._core @ self._core.T).fill_diagonal_(0)
        self._usual = max(0.5, float(among.max(1).values.mean()))
        target, rest = share / share.sum(), (1 - inside) / (1 - inside).sum().clamp(min=1e-6)
        self._contrast = target @ nodes - rest @ nodes
        return Sighting(_box(self._box), 1.0)

    @torch.no_grad()
    def __call__(self, frame: Source) -> Sighting:
        """Find the target in the next frame.

        >>> tracker(frame).box

        Raises:
            InputError: `start` wasn't called yet, or the frame has another size than the first.
            ImageError: the frame can't be read.
        """
        pixels = _pixels(frame)
        if self._first is None:
            raise InputError("The tracker has no target yet: call start(frame, box) first.")
        if pixels.shape[:2] != self._size:
            raise InputError(
                f"A frame has {pixels.shape[1]} x {pixels.shape[0]} pixels and the first "
                f"{self._size[1]} x {self._size[0]}; give frames of one size."
            )
        window, near = self._look()
        nodes = self._nodes(pixels, window)
        share, likeness = self._back(nodes, near)
        cells = self._stages.cells
        heat = share.reshape(cells, cells)
        region = self._region(heat)
        if region is None:
            return self._miss(heat, window, 0.0)
        weight = (heat * region).reshape(-1)
        alike = float((likeness * weight).sum() / weight.sum())
        confidence = min(1.0, alike / self._usual)
        # In the whole frame a target is small; a closer look will tell.
        if confidence < self.settings.doubt or self._lost % 2:
            return self._miss(heat, window, confidence)
        seen = _scaled(edges(heat, region, self.settings.level), window, cells)
        agility = 1.0 if self._lost else self.settings.agility
        self._box += agility * (seen - self._box)
        self._lost = 0
        self._extent += 0.1 * (self._box[2:] - self._box[:2] - self._extent)
        self._usual += 0.25 * (alike - self._usual)
        self._last.append(_Seen(nodes, share))
        return Sighting(_box(self._box), confidence)

    def channels(self, count: int = 20) -> list[Channel]:
        """The channels that told the target from its surroundings most in the first frame, strongest first.

        >>> tracker.channels(3)

        Raises:
            InputError: `start` wasn't called yet.
        """
        if self._first is None:
            raise InputError("The tracker has no target yet: call start(frame, box) first.")
        names = [
            (name, channel)
            for name, width in zip(self._stages.names, self._stages.widths, strict=True)
            for channel in range(width)
        ]
        order = self._contrast.abs().sort(descending=True, stable=True).indices[:count].tolist()
        return [Channel(names[i][0], names[i][1], float(self._contrast[i])) for i in order]

    # -- where to look ------------------------------------------------------------------------------

    def _window(self) -> tuple[int, int, int, int]:
        """The part of the frame that is looked at: around the box, in whole pixels."""
        x0, y0, x1, y1 = self._box
        margin = self.settings.around * (x1 - x0 + y1 - y0) / 2
        height, width = self._size
        return (
            max(0, math.floor(x0 - margin)),
            max(0, math.floor(y0 - margin)),
            min(width, math.ceil(x1 + margin)),
            min(height, math.ceil(y1 + margin)),
        )

    def _whole(self) -> tuple[int, int, int, int]:
        return (0, 0, self._size[1], self._size[0])

    def _look(self) -> tuple[tuple[int, int, int, int], bool]:
        """The window of this frame, and whether the target must be near where it was."""
        if not self._lost:
            return self._window(), True
        # All of the frame, and in the next one more closely where the target might have been.
        return (self._whole() if self._lost % 2 else self._window()), False

    def _miss(self, heat: Tensor, window: tuple[int, int, int, int], confidence: float) -> Sighting:
        """The target is lost; where it might be is looked at next."""
        if self._lost % 2:
            blurred = F.avg_pool2d(heat[None], 3, stride=1, padding=1)[0]
            y, x = divmod(int(blurred.argmax()), heat.shape[1])
            place = _scaled((x, y, x + 1, y + 1), window, heat.shape[1])
            centre = (place[:2] + place[2:]) / 2
            self._box = np.concatenate([centre - self._extent / 2, centre + self._extent / 2])
        self._lost += 1
        return Sighting(None, min(confidence, self.settings.doubt))

    # -- what is there ------------------------------------------------------------------------------

    def _nodes(self, pixels: np.ndarray, window: tuple[int, int, int, int]) -> Tensor:
        """What each cell of a window is [cells * cells, channels], of length 1."""
        x0, y0, x1, y1 = window
        tensor, _ = self._prepare(Image.fromarray(pixels[y0:y1, x0:x1]))
        return self._stages(tensor[None])

    def _back(self, nodes: Tensor, near: bool) -> tuple[Tensor, Tensor]:
        """Walk back from each node: its share in the target, and how much it is like the target, [n] each."""
        s = self.settings
        assert self._first is not None
        seen = [self._first, *(self._last if near else ())]
        there = torch.cat([one.nodes for one in seen])
        share = torch.cat([one.share for one in seen])
        start = nodes / s.likeness
        odds = there.new_zeros(len(seen), len(nodes))
        odds[0] = math.log(s.first)
        if near:
            # -|p - q|² / 2 near² = p·q / near² - |q|² / 2 near² and what is the same for all q, so
            # that likeness and nearness are one product of matrices.
            places = self._stages.places
            there = torch.cat([there, places.repeat(len(seen), 1)], 1)
            start = torch.cat([start, places / s.near**2], 1)
            odds -= places.square().sum(1) / (2 * s.near**2)
        odds = odds.reshape(-1)
        # Some nodes at a time: all ways at once would leave the CPU's cache between two passes.
        ways = (torch.addmm(odds, some, there.T).softmax(1) for some in start.split(_AT_ONCE))
        return torch.cat([some @ share for some in ways]), (nodes @ self._core.T).max(1).values

    def _region(self, heat: Tensor) -> Tensor | None:
        """The cells of the target, without its scattered crumbs; None if there are none."""
        above = heat > self.settings.level
        if not bool(above.any()):
            return None
        labels = components(above)
        holds = held(labels, heat)
        return above & (holds[labels] >= self.settings.parts * holds.max())


def annotate(frame: np.ndarray, sighting: Sighting) -> np.ndarray:
    """The frame [height, width, 3] with the box and the confidence drawn on it, or a note that it is lost.

    >>> picture = annotate(frame, tracker(frame))
    """
    picture = Image.fromarray(frame)
    pen = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 160))
    font = ImageFont.load_default(max(12, round(min(picture.size) / 24)))
    text, place, colour = "lost", (2 * line, 2 * line), _LOST
    if sighting.box is not None:
        draw_box(pen, sighting.box, _FOUND, line)
        x, y = (round(side) + line for side in sighting.box[:2])
        text, place, colour = f"{sighting.confidence:.2f}", (x, y), _FOUND
    pen.rectangle(pen.textbbox(place, text, font=font), fill=colour)
    pen.text(place, text, font=font, fill="black")
    return np.asarray(picture)


_FOUND, _LOST = (255, 200, 0), (230, 230, 230)
_AT_ONCE = 196  # nodes that walk back together


@dataclass(frozen=True, eq=False)
class _Seen:
    """The nodes of a frame [n, channels] and their share in the target [n]."""

    nodes: Tensor
    share: Tensor


def _staying(nodes: Tensor, inside: Tensor, likeness: float, steps: int) -> Tensor:
    """The share of walks that are still in the box after so many steps, scaled: [n] in 0..1.

    Walks go from node to another with the softmax of their cosines, and end where they leave the box.
    """
    onward = (nodes @ nodes.T / likeness).fill_diagonal_(-torch.inf).softmax(1)
    share = inside
    for _ in range(steps):
        share = inside * (onward @ share)
    best = share.topk(max(1, int(inside.sum() / 10))).values[-1]  # one node alone may be an outlier
    return (share / best.clamp(min=torch.finfo(share.dtype).tiny)).clamp(max=1)


def _inside(box: np.ndarray, window: tuple[int, int, int, int], cells: int) -> Tensor:
    """The share of each cell of the window that is covered by the box: [cells, cells]"""
    cover = []
    for axis in (1, 0):
        low, high = window[axis], window[axis + 2]
        border = torch.linspace(low, high, cells + 1, dtype=torch.float64, device="cpu")
        cover.append(border.clamp(box[axis], box[axis + 2]).diff() * cells / (high - low))
    return cover[0][:, None] * cover[1]


def _scaled(box: Sequence[float], window: tuple[int, int, int, int], cells: int) -> np.ndarray:
    """A box in cells of a window, in pixels of the frame."""
    low, high = np.array(window[:2] * 2), np.array(window[2:] * 2)
    pixels: np.ndarray = low + np.array(box) * (high - low) / cells
    return pixels


def _pixels(frame: Source) -> np.ndarray:
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape[2:] == (3,):
        return frame
    return np.asarray(load_image(frame))


def _box(box: np.ndarray) -> Box:
    x0, y0, x1, y1 = box.tolist()
    return x0, y0, x1, y1
