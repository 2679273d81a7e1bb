"""The way back: from one value of a tape to the inputs, call by call.

`plan` freezes every call that the target depends on into its links, in the order of the walk. The
methods then carry evidence along those links: exactly (`multipliers`), or as they choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError, UnsupportedCallError
from .links import Diagonal
from .rules import Refusal, Step, find_rule
from .tape import Call, Tape, Value, at_hand, harmless

__all__ = ["Plan", "multipliers", "plan", "signs"]


@dataclass(eq=False)
class Plan:
    """The steps from a value back to the inputs: `steps` in the order of the walk, last call first.

    `layouts` keeps what `howyouseeme.places.layouts` found out, by input. `shared` is what walks from
    several nodes of the start keep for each other; None where there is but one, to let it go at once. A walk that
    `spends` is the last one: it may let go of the activations that it has passed.
    """

    start: Value
    steps: list[tuple[Value, Step]]
    inputs: list[Value]
    exclusive: bool = True  # whether the start's elements exclude each other, as softmax classes do
    layouts: dict[Value, dict[Value, Any]] = field(default_factory=dict)
    shared: dict[Any, Any] | None = None
    spends: bool = False
    _step_of: dict[Value, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._step_of = dict(self.steps)

    def expect(self, walks: int) -> None:
        """So many walks follow: several share what they can, and then none spends what the next one needs."""
        self.shared, self.spends = ({}, False) if walks > 1 else (None, self.spends)

    def separable(self, batch: int) -> bool:
        """True if the values are `batch` samples one after the other that never mix."""
        return batch == 1 or all(
            link.keeps_samples(batch) for _, step in self.steps for _, link in step.links
        )

    @cached_property
    def stacks(self) -> bool:
        """True if all on the way is one sample, so that walks from several elements may go as a stack.

        Evidence has then as many samples as there are walks, and activations one.
        """
        links = (link for _, step in self.steps for _, link in step.links)
        return self.start.shape[:1] == (1,) and all(link.stacks for link in links)

    def step(self, value: Value) -> Step | None:
        """The step that leads back from a value; None for an input of the model."""
        return self._step_of.get(value)


@torch.no_grad()
def plan(tape: Tape, start: Value, exclusive: bool = True) -> Plan:
    """Freeze the calls that `start` depends on.

    >>> tape = record(model, [image])
    >>> [value.call.name for value, step in plan(tape, tape.output).steps][:2]
    ['aten.addmm', 'aten.view']

    `exclusive` tells whether the elements of `start` [batch, classes] exclude each other (softmax) or
    not (sigmoids).

    Raises:
        UnsupportedCallError: calls on the way have no rule; the message names all of them.
        ModelError: the value does not depend on the model's input.
    """
    needed = {start}
    steps: list[tuple[Value, Step]] = []
    missing: list[tuple[Call, str]] = []
    widened = any(value.rounded for value in tape.values)
    for call in reversed(tape.calls):
        for value in call.outputs:
            if value is None or value not in needed:
                continue
            find = find_rule(call.name)
            try:
                if find is None:
                    raise Refusal("no rule")
                step = find(call.widened() if widened else call, value)
            except Refusal as reason:
                missing.append((call, str(reason)))
                needed.update(v for v in call.inputs if v.data.is_floating_point())
                continue
            steps.append((value, step))
            needed.update(source for source, _ in step.links)
    if missing:
        raise _unsupported(missing)
    inputs = [value for value in tape.inputs if value in needed]
    if not inputs:
        raise ModelError(
            "The target does not depend on the model's input through recorded calls: is it computed "
            "outside of PyTorch (numpy), or from a constant?"
        )
    if not at_hand(start.data):
        _look_at_once(steps)
    return Plan(start, steps, inputs, exclusive)


def _look_at_once(steps: list[tuple[Value, Step]]) -> None:
    """Find out at once what walks decide by the contents of."""
    asked: dict[Value | Diagonal, Tensor] = {}
    for value, step in steps:
        items: list[Value | Diagonal] = [
            link for _, link in step.links if isinstance(link, Diagonal)
        ]
        if not step.moves:  # where a value was overwritten, what did that tells its sign
            items += [source for source, _ in step.links]
            items += [] if value.forgotten else [value]
        for item in items:
            if item not in asked and (pending := item.pending) is not None:
                asked[item] = pending
    if not asked:
        return
    flags = torch.stack(list(asked.values()))
    with harmless():
        found = flags.tolist()
    for item, told in zip(asked, found, strict=True):
        item.settle(told)
    # A value that is below zero somewhere may be taken for such anywhere. On the rest a replay has to find the
    # same, and only CPUs replay: a device would wait once more.
    rest = [
        flag
        for (item, flag), told in zip(asked.items(), found, strict=True)
        if not (told and isinstance(item, Value))
    ]
    if rest and flags.is_cpu:
        torch.stack(rest).tolist()


#: What makes whole numbers with a scale of floats, and floats of these.
_QUANTISING = {
    "aten.dequantize",
    *(f"aten.quantize_per_{kind}" for kind in ("tensor", "channel", "tensor_dynamic")),
}


def _unsupported(missing: list[tuple[Call, str]]) -> UnsupportedCallError:
    lines = [f"  {call.describe()}: {reason}" for call, reason in reversed(missing)]
    names = sorted({call.name for call, _ in missing})
    if any(name.startswith("quantized.") or name in _QUANTISING for name in names):
        return UnsupportedCallError(
            f"The model was quantised by PyTorch, and such networks aren't supported ({', '.join(names)}): "
            "explain the float model, as it was before it was quantised."
        )
    reads = [call.reads for call, _ in missing]
    whose = "The target function makes" if all(reads) else "The model makes"
    if any(reads) and not all(reads):
        whose = "The model and the target function make"
    return UnsupportedCallError(
        f"{whose} {len(missing)} call(s) that can't be walked back through:\n"
        + "\n".join(dict.fromkeys(lines))
        + f"\nA rule for {', '.join(names)} makes them work: see howyouseeme.rules.rule."
    )


@torch.no_grad()
def multipliers(
    plan: Plan,
    seed: Tensor,
    until: Callable[[Value], bool] = lambda value: False,
    on_bias: Callable[[Call, Tensor], None] | None = None,
    gates: bool = True,
) -> Iterator[tuple[Value, Tensor]]:
    """Carry exact multipliers back: d(target) = multiplier · activation, with every call frozen.

    Yields (value, multiplier in the value's shape) once all that flows into it has arrived, for every
    value on the way. The walk goes no further back than values for which `until` is true. All paths
    are summed, with their sign; nothing is lost.

    `on_bias` is told each call's share of the target that comes from its bias, elementwise. Without `gates`
    what acts on each element alone (an activation, a scale, a mask) lets everything through as it is: what is
    not 0 then has a say, whether this image makes use of it or not.
    """
    waiting: dict[Value, Tensor] = {plan.start: seed}
    for value, step in plan.steps:
        if value not in waiting:
            continue
        multiplier = waiting.pop(value)
        yield value, multiplier
        if until(value):
            continue
        for source, link in step.links:
            if gates or not isinstance(link, Diagonal):
                back = link.transposed().forward(multiplier).to(source.dtype)
            else:
                back = link.back(multiplier).to(source.dtype)
            waiting[source] = waiting[source] + back if source in waiting else back
        if on_bias is not None and step.bias is not None:
            assert value.call is not None
            share = multiplier * step.bias_like(value.data)
            # What counts for nothing may be infinite, as where a mask has put it.
            on_bias(value.call, share.masked_fill_(multiplier == 0, 0))
    yield from waiting.items()


def signs(tensor: Tensor) -> Tensor:
    """+1 or -1, with +1 for zero."""
    return tensor.sign().add_(0.5).sign_()  # several times as fast as `torch.where`
