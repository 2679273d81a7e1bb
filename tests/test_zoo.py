"""Every classifier of torchvision (of transformers one a family), random weights, both methods.

The networks are not initialised, but filled from one stretch of noise: that takes seconds, where
PyTorch's own initialisation of all of them takes minutes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from unittest.mock import patch

import pytest
import torch
from ledger import account
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme.backtrack import plan
from howyouseeme.tape import record

models = pytest.importorskip("torchvision.models")

#: Of each family of transformers the smallest: the larger ones make the same calls.
TRANSFORMERS = {"vit_b_16": 64, "vit_b_32": 64, "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224}
NAMES = models.list_models(module=models)
CONVOLUTIONAL = [name for name in NAMES if not name.startswith(("vit_", "swin_", "maxvit_"))]

SIZES = {"inception_v3": 139}  # one place is left of 96 pixels, and none of 64
METHODS = {"evidence": {}, "seed": {"outliers": False}}


@cache
def _noise() -> Tensor:
    """A prime number of normal numbers, so that no two channels get the same ones."""
    return torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))


def _fill(tensor: Tensor, start: int) -> None:
    """Normal numbers, the noise repeated from `start` on."""
    flat, noise = tensor.data.reshape(-1), _noise()
    at, begin = 0, start % len(noise)
    while at < len(flat):
        part = noise[begin : begin + len(flat) - at]
        flat[at : at + len(part)] = part
        at, begin = at + len(part), 0


@torch.no_grad()
def build(name: str, **options: object) -> nn.Module:
    """A network with random weights under which activations neither die nor explode."""
    idle = {
        each: lambda tensor, *_, **__: tensor
        for each in dir(nn.init)
        if each.endswith("_") and not each.startswith("_")
    }
    with patch.multiple(nn.init, **idle):
        model = models.get_model(name, weights=None, **options)
    for position, (key, parameter) in enumerate(model.named_parameters()):
        _fill(parameter, 7919 * position)
        if parameter.dim() > 1 and "layer_scale" not in key:
            parameter.mul_((2 / parameter[0].numel()) ** 0.5)
        elif key.endswith("bias"):
            parameter.mul_(0.1)
        else:  # the scales of batch and layer norm, one in fifty of them negative
            parameter.mul_(0.25).add_(0.5)
    for key, buffer in model.named_buffers():
        if key.endswith("running_var"):
            buffer.fill_(1)
        elif buffer.is_floating_point():
            buffer.zero_()
    return model.eval()


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()


def test_all_of_torchvision_is_named() -> None:
    assert set(TRANSFORMERS) <= set(NAMES)
    assert len(CONVOLUTIONAL) >= 60


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_classifier(name: str) -> None:
    model = build(name)
    size = SIZES.get(name, 64)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = model(image)
    assert answer.std() > 0
    assert torch.equal(record(model, [image]).output.data, answer)
    for method, parameters in METHODS.items():
        explanation = hysm.explain(model, image, method=method, **parameters)
        points = explanation.points[0]
        assert len(points) > 0, method
        assert points.position.min() >= 0, method
        assert points.position.max() <= size - 1, method
        assert (points.strength > 0).all(), method
        assert explanation.target[0] == int(answer.argmax()), method


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name: str) -> None:
    size = TRANSFORMERS[name]
    model = build(name, **({"image_size": size} if name.startswith("vit_") else {}))
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = model(image)
    tape = record(model, [image])
    # What PyTorch runs in one fused call is recorded as several, which round differently.
    torch.testing.assert_close(tape.output.data, answer, rtol=1e-3, atol=1e-4)
    for method, parameters in METHODS.items():
        few = {"k": 2} if method == "seed" else {}
        explanation = hysm.explain(model, image, method=method, **parameters, **few)
        assert len(explanation.points[0]) > 0, method
        assert explanation.target[0] == int(answer.argmax()), method
    with torch.no_grad():
        way = plan(tape, tape.output)
        ledger = account(way, tape.output.flat.argmax()[None])
    assert ledger.total == pytest.approx(float(answer.max()), rel=1e-3)
