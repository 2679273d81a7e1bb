"""Where the class scores are in a model's output, and what they were before a softmax or sigmoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError, ModelError
from .rules import Refusal, find_rule
from .tape import Tape, Value
from .tape.appended import pick

__all__ = [
    "Found",
    "certainties",
    "detection_scores",
    "logits_of",
    "outline",
    "ranked",
    "recorded_scores",
    "scores_in",
]


def scores_in(output: Any) -> Any:
    """Where in a model's output the class scores are: the output itself, its 'logits' or 'out', or all floats that it has.

    >>> scores_in({"aux": aux, "out": scores}) is scores

    Raises:
        InputError: it has several parts, of which none is named so.
        ModelError: it has no tensors, but numbers.
    """
    given = output
    if hasattr(output, "_asdict"):  # a named tuple
        output = output._asdict()
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "out") if name in output]
        output = named[0] if named else list(output.values())
    if isinstance(output, Sequence):  # labels, places and the like are no scores
        tensors = [one for one in output if isinstance(one, (Value, Tensor))]
        floats = [one for one in tensors if one.dtype.is_floating_point]
        likely = floats or tensors
        output = likely[0] if len(likely) == 1 else output
    if isinstance(output, (Value, Tensor)):
        return output
    leaves = pytree.tree_leaves(given)
    if any(isinstance(leaf, _OUTSIDE) for leaf in leaves) and not any(
        isinstance(leaf, (Value, Tensor)) for leaf in leaves
    ):
        raise ModelError(
            f"The model's answer leaves PyTorch: it is {outline(given)}. Only what PyTorch computes can be "
            "walked back through: let the model return tensors."
        )
    raise InputError(
        f"Which part of the model's output are the class scores? It is {outline(given)}: give a "
        "function as the target, target=lambda output: output[...], or one of howyouseeme.targets, such as "
        "region for a segmenter and box(0), or --box 0, for a detector; or explain a module that returns the "
        "class scores alone."
    )


#: What models return that leave PyTorch.
_OUTSIDE = (np.ndarray, np.generic, float, int)


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
    if not (found.is_floating_point() or found.is_complex()):
        kind = "yes and no" if found.dtype == torch.bool else "whole numbers, as an argmax gives"
        raise ModelError(
            f"The model's output is no scores, but {kind}: nothing can be walked back through these. Let the "
            "model return the scores that they were made from."
        )
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


class Found(NamedTuple):
    """Scores, traced back to where they were logits: elements of `start`, and what they became."""

    start: Value
    nodes: Tensor  # flat indices into the start, one for each score
    squashed_by: str = ""  # the call nearest to the scores, or none
    told: Tensor | None = None  # what it made of each [scores], probabilities but for log_softmax

    @property
    def exclusive(self) -> bool:
        """Whether the scores exclude each other, as those of a softmax and logits do."""
        return self.squashed_by != "aten.sigmoid"


def _before_squashing(scores: Value, nodes: Tensor, *, shifted: bool = True) -> Found:
    """Where elements of the scores were before a softmax or sigmoid; there, if there was none.

    A softmax sets every class against all others, and a sigmoid that is sure of itself is flat. What
    follows them may only move each of its elements or let it grow: a choice, a clamp, a logarithm, a
    product with a constant; without `shifted`, nothing that moves where yes and no part.
    """
    found = Found(scores, nodes)
    at: tuple[Value, Tensor] | None = scores, nodes
    while at is not None and (call := at[0].call) is not None:
        value, here = at
        if call.name in _SQUASHING:
            squashed: Value = call.args[0]
            dims = len(squashed.shape)
            if (
                call.name != "aten.sigmoid"
                and squashed.shape[call.args[1] % dims + 1 :].numel() != 1
            ):
                break  # over something else than classes
            told = value.flat[here] if found.told is None else found.told
            found = Found(squashed, here, found.squashed_by or call.name, told)
            at = squashed, here
        else:
            at = _grown_from(value, here, shifted)
    return found


_SQUASHING = {"aten._softmax", "aten._safe_softmax", "aten._log_softmax", "aten.sigmoid"}

#: What may stand in the place of a score.
_MASKING = {"aten.masked_fill", "aten.where"}

#: By what a class can be left out: its logit becomes minus infinity.
_LEAVING_OUT = _MASKING | {"aten.add", "aten.sub"}

#: What never falls, and keeps the order of what is 0 or more. A factor may be negative, as its slope tells.
_GROWING = {
    f"aten.{name}"
    for name in "_to_copy add div exp log log10 log1p log2 logit mul pow round sqrt sub".split()
}

#: What never falls, and leaves where yes and no part.
_BOUNDING = {"aten.clamp", "aten.clamp_max", "aten.clamp_min"}


def _grown_from(value: Value, nodes: Tensor, shifted: bool) -> tuple[Value, Tensor] | None:
    """What alone these elements were made of, each of one and growing with it, and where that is."""
    call = value.call
    assert call is not None
    if call.name in _LEAVING_OUT and bool((value.flat[nodes] == -torch.inf).any()):
        return None  # classes that are left out are nobody's rivals
    if call.name in _MASKING and shifted:  # of a score that was put down, what it would have been
        masked = [v for v in call.inputs if v.data.is_floating_point()]
        if len(masked) == 1 and masked[0].shape == value.shape:
            down = value.flat[nodes] <= masked[0].flat[nodes]
            return (masked[0], nodes) if bool(down.all()) else None
    find = find_rule(call.name)
    try:
        step = find(call, value) if find is not None else None
    except Refusal:
        step = None
    if step is None:
        return None
    growing = call.name in _BOUNDING or (
        call.name in _GROWING and len(step.links) == 1 and (shifted or step.bias is None)
    )
    for source, link in step.links:
        if not link.one_to_one:
            continue
        edges = link.edges(nodes)
        if bool((edges.index < 0).any()) or bool((edges.weight < 0).any()):
            continue
        if growing or torch.equal(value.flat[nodes], source.flat[edges.index]):
            return source, edges.index
    return None


def logits_of(tape: Tape, scores: Value, batch: int = 1) -> Found:
    """The table of scores [batch, classes], of any shape, before a softmax or sigmoid at the end.

    All its nodes are the scores'. Of classes that were chosen from others, the table is a new one, of those
    alone. Of one that was chosen from those of a softmax it is the logarithm of the odds, log p / (1 - p), as
    before a sigmoid.

    >>> found = logits_of(tape, recorded_scores(tape))
    >>> found.squashed_by                                          # 'aten._softmax', or ''
    """
    single = scores.numel == batch
    nodes = torch.arange(scores.numel, device=scores.device)
    found = _before_squashing(scores, nodes, shifted=not single)
    start = found.start
    if found.squashed_by and found.exclusive and single:
        start = _odds(tape, found)
    elif start.numel != scores.numel or not torch.equal(found.nodes, nodes):
        start = pick(tape, start, found.nodes.reshape(scores.shape))
    return found._replace(start=start, nodes=nodes)


def _odds(tape: Tape, found: Found) -> Value:
    """log p / (1 - p) of elements of a softmax [n]: their logits less the logsumexp of all others."""
    rows = _rows(found.start, found.nodes)
    others = rows[rows != found.nodes[:, None]].reshape(len(rows), -1)
    one, rest = (pick(tape, found.start, index) for index in (found.nodes, others))
    aten = torch.ops.aten
    together = tape.append(
        "aten.logsumexp", aten.logsumexp.default, (rest, [1]), rest.data.logsumexp(1)
    )
    return tape.append("aten.sub", aten.sub.Tensor, (one, together), one.data - together.data)


def _rows(start: Value, nodes: Tensor) -> Tensor:
    """The flat indices [n, classes] of all that was in one softmax with each node, over the last axis."""
    classes = next((size for size in reversed(start.shape) if size > 1), 1)
    first = torch.div(nodes, classes, rounding_mode="floor") * classes
    return first[:, None] + torch.arange(classes, device=nodes.device)


def ranked(scores: Tensor, logits: Tensor) -> Tensor:
    """The classes [batch, classes] in the order of their scores, the best first; of equal ones by logits.

    >>> ranked(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[5.0, 30.0, 40.0]]))
    tensor([[2, 1, 0]])
    """
    first = logits.sort(dim=1, descending=True, stable=True).indices
    order = scores.gather(1, first).sort(dim=1, descending=True, stable=True).indices
    return first.gather(1, order)


def detection_scores(tape: Tape, scores: Value, nodes: Tensor) -> tuple[Value, Tensor, bool]:
    """Where scores [batch] of detections were logits, at which nodes, and whether of a softmax."""
    start, found, squashed_by, _ = _before_squashing(scores, nodes)
    if squashed_by in {"", "aten.sigmoid"}:
        return start, found, False
    # A softmax has one row of classes for each detection: only theirs stand against each other.
    picked = pick(tape, start, _rows(start, found))
    classes = picked.shape[1]
    return picked, nodes * classes + found % classes, True


def certainties(scores: Tensor, found: Found, *, multilabel: bool = False) -> Tensor:
    """The probability of each class, 0..1 [batch, classes], from what the model says: these, or logits.

    >>> certainties(scores, found)[:, 281]
    """
    scores = scores.float()
    if scores.shape[1] > 1 and bool((scores >= 0).all()):
        total = scores.sum(1)
        if torch.allclose(total, torch.ones_like(total), atol=1e-3):
            return scores
    if found.told is not None:
        told = found.told.float().reshape(scores.shape)
        return told.exp() if found.squashed_by == "aten._log_softmax" else told
    return scores.sigmoid() if multilabel or scores.shape[1] == 1 else scores.softmax(1)
