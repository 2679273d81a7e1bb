"""The boxes in what a detector answers, whatever its family.

>>> found = boxes_in(detector(images), network, count=5)[0]     # of the first image
>>> found.scores, found.boxes, found.classes

Detectors answer in many ways: torchvision's with a dict for each image, DETR and its kin with logits and boxes
of queries, YOLO networks with a table of all that they considered. An answer that could be read in two ways,
or in none, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError
from .models.transformers import labels_in
from .regions import Box, suppress
from .scores import outline
from .tape import Tape, Value

if TYPE_CHECKING:
    from .models import Network

__all__ = ["SURE", "Boxes", "boxes_in", "recorded_boxes"]

#: So sure a detector is of a box that is shown: the usual threshold of YOLO networks.
SURE = 0.25


@dataclass(frozen=True, eq=False)
class Boxes:
    """What a detector found in one image: in its own order where the answer has one, else the best first.

    >>> found = boxes_in(network.module(images), network)[0]
    >>> len(found), found.scores[0], found.name(0, network), found.place(0, images.shape[2:])

    - `scores` [n]: 0..1, as the detector made them;
    - `boxes` [n, 4]: x0, y0, x1, y1 in pixels of its input, or, if `relative`, in shares of its sides; None
      where the answer doesn't tell;
    - `classes` [n]: whole numbers; None where the answer has none.
    """

    scores: Tensor
    boxes: Tensor | None = None
    classes: Tensor | None = None
    relative: bool = False

    def __len__(self) -> int:
        return len(self.scores)

    def name(self, i: int, network: Network) -> str | None:
        """The class of a box; None where the answer or the network doesn't tell.

        >>> found.name(0, network)
        'person'
        """
        if self.classes is None:
            return None
        category, names = int(self.classes[i]), network.classes
        known = category >= 0 and (names is None or category < len(names))
        return network.label(category) if known else None

    def place(self, i: int, size: Sequence[int] | None) -> Box | None:
        """A box in pixels of the input, of the `size` (height, width); None where that can't be told.

        >>> x0, y0, x1, y1 = found.place(0, (640, 640))
        """
        if self.boxes is None or (self.relative and size is None):
            return None
        height, width = size if self.relative and size is not None else (1, 1)
        x0, y0, x1, y1 = self.boxes[i].tolist()
        if x0 <= x1 and y0 <= y1:  # no numbers are neither
            return x0 * width, y0 * height, x1 * width, y1 * height
        return None


def boxes_in(output: Any, network: Network, count: int = 100) -> list[Boxes]:
    """The boxes in what a detector answered, for each image.

    >>> boxes_in(network.module(images), network)[0].scores

    Read are

    - dicts with 'scores', one an image or one for all [batch, n], and with 'boxes' and 'labels': as they are;
    - 'logits' [batch, n, classes] and 'pred_boxes' (transformers): where there is one score more than the network
      has classes, for 'nothing', the best class of each query by softmax (DETR, YOLOS), else by sigmoid the best
      of all queries and classes (RT-DETR, Deformable and Conditional DETR);
    - a table [batch, n, 6] of box, score and class (YOLO with its boxes chosen already): its rows as they are,
      but those with a score of 0;
    - a table [batch, 4 + classes, n] of centre, size and scores (YOLOv8 and later), or [batch, n, 5 + classes]
      with how sure it is of any object before them (YOLOv5, YOLOX): the best ones that overlap no better one of
      their class by more than .7 or .45, the usual limits of these.

    Of the latter, and of logits, the number of classes that the network knows tells one from the other, and
    no more than `count` boxes are looked for.

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
        return [boxes for one in each for boxes in _named(one, network)]
    leaves = pytree.tree_leaves(output)  # of several the first is the table: others hold masks
    if leaves and _is_floats(leaves[0]) and leaves[0].dim() == 3:
        return _of_table(leaves[0], network, count)
    raise _unknown(output, network)


