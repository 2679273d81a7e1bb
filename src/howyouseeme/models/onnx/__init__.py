"""Networks in ONNX files: one small PyTorch function for each operator.

    network = load_onnx(Path("model.onnx"))

The graph becomes an `nn.Module` with a submodule for each of its nodes, named as in the file. What
depends on constants alone is computed once. Nothing in such a file can run code.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import MissingExtraError, ModelError, UnsupportedCallError, first_line
from ...images import Preprocess
from ..network import Network
from ..weights import check_finite
from .check import QUANTISED, compare, dtype_of, shape_of
from .graph import OWN, WITH_GRAPHS, OnnxModule, channels_last, operators_in, opset_of
from .operators import DTYPES, OPERATORS

__all__ = ["load_onnx"]

_OLDEST = 7  # before this opset, shapes were broadcast by an attribute


def load_onnx(path: Path) -> Network:
    """The network in an `.onnx` file.

    >>> network = load_onnx(Path("model.onnx"))

    Where onnxruntime is installed, both answer a fixed random input, and a difference is an error;
    where it isn't, a warning says so. Preprocessing and classes are known of files that Ultralytics (YOLO)
    wrote; a network of bytes takes the photo as it is.

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
    compare(module, model, path)
    said = {one.key: one.value for one in model.metadata_props}
    return Network(
        path.name,
        module,
        _of_ultralytics(said) or _of_bytes(model, module),
        _names(said.get("names", "")),
    )


def _of_bytes(model: Any, module: OnnxModule) -> Preprocess | None:
    """Of a network that takes bytes it is known how a photo becomes its input: as it is."""
    given = [one for one in model.graph.input if one.name in module.inputs]
    shape = shape_of(given[0]) if len(given) == 1 else []
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or dtype_of(given[0]) != torch.uint8:
        return None
    return Preprocess(
        (shape[1], shape[2]) if channels_last(shape) else (shape[2], shape[3]), scale=1.0
    )


def _of_ultralytics(said: Mapping[str, str]) -> Preprocess | None:
    """How Ultralytics' networks (YOLO) take photos, which the file says by its task and size."""
    sides = _literal(said.get("imgsz", ""))
    usual = said.get("author") == "Ultralytics" and said.get("channels", "3") == "3"
    if not usual or not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return None
    if not all(type(side) is int and 0 < side < 2**15 for side in sides):
        return None
    size = sides[0], sides[1]
    if said.get("task") == "classify":
        return Preprocess(size, resize="crop", crop_from=min(size))
    if "rtdetr" in (said.get("head", "") + said.get("description", "")).lower():
        return Preprocess(size)
    return Preprocess(size, resize="fit", fill=114)


def _names(text: str) -> tuple[str, ...] | None:
    """The names of the classes, which Ultralytics writes as a dict by index."""
    found = _literal(text)
    if not isinstance(found, dict) or found.keys() != {*range(len(found))}:
        return None
    return tuple(str(found[index]) for index in range(len(found))) or None


def _literal(text: str) -> Any:
    """What a piece of text stands for if it is one of Python's constants; nothing is run."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _check_operators(model: Any, path: Path) -> None:
    if not model.graph.node or not any(one.domain in OWN for one in model.opset_import):
        raise ModelError(f"{path} holds no graph of ONNX's operators; export it again.")
    if (opset := opset_of(model)) < _OLDEST:
        raise UnsupportedCallError(
            f"{path} is of opset {opset}, and imported are {_OLDEST} and later ones; "
            "convert it with onnx.version_converter.convert_version(model, 18)."
        )
    for one in model.graph.input:
        if one.type.tensor_type.elem_type not in DTYPES:
            raise UnsupportedCallError(
                f"{path} can't be imported, for its input {one.name} is no tensor of numbers that are supported."
            )
    missing = sorted(operators_in(model.graph) - OPERATORS.keys() - WITH_GRAPHS.keys())
    if missing:
        advice = (
            " Explain the network before it was quantised, or quantise it in the format QDQ."
            if any(map(QUANTISED.search, missing))
            else ""
        )
        raise UnsupportedCallError(
            f"{path} can't be imported, for these ONNX operators are not supported: "
            f"{', '.join(missing)}.{advice}"
        )
