"""One recorded forward pass of a network and what it answers, or one sentence about why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import HowYouSeeMeError, InputError, ModelError, first_line
from .models import Network
from .scores import Found, certainties, logits_of, ranked, recorded_scores
from .tape import Reader, Tape, Value, record

__all__ = ["Answer", "CannotRunError", "answered", "check_finite", "forward"]


class CannotRunError(InputError):
    """The model itself refuses an input."""


def forward(
    network: Network,
    tensors: Sequence[Tensor],
    readers: Sequence[Reader] = (),
    given: str = "",
) -> Tape:
    """The tape of a network's pass over its inputs, to go on from in float32 where that was in float16.

    >>> tape = forward(network, [images])                    # float [batch, channel, height, width]
    >>> recorded_scores(tape).shape
    torch.Size([2, 1000])

    Args:
        tensors: one for each input of the network.
        readers: what `howyouseeme.tape.record` takes.
        given: the shapes that the user gave, if these are but a part of them.

    Raises:
        CannotRunError: the network does not take such inputs.
        ModelError: what `record` says.
    """
    first = tensors[0]
    try:
        tape = record(network.module, tensors, readers=readers)
    except HowYouSeeMeError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        hint = {
            2: " Pictures have the shape [batch, channel, height, width].",
            3: " A single image needs a batch axis: image[None].",
        }.get(first.dim(), "")
        shapes = given or ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CannotRunError(
            f"The model {network.name} can't run on an input of the shape "
            f"{shapes} and type {first.dtype}: {first_line(error)}.{hint}"
        ) from error
    tape.widen()
    return tape


class Answer(NamedTuple):
    """What a classifier answers to one image.

    - `tape`: the pass, and `found`: where on it the scores were logits;
    - `order` [classes]: the classes in the order of their scores, the best first;
    - `chances` [classes]: the probability of each class, 0..1.
    """

    tape: Tape
    found: Found
    order: Tensor
    chances: Tensor


def answered(network: Network, image: Tensor) -> Answer:
    """What a network answers to one image [channel, height, width].

    >>> answered(network, image).order[:5]                   # the five likeliest classes

    Raises:
        InputError, ModelError: it can't be run, or is no classifier; or its probabilities are no numbers.
    """
    tape = forward(network, [image[None]])
    scores = recorded_scores(tape)
    alone = len(scores.shape) == 1  # some squeeze away the batch of a single picture
    if not alone and (scores.shape[:1] != (1,) or scores.shape[2:].numel() != 1):
        raise ModelError(
            f"{network.name} answers one image with scores of the shape {tuple(scores.shape)}, and not with "
            "[1, classes]: it is no classifier."
        )
    found = logits_of(tape, scores)
    table = scores.data.reshape(1, -1)
    chances = certainties(table, found)
    if not bool(torch.isfinite(chances).all()):
        check_finite(tape, network, scores)
    order = ranked(table, found.start.data.reshape(1, -1))
    return Answer(tape, found, order[0], chances[0])


def check_finite(tape: Tape, network: Network, answer: Any) -> None:
    """Say where NaN or infinity comes from, if an answer has any but for classes that the network leaves out.

    Raises:
        ModelError, InputError: it has.
    """
    module = network.module
    known: dict[Value, bool] = {}
    answers = [value for value in pytree.tree_leaves(answer) if isinstance(value, Value)]
    if all(_sound(value, known) for value in answers):
        return
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"The model's weight {name} contains NaN or infinity: load it again.")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not bool((buffer < torch.inf).all()):
            raise ModelError(f"The model's buffer {name} contains NaN or infinity: load it again.")
    for value in tape.values:
        if not value.data.is_floating_point() or _sound(value, known):
            continue
        if value.call is None:
            raise InputError(
                f"The input overflows where it is made {torch.float16 if value.rounded else value.dtype}, as {network.name} takes it: give "
                "smaller numbers, or the model in float32, model.float()."
            )
        raise ModelError(
            f"The model's answer contains NaN or infinity, first made by {value.call.describe()}: "
            "is the input normalised as the model expects?"
        )


def _sound(value: Value, known: dict[Value, bool]) -> bool:
    """Whether it holds finite numbers, or minus infinity where a constant of the network has put it: a mask."""
    if value not in known:
        known[value] = bool(torch.isfinite(value.data).all()) or _masked(value, known)
    return known[value]


def _masked(value: Value, known: dict[Value, bool]) -> bool:
    """Whether all that is not finite in it is minus infinity, by a mask and no overflow of what it was made of."""
    if value.call is None or value.data.is_complex() or not bool((value.data < torch.inf).all()):
        return False
    constants = pytree.tree_leaves((value.call.args, value.call.kwargs))
    sources = value.call.inputs
    there = any(map(_masks, [*constants, *(source.data for source in sources)]))
    return there and all(_sound(source, known) for source in sources)


def _masks(item: Any) -> bool:
    """Whether something is or holds minus infinity."""
    if isinstance(item, Tensor):
        return bool((item == -torch.inf).any())
    return isinstance(item, float) and item == -torch.inf