def recorded_boxes(tape: Tape, network: Network, count: int = 100) -> list[Boxes]:
    """The boxes in the answer on a tape, for each image; see `boxes_in`.

    >>> recorded_boxes(record(network.module, [images]), network)[0].scores
    """
    answer = pytree.tree_map_only(Value, lambda value: value.data, tape.output)
    return boxes_in(answer, network, count)


def _named(found: Mapping[str, Any], network: Network) -> list[Boxes]:
    """torchvision's: one image, or several where all have an axis more."""
    scores: Tensor = found["scores"]
    boxes, labels = found.get("boxes"), found.get("labels")
    fit = (boxes is None or (_is_floats(boxes) and boxes.shape == (*scores.shape, 4))) and (
        labels is None or (isinstance(labels, Tensor) and labels.shape == scores.shape)
    )
    alone = scores.dim() == 1
    # Scores of classes have two axes as well, but no boxes.
    if not fit or not (alone or (scores.dim() == 2 and boxes is not None)):
        raise _unknown(found, network)
    if not _are_scores(scores.detach()):
        raise _no_scores(found, network)
    if alone:
        return [Boxes(scores, boxes, labels)]
    none = [None] * len(scores)
    rows = zip(
        scores, none if boxes is None else boxes, none if labels is None else labels, strict=True
    )
    return [Boxes(*row) for row in rows]


def _of_queries(logits: Tensor, boxes: Tensor, network: Network, count: int) -> list[Boxes]:
    classes = _known(network)
    if not classes or logits.shape[-1] not in {classes, classes + 1}:
        raise InputError(
            f"{network.name} answers with {logits.shape[-1]} scores for each box, and "
            f"{classes or 'no'} class names are known: give classes=[...] (--classes FILE), which tell whether one score means "
            "'nothing'."
        )
    nothing = logits.shape[-1] == classes + 1
    certain = logits.softmax(-1)[..., :-1] if nothing else logits.sigmoid()
    found = []
    for scores, place in zip(certain, boxes, strict=True):
        plain = scores.detach()
        if nothing:
            best, which = plain.max(-1)
            query = best.sort(descending=True, stable=True).indices[:count]
            category = which[query]
        else:
            order = plain.flatten().sort(descending=True, stable=True).indices[:count]
            query, category = order // classes, order % classes
        corners = _corners(place.detach()[query])
        found.append(Boxes(scores[query, category], corners, category, relative=True))
    return found


@dataclass(frozen=True, eq=False)
class _Candidates:
    """A table with a column for each box: its centre and size, and from `first` on the scores of classes."""

    table: Tensor  # [batch, 4 + ..., n]
    first: int
    classes: int
    overlap: float  # boxes of a class that overlap a better one by more go

    @property
    def scores(self) -> Tensor:
        """[batch, classes, n]: with how sure it is of any object, where that stands before them."""
        alone = self.table[:, self.first : self.first + self.classes]
        return alone if self.first == 4 else alone * self.table[:, 4:5]

    @property
    def likely(self) -> bool:
        """Whether these can be scores: shares that aren't all whole, and what is behind them isn't."""
        scores = self.table.detach()[:, 4 : self.first + self.classes]
        rest = self.table.detach()[:, self.first + self.classes :]
        whole = (scores == scores.round()).all(2) & (scores > 0).any(2)  # a column of classes
        behind = rest.numel() and _are_scores(rest)
        return _are_scores(scores) and not bool(whole.any()) and not behind


def _of_table(table: Tensor, network: Network, count: int) -> list[Boxes]:
    classes = _known(network)
    plain = table.detach().float()
    chosen = table.shape[2] == 6 and _are_chosen(plain, classes)
    likely = [way for way in _ways(table, classes) if way.likely] if classes else []
    if chosen and not likely:
        return _of_rows(table, plain)
    if chosen or len(likely) != 1:
        least = min(table.shape[1:])
        raise InputError(
            f"How {network.name} answers, {outline(table)}, can be read in several ways or in none with "
            f"{classes or 'no'} class names: of a YOLOv8 or later it would have {least - 4} classes, of a YOLOv5 "
            f"{least - 5}. Give classes=[...] (--classes FILE), a name for each, or a function of its output as "
            "the target."
        )
    return _of_candidates(likely[0], network, count)


