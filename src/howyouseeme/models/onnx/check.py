"""An imported network, held against onnxruntime."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelError, UnsupportedCallError, first_line
from .graph import OnnxModule, channels_last, operators_in, said_shape
from .operators import DTYPES

__all__ = ["QUANTISED", "compare", "dtype_of", "shape_of"]

#: Names of operators on numbers of few bits.
QUANTISED = re.compile("Quant|QLinear|Integer|QGemm|QAttention")

#: Operators that choose: where two scores are nearly the same, rounding may turn their choice.
_CHOOSING = {
    *("ArgMax", "ArgMin", "Compress", "Hardmax", "If", "Loop"),
    *("NonMaxSuppression", "NonZero", "TopK"),
}

_TOLERANCE = 1e-3  # of the largest output
_QUANTUM = (
    0.05  # the same where numbers are rounded to few bits: a hair's breadth may turn one over
)

#: Heights and widths that are tried, one after another, where the file leaves them open: some networks
#: take but one height all the same (that of a line of text, 48).
_SIDES = (224, 48, 32, 640)


def compare(module: OnnxModule, model: Any, path: Path) -> None:
    """Hold the module against onnxruntime, on a fixed random input; a difference is an error.

    >>> compare(module, onnx.load("model.onnx"), Path("model.onnx"))

    Where a network chooses among its answers, as detectors do, both may choose otherwise for no more than
    a rounding. Then every node is given what onnxruntime gave it, and has to do the same with that.

    Raises:
        ModelError: they differ, or the file doesn't run.
        UnsupportedCallError: an operator is used in a way that isn't supported.
    """
    try:
        import onnxruntime  # noqa: F401, PLC0415
    except ImportError:
        warnings.warn(
            f"{path} is not checked against onnxruntime, which is not installed: "
            "pip install onnxruntime",
            stacklevel=4,
        )
        return
    feeds, theirs = _answered(module, model, path)
    try:
        with torch.no_grad():
            ours = module(*feeds.values())
    except UnsupportedCallError as error:
        raise UnsupportedCallError(f"{path}: {error}") from error
    except Exception as error:
        raise _cannot_run(path, feeds, error) from error
    operators = operators_in(model.graph)
    tolerance = _QUANTUM if any(map(QUANTISED.search, operators)) else _TOLERANCE
    answers = ours.values() if isinstance(ours, dict) else [ours]
    for name, mine, other in zip(module.outputs, answers, theirs, strict=False):
        if not _same(mine, other, tolerance):
            try:
                odd = _odd_node(module, model, feeds, tolerance)
            except Exception as error:  # of more than 2 GB, say
                raise _differs(path, name, "") from error
            if odd is None and operators & _CHOOSING:
                return
            raise _differs(path, name, "" if odd is None else f", the first at the node {odd}")


def _answered(module: OnnxModule, model: Any, path: Path) -> tuple[dict[str, Tensor], list[Any]]:
    """A random input of a size that the network takes, and what onnxruntime answers to it."""
    given = [one for one in model.graph.input if one.name in module.inputs]
    sides = _SIDES if any(shape_of(one, 1) != shape_of(one, 2) for one in given) else _SIDES[:1]
    failed: ModelError | None = None
    for side in sides:
        generator = torch.Generator().manual_seed(0)
        feeds = {
            one.name: torch.rand(shape_of(one, side), generator=generator).to(dtype_of(one))
            for one in given
        }
        try:
            return feeds, _run(str(path), feeds)
        except Exception as error:  # onnxruntime's have no common base
            failed = failed or _cannot_run(path, feeds, error)
    assert failed is not None
    raise failed


def _differs(path: Path, name: str, where: str) -> ModelError:
    return ModelError(
        f"{path} is not imported as onnxruntime runs it, for the output {name} differs{where}; "
        "please report it."
    )


def _cannot_run(path: Path, feeds: Mapping[str, Tensor], error: Exception) -> ModelError:
    shapes = [list(one.shape) for one in feeds.values()]
    return ModelError(f"{path} does not run on inputs of {shapes} ({first_line(error)}).")


def _run(model: str | bytes, feeds: Mapping[str, Tensor]) -> list[Any]:
    """What onnxruntime answers, by the model as it is written, and not as it would be optimised."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    answers: list[Any] = session.run(None, {name: one.numpy() for name, one in feeds.items()})
    return answers


def _odd_node(
    module: OnnxModule, model: Any, feeds: Mapping[str, Tensor], tolerance: float
) -> str | None:
    """The first node that gives something else than onnxruntime's does, from what that one took."""
    import onnx  # noqa: PLC0415

    steps = list(module.steps())
    names = [name for node in steps for name in node.gives if name]
    told = onnx.ModelProto()
    told.CopyFrom(model)
    del told.graph.output[:]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = dict(zip(names, _run(told.SerializeToString(), feeds), strict=True))
    known = {**module.constants(), **feeds, **{name: _tensors(one) for name, one in values.items()}}
    for node in steps:
        with torch.no_grad():
            results = node.results(*(known[name] for name in node.takes))
        for name, mine in zip(node.gives, results, strict=False):
            if name and not _same(mine, values[name], tolerance):
                return str(name)
    return None


def _tensors(item: Any) -> Any:
    return (
        [_tensors(one) for one in item]
        if isinstance(item, list)
        else torch.from_numpy(np.asarray(item))
    )


def _same(mine: Any, theirs: Any, tolerance: float) -> bool:
    """Whether two answers, or lists of them, differ by no more than a share of the largest number."""
    if isinstance(theirs, list) or isinstance(mine, list):
        return len(mine) == len(theirs) and all(
            _same(one, other, tolerance) for one, other in zip(mine, theirs, strict=True)
        )
    expected = _tensors(theirs).double()
    finite = expected[expected.isfinite()].abs()
    scale = max(float(finite.max()), 1e-6) if finite.numel() else 1.0
    return mine.shape == expected.shape and bool(
        torch.isclose(mine.double(), expected, 0, tolerance * scale, equal_nan=True).all()
    )


def shape_of(value: Any, side: int = _SIDES[0]) -> list[int]:
    """A shape that the file allows: 1 for an open batch, and `side` for open axes of space."""
    said = said_shape(value)
    places = range(1, 3) if channels_last(said) else range(2, len(said))
    return [size or (side if axis in places else 1) for axis, size in enumerate(said)]


def dtype_of(value: Any) -> torch.dtype:
    """The type of an input's elements."""
    return DTYPES[value.type.tensor_type.elem_type]
