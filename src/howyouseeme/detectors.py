"""The boxes in what a detector answers, whatever its family.

>>> found = boxes_in(detector(images), network, count=5)[0]     # of the first image, the best first
>>> found.scores, found.boxes, found.classes

Detectors answer in many ways: torchvision's with a dict for each image, DETR and its kin with logits and boxes
of queries, YOLO networks with a table of all that they considered. Nothing is guessed: an answer that
could be read in two ways is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError
from .regions import suppress
from .scores import outline

if TYPE_CHECKING:
    from .models import Network

__all__ = ["Boxes", "boxes_in"]

#: Of boxes of one class that overlap by more than this, the best stays.
_OVERLAP = 0.5


@dataclass(frozen=True, eq=False)
class Boxes:
    """What a detector found in one image, the best first.

    - `scores` [n]: 0..1, as the detector made them;
    - `boxes` [n, 4]: x0, y0, x1, y1 in pixels of its input, or, if `relative`, in shares of its sides; None
      where the answer has none;
    - `classes` [n]: whole numbers; None where the answer has none.
    """

    scores: Tensor
    boxes: Tensor | None = None
    classes: Tensor | None = None
    relative: bool = False

    def __len__(self) -> int:
        return len(self.scores)


def boxes_in(output: Any, network: Network, count: int = 100) -> list[Boxes]:
    """For each image the best boxes in what a detector answered, at most `count` where it considers more.

    >>> boxes_in(network.module(images), network)[0].scores

    Read are

    - dicts with 'scores', one an image or one for all [batch, n], and with 'boxes' and 'labels': as they are;
    - 'logits' [batch, n, classes] and 'pred_boxes' (DETR, YOLOS, RT-DETR of transformers): the best class of
      each query, by softmax where there is one score more than the network has classes, for 'nothing', else by sigmoid;
    - a table [batch, n, 6] of box, score and class (YOLO with its boxes chosen already);
    - a table [batch, 4 + classes, n] of centre, size and scores (YOLOv8 and later), or [batch, n, 5 + classes]
      with how sure it is of any object before them (YOLOv5, YOLOX): of boxes of one class that overlap by more
      than half the best.

    Raises:
        InputError: the answer is none of these, or could be read in two ways.
    """
    if isinstance(output, Mapping) and {"logits", "pred_boxes"} <= output.keys():
        return _of_queries(output["logits"], output["pred_boxes"], network, count)
    each = [output] if isinstance(output, Mapping) else output
    if (
        isinstance(each, Sequence)
        and len(each)
        and all(isinstance(one, Mapping) and _is_floats(one.get("scores")) for one in each)
    ):
        return [boxes for one in each for boxes in _named(one)]
    if isinstance(output, Mapping):
        output = [*output.values()]
    tables = [output] if isinstance(output, Tensor) else output
    # Of several the first is the table: others hold masks.
    if (
        isinstance(tables, Sequence)
        and len(tables)
        and _is_floats(tables[0])
        and tables[0].dim() == 3
    ):
        return _of_table(tables[0], network, count)
    raise _unknown(output, network)


def _named(found: Mapping[str, Any]) -> list[Boxes]:
    """torchvision's: one image, or several where all have an axis more."""
    scores: Tensor = found["scores"]
    boxes, labels = found.get("boxes"), found.get("labels")
    boxes = boxes if isinstance(boxes, Tensor) and boxes.shape[:-1] == scores.shape else None
    labels = labels if isinstance(labels, Tensor) and labels.shape == scores.shape else None
    if scores.dim() == 1:
        return [Boxes(scores, boxes, labels)]
    rows = range(len(scores)) if scores.dim() == 2 else ()
    return [
        Boxes(scores[i], None if boxes is None else boxes[i], None if labels is None else labels[i])
        for i in rows
    ]


def _of_queries(logits: Tensor, boxes: Tensor, network: Network, count: int) -> list[Boxes]:
    classes = len(network.classes or ())
    if logits.shape[-1] == classes + 1 and classes:
        certain = logits.softmax(-1)[..., :-1]
    elif logits.shape[-1] == classes:
        certain = logits.sigmoid()
    else:
        raise InputError(
            f"{network.name} answers with {logits.shape[-1]} scores for each box, and "
            f"{classes or 'no'} class names are known: give classes=[...], which tell whether one score means "
            "'nothing'."
        )
    found = []
    for scores, place in zip(certain, boxes, strict=True):
        best, which = scores.detach().max(-1)
        order = best.sort(descending=True, stable=True).indices[:count]
        chosen, corners = which[order], _corners(place.detach()[order])
        found.append(Boxes(scores[order, chosen], corners, chosen, relative=True))
    return found


