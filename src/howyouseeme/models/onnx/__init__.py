"""Networks in ONNX files: one small PyTorch function for each operator.

    network = load_onnx(Path("model.onnx"))

The graph becomes an `nn.Module` with a submodule for each of its nodes, named as in the file. What
depends on constants alone is computed once. Nothing in such a file can run code.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import MissingExtraError, ModelError, UnsupportedCallError, first_line
from ...images import Preprocess
from ..network import Network
from ..weights import check_finite
from .graph import OWN, WITH_GRAPHS, OnnxModule, operators_in, opset_of
from .operators import DTYPES, OPERATORS

__all__ = ["load_onnx"]

_OLDEST = 7  # before this opset, shapes were broadcast by an attribute
_TOLERANCE = 1e-3  # of the largest output
_QUANTUM = (
    0.05  # the same where numbers are rounded to few bits, as a hair's breadth may turn one over
)
_QUANTISED = re.compile("Quant|QLinear|Integer|QGemm|QAttention")
_SIDE = 224  # where the file leaves the height and width open


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


def _check_operators(model: Any, path: Path) -> None:
    if not model.graph.node or not any(one.domain in OWN for one in model.opset_import):
        raise ModelError(f"{path} holds no graph of ONNX's operators; export it again.")
    if (opset := opset_of(model)) < _OLDEST:
        raise UnsupportedCallError(
            f"{path} is of opset {opset}, and imported are {_OLDEST} and later ones; "
            "convert it with onnx.version_converter.convert_version(model, 18)."
        )
    missing = sorted(operators_in(model.graph) - OPERATORS.keys() - WITH_GRAPHS.keys())
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


def _dtype_of(value: Any) -> torch.dtype:
    return DTYPES[value.type.tensor_type.elem_type]
