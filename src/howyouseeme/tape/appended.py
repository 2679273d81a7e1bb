"""Calls that the network did not make, at the end of a tape: for walks that set out from what they return."""

from __future__ import annotations

import torch
from torch import Tensor

from .values import Tape, Value

__all__ = ["flip", "pick"]


def pick(tape: Tape, source: Value, index: Tensor) -> Value:
    """A new value on the tape, made of the elements of another at flat positions `index`.

    >>> pick(tape, scores, torch.tensor([[281, 285]])).shape
    torch.Size([1, 2])
    """
    return tape.append("hysm.pick", None, (source, index), source.flat[index])


def flip(tape: Tape, source: Value, where: Tensor) -> Value:
    """A new value on the tape: another with its sign changed in the rows where `where` [batch] is true.

    >>> flip(tape, logits, logits.data[:, 0] < 0).data.min() >= 0
    tensor(True)
    """
    sign = torch.where(where, -1.0, 1.0).to(source.data)
    sign = sign.reshape(-1, *[1] * (len(source.shape) - 1))
    times = torch.ops.aten.mul.Tensor
    return tape.append("aten.mul", times, (source, sign), source.data * sign)
