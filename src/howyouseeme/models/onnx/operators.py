"""What the operators of ONNX have in common: each is one small function of PyTorch, told by its name.

A function takes the `Attributes` of its node and then its inputs, None for one that is left out,
and returns a tensor, or several where the node has several outputs. It makes the calls that a
PyTorch network would make, for those have rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedCallError

__all__ = ["DTYPES", "OPERATORS", "Attributes", "operator", "padded", "to_tensor"]


# onnx.TensorProto's numbers for the types of elements.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


class Attributes:
    """What a node says besides its inputs, and the opset that tells what it means."""

    def __init__(self, node: Any, opset: int) -> None:
        import onnx  # noqa: PLC0415

        values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        self._values = {name: _plain(value) for name, value in values.items()}
        self.kind, self.opset = node.op_type, opset
        self.outputs = sum(bool(name) for name in node.output)

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def only(self, name: str, *allowed: Any) -> Any:
        """The attribute, whose default is the first of the values that are supported."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise UnsupportedCallError(
                f"{name}={value!r} is not supported, only {', '.join(map(repr, allowed))}."
            )
        return value


Operator = Callable[..., Any]
Function = Callable[..., Any]  # of PyTorch
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Register what a node does: a function of its `Attributes` and its inputs (None if left out)."""

    def register(function: Operator) -> Operator:
        for name in names:
            if name in OPERATORS:
                raise ValueError(f"The ONNX operator {name} is registered already.")
            OPERATORS[name] = function
        return function

    return register


def to_tensor(proto: Any) -> Tensor:
    import onnx  # noqa: PLC0415

    array = onnx.numpy_helper.to_array(proto)
    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        kind = onnx.TensorProto.DataType.Name(proto.data_type)
        raise UnsupportedCallError(f"{proto.name or 'a constant'} holds {kind}.")
    if dtype == torch.bfloat16:
        array = array.astype(np.float32)
    return torch.tensor(array).to(dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return to_tensor(value) if hasattr(value, "raw_data") else value


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    pairs = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return F.pad(x, pairs, value=value) if any(pairs) else x
