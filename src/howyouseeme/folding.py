"""A copy of a network that says the same in less time, for work that runs it again and again."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from .errors import ModelError

__all__ = ["folded"]


@torch.no_grad()
def folded(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy with batch norm folded into the convolutions before it, and weights laid out channels last.

    >>> fast = folded(module, torch.zeros(1, 3, 224, 224))

    Modules keep their names and, up to rounding, their outputs; but those of folded convolutions are what
    batch norm made of them, and batch norm passes on what it gets. Weights that don't change share their
    memory with the module's. Whether a convolution's output goes to batch norm alone can't be seen from
    outside, so compare what the copy says before relying on it.

    Raises:
        ModelError: a part of the module can't be copied.
    """
    pairs = _pairs(module, example)
    changed = {id(part) for pair in pairs for part in pair}
    shared: dict[int, Any] = {}
    for part in module.modules():
        if id(part) not in changed:
            for parameter in part.parameters(recurse=False):
                own = nn.Parameter(parameter.detach(), parameter.requires_grad)
                shared[id(parameter)] = own
            shared.update((id(item), item.detach()) for item in part.buffers(recurse=False))
    names = {part: name for name, part in module.named_modules()}
    copy = deepcopy(module, shared)
    if not names.keys().isdisjoint(copy.modules()):
        raise ModelError(f"A part of {type(module).__name__} can't be copied: its copy is itself.")
    for convolution, norm in pairs:
        twin: Any = copy.get_submodule(names[convolution])
        twin.weight, twin.bias = fuse_conv_bn_weights(
            *(convolution.weight, convolution.bias, norm.running_mean, norm.running_var),
            *(norm.eps, norm.weight, norm.bias),
        )
        parent, _, last = names[norm].rpartition(".")
        copy.get_submodule(parent)._modules[last] = nn.Identity().eval()
    for part in copy.modules():
        if isinstance(part, nn.Conv2d) and not is_parametrized(part):
            part.weight.data = part.weight.contiguous(memory_format=torch.channels_last)
    return copy


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[Any, Any]]:
    """Each convolution and the batch norm that takes its output as it is, if both run once."""
    # Tensors are kept, or others would get their id; a later version was written to since.
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}
    runs: Counter[nn.Module] = Counter()
    pairs: list[tuple[Any, Any]] = []

    def after(part: nn.Module, _: Any, output: Any) -> None:
        runs[part] += 1
        if isinstance(output, Tensor):
            made[id(output)] = part, output, output._version

    def before(part: nn.Module, given: tuple[Any, ...]) -> None:
        runs[part] += 1
        found = made.get(id(given[0])) if given else None
        if found is not None and found[1]._version == found[2]:
            pairs.append((found[0], part))

    handles = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and not is_parametrized(part):
            handles.append(part.register_forward_hook(after))
        elif type(part) is nn.BatchNorm2d and part.track_running_stats and not part.training:
            handles.append(part.register_forward_pre_hook(before))
    try:
        module(example)
    finally:
        for handle in handles:
            handle.remove()
    folds = Counter(convolution for convolution, _ in pairs)
    return [pair for pair in pairs if folds[pair[0]] == runs[pair[0]] == runs[pair[1]] == 1]
