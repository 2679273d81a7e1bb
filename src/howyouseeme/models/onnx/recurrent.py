"""ONNX's recurrent layers, by PyTorch's: the same cells, whose gates lie in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedCallError
from .operators import Attributes, operator

__all__: list[str] = []

#: Where each of PyTorch's gates lies among ONNX's, and the activations that are the same.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}


def _in_order(kind: str, weight: Tensor) -> Tensor:
    """The rows of a weight [gates x hidden, ...] in PyTorch's order."""
    gates = weight.chunk(len(_GATES[kind]))
    return torch.cat([gates[place] for place in _GATES[kind]])


@operator("LSTM", "GRU", "RNN")
def _recurrent(
    attributes: Attributes,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peephole: Tensor | None = None,
) -> Any:
    kind, directions = attributes.kind, len(weight)
    if lengths is not None and not bool((lengths == len(x)).all()):
        raise UnsupportedCallError("sequences of several lengths in one batch are not supported.")
    if peephole is not None:
        raise UnsupportedCallError("peepholes are not supported.")
    attributes.only("layout", 0)
    attributes.only("input_forget", 0)
    attributes.only("clip", None)
    direction = attributes.only("direction", "forward", "reverse", "bidirectional")
    names = attributes.get("activations", _ACTIVATIONS.get(kind, ["Tanh"]) * directions)
    one = names[: len(names) // directions]
    wanted = [_ACTIVATIONS[kind]] if kind in _ACTIVATIONS else [["Tanh"], ["Relu"]]
    if names != one * directions or one not in wanted:
        raise UnsupportedCallError(f"activations={names!r} is not supported, only the usual ones.")
    if kind == "GRU" and not attributes.get("linear_before_reset", 0):
        raise UnsupportedCallError(
            "a GRU with linear_before_reset=0 is not supported; PyTorch's and Keras's have 1."
        )
    weights = []
    for at in range(directions):
        weights += [_in_order(kind, weight[at]), _in_order(kind, recurrence[at])]
        if bias is not None:
            weights += [_in_order(kind, half) for half in bias[at].chunk(2)]
    size = attributes.get("hidden_size", recurrence.shape[-1])
    nothing = torch.zeros(directions, x.shape[1], size, dtype=x.dtype, device=x.device)
    states = [nothing if item is None else item for item in (hidden, cell)]
    cells: dict[str, Any] = {"LSTM": torch.lstm, "GRU": torch.gru}
    run = cells.get(kind, torch.rnn_tanh if one == ["Tanh"] else torch.rnn_relu)
    backwards = direction == "reverse"
    y, *last = run(
        *(x.flip(0) if backwards else x, states if kind == "LSTM" else states[0], weights),
        *(bias is not None, 1, 0.0, False, directions == 2, False),
    )
    y = y.flip(0) if backwards else y
    # [sequence, batch, directions x hidden] to ONNX's [sequence, directions, batch, hidden]
    return (y.reshape(*y.shape[:2], directions, size).transpose(1, 2), *last)
