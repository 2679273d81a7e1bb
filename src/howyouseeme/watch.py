"""A video, explained frame by frame: what the network answers, and where it saw that."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .draw import frame_picture, percent
from .errors import InputError
from .explanation import Explanation
from .video import FrameWriter, Video, VideoWriter, write_each

__all__ = ["COLUMNS", "Moment", "annotate", "watch"]

COLUMNS = ["frame", "seconds", "label", "target", "probability", "coverage", "problem"]


@dataclass(frozen=True)
class Moment:
    """A frame that was looked at.

    >>> moment.number, moment.seconds, moment.label, moment.problem
    (50, 2.0, 'Egyptian cat', '')

    - `number`: of the frame, from 0; `seconds`: when it is shown, None where nobody knows;
    - `explanation`: of this one frame, in its pixels; None where there is none;
    - `problem`: why there is none, in a sentence; empty where there is one.
    """

    number: int
    seconds: float | None
    explanation: Explanation | None
    problem: str = ""

    @property
    def label(self) -> str:
        """What is explained; empty where nothing is."""
        return "" if self.explanation is None else _named(self.explanation)

    def row(self) -> list[Any]:
        """The row of the table, its columns being `COLUMNS`.

        >>> moment.row()
        [50, '2.000', 'Egyptian cat', 285, '0.7971', '0.0492', '']
        """
        when = "" if self.seconds is None else f"{self.seconds:.3f}"
        if self.explanation is None:
            return [self.number, when, "", "", "", "", self.problem]
        target, chance = self.explanation.target[0], self.explanation.probability[0]
        return [
            self.number,
            when,
            self.label,
            "" if target is None else target,
            "" if chance is None else f"{chance:.4f}",
            f"{self.explanation.coverage[0]:.4f}",
            "",
        ]


def watch(
    video: Video,
    explain: Callable[[np.ndarray], Explanation],
    table: Path,
    picture: FrameWriter | VideoWriter | None = None,
    every: int = 1,
) -> Generator[Moment]:
    """Explain the frames of a video, writing a table and, if asked for, a video of what answers for each.

    >>> explainer = Explainer("efficientnet-lite0", replay=True)
    >>> with open_video("walk.mp4") as video:
    ...     for moment in watch(video, explainer, Path("walk.csv"), VideoWriter("out.mp4", video.rate)):
    ...         ...                            # both are complete up to this frame

    `explain` is given a frame, uint8 [height, width, 3], and explains it: an `Explainer`, or a function
    that asks one for a target. Of `every` so many frames the first is explained, and the others are left
    out. A frame that can't be explained (a detector that finds no box in it) has its `problem` in the table, stays as
    it is in the video, and the next ones go on.

    Raises:
        InputError: `every` is no number from 1 on, or the video is none, or damaged from some frame on.
        HowYouSeeMeError: the network can't be explained.
        OSError: the table or the video can't be written.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"Every how many frames one is explained is 1 or more, not {every!r}.")

    def look(number: int, frame: np.ndarray) -> Moment:
        try:
            return Moment(number, video.seconds, explain(frame))
        except InputError as error:  # the other frames are not to suffer from this one
            return Moment(number, video.seconds, None, " ".join(str(error).split()))

    def row(number: int, seconds: float | None, moment: Moment) -> list[Any]:
        return moment.row()  # which knows both

    return write_each(video, look, row, annotate, table, COLUMNS, picture, every)


def annotate(frame: np.ndarray, moment: Moment) -> np.ndarray:
    """The frame [height, width, 3] under its saliency, with the answer in its corner; as it is where there is none.

    >>> picture = annotate(frame, moment)
    """
    explanation = moment.explanation
    if explanation is None:
        return frame
    chance = explanation.probability[0]
    text = moment.label if chance is None else f"{moment.label}  {percent(chance)}"
    seen = explanation.saliency[0].numpy()
    return np.asarray(frame_picture(Image.fromarray(frame), seen, text, explanation.box[0]))


def _named(explanation: Explanation) -> str:
    return explanation.label[0] or str(explanation.target[0])  # not every network names its classes
