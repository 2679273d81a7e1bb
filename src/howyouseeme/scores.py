"""Where the class scores are in a model's output, and what they were before a softmax or sigmoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, ModelError
from .rules import Refusal, find_rule
from .rules.movement import pick
from .tape import Tape, Value

__all__ = [
    "certainties",
    "detection_scores",
    "logits_of",
    "outline",
    "recorded_scores",
    "scores_in",
]


def scores_in(output: Any) -> Any:
    """Where in a model's output the class scores are: the output itself, its 'logits' or 'out', or all it has.

    >>> scores_in({"aux": aux, "out": scores}) is scores

    Raises:
        InputError: it has several parts, of which none is named so.
    """
    given = output
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "out") if name in output]
        output = named[0] if named else list(output.values())
    if isinstance(output, Sequence) and len(output) == 1:
        output = output[0]
    if isinstance(output, (Value, Tensor)):
        return output
    raise InputError(
        f"Which part of the model's output are the class scores? It is {outline(given)}: give a "
        "function as the target, target=lambda output: output[...], or one of howyouseeme.targets, such as "
        "region for a segmenter and box for a detector."
    )


def recorded_scores(tape: Tape) -> Value:
    """The class scores on a tape.

    >>> recorded_scores(record(model, [images])).shape
    torch.Size([2, 1000])

    Raises:
        InputError, ModelError: there are none, or they do not depend on the input.
    """
    found = scores_in(tape.output)
    if isinstance(found, Value):
        return found
    raise ModelError(
        "The model's output does not depend on its input through recorded calls: is it computed "
        "outside of PyTorch (numpy), or from a constant?"
    )


def outline(output: Any) -> str:
    """The structure of an output: tensor [2, 10]"""
    if isinstance(output, (Tensor, Value)):
        return f"tensor {list(output.shape)}"
    if isinstance(output, Mapping):
        inside = ", ".join(f"{name!r}: {outline(item)}" for name, item in output.items())
        return f"{type(output).__name__} {{{inside}}}"
    if isinstance(output, (list, tuple)):
        return f"{type(output).__name__} ({', '.join(map(outline, output))})"
    return type(output).__name__


def _before_squashing(scores: Value, nodes: Tensor) -> tuple[Value, Tensor, str]:
    """Where scores were before a softmax or sigmoid, and its call's name; '' if there was none.

    A softmax sets every class against all others, and a sigmoid that is sure of itself is flat.
    Between the two the scores may only have been moved, or clamped.
    """
    start, chosen, squashed_by = scores, nodes, ""
    found: tuple[Value, Tensor] | None = scores, nodes
    while found is not None and (call := found[0].call) is not None:
        value, nodes = found
        if call.name in _SQUASHING:
            squashed: Value = call.args[0]
            dims = len(squashed.shape)
            if (
                call.name != "aten.sigmoid"
                and squashed.shape[call.args[1] % dims + 1 :].numel() != 1
            ):
                break  # over something else than classes
            start, chosen, squashed_by = squashed, nodes, squashed_by or call.name
            found = start, nodes
        else:
            found = _moved_from(value, nodes)
    return start, chosen, squashed_by


_SQUASHING = {"aten._softmax", "aten._log_softmax", "aten.sigmoid"}


def _moved_from(value: Value, nodes: Tensor) -> tuple[Value, Tensor] | None:
    """The value that these elements were only moved (or clamped) from, and where they are in it."""
    call = value.call
    assert call is not None
    find = find_rule(call.name)
    try:
        step = find(call, value) if find is not None else None
    except Refusal:
        step = None
    for source, link in step.links if step is not None else ():
        if not link.one_to_one:
            continue
        index = link.edges(nodes).index
        if bool((index < 0).any()):
            continue
        if call.name == "aten.clamp" or torch.equal(value.flat[nodes], source.flat[index]):
            return source, index
    return None


def logits_of(scores: Value) -> tuple[Value, str]:
    """The table of scores [batch, classes] before a softmax or sigmoid at the end, and its call.

    >>> logits, squashed_by = logits_of(recorded_scores(tape))     # 'aten._softmax', or ''
    """
    nodes = torch.arange(scores.numel, device=scores.device)
    start, found, squashed_by = _before_squashing(scores, nodes)
    same = start.numel == scores.numel and torch.equal(found, nodes)
    return (start, squashed_by) if same else (scores, "")


def detection_scores(tape: Tape, scores: Value, nodes: Tensor) -> tuple[Value, Tensor, bool]:
    """Where scores [batch] of detections were logits, at which nodes, and whether of a softmax."""
    start, found, squashed_by = _before_squashing(scores, nodes)
    if squashed_by in {"", "aten.sigmoid"}:
        return start, found, False
    # A softmax has one row of classes for each detection: only theirs stand against each other.
    classes = next((size for size in reversed(start.shape) if size > 1), 1)
    first = torch.div(found, classes, rounding_mode="floor") * classes
    rows = first[:, None] + torch.arange(classes, device=found.device)
    picked = pick(tape, start, rows)
    return picked, nodes * classes + found % classes, True


def certainties(scores: Tensor, squashed_by: str) -> Tensor:
    """The probability of each class, 0..1 [batch, classes], from what the model says: these, or logits.

    >>> certainties(scores, squashed_by)[:, 281]
    """
    if squashed_by == "aten._log_softmax":
        return scores.exp()
    told = bool((scores >= 0).all()) and torch.allclose(
        scores.sum(1), torch.ones_like(scores[:, 0]), atol=1e-3
    )
    if squashed_by or (scores.shape[1] > 1 and told):
        return scores
    return scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
