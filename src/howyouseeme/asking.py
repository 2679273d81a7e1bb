"""What a target asks for: the element of the output that a walk sets out from, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import targets
from .detectors import recorded_boxes
from .errors import HowYouSeeMeError, InputError, first_line
from .models import Network
from .numbers import plain
from .regions import Box
from .scores import certainties, detection_scores, logits_of, outline, ranked, recorded_scores
from .tape import Reader, Tape, Value, opened
from .tape.appended import flip
from .targets import Target as NamedTarget

__all__ = ["Asked", "Asker", "Rank", "Target", "check_read", "one_each", "targets_of"]

#: What can be asked for: nothing (the top class), a class, a box, region, neuron or channel
#: (`howyouseeme.targets`), a function of the output, or one of these for each sample.
Target = (
    None
    | int
    | str
    | NamedTarget
    | Callable[[Any], Any]
    | Sequence[int | str | NamedTarget | Callable[[Any], Any] | None]
    | Tensor
    | np.ndarray
)


class Rank:
    """The class of a rank, 0 being the top one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def among(self, count: int) -> int:
        """The rank, if there are so many classes."""
        if self.rank >= count:
            raise InputError(
                f"There is no class of rank {self.rank + 1}: the model has {count} class"
                f"{'' if count == 1 else 'es'}."
            )
        return self.rank


def targets_of(
    target: Any = None,
    *,
    top: int | None = None,
    versus: int | str | None = None,
    box: int | None = None,
) -> list[Any]:
    """What a question of the command line or the page asks `Explainer.many` for.

    >>> explainer.many("photo.jpg", targets_of("tabby", versus="lynx"))

    That is the `top` so many classes; or the target against the class `versus`; or the box of a number; else
    the target, which is any that a call takes.
    """
    if top is not None:
        return [Rank(rank) for rank in range(top)]
    if versus is not None:
        return [targets.versus(target, versus)]
    return [target if box is None else targets.box(box)]


class Asked(NamedTuple):
    """A target, found on a tape: where the walk sets out, and what is known about each sample's."""

    start: Value
    nodes: Tensor  # [batch], flat indices into the start
    classes: tuple[int | None, ...]
    probability: tuple[float | None, ...]
    exclusive: bool = True  # softmax, not sigmoids
    labels: tuple[str, ...] | None = None  # where there is no class that has one
    boxes: tuple[Box | None, ...] | None = None  # asked about, in pixels of the input
    scores: tuple[float, ...] = ()  # what the network says to it, by sample


