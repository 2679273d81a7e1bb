"""Operators of ONNX that make constants, and tell shapes and types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedCallError
from .operators import DTYPES, Attributes, operator

__all__: list[str] = []


@operator("Constant")
def _constant(attributes: Attributes) -> Tensor:
    for name, dtype in {
        "value": None,
        "value_float": torch.float32,
        "value_floats": torch.float32,
        "value_int": torch.int64,
        "value_ints": torch.int64,
    }.items():
        value = attributes.get(name)
        if value is not None:
            return value if dtype is None else torch.tensor(value, dtype=dtype)
    raise UnsupportedCallError("it is neither a tensor nor a number.")


@operator("ConstantOfShape")
def _constant_of_shape(attributes: Attributes, shape: Tensor) -> Tensor:
    value = attributes.get("value")
    filled = torch.zeros(1) if value is None else value
    return filled.reshape(()).to(shape.device).expand(shape.tolist()).clone()


@operator("Shape")
def _shape(attributes: Attributes, x: Tensor) -> Tensor:
    sides = list(x.shape)[attributes.get("start", 0) : attributes.get("end")]
    return torch.tensor(sides, dtype=torch.int64, device=x.device)


@operator("Size")
def _size(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), device=x.device)


@operator("Range")
def _range(attributes: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    numbers = (one.item() for one in (start, limit, delta))
    return torch.arange(*numbers, dtype=start.dtype, device=start.device)


@operator("Cast")
def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    dtype = DTYPES.get(attributes.get("to"))
    if dtype is None:
        raise UnsupportedCallError(f"the type {attributes.get('to')} is not supported.")
    return x.to(dtype)


@operator("CastLike")
def _cast_like(attributes: Attributes, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("Dropout")
def _dropout(
    attributes: Attributes, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> Any:
    if training is not None and training.item():
        raise UnsupportedCallError("it is in training mode.")
    return x if attributes.outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))
