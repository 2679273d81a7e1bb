"""Networks that have forgotten: a map that stays the same never showed what they had learnt."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..tape import record

__all__ = ["randomised"]


def randomised(module: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """A copy of a network whose last layer has its weights shuffled.

    >>> other = randomised(model, images)              # images [batch, channel, height, width]
    >>> structural_similarity(explain(model, images).saliency[0], explain(other, images).saliency[0])

    The last layer is the last call of a forward pass on `images` that takes a parameter of more than one
    axis. Shuffled among all places, its weights keep their scale and lose what they know: the first step of
    the cascade of Adebayo et al. 2018 (arXiv 1810.03292).

    Raises:
        ModelError: no call takes such a parameter.
    """
    weights = {
        item.untyped_storage().data_ptr(): name
        for name, item in module.named_parameters()
        if item.dim() > 1
    }
    for call in reversed(record(module, [images]).calls):
        for leaf in pytree.tree_leaves((call.args, call.kwargs)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in weights:
                return _shuffled(module, weights[leaf.untyped_storage().data_ptr()], seed)
    raise ModelError(
        "The network has no layer to randomise: none of its calls takes a parameter of more than one axis."
    )


@torch.no_grad()
def _shuffled(module: nn.Module, name: str, seed: int) -> nn.Module:
    copy = deepcopy(module)
    weight = copy.get_parameter(name)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(weight.numel(), generator=generator, device="cpu")
    weight.copy_(weight.reshape(-1)[order.to(weight.device)].reshape(weight.shape))
    return copy
