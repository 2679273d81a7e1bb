"""Where networks come from: the embedded one, packages of them, files, or a function of yours."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import PIL.Image
import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError
from ..files import PHOTOS
from ..images import Preprocess
from .embedded import NAME, load_embedded
from .keras import from_keras, is_keras, load_keras
from .network import Network, measured
from .onnx import load_onnx
from .programs import from_export, load_program
from .timm import PREFIX as TIMM
from .timm import load_timm
from .torchvision import PREFIX as TORCHVISION
from .torchvision import load_torchvision, torchvision_names
from .transformers import PREFIX as TRANSFORMERS
from .transformers import load_transformers, names_in
from .weights import check_finite, load_weights

__all__ = [
    "Model",
    "Network",
    "Prepare",
    "as_network",
    "available",
    "check_name",
    "from_keras",
    "load_model",
]

#: Whatever can be explained. (In quotes: importing torch.export takes a while.)
Model: TypeAlias = "nn.Module | Network | torch.export.ExportedProgram | str"

#: How a photo becomes a model's input: a `Preprocess`, or a function that `Preprocess.like` can tell.
Prepare: TypeAlias = Preprocess | Callable[[PIL.Image.Image], Tensor]


def available() -> list[str]:
    """The names of models that `load_model` knows itself: the embedded one and torchvision's.

    >>> available()                                          # ["efficientnet-lite0", ...]

    Torchvision's are among them where torchvision is installed. Besides them it takes whatever timm
    and transformers have, files, and functions of yours.
    """
    return [NAME, *torchvision_names()]


def load_model(
    name: str = NAME,
    weights: str | os.PathLike[str] | None = None,
    *,
    preprocess: Prepare | None = None,
    allow_code: bool = False,
) -> Network:
    """A network by name or from a file, in eval mode on the CPU.

    >>> network = load_model()
    >>> network = load_model("torchvision:resnet50", weights="resnet50.safetensors")
    >>> network = load_model("timm:convnext_atto", weights="convnext_atto.safetensors")
    >>> network = load_model("transformers:my-resnet")       # a folder, or a name on the hub
    >>> network = load_model("model.onnx", preprocess=Preprocess((224, 224)))
    >>> network = load_model("package.module:factory", preprocess=Preprocess((64, 64)))

    `name` is "efficientnet-lite0" (embedded, needs no download), "torchvision:NAME", "timm:NAME",
    "transformers:FOLDER_OR_NAME", a file (`.onnx`; `.keras` or `.h5`; `.pt2` of torch.export, or
    TorchScript or a pickled model in a `.pt` or `.pth`), or "package.module:factory", a callable
    without arguments that returns the module, or a `Network` with its preprocessing and classes
    too. `weights` is a `.safetensors` file or a state dict made by `torch.save`, alone or in a
    checkpoint; None: the model's own, or the hub's. `preprocess` replaces the network's own.
    `allow_code` loads files that can run code while they are loaded: only for files whose source
    you trust.

    Raises:
        ModelError: the name is unknown, the file can't be read or could run code, or the weights can't be
            had, don't fit, could run code, or hold NaN or infinity.
        MissingExtraError: an optional package is missing.
    """
    known = None if preprocess is None else measured(preprocess)  # before anything is loaded
    file = None if weights is None else Path(weights)
    prefix, _, place = name.partition(":")
    static = True
    if loader := _BY_PREFIX.get(f"{prefix}:"):
        network = loader(place, file)
    elif Path(name).suffix.lower() in _BY_SUFFIX:
        network = _from_file(Path(name), file, allow_code)
        static = not allow_code
    elif Path(name).suffix.lower() in _PHOTOS:
        raise ModelError(
            f"{name} is a photo, as its suffix says, and not a model: name photos by themselves, as in "
            f"`howyouseeme explain {name}` or explain({NAME!r}, {name!r})."
        )
    elif ":" in name:
        network = _from_factory(name, file)
        static = network.static
    elif name == NAME:
        network = load_embedded(file)
    else:
        raise _unknown(name)
    check_finite(network.module, network.name)
    return replace(network, preprocess=known or network.preprocess, static=static)


def check_name(name: str) -> None:
    """Refuse, without loading a model, a name that `load_model` can't load.

    >>> check_name("efficientnet-lite0")

    Whether timm and transformers know a name, and what a factory does, shows when it is loaded. Of
    package.module:factory the package is imported, to see whether it has the module.

    Raises:
        ModelError: there is no such network, file or module.
    """
    prefix, _, _ = name.partition(":")
    if f"{prefix}:" in {TIMM, TRANSFORMERS}:
        return
    if Path(name).suffix.lower() in _BY_SUFFIX:
        _check_file(Path(name))
    elif f"{prefix}:" != TORCHVISION and ":" in name:
        try:
            found = find_spec(prefix)
        except (ImportError, ValueError):  # of what it lies in, or no name of a module
            found = None
        if found is None:
            raise ModelError(
                f"There is no module {prefix!r}; give package.module:factory, a function in a file that "
                "lies here or is installed."
            )
    elif name not in available():
        raise _unknown(name)


def _unknown(name: str) -> ModelError:
    return ModelError(
        f"There is no model {name!r}{_close(name)}; "
        "`howyouseeme models` lists them, or give a file or package.module:factory."
    )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"There is no model file {path}; check its name and folder.")


_BY_PREFIX: dict[str, Callable[[str, Path | None], Network]] = {
    TORCHVISION: load_torchvision,
    TIMM: load_timm,
    TRANSFORMERS: load_transformers,
}

#: What loads a file, given it and whether it may run code.
_BY_SUFFIX: dict[str, Callable[[Path, bool], Network]] = {
    ".onnx": lambda path, _: load_onnx(path),
    **dict.fromkeys((".keras", ".h5", ".hdf5"), load_keras),
    **dict.fromkeys((".pt2", ".pt", ".pth", ".torchscript", ".safetensors"), load_program),
}

#: Suffixes that no model has, in case one is given in place of a model.
_PHOTOS = PHOTOS | {".avif", ".heic"}


def as_network(
    model: Model,
    preprocess: Prepare | None = None,
    classes: Sequence[str] | None = None,
) -> Network:
    """A model of any kind as a `Network`, with its module out of wrappers that hide its calls.

    >>> network = as_network(module, Preprocess((64, 64)), ["cat", "dog"])

    Arguments are those of `Explainer`.

    Raises:
        InputError: the model or the preprocessing is none.
        ModelError, MissingExtraError: as `load_model`.
    """
    preprocess = None if preprocess is None else measured(preprocess)  # before anything is loaded
    if isinstance(model, str):
        model = load_model(model)
    if "torch.export" in sys.modules and isinstance(model, torch.export.ExportedProgram):
        model = from_export(model)
    if isinstance(model, Network) and is_keras(model.module):
        model = replace(model, module=from_keras(model.module).module)
    if is_keras(model):
        model = from_keras(model)
    if isinstance(model, nn.Module):
        bare = _unwrapped(model)
        model = Network(type(bare).__name__, model, classes=names_in(bare))
    if not isinstance(model, Network):
        kind = (
            f"the class {model.__name__}"
            if isinstance(model, type)
            else f"a {type(model).__name__}"
        )
        raise InputError(f"A model is an nn.Module, a Network or a name, not {kind}.")
    return Network(
        model.name,
        _unwrapped(model.module),
        preprocess or model.preprocess,
        model.classes if classes is None else classes,  # type: ignore[arg-type]
        model.static,
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and data-parallel wrappers, which hide its calls."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _from_file(path: Path, weights: Path | None, allow_code: bool) -> Network:
    _check_file(path)
    if weights is not None:
        raise ModelError(f"{path} brings its own weights; leave {weights} out (--weights).")
    return _BY_SUFFIX[path.suffix.lower()](path, allow_code)


def _from_factory(name: str, weights: Path | None) -> Network:
    place, _, attribute = name.partition(":")
    try:
        factory = getattr(import_module(place), attribute)
    except Exception as error:  # it is the user's code
        raise ModelError(
            f"{name} can't be imported ({type(error).__name__}: {error}); "
            "give package.module:factory, a function in a file that lies here or is installed."
        ) from error
    if not callable(factory):
        raise ModelError(
            f"{name} is a {type(factory).__name__}; it must be callable without arguments."
        )
    try:
        made = factory()
    except Exception as error:  # as above
        raise ModelError(f"{name}() failed with {type(error).__name__}: {error}.") from error
    network = made if isinstance(made, Network) else Network(name, made)
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
    by_name = {known.removeprefix(TORCHVISION): known for known in available()}
    close = get_close_matches(name.removeprefix(TORCHVISION), by_name, n=3)
    return f" (did you mean {', '.join(by_name[known] for known in close)}?)" if close else ""
