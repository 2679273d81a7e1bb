"""A folded copy says what the network says."""

from __future__ import annotations

from threading import Lock

import pytest
import torch
from torch import Tensor, nn

from howyouseeme.errors import ModelError
from howyouseeme.folding import folded
from howyouseeme.images import Preprocess
from howyouseeme.models import Network
from howyouseeme.stages import Stages
from howyouseeme.track import TrackerSettings


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
    assert copy[5].weight is not module[5].weight  # which may be moved
    assert copy[5].weight.data_ptr() == module[5].weight.data_ptr()
    assert not any(part.training for part in copy.modules())
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


def test_what_was_written_to_since_is_not_paired() -> None:
    module = normal(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), *block(4, 4))
    )
    x = torch.randn(1, 3, 16, 16)
    copy = folded(module, x)
    assert [type(part) for part in copy].count(nn.Identity) == 1
    with torch.no_grad():
        torch.testing.assert_close(copy(x), module(x), rtol=1e-5, atol=1e-5)


class Norm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_kind_of_batch_norm_that_does_more_stays() -> None:
    module = normal(nn.Sequential(nn.Conv2d(3, 4, 3), Norm(4)))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(folded(module, x)(x), module(x))


class Single(nn.Sequential):
    def __deepcopy__(self, memo: object) -> Single:
        return self


def test_what_is_its_own_copy_is_refused() -> None:
    module = normal(nn.Sequential(Single(*block(3, 4))))
    with pytest.raises(ModelError, match="can't be copied"):
        folded(module, torch.zeros(1, 3, 16, 16))
    assert isinstance(module[0][1], nn.BatchNorm2d)
    assert isinstance(
        stages(normal(nn.Sequential(*(Single(*block(n, 8)) for n in (3, 8, 8, 8)))))(
            torch.randn(1, 3, 64, 64)
        ),
        Tensor,
    )


def test_a_copy_stays_when_the_network_is_moved() -> None:
    module = normal(nn.Sequential(nn.BatchNorm2d(3), *(block(n, 8) for n in (3, 8, 8, 8))))
    made, x = stages(module), torch.randn(1, 3, 64, 64)
    before = made(x)
    module.double()
    assert torch.equal(made(x), before)


class Flat(nn.Module):
    """Takes its input as contiguous, as many a network does."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(block(n, 8) for n in (3, 8, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](x.view(x.size(0), -1).view(x.shape))
        return self.stages[1:](x.view(x.size(0), -1).view(x.shape))


def test_a_network_that_takes_one_layout_is_given_that() -> None:
    module = normal(Flat())
    made = stages(module)
    assert made.module is module
    made(torch.randn(1, 3, 64, 64))


def stages(module: nn.Module) -> Stages:
    preprocess = Preprocess((64, 64), mean=(0.5,) * 3, std=(0.2,) * 3)
    return Stages(Network("small", module, preprocess, None), 64, TrackerSettings().strides)


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
