"""Weights from files, without ever running code that a file may hold."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError, ModelError

_SHOWN = 3

# What DataParallel and DistributedDataParallel, Lightning, and torch.compile put before each key.
_PREFIXES = ("module.", "model.", "_orig_mod.")


def load_weights(module: nn.Module, path: Path, name: str) -> None:
    """Fill `module` with the state dict in a `.safetensors` file or one made by `torch.save`.

    >>> load_weights(module, Path("resnet50.safetensors"), "resnet50")

    Raises:
        ModelError: the file can't be read, could run code, or doesn't fit the module, whose `name`
            is for that message.
    """
    fill(module, read_weights(path), str(path), name)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU.

    >>> read_weights(Path("resnet50.safetensors"))

    What kind of file it is, is told by its content and not by its suffix. Of a checkpoint, such as
    {"epoch": 3, "state_dict": {...}}, the state dict inside is taken, if there is only one.

    Raises `ModelError` when the file can't be read or could run code, and `MissingExtraError`
    when it needs the package safetensors.
    """
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}; check its name and folder.")
    content = _reader(path)(path)
    if not isinstance(content, Mapping) or not content:
        raise ModelError(f"{path} holds no state dict; save the result of model.state_dict().")
    if not _is_state(content):
        inside = [key for key, value in content.items() if _is_state(value)]
        if len(inside) != 1:
            others = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
            what = (
                f"holds {len(inside)} state dicts, {_some(inside)}"
                if inside
                else f"is not a plain state dict, for it also holds {_some(others)}"
            )
            raise ModelError(f"{path} {what}; save only the result of model.state_dict().")
        content = content[inside[0]]
    return {str(key): value for key, value in content.items()}


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], source: str, name: str) -> None:
    """Put the tensors of a state dict into `module`; `source` and `name` name both in errors.

    >>> fill(module, torch.load("resnet50.pth", weights_only=True), "resnet50.pth", "resnet50")

    Where all keys start with `module.`, `model.` or `_orig_mod.`, which wrappers put before them,
    and the module has none of them, that prefix is left out.

    Raises `ModelError` naming a few of the tensors that are missing, unknown or of another shape.
    """
    # Starting from the module's own keeps the versions that some modules ask for, and the
    # counters that files older than PyTorch 0.4.1 lack and inference doesn't use.
    complete = module.state_dict()
    state = _unwrapped(state, complete)
    missing = [
        key for key in complete if key not in state and not key.endswith("num_batches_tracked")
    ]
    unknown = [key for key in state if key not in complete]
    misshapen = [
        f"{key} ({_shape(value)}, not {_shape(complete[key])})"
        for key, value in state.items()
        if key in complete and value.shape != complete[key].shape
    ]
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        hint = (
            "name the model that they belong to (--model)"
            if missing or unknown
            else "for another number of classes, let a function of yours build the model "
            "(--model package.module:factory)"
        )
        raise ModelError(
            f"The weights in {source} don't fit {name}; {'; '.join(problems)}; {hint}."
        )
    complete.update(state)
    module.load_state_dict(complete)


def class_count(module: nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """For how many classes a state dict is, where nothing else tells it from the module's own; None elsewhere.

    >>> class_count(resnet50, torch.load("fine-tuned.pth", weights_only=True))
    10
    """
    own = module.state_dict()
    state = _unwrapped(state, own)
    shapes = [(own[key].shape, value.shape) for key, value in state.items() if key in own]
    other = [(mine, given) for mine, given in shapes if mine != given]
    counts = {(mine[:1], given[:1]) for mine, given in other}
    if len(counts) != 1 or any(mine[1:] != given[1:] or not given for mine, given in other):
        return None
    return int(other[0][1][0])


def _unwrapped(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Without what wrappers put before all keys, and the module's own have not."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) and key not in own for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `ModelError` naming the first parameter or buffer that holds NaN, infinity or nothing yet.

    >>> check_finite(module, "my network")

    Minus infinity in a buffer is a mask.
    """
    weights = dict(module.named_parameters(remove_duplicate=False))
    for key, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            raise ModelError(
                f"{name} can't be explained: {key} is on the meta device, where tensors have no "
                "contents; load its weights first."
            )
        weight = key in weights or value.is_complex()
        finite = torch.isfinite(value) if weight else value < torch.inf
        if not finite.all():
            raise ModelError(f"{name} can't be explained: {key} holds NaN or infinity.")


def _is_state(item: Any) -> bool:
    return (
        isinstance(item, Mapping)
        and len(item) > 0
        and all(isinstance(value, torch.Tensor) for value in item.values())
    )


def _reader(path: Path) -> Callable[[Path], Any]:
    """What reads such a file, judged by how it starts."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[4:] == b"\0\0\0\0{":  # the length of a JSON header, and the header
        return _read_safetensors
    if start.startswith(b"PK\3\4"):
        return _read_archive
    if start.startswith(b"\x80"):  # a pickle, as before PyTorch 1.6
        return _read_torch
    raise ModelError(
        f"{path} is not a file of weights; give a .safetensors file, or a state dict made by "
        "torch.save."
    )


def _read_safetensors(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.torch import load_file  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(
            f"{path} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_archive(path: Path) -> Any:
    """What torch.save writes. TorchScript looks like it, and PyTorch before 2.6 loads that, `weights_only` or not."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # as below
        raise _unreadable(path, error) from error
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise ModelError(
            f"{path} is a TorchScript program, not a state dict; "
            "save the result of model.state_dict()."
        )
    return _read_torch(path)


def _read_torch(path: Path) -> Any:
    try:
        # Opened here, for torch.load judges a path by its suffix.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise anything on a file of another kind
        # PyTorch's message is a page long; the object that it refused is the one thing to know.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        # The latter is said of pickles that torch.save didn't write.
        if refused or "Unsupported operand" in str(error):
            asks = f" (it asks for {refused[1]})" if refused else ""
            raise ModelError(
                f"{path} is a pickle that could run code{asks}, so it is not loaded; "
                "save model.state_dict() alone with torch.save, or as .safetensors."
            ) from error
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return ModelError(f"{path} can't be read as weights ({reason}); copy or download it again.")


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"
