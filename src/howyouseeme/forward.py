"""One recorded forward pass of a network, or one sentence about why there is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import HowYouSeeMeError, InputError, ModelError, first_line
from .models import Network
from .tape import Reader, Tape, Value, record

__all__ = ["CannotRunError", "forward"]


class CannotRunError(InputError):
    """The model itself refuses an input."""


def forward(
    network: Network,
    tensors: Sequence[Tensor],
    readers: Sequence[Reader] = (),
    given: str = "",
) -> Tape:
    """The tape of a network's pass over its inputs.

    >>> tape = forward(network, [images])                    # float [batch, channel, height, width]
    >>> recorded_scores(tape).shape
    torch.Size([2, 1000])

    Args:
        tensors: one for each input of the network.
        readers: what `howyouseeme.tape.record` takes.
        given: the shapes that the user gave, if these are but a part of them.

    Raises:
        CannotRunError: the network does not take such inputs.
        ModelError: its answer has NaN or infinity; or what `record` says.
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
    _check_finite(tape, network.module)
    return tape


def _check_finite(tape: Tape, module: nn.Module) -> None:
    """Say where NaN or infinity comes from, if the answer has any."""
    last = [value for value in pytree.tree_leaves(tape.output) if isinstance(value, Value)]
    if all(bool(torch.isfinite(value.data).all()) for value in last):
        return
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"The model's weight {name} contains NaN or infinity: load it again.")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            raise ModelError(f"The model's buffer {name} contains NaN or infinity: load it again.")
    for value in tape.values:
        if not value.data.is_floating_point() or bool(torch.isfinite(value.data).all()):
            continue
        assert value.call is not None
        raise ModelError(
            f"The model's answer contains NaN or infinity, first made by {value.call.describe()}: "
            "is the input normalised as the model expects?"
        )
