"""Whole networks in PyTorch's own files: torch.export's `.pt2`, TorchScript, and pickles.

All three can run code while they are loaded (a `.pt2` too: parts of it may be pickled), so none is
loaded unless the user allows it.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, first_line
from .network import Network
from .weights import read_weights

__all__ = ["from_export", "load_program"]

_KINDS = {
    "export": "a program of torch.export, of which parts may be pickled",
    "script": "a TorchScript program",
    "pickle": "a pickled model",
}


def load_program(path: Path, allow_code: bool = False) -> Network:
    """The network in a `.pt2` (torch.export), TorchScript, or pickled (`torch.save(model)`) file.

    >>> network = load_program(Path("model.pt2"), allow_code=True)

    What kind of file it is, is told by its content. Without `allow_code` it is refused: loading one
    can run any code, so that only files from a source that you trust should be loaded.

    Raises:
        ModelError: the file could run code and that wasn't allowed, holds weights alone, was
            exported in training mode, or can't be read.
    """
    kind = _kind(path)
    if kind == "pickle":
        _refuse_weights(path)
    if not allow_code:
        raise ModelError(
            f"{path} is {_KINDS[kind]}, which can run code when it is loaded, so it is not; if you "
            "trust its source, allow it with --allow-code (allow_code=True)."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; who has such a file knows
            module = _LOADERS[kind](path)
    except ModelError:
        raise
    except Exception as error:  # code from a file may raise anything
        raise ModelError(
            f"{path} can't be loaded as {_KINDS[kind]} ({first_line(error)})."
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{path} holds a {type(module).__name__}, not a torch.nn.Module.")
    return Network(path.name, module)


def _kind(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        return "pickle"  # as torch.save wrote them before 1.6
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        flat = archive.namelist()
    if "serialized_exported_program.json" in flat or any(n.startswith("models/") for n in names):
        return "export"
    return "script" if any(name.startswith("code/") for name in names) else "pickle"


def _refuse_weights(path: Path) -> None:
    try:
        read_weights(path)
    except ModelError as error:
        if "could run code" not in str(error):
            raise
        return
    raise ModelError(
        f"{path} holds weights alone, and not the network that they belong to; name that with "
        "--model, and give this file as --weights."
    )


def from_export(program: torch.export.ExportedProgram, name: str = "The program") -> nn.Module:
    """The module of a program of torch.export, with the submodules that the model had.

    >>> module = from_export(torch.export.export(model.eval(), (images,)))

    Raises `ModelError`, which begins with `name`, when the program was exported in training mode, or can't be
    parted into submodules.
    """
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.name in ("train", "training") and value is True:
                raise ModelError(
                    f"{name} was exported in training mode ({node.target}); export it again, after "
                    "model.eval()."
                )
    try:
        module = torch.export.unflatten(program)
    except Exception as error:  # its metadata may name modules in ways that unflatten does not know
        raise ModelError(
            f"{name} can't be parted into its modules again ({first_line(error)}); export it again, "
            "with strict=False."
        ) from error
    for part in module.modules():
        part.training = False  # fixed by the export; these modules refuse eval()
    return module


def _load_export(path: Path) -> nn.Module:
    return from_export(torch.export.load(path), str(path))


def _load_script(path: Path) -> nn.Module:
    module: nn.Module = torch.jit.load(path, map_location="cpu")
    return module.eval()


def _load_pickle(path: Path) -> Any:
    module = torch.load(path, map_location="cpu", weights_only=False)
    return module.eval() if isinstance(module, nn.Module) else module


_LOADERS = {"export": _load_export, "script": _load_script, "pickle": _load_pickle}
