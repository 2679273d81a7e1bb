"""Where networks come from: the embedded one, torchvision's, or a function of yours."""

from __future__ import annotations

import os
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from torch import nn

from ..errors import ModelError
from ..images import Preprocess
from .embedded import NAME, load_embedded
from .network import Network
from .torchvision import PREFIX, load_torchvision, torchvision_names
from .weights import check_finite, load_weights

__all__ = ["Network", "available", "load_model"]


def available() -> list[str]:
    """The names that `load_model` takes, besides "package.module:factory".

        available()                                          # ["efficientnet-lite0", ...]

    Torchvision's are among them where torchvision is installed.
    """
    return [NAME, *torchvision_names()]


def load_model(
    name: str = NAME,
    weights: str | os.PathLike[str] | None = None,
    *,
    preprocess: Preprocess | None = None,
) -> Network:
    """A network by name, in eval mode on the CPU.

        network = load_model()
        network = load_model("torchvision:resnet50", weights="resnet50.safetensors")
        network = load_model("package.module:factory", preprocess=Preprocess((64, 64)))

    `name` is "efficientnet-lite0" (embedded, needs no download), "torchvision:NAME", or
    "package.module:factory", a callable without arguments that returns the module, or a `Network`
    with its preprocessing and classes too. `weights` is a `.safetensors` file or a state dict made
    by `torch.save`, alone or in a checkpoint; None: the model's own, or the hub's. `preprocess`
    replaces the network's own.

    Raises `ModelError` for unknown names, weights that can't be had, don't fit, could run code, or
    hold NaN or infinity, and `MissingExtraError` when an optional package is missing.
    """
    file = None if weights is None else Path(weights)
    if name.startswith(PREFIX):
        network = load_torchvision(name.removeprefix(PREFIX), file)
    elif ":" in name:
        network = _from_factory(name, file)
    elif name == NAME:
        network = load_embedded(file)
    else:
        raise ModelError(
            f"There is no model {name!r}{_close(name)}; "
            "`howyouseeme models` lists them, or give package.module:factory."
        )
    check_finite(network.module, network.name)
    return network if preprocess is None else replace(network, preprocess=preprocess)


def _from_factory(name: str, weights: Path | None) -> Network:
    place, _, attribute = name.partition(":")
    try:
        factory = getattr(import_module(place), attribute)
    except Exception as error:  # it is the user's code
        raise ModelError(
            f"{name} can't be imported ({type(error).__name__}: {error}); "
            "give package.module:factory, on the Python path."
        ) from error
    if not callable(factory):
        raise ModelError(
            f"{name} is a {type(factory).__name__}; it must be callable without arguments."
        )
    try:
        made = factory()
    except Exception as error:  # as above
        raise ModelError(f"{name}() failed with {type(error).__name__}: {error}.") from error
    network = made if isinstance(made, Network) else Network(name, made, None, None)
    if not isinstance(network.module, nn.Module):
        raise ModelError(
            f"{name}() gave a {type(network.module).__name__}, "
            "not a torch.nn.Module or a howyouseeme.Network."
        )
    if weights is not None:
        load_weights(network.module, weights, name)
    network.module.eval()
    return network


def _close(name: str) -> str:
    # Compared without the prefix, which would outweigh the difference between short names.
    by_name = {known.removeprefix(PREFIX): known for known in available()}
    close = get_close_matches(name, by_name, n=3)
    return f" (did you mean {', '.join(by_name[known] for known in close)}?)" if close else ""
