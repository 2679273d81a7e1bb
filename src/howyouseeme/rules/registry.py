"""Which call has which rule, and what a rule returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..links import Link
from ..tape import Call, Value

__all__ = ["Refusal", "Rule", "Step", "family_of", "find_rule", "rule", "rule_of", "rules"]


@dataclass(frozen=True)
class Step:
    """One call, frozen: `output = sum of link.forward(source.data) + bias`.

    >>> x = call.args[0]
    >>> step = Step([(x, Diagonal(x.shape, output.shape, x.data.new_tensor(0.5)))])      # y = x / 2

    `bias` broadcasts against the output; None is 0. A function is called when it is first needed.
    `apart` promises that no element of the output has an input by more than one of the links.
    """

    links: Sequence[tuple[Value, Link]]
    bias: Tensor | Callable[[], Tensor] | None = None
    apart: bool = False

    @property
    def moves(self) -> bool:
        """Whether each element of the output has at most one input."""
        alone = len(self.links) == 1 or (self.apart and len(self.links) > 1)
        return alone and all(link.one_to_one for _, link in self.links)

    def bias_like(self, output: Tensor) -> Tensor:
        """The bias in the shape of the output.

        >>> total = step.bias_like(value.data)
        """
        if self.bias is None:
            return torch.zeros_like(output)
        bias = self.bias if isinstance(self.bias, Tensor) else self.bias()
        return bias.to(output.dtype).expand(output.shape)


Rule = Callable[[Call, Value], Step]

_RULES: dict[str, Rule] = {}
_FAMILIES: dict[str, str] = {}


class Refusal(Exception):  # noqa: N818 - never leaves the package; becomes UnsupportedCallError
    """A rule knows the call, but not this way of calling it; the message says which.

    >>> if len(call.inputs) > 1:               # in a rule
    ...     raise Refusal("only one computed input is supported")

    Rules raise it; users get an `UnsupportedCallError` that names all such calls.
    """


def rule(*names: str, family: str | None = None, replace: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for one or more calls.

    >>> @rule("shop.expm1", family="pointwise")
    ... def expm1(call, output):
    ...     return secant(call, output)

    The `family` says what kind of call it is, where others go by that: a sigmoid is a gate also after
    'movement', 'pooling' and 'branches'. Where none is named, it is that of the rule whose place is taken,
    or else the name of the module. With `replace` it takes the place of the rules that there are.

    Raises:
        ValueError: a name has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES and not replace:
                raise ValueError(
                    f"{name} has a rule already ({_RULES[name].__module__}.{_RULES[name].__name__}): "
                    f"to put another in its place, @rule({name!r}, replace=True)."
                )
            _RULES[name] = function
            own = (function.__module__ or "").rsplit(".", 1)[-1]
            _FAMILIES[name] = family or _FAMILIES.get(name, own)
        return function

    return register


def rule_of(family: str) -> partial[Callable[[Rule], Rule]]:
    """`rule`, for a file whose rules are all of one family.

    >>> rule = rule_of("movement")
    >>> @rule("aten.permute")
    ... def permute(call, output): ...
    """
    return partial(rule, family=family)


def rules() -> dict[str, Rule]:
    """The registry: call name to rule. Changing it changes what can be explained.

    >>> "aten.relu" in rules(), rules()["aten.relu"].__name__
    (True, 'secant')
    """
    return _RULES


def family_of(name: str) -> str:
    """The family of the rule for a call; '' where it has none.

    >>> family_of("aten.relu")
    'pointwise'
    """
    return _FAMILIES[name] if name in _RULES else ""


def find_rule(name: str) -> Rule | None:
    """The rule for a call, or None.

    >>> find_rule("aten.relu").__name__
    'secant'
    """
    return _RULES.get(name)