@dataclass(frozen=True)
class Asker:
    """Finds what targets ask for in what a network answered.

    >>> asker = Asker(network, multilabel=False)
    >>> tape = record(network.module, [images], readers=[asker.reader(t) for t in targets if callable(t)])
    >>> asked = asker.find(tape, target, iter(tape.reads), len(images))
    """

    network: Network
    multilabel: bool = False

    def reader(self, target: Any) -> Reader:
        """The target function, with an error that says what it was given."""
        named = target if isinstance(target, NamedTarget) else None

        def read(output: Any) -> Any:
            try:
                return target(output) if named is None else named.read(opened(output), self.network)
            except HowYouSeeMeError:
                raise
            except Exception as error:
                raise InputError(
                    f"The target function failed with {type(error).__name__}: {first_line(error)}. "
                    f"It was given the model's output: {outline(output)}."
                ) from error

        return Reader(read, None if named is None else named.module(self.network))

    def find(self, tape: Tape, target: Any, reads: Iterator[Any], batch: int) -> Asked:
        """Where the walk sets out for a target; what a function made of the output is in `reads`."""
        found = self._found(tape, target, reads, batch)
        told = found.start.data.reshape(-1)
        scores = told.expand(batch) if len(told) == 1 else told[found.nodes]  # one for all of them
        if bool((scores == -torch.inf).any()):
            i = int(scores.argmin())
            raise InputError(
                f"{self.network.name} leaves {self.label(found.classes[i]) or 'what is asked for'} out: its score "
                "is minus infinity. Ask for a class that it does not mask."
            )
        return found._replace(scores=tuple(scores.tolist()))

    def _found(self, tape: Tape, target: Any, reads: Iterator[Any], batch: int) -> Asked:
        if callable(target):
            read = next(reads)
            if not _is_whole(read):
                start, nodes = read, torch.arange(batch, device=read.device)
                labels, exclusive = ("",) * batch, True
                boxes = None
                certainty: tuple[float | None, ...] = (None,) * batch
                if isinstance(target, NamedTarget):
                    labels = self._labels(target, tape, batch)
                    if target.box is not None:
                        labels, boxes = self._boxes(target.box, tape)
                    if target.score and read.numel == batch:
                        certainty = tuple(read.data.reshape(-1).tolist())
                if read.numel == batch:
                    start, nodes, exclusive = detection_scores(tape, read, nodes)
                return Asked(start, nodes, (None,) * batch, certainty, exclusive, labels, boxes)
            target = one_each(read, batch)
        scores = recorded_scores(tape)
        # Some networks leave the last convolution's axes of one place: [batch, classes, 1, 1].
        places = tuple(scores.shape[2:])
        # Others squeeze away the batch of a single picture.
        alone = batch == 1 and len(scores.shape) == 1 and tape.inputs[0].data.dim() > 3
        # Or all axes but that of the images, where there is a single score.
        single = scores.numel == batch and len(scores.shape) < 2
        if not (alone or single) and (
            tuple(scores.shape[:1]) != (batch,) or places not in ((), (1, 1))
        ):
            raise InputError(
                f"The model's output has the shape {tuple(scores.shape)} for {batch} image(s), not "
                "[batch, classes]: is the input [batch, channel, height, width]? Of a detector ask for a box, "
                "howyouseeme.targets.box(0) or --box 0 (`howyouseeme detect --own` lists them); for another kind of output, give a function as the "
                "target: target=lambda output: output[...]."
            )
        found = logits_of(tape, scores, batch)
        told = scores.data.reshape(batch, -1)
        certain = certainties(told, found, multilabel=self.multilabel)
        if scores.numel == batch:
            return self._yes_or_no(tape, target, found.start, certain[:, 0].tolist())
        classes = self._classes(told, found.start.data.reshape(told.shape), target)
        rows = torch.arange(batch, device=told.device)
        return Asked(
            found.start,
            rows * told.shape[1] + classes,
            tuple(classes.tolist()),
            tuple(certain[rows, classes].tolist()),
            found.exclusive and not (self.multilabel and not found.squashed_by),
        )

    def _labels(self, target: NamedTarget, tape: Tape, batch: int) -> tuple[str, ...]:
        """That of a `howyouseeme.targets` for each image, with the names of the classes in it."""
        names = {
            str(i): self.label(one if isinstance(one, int) else self.network.class_index(one))
            for i, one in enumerate(target.classes)
        }

        def filled(answer: str) -> str:
            known = {**names, "answer": answer}
            return re.sub(r"\{(\w+)\}", lambda at: known.get(at[1], at[0]), target.label)

        if "{answer}" not in target.label:
            return (filled(""),) * batch
        likeliest = recorded_scores(tape).data.reshape(batch, -1).argmax(1)
        return tuple(filled(self.label(top)) for top in likeliest.tolist())

    def _boxes(self, index: int, tape: Tape) -> tuple[tuple[str, ...], tuple[Box | None, ...]]:
        """What the box of a number is called in each image, and where it lies."""
        pictures = [value.shape[2:] for value in tape.inputs if len(value.shape) == 4]
        size = pictures[0] if pictures else None
        labels: list[str] = []
        boxes: list[Box | None] = []
        for found in recorded_boxes(tape, self.network, index + 1):
            name = found.name(index, self.network)
            labels.append(f"box {index}" if name is None else f"{name}, box {index}")
            boxes.append(found.place(index, size))
        return tuple(labels), tuple(boxes)

    def _yes_or_no(self, tape: Tape, target: Any, logits: Value, certain: list[float]) -> Asked:
        """The same where there is but one score: below 0 the answer is no, and that is explained.

        Two class names are those of no and yes. With one, or none, the class itself can be asked for too.
        """
        table = logits.data.reshape(-1, 1)
        batch, names = len(table), self.network.classes
        two = names is not None and len(names) == 2
        if names is not None and not two:
            self._classes(table, table, 0)  # refuses more names than these
        if target is None or isinstance(target, Rank):
            rank = 0 if target is None else target.among(2 if two else 1)
            yes = (table[:, 0] >= 0) ^ (rank == 1)
        elif two:
            wanted = target if isinstance(target, list) else [target] * batch
            yes = torch.tensor([self._class(item, 2) == 1 for item in wanted], device=table.device)
        else:
            yes = self._classes(table, table, target) == 0
        labels, classes = [], []
        for answer in yes.tolist():
            classes.append(int(answer) if two else 0 if answer else None)
            labels.append(self.label(classes[-1]) if two or answer else f"not {self.label(0)}")
        start = logits if bool(yes.all()) else flip(tape, logits, ~yes)
        return Asked(
            start,
            torch.arange(batch, device=table.device),
            tuple(classes),
            tuple(p if answer else 1 - p for p, answer in zip(certain, yes.tolist(), strict=True)),
            False,
            tuple(labels),
        )

    def _classes(self, scores: Tensor, logits: Tensor, target: Any) -> Tensor:
        """Each sample's class [batch], given its scores [batch, classes]; logits rank what these hold equal."""
        batch, count = scores.shape
        names = self.network.classes
        if names is not None and len(names) != count:
            raise InputError(
                f"{self.network.name} has {len(names)} class names and {count} scores: "
                "give classes=[...] with one name for each."
            )
        if isinstance(target, Rank):
            return ranked(scores, logits)[:, target.among(count)]
        if target is None:
            return ranked(scores, logits)[:, 0]
        wanted = target if isinstance(target, list) else [target] * batch
        likeliest = ranked(scores, logits)[:, 0].tolist() if None in wanted else [0] * batch
        found = [
            top if item is None else self._class(item, count)
            for item, top in zip(wanted, likeliest, strict=True)
        ]
        return torch.tensor(found, device=scores.device)

    def _class(self, name: Any, count: int) -> int:
        name = plain(name)
        if isinstance(name, bool) or not isinstance(name, (int, str)):
            raise InputError(
                f"A target is None, a class (index or name), one for each image, or a function of the "
                f"model's output, not {name!r}."
            )
        return self.network.class_index(name, count)

    def label(self, index: int | None) -> str:
        """The name of a class; none where no class was asked for."""
        if index is None:
            return ""
        names = self.network.classes
        return f"class {index}" if names and index >= len(names) else self.network.label(index)


