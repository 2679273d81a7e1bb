"""Weights from files, without ever running code that a file may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError, ModelError

_SHOWN = 3


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` with the state dict in a `.safetensors` file or one made by `torch.save`.

        load_weights(module, Path("resnet50.safetensors"))

    Raises `ModelError` when the file can't be read, could run code, or doesn't fit the module.
    """
    fill(module, read_weights(path), str(path))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, on the CPU.

        read_weights(Path("resnet50.safetensors"))

    Raises `ModelError` when the file can't be read or could run code, and `MissingExtraError`
    when it needs the package safetensors.
    """
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}; check its name and folder.")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"{path} holds no state dict; save the result of model.state_dict().")
    others = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ModelError(
            f"{path} is not a plain state dict, for it also holds {_some(others)}; "
            "save only the result of model.state_dict()."
        )
    return {str(key): value for key, value in state.items()}


def fill(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Put the tensors of a state dict into `module`; `source` names it in errors.

        fill(module, torch.load("weights.pth", weights_only=True), "weights.pth")

    Raises `ModelError` naming a few of the tensors that are missing, unknown or of another shape.
    """
    # Starting from the module's own keeps the versions that some modules ask for, and the
    # counters that files older than PyTorch 0.4.1 lack and inference doesn't use.
    complete = module.state_dict()
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
        raise ModelError(f"The weights in {source} don't fit the model; {'; '.join(problems)}.")
    complete.update(state)
    module.load_state_dict(complete)


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `ModelError` naming the first parameter or buffer that holds NaN or infinity.

    check_finite(module, "my network")
    """
    for key, value in module.state_dict().items():
        if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
            raise ModelError(f"{name} can't be explained: {key} holds NaN or infinity.")


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


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler may raise anything on a file of another kind
        # PyTorch's message is a page long; the object that it refused is the one thing to know.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ModelError(
                f"{path} is a pickle that could run code (it asks for {refused[1]}), so it is not "
                "loaded; save model.state_dict() alone, or as .safetensors."
            ) from error
        if "TorchScript" in str(error):
            raise ModelError(
                f"{path} is a TorchScript program, not a state dict; "
                "save the result of model.state_dict()."
            ) from error
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return ModelError(f"{path} can't be read as weights ({reason}); copy or download it again.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"
