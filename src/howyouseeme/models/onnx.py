"""Networks in ONNX files: one small PyTorch function for each operator.

    network = load_onnx(Path("model.onnx"))

The graph becomes an `nn.Module` with a submodule for each of its nodes, named as in the file. What
depends on constants alone is computed once. Nothing in such a file can run code.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import (
    HowYouSeeMeError,
    MissingExtraError,
    ModelError,
    UnsupportedCallError,
    first_line,
)
from ..images import Preprocess
from . import onnx_quantised  # noqa: F401 - registers its operators
from .network import Network
from .onnx_operators import DTYPES, OPERATORS, Attributes, to_tensor
from .weights import check_finite

__all__ = ["load_onnx"]

_OWN = ("", "ai.onnx")  # the names of ONNX's own domain
_OLDEST = 7  # before this opset, shapes were broadcast by an attribute
_TOLERANCE = 1e-3  # of the largest output
_QUANTUM = (
    0.05  # the same where numbers are rounded to few bits, as a hair's breadth may turn one over
)
_QUANTISED = re.compile("Quant|QLinear|Integer|QGemm|QAttention")
_SIDE = 224  # where the file leaves the height and width open


class _Node(nn.Module):
    """One node of the graph."""

    def __init__(self, node: Any, opset: int) -> None:
        super().__init__()
        self.attributes = Attributes(node, opset)
        self.function = OPERATORS[_operator(node)]
        self.takes = list(node.input)
        self.gives = list(node.output)
        self.kind = node.op_type

    def forward(self, *inputs: Any) -> Any:
        try:
            return self.function(self.attributes, *inputs)
        except UnsupportedCallError as error:
            raise UnsupportedCallError(
                f"The ONNX operator {self.kind}, which gives {self.gives[0]}, can't be imported: {error}"
            ) from None


class OnnxModule(nn.Module):
    """The graph of an ONNX file, run node by node."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        graph = model.graph
        opset = _opset(model)
        initial = {one.name: to_tensor(one) for one in graph.initializer}
        self.inputs = [one.name for one in graph.input if one.name not in initial]
        self._said = {one.name: _said_shape(one) for one in graph.input}
        self.outputs = [one.name for one in graph.output]
        self.weights = nn.Module()
        self.nodes = nn.Module()
        self._place: dict[str, str] = {}  # where the constant of a name lies
        constants: dict[str, Any] = {"": None, **initial}
        for node in graph.node:
            made = _Node(node, opset)
            if all(name in constants for name in made.takes):
                results = _several(made(*(constants[name] for name in made.takes)))
                constants.update(zip(made.gives, results, strict=False))
            else:
                self.nodes.add_module(_key(node.name or made.gives[0], self.nodes), made)
        used = {name for node in self._steps() for name in node.takes} | {*self.outputs}
        for name in used:
            if isinstance(constants.get(name), Tensor):
                self._place[name] = _key(name, self.weights)
                self.weights.register_buffer(self._place[name], constants[name])

    def _steps(self) -> list[_Node]:
        return [node for node in self.nodes.children() if isinstance(node, _Node)]

    def forward(self, *inputs: Tensor) -> Any:
        """The output, or a dict of several by their names in the file."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"takes {len(self.inputs)} inputs ({', '.join(self.inputs)})")
        try:
            return self._run(*inputs)
        except HowYouSeeMeError:
            raise
        except Exception as error:
            for name, item in zip(self.inputs, inputs, strict=True):
                said = self._said[name]
                fits = len(said) == item.dim() and all(
                    size in {None, given} for size, given in zip(said, item.shape, strict=True)
                )
                if not fits:
                    shape = ", ".join("any" if size is None else str(size) for size in said)
                    raise ValueError(
                        f"the file was exported for inputs [{shape}] alone; export it for such as this, "
                        f"or with open axes ({first_line(error)})"
                    ) from error
            raise

    def _run(self, *inputs: Tensor) -> Any:
        known: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        weights = self.weights._buffers
        known.update((name, weights[place]) for name, place in self._place.items())
        known[""] = None
        for node in self._steps():
            results = _several(node(*(known[name] for name in node.takes)))
            known.update(zip(node.gives, results, strict=False))
        outputs = {name: known[name] for name in self.outputs}
        return outputs[self.outputs[0]] if len(outputs) == 1 else outputs


def load_onnx(path: Path) -> Network:
    """The network in an `.onnx` file.

    >>> network = load_onnx(Path("model.onnx"))

    Where onnxruntime is installed, both answer a fixed random input, and a difference is an error;
    where it isn't, a warning says so. Preprocessing and classes aren't in such files.

    Raises `MissingExtraError` without the package onnx, `UnsupportedCallError` naming all operators
    that can't be imported, and `ModelError` when the file can't be read, or onnxruntime's answer is
    another one.
    """
    try:
        import onnx  # noqa: PLC0415
        from onnx import inliner  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(f"{path} needs the package onnx: pip install onnx") from error
    try:
        model = inliner.inline_local_functions(onnx.load(path))
    except Exception as error:  # protobuf's, of missing external data, and the inliner's
        raise ModelError(
            f"{path} can't be read as ONNX ({first_line(error)}); export it again."
        ) from error
    _check_operators(model, path)
    try:
        module = OnnxModule(model).eval()
    except UnsupportedCallError as error:
        raise UnsupportedCallError(f"{path}: {error}") from error
    except Exception as error:  # a graph that no exporter writes
        raise ModelError(
            f"{path} is no valid graph ({type(error).__name__}: {first_line(error)}); export it again."
        ) from error
    check_finite(module, path.name)
    _compare(module, model, path)
    return Network(path.name, module, _preprocess(model, module))


def _preprocess(model: Any, module: OnnxModule) -> Preprocess | None:
    """Of a network that takes bytes it is known how a photo becomes its input: as it is."""
    given = [one for one in model.graph.input if one.name in module.inputs]
    shape = _shape_of(given[0]) if len(given) == 1 else []
    if len(shape) != 4 or shape[1] != 3 or _dtype_of(given[0]) != torch.uint8:
        return None
    return Preprocess((shape[2], shape[3]), scale=1.0)


def _operator(node: Any) -> str:
    """The name of what a node does, with its domain where that isn't ONNX's own."""
    return node.op_type if node.domain in _OWN else f"{node.domain}.{node.op_type}"


def _opset(model: Any) -> int:
    return max(int(one.version) for one in model.opset_import if one.domain in _OWN)


def _check_operators(model: Any, path: Path) -> None:
    if not model.graph.node or not any(one.domain in _OWN for one in model.opset_import):
        raise ModelError(f"{path} holds no graph of ONNX's operators; export it again.")
    if (opset := _opset(model)) < _OLDEST:
        raise UnsupportedCallError(
            f"{path} is of opset {opset}, and imported are {_OLDEST} and later ones; "
            "convert it with onnx.version_converter.convert_version(model, 18)."
        )
    missing = sorted(set(map(_operator, model.graph.node)) - OPERATORS.keys())
    if missing:
        advice = (
            " Explain the network before it was quantised, or quantise it in the format QDQ."
            if any(map(_QUANTISED.search, missing))
            else ""
        )
        raise UnsupportedCallError(
            f"{path} can't be imported, for these ONNX operators are not supported: "
            f"{', '.join(missing)}.{advice}"
        )


def _compare(module: OnnxModule, model: Any, path: Path) -> None:
    """Hold the module against onnxruntime, on a fixed random input."""
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError:
        warnings.warn(
            f"{path} is not checked against onnxruntime, which is not installed: "
            "pip install onnxruntime",
            stacklevel=4,
        )
        return
    generator = torch.Generator().manual_seed(0)
    feeds = {
        one.name: torch.rand(_shape_of(one), generator=generator).to(_dtype_of(one))
        for one in model.graph.input
        if one.name in module.inputs
    }
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = torch.get_num_threads()
    # As written, and not as optimised: that is what the module does.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        theirs = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        with torch.no_grad():
            ours = module(*feeds.values())
    except UnsupportedCallError as error:
        raise UnsupportedCallError(f"{path}: {error}") from error
    except Exception as error:  # onnxruntime's have no common base
        raise ModelError(
            f"{path} does not run on inputs of {[list(one.shape) for one in feeds.values()]} "
            f"({first_line(error)})."
        ) from error
    rounds = any(_QUANTISED.search(node.op_type) for node in model.graph.node)
    tolerance = _QUANTUM if rounds else _TOLERANCE
    answers = ours.values() if isinstance(ours, dict) else [ours]
    for name, mine, other in zip(module.outputs, answers, theirs, strict=False):
        expected = torch.from_numpy(np.asarray(other))
        scale = max(expected.double().abs().max().item(), 1e-6) if expected.numel() else 1.0
        same = mine.shape == expected.shape and bool(
            ((mine.double() - expected.double()).abs() <= tolerance * scale).all()
        )
        if not same:
            raise ModelError(
                f"{path} is not imported as onnxruntime runs it, for the output {name} differs; "
                "please report it."
            )


def _shape_of(value: Any) -> list[int]:
    """A shape that the file allows: 1 for an open batch, and the usual side for open axes of space."""
    dims = value.type.tensor_type.shape.dim
    return [
        dim.dim_value if dim.dim_value > 0 else (1 if axis < 2 else _SIDE)
        for axis, dim in enumerate(dims)
    ]


def _said_shape(value: Any) -> list[int | None]:
    """The shape in the file, None for what it leaves open."""
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def _dtype_of(value: Any) -> torch.dtype:
    return DTYPES[value.type.tensor_type.elem_type]


def _several(results: Any) -> Sequence[Any]:
    return results if isinstance(results, (list, tuple)) else (results,)


def _key(name: str, holder: nn.Module) -> str:
    """A name under which a module can hold something, and holds nothing yet."""
    base = key = name.replace(".", "/")
    number = 1
    while hasattr(holder, key):
        number += 1
        key = f"{base}:{number}"
    return key