def one_each(target: Any, batch: int) -> Any:
    """Several classes as a list, one for each sample; anything else as it is."""
    target = plain(target)
    if not isinstance(target, Sequence) or isinstance(target, str):
        return target
    if len(target) != batch:
        raise InputError(
            f"There are {len(target)} targets for {batch} image(s): give one for each, or one for all."
        )
    return list(target)


def _is_whole(item: Any) -> bool:
    """True for a class index or a tensor of them."""
    if isinstance(item, Tensor):
        return not (item.is_floating_point() or item.is_complex() or item.dtype == torch.bool)
    return isinstance(item, int) and not isinstance(item, bool)


def check_read(read: Any, batch: int) -> None:
    """Whether a target function returned something that can be explained."""
    if _is_whole(read) or (isinstance(read, Value) and read.numel in {1, batch}):
        if isinstance(read, Value) and not bool(torch.isfinite(read.data).all()):
            raise InputError("The target function returned NaN or infinity for this input.")
        return
    found = f"a tensor {list(read.shape)}" if isinstance(read, (Value, Tensor)) else repr(read)
    constant = " that does not depend on the input" if isinstance(read, Tensor) else ""
    raise InputError(
        "A target function returns elements of the model's output, one for each image or one alone: "
        f"for {batch} image(s) this one returned {found}{constant}. "
        "For example: target=lambda output: output[:, 281]."
    )
