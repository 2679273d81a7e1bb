"""Keras 3 models, on its torch backend: `.keras` and `.h5` files, and models in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import MissingExtraError, ModelError, first_line
from .network import Network

__all__ = ["from_keras", "is_keras", "load_keras", "on_torch"]

_LAMBDA = "enable_unsafe_deserialization"  # what Keras's refusal of code in a file mentions


class KerasModule(nn.Module):
    """A Keras model that takes its images as PyTorch has them, [batch, channel, height, width].

    Several inputs come one after the other, in the order of `model.inputs`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        layers = {layer.path: layer for layer in model._flatten_layers(include_self=False)}
        self.channels_last = not any(
            getattr(layer, "data_format", None) == "channels_first" for layer in layers.values()
        )

    def forward(self, *inputs: Tensor) -> Any:
        given = [x.movedim(1, -1) for x in inputs] if self.channels_last else list(inputs)
        with import_module("keras").device(str(given[0].device)):
            return self.model(given[0] if len(given) == 1 else given, training=False)


def from_keras(model: Any, name: str | None = None) -> Network:
    """A Keras model in memory as a `Network`, whose module takes [batch, channel, height, width].

    >>> network = from_keras(keras.applications.MobileNetV2(weights=None))

    Points and maps have PyTorch's order of axes, whatever the model's is. The model is set to
    inference. Preprocessing and classes aren't part of a Keras model.

    Raises:
        MissingExtraError: Keras is missing.
        ModelError: its backend isn't torch, or the model is none of Keras.
    """
    keras = on_torch("A Keras model")
    if not isinstance(model, keras.Model):
        raise ModelError(f"A {type(model).__name__} is not a Keras model; give a keras.Model.")
    return Network(name or model.name, KerasModule(model).eval())


def is_keras(model: Any) -> bool:
    """True for a model of Keras, on whatever backend.

    >>> is_keras(keras.applications.MobileNetV2(weights=None))
    """
    keras = sys.modules.get("keras")
    return isinstance(model, getattr(keras, "Model", ()))


def load_keras(path: Path, allow_code: bool = False) -> Network:
    """The network in a `.keras` or `.h5` file.

    >>> network = load_keras(Path("model.keras"))

    Keras must run on torch: its backend is chosen when it is first imported, which is done here
    unless it was before. With `allow_code` layers may be loaded that hold Python code (Lambda).

    Raises `MissingExtraError` without Keras, or h5py for an `.h5`, and `ModelError` when Keras runs
    on another backend, or the file can't be read or could run code.
    """
    keras = on_torch(str(path))
    if path.suffix.lower() != ".keras":
        _need_h5py(path)
    try:
        with keras.device("cpu"):
            model = keras.saving.load_model(path, compile=False, safe_mode=not allow_code)
    except Exception as error:  # Keras raises all kinds on a file that it can't read
        if not allow_code and _LAMBDA in str(error):
            raise ModelError(
                f"{path} holds a layer of Python code (Lambda), which would run, so it is not loaded; "
                "if you trust its source, allow it with --allow-code (allow_code=True)."
            ) from error
        reason = first_line(error)
        raise ModelError(f"{path} can't be loaded by Keras ({reason}).") from error
    return from_keras(model, path.name)


def on_torch(what: str) -> Any:
    """The package keras, running on torch, for `what` needs it: that is for the error.

    >>> keras = on_torch("A Keras model")

    Raises `MissingExtraError` without Keras, and `ModelError` when it runs on another backend.
    """
    if "keras" not in sys.modules:
        with _chosen():
            try:
                import_module("keras")
            except ImportError as error:
                raise MissingExtraError(
                    f"{what} needs the package keras, of version 3: pip install keras"
                ) from error
    keras = sys.modules["keras"]
    backend = getattr(keras, "config", None) and keras.config.backend()
    if backend != "torch":
        raise ModelError(
            f"{what} can't be explained, for Keras runs on {backend or 'TensorFlow (Keras 2)'}; "
            "set the environment variable KERAS_BACKEND=torch before Keras is imported."
        )
    return keras


@contextmanager
def _chosen() -> Iterator[None]:
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = before


def _need_h5py(path: Path) -> None:
    try:
        import_module("h5py")
    except ImportError as error:
        raise MissingExtraError(f"{path} needs the package h5py: pip install h5py") from error