def _of_table(table: Tensor, network: Network, count: int) -> list[Boxes]:
    plain = table.detach().float()
    if table.shape[2] == 6 and _are_scores(plain[..., 4]) and _are_whole(plain[..., 5]):
        return [_of_rows(rows, told) for rows, told in zip(table, plain, strict=True)]
    classes = len(network.classes or ())
    ways = _ways(table, classes)
    if len(ways) != 1:
        raise InputError(
            f"How {network.name} answers, {outline(table)}, can be read in several ways or in none, and "
            f"{classes or 'no'} class names are known: give classes=[...], one for each score of a box, or a "
            "function of its output as the target."
        )
    columns, first, last = ways[0]
    plain, scores = columns.detach().float(), columns[:, first:last]
    sure = columns[:, 4] if first == 5 else None
    certain = scores if sure is None else scores * sure[:, None]
    if not _are_scores(certain.detach()):
        raise InputError(
            f"The scores in the answer of {network.name}, {outline(table)}, are not between 0 and 1: give a function "
            "of its output as the target, target=lambda output: output[...]."
        )
    if not bool((plain[:, 2:4] > 0).all()):
        raise InputError(
            f"{network.name} answers with boxes that are not decoded yet (sizes of 0 and less): export it with its "
            "boxes decoded, or give a function of its output as the target, target=lambda output: output[...]."
        )
    found = []
    for image, of_image in enumerate(certain):
        best, which = of_image.detach().float().max(0)
        corners = _corners(plain[image, :4].T)
        apart = (which * 2 * corners.abs().max().clamp(min=1))[:, None]  # classes don't compete
        kept = suppress(corners + apart, best, _OVERLAP, count)
        found.append(Boxes(of_image[which[kept], kept], corners[kept], which[kept]))
    return found


def _ways(table: Tensor, classes: int) -> list[tuple[Tensor, int, int]]:
    """How a table can be read: with a column for each box, and where in it the scores of the classes are."""
    rows, columns = table.transpose(1, 2), table
    _, height, width = table.shape
    if not classes:  # many more boxes than scores, or else it isn't known which axis is which
        there = width >= 4 * height > 16 and _are_scores(table.detach()[:, 4:])
        return [(columns, 4, height)] if there else []
    ways = []
    if (
        height == 4 + classes or 5 + classes < height < width
    ):  # masks or key points behind the scores
        ways.append((columns, 4, 4 + classes))
    if width in {4 + classes, 5 + classes}:
        ways.append((rows, width - classes, width))
    return ways


def _of_rows(rows: Tensor, plain: Tensor) -> Boxes:
    """The rows [n, 6] with a score above zero: others fill the table up."""
    there = (plain[:, 4] > 0).nonzero()[:, 0]
    rows, plain = rows[there], plain[there]
    boxes, classes = plain[:, :4], plain[:, 5].round().long()
    if bool((boxes[:, 2:] < boxes[:, :2]).any()):  # no corners, but centres and sizes
        boxes = _corners(boxes)
    return Boxes(rows[:, 4], boxes, classes, relative=bool((plain[:, :4].abs() <= 1).all()))


def _corners(boxes: Tensor) -> Tensor:
    """Centre and size, x, y, width, height [n, 4], as x0, y0, x1, y1."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], 1)


def _is_floats(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _are_scores(item: Tensor) -> bool:
    return bool(((item >= 0) & (item <= 1)).all())


def _are_whole(item: Tensor) -> bool:
    return bool(((item - item.round()).abs() < 1e-3).all() & (item > -1).all())


def _unknown(output: Any, network: Network) -> InputError:
    return InputError(
        f"{network.name} is no detector whose answer is known: it is {outline(output)}, with no 'scores' for each "
        "image and no table of boxes. Give a function of its output as the target, "
        "target=lambda output: output[...]."
    )
