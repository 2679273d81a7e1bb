"""The account of an exact walk: what the inputs and the biases put in is the target."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from howyouseeme.backtrack import Plan, multipliers
from howyouseeme.methods.base import one_hot
from howyouseeme.tape import Call


class Ledger(NamedTuple):
    """The evidence that ended at the inputs, and at the biases; together, the target's value."""

    inputs: float
    biases: float

    @property
    def total(self) -> float:
        return self.inputs + self.biases


def account(plan: Plan, nodes: Tensor) -> Ledger:
    """Where the targets' values come from; `nodes` are flat indices into the plan's start, added up."""
    inputs = biases = 0.0

    def note(_: Call, share: Tensor) -> None:
        nonlocal biases
        biases += float(share.sum())

    for value, multiplier in multipliers(plan, one_hot(plan, nodes), on_bias=note):
        if value.call is None:
            inputs += float((multiplier * value.data).sum())
    return Ledger(inputs, biases)
