"""A copy of a network that says the same in less time, for work that runs it again and again."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["folded"]


@torch.no_grad()
def folded(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy with batch norm folded into the convolutions before it, and weights laid out channels last.

    >>> fast = folded(module, torch.zeros(1, 3, 224, 224))

    Modules keep their names and, up to rounding, their outputs; but those of folded convolutions are what
    batch norm made of them, and batch norm passes on what it gets. Weights that don't change are shared
    with the module. Whether a convolution's output goes to batch norm alone can't be seen from outside, so
    compare what the copy says before relying on it.
    """
    pairs = _pairs(module, example)
    changed = {id(part) for pair in pairs for part in pair}
    shared = {
        id(tensor): tensor
        for part in module.modules()
        if id(part) not in changed
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    }
    names = {part: name for name, part in module.named_modules()}
    copy = deepcopy(module, shared)
    for convolution, norm in pairs:
        twin = copy.get_submodule(names[convolution])
        twin.weight, twin.bias = fuse_conv_bn_weights(
            *(convolution.weight, convolution.bias, norm.running_mean, norm.running_var),
            *(norm.eps, norm.weight, norm.bias),
        )
        parent, _, last = names[norm].rpartition(".")
        copy.get_submodule(parent)._modules[last] = nn.Identity()
    for part in copy.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.dim() == 4:
                last = weight.detach().contiguous(memory_format=torch.channels_last)
                setattr(part, name, nn.Parameter(last, weight.requires_grad))
    return copy


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[Any, Any]]:
    """Each convolution and the batch norm that takes its output as it is, if both run once."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # tensors are kept, or others would get their id
    runs: list[nn.Module] = []
    pairs = []

    def after(part: nn.Module, _: Any, output: Any) -> None:
        runs.append(part)
        if isinstance(output, Tensor):
            made[id(output)] = part, output

    def before(part: nn.Module, given: tuple[Any, ...]) -> None:
        runs.append(part)
        if given and id(given[0]) in made:
            pairs.append((made[id(given[0])][0], part))

    handles = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            handles.append(part.register_forward_hook(after))
        elif isinstance(part, nn.BatchNorm2d) and part.track_running_stats and not part.training:
            handles.append(part.register_forward_pre_hook(before))
    try:
        module(example)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if all(runs.count(part) == 1 for part in pair)]
