"""A folded copy says what the network says."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor, nn

from howyouseeme.folding import folded
from howyouseeme.images import Preprocess
from howyouseeme.models import Network
from howyouseeme.track import TrackerSettings, _Stages


def normal(module: nn.Module) -> nn.Module:
    """Statistics and weights of batch norm that change something."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2)
            for tensor in (part.running_mean, part.weight, part.bias):
                nn.init.normal_(tensor)
    return module.eval()


def block(inputs: int, outputs: int, **options: object) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1, **options),  # type: ignore[arg-type]
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Twice(nn.Module):
    """Its convolution's output goes to batch norm, and around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 8), block(8, 8))
        self.before, self.norm = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.last = block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.stem(x))
        return self.last(x + self.norm(x))


def test_says_the_same_in_fewer_calls() -> None:
    module = normal(
        nn.Sequential(
            block(3, 8, bias=False),
            block(8, 8, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1),
            nn.Flatten(),
            nn.Linear(4 * 16, 5),
        )
    )
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(2, 3, 16, 16)
    copy = folded(module, x[:1])
    with torch.no_grad():
        torch.testing.assert_close(copy(x), module(x), rtol=1e-5, atol=1e-5)
    kinds = [type(part) for part in copy.modules()]
    assert kinds.count(nn.Identity) == 2
    assert kinds.count(nn.BatchNorm2d) == 1  # that has no convolution before it
    assert copy[5].weight is module[5].weight
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_convolution_that_runs_twice_stays() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    module = normal(nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3)))
    x = torch.randn(1, 3, 8, 8)
    copy = folded(module, x)
    assert not any(isinstance(part, nn.Identity) for part in copy.modules())
    with torch.no_grad():
        torch.testing.assert_close(copy(x), module(x), rtol=1e-5, atol=1e-5)


def stages(module: nn.Module) -> _Stages:
    preprocess = Preprocess((64, 64), mean=(0.5,) * 3, std=(0.2,) * 3)
    return _Stages(Network("small", module, preprocess, None), 64, TrackerSettings().strides)


def test_a_tracker_takes_the_copy() -> None:
    module = normal(nn.Sequential(*(block(n, 8) for n in (3, 8, 8, 8))))
    made = stages(module)
    assert made.module is not module
    x = torch.randn(1, 3, 64, 64)
    found = made(x)
    made.module = module
    torch.testing.assert_close(found, made(x), rtol=1e-4, atol=1e-4)


def test_a_tracker_leaves_a_copy_that_says_something_else() -> None:
    module = normal(Twice())
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert not torch.allclose(folded(module, x)(x), module(x), rtol=1e-2, atol=1e-2)
    assert stages(module).module is module


def test_a_tracker_does_without_a_copy() -> None:
    module = normal(nn.Sequential(*(block(n, 8) for n in (3, 8, 8, 8))))
    module.lock = Lock()  # can't be copied
    assert stages(module).module is module
