"""Every path, with its sign: the contributions of all pixels and all biases add up to the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backtrack import Plan, multipliers
from ..tape import Call
from .base import Crossing, Method, Trail, Walked, one_hot, per_sample

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact(Method):
    """The evidence of an input is its activation times its multiplier, summed over all paths.

    >>> Explainer(model, Exact())
    >>> Explainer(model, "exact")                            # the same

        evidence[i] = multiplier[i] * a[i]

    a[i] is the activation; multiplier[i] is the product of the weights along a path from the target to i, added
    up over all paths, every call being a linear map on this image (docs/how-it-works.md). Evidence is in logits.

    Nothing is chosen and nothing is lost: the sum over all inputs and biases is the target itself.
    As a picture it is noisy, for positive and negative evidence cancel; it is here to account, and as
    the reference for the methods that choose. Its shares are of all that speaks for the target, at the
    inputs and at the biases.
    """

    @torch.no_grad()
    def walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        evidence = {}
        batch = len(nodes)
        total = plan.start.data.new_zeros(batch)

        def note(_: Call, share: Tensor) -> None:
            nonlocal total
            total = total + per_sample(share.to(total), batch).clamp(min=0).sum(1)

        for value, multiplier in multipliers(plan, one_hot(plan, nodes), on_bias=note):
            if trail is not None:
                first = value is plan.start
                trail.arrive(value, multiplier if first else multiplier * value.data)
                step = plan.step(value)
                for source, link in step.links if step is not None else ():
                    trail.cross(source, Crossing(value, link, multiplier))
            if value.call is None:
                evidence[value] = multiplier * value.data
        for item in evidence.values():
            total = total + per_sample(item.to(total), batch).clamp(min=0).sum(1)
        return Walked.relative(evidence, total)