def _known(network: Network) -> int:
    """How many classes a network is known to have: by its configuration, as of transformers, or its names."""
    return len(labels_in(network.module) or network.classes or ())


def _ways(table: Tensor, classes: int) -> list[_Candidates]:
    """How a table may lie: by the number of classes alone."""
    _, height, width = table.shape
    turned = table.transpose(1, 2)
    ways = []
    # Where it is higher, masks or key points are behind the scores.
    if height == 4 + classes or 5 + classes < height < width:
        ways.append(_Candidates(table, 4, classes, 0.7))
    if width == 4 + classes:
        ways.append(_Candidates(turned, 4, classes, 0.7))
    if width == 5 + classes:
        ways.append(_Candidates(turned, 5, classes, 0.45))
    return ways


def _of_candidates(way: _Candidates, network: Network, count: int) -> list[Boxes]:
    scores, places = way.scores, way.table.detach()[:, :4].float()
    if not bool((places[:, 2:] > 0).all()):
        raise InputError(
            f"{network.name} answers with boxes that are not decoded yet (sizes of 0 and less): export it with its "
            "boxes decoded, or give a function of its output as the target, target=lambda output: output[...]."
        )
    relative = bool((places <= 1).all())
    found = []
    for of_image, place in zip(scores, places, strict=True):
        best, which = of_image.detach().float().max(0)
        corners = _corners(place.T)
        apart = which * 2 * corners.abs().max().clamp(min=1)  # classes don't compete
        kept = suppress(corners + apart[:, None], best, way.overlap, count)
        found.append(Boxes(of_image[which[kept], kept], corners[kept], which[kept], relative))
    return found


def _are_chosen(plain: Tensor, classes: int) -> bool:
    """Whether a table [batch, n, 6] holds scores, and then whole numbers of classes that there are."""
    category = plain[..., 5]
    known = not classes or bool((category < classes).all())
    whole = bool(((category == category.round()) & (category >= 0)).all())
    return known and whole and _are_scores(plain[..., 4])


def _of_rows(table: Tensor, plain: Tensor) -> list[Boxes]:
    """The rows of box, score and class; those without a score fill the table up.

    Boxes are corners in pixels, or centre and size in shares (Ultralytics' RT-DETR): all together tell.
    """
    there = plain[..., 4] > 0
    boxes = plain[there][:, :4]
    relative = bool((boxes.abs() <= 1).all())
    crossed = bool((boxes[:, 2:] < boxes[:, :2]).any())  # no corners
    found = []
    for rows, told, kept in zip(table, plain, there, strict=True):
        which = kept.nonzero()[:, 0]
        place: Tensor | None = told[which, :4]
        if crossed and place is not None:
            place = _corners(place)
        elif relative:  # they could be either
            place = None
        found.append(Boxes(rows[which, 4], place, told[which, 5].long(), relative))
    return found


def _corners(boxes: Tensor) -> Tensor:
    """Centre and size, x, y, width, height [n, 4], as x0, y0, x1, y1."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], 1)


def _is_floats(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _are_scores(item: Tensor) -> bool:
    return bool(((item >= 0) & (item <= 1)).all())


def _no_scores(output: Any, network: Network) -> InputError:
    return InputError(
        f"The scores in the answer of {network.name}, {outline(output)}, are not all between 0 and 1: give a "
        "function of its output as the target, target=lambda output: output[...]."
    )


def _unknown(output: Any, network: Network) -> InputError:
    return InputError(
        f"{network.name} is no detector whose answer is known: it is {outline(output)}, with no 'scores' and 'boxes' "
        "for each image and no table of boxes. Ask a classifier for a class; of another detector give a "
        "function of its output as the target, target=lambda output: output[...]."
    )
