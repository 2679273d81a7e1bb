"""What every method takes and returns, and how a path is found in what it did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backtrack import Plan
from ..errors import InputError
from ..links import Link
from ..numbers import plain
from ..tape import Value

__all__ = ["Crossing", "Hop", "Method", "Trail", "Walked"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One node of a path: an element of a value, and the evidence found there."""

    value: Value
    index: int
    evidence: float


@dataclass(eq=False)
class Crossing:
    """How evidence crossed one link: flow from child j to source i = share(w[j, i] · a[i]) · rate[j].

    share(c) is c itself where `oriented` is None (exact), else its positive part after the sign of the
    child's orientation. Where a value only moved, `rate` is the child's evidence and w · a is left out.
    """

    child: Value
    link: Link
    rate: Tensor
    orientation: Tensor | None = None
    moved: bool = False

    def strongest(self, source: Value, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """For each node [n] of the source: the child's node that sent it most [n], and how much [n]."""
        edges = self.link.transposed().edges(nodes)
        index, weight = edges.index.reshape(len(nodes), -1), edges.weight.reshape(len(nodes), -1)
        at = index.clamp(min=0)
        rate = flow = self.rate.reshape(-1)[at]
        if not self.moved:
            contribution = weight * source.flat[nodes][:, None]
            if self.orientation is not None:
                contribution = (contribution * self.orientation.reshape(-1)[at]).clamp(min=0)
            flow = flow * contribution
        flow = flow.masked_fill((index < 0) | (rate == 0), -torch.inf)
        best = flow.argmax(1, keepdim=True)
        return index.gather(1, best)[:, 0], flow.gather(1, best)[:, 0]


@dataclass(eq=False)
class Trail:
    """What a walk of `batch` samples left behind: the evidence at each value, how it came there."""

    batch: int = 1
    evidence: dict[Value, Tensor] = field(default_factory=dict)  # each in its value's shape
    crossings: dict[Value, list[Crossing]] = field(default_factory=dict)  # by source

    def arrive(self, value: Value, evidence: Tensor) -> None:
        self.evidence[value] = evidence

    def cross(self, source: Value, crossing: Crossing) -> None:
        self.crossings.setdefault(source, []).append(crossing)

    def paths(self, value: Value, nodes: Tensor) -> list[list[Hop]]:
        """For each node [n] of a value, the strongest path from the start to it, start first."""
        hops: list[list[Hop]] = [[] for _ in range(len(nodes))]
        waiting = {value: (torch.arange(len(nodes), device=nodes.device), nodes)}
        while waiting:
            here = min(waiting, key=lambda item: item.index)
            which, at = waiting.pop(here)
            found = self.evidence[here].reshape(-1)[at]
            for path, index, share in zip(which.tolist(), at.tolist(), found.tolist(), strict=True):
                hops[path].append(Hop(here, index, share))
            crossings = self.crossings.get(here, [])
            if not crossings:
                continue
            options = [crossing.strongest(here, at) for crossing in crossings]
            chosen = torch.stack([flow for _, flow in options]).argmax(0)
            for position, (crossing, (index, _)) in enumerate(zip(crossings, options, strict=True)):
                mine = chosen == position
                if bool(mine.any()):
                    arrived = (which[mine], index[mine])
                    before = waiting.get(crossing.child)
                    if before is not None:
                        arrived = (
                            torch.cat([before[0], arrived[0]]),
                            torch.cat([before[1], arrived[1]]),
                        )
                    waiting[crossing.child] = arrived
        return [path[::-1] for path in hops]


@dataclass(eq=False)
class Walked:
    """The end of a walk, each tensor in the shape of its input.

    `strength` is the evidence in the method's own unit; `share` is the same as a share of what
    the walk set out with in that sample.
    """

    strength: dict[Value, Tensor]
    share: dict[Value, Tensor]

    def of(self, i: int) -> Walked:
        """That of sample i alone."""
        strength, share = (
            {value: item[i : i + 1].clone() for value, item in items.items()}
            for items in (self.strength, self.share)
        )
        return Walked(strength, share)

    @staticmethod
    def relative(evidence: dict[Value, Tensor], total: Tensor) -> Walked:
        """From signed evidence, and the evidence [batch] that counts as 1; shares of none are 0."""
        total = torch.where(total > 0, total, torch.inf)
        share = {
            value: item / total.reshape(-1, *[1] * (item.dim() - 1))
            for value, item in evidence.items()
        }
        return Walked(evidence, share)


class Method(ABC):
    """A way to walk back. A frozen dataclass whose fields are its documented parameters."""

    def __post_init__(self) -> None:
        """Refuse parameters of the wrong kind."""
        for name, given in self.parameters.items():
            value = plain(given)
            object.__setattr__(self, name, value)
            default = getattr(type(self), name, None)  # of a method of a user's there may be none
            if isinstance(default, bool) and not isinstance(value, bool):
                raise InputError(f"{name}={value!r} is neither True nor False.")
            if default is not None and not isinstance(default, bool) and isinstance(value, bool):
                raise InputError(
                    f"{name}={value!r} is no value for it: the default is {default!r}."
                )

    #: The standard deviation of the Gaussian that turns points into attention, as a share of the
    #: input's shorter side.
    blur: float = 1 / 28

    #: Whether levels of saliency weigh evidence by how far the network describes its place like others
    #: where evidence is.
    likeness: bool = False

    @property
    def surroundings(self) -> float:
        """How much, in levels of saliency, the attention around a pixel counts beside its own evidence."""
        return 0.3

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def clean(self, evidence: Tensor) -> Tensor:
        """What the method drops of the evidence [batch, ...] at the pixels: nothing, by default."""
        return evidence

    @abstractmethod
    def walk(self, plan: Plan, nodes: Tensor, trail: Trail | None = None) -> Walked:
        """Walk from `nodes` [batch], flat indices into `plan.start`, one a sample, to the inputs."""

    def walk_each(self, plan: Plan, targets: Sequence[Tensor]) -> Iterator[Walked]:
        """A walk for each of several `targets`, the nodes [batch] of a walk, which share what they can."""
        plan.expect(len(targets))
        for nodes in targets:
            yield self.walk(plan, nodes)


def one_hot(plan: Plan, nodes: Tensor) -> Tensor:
    """1 at the nodes, 0 elsewhere, in the shape of the start."""
    seed = torch.zeros_like(plan.start.data).reshape(-1)
    seed[nodes] = 1
    return seed.reshape(plan.start.shape)


def per_sample(tensor: Tensor, batch: int) -> Tensor:
    """[batch, rest]"""
    return tensor.reshape(batch, -1)
