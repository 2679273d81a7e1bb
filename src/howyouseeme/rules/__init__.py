"""One rule for every ATen call: which linear maps of its inputs the call is, on this image.

A rule takes a recorded call, and the output that is walked back from, and returns a `Step`: the
links to the inputs that are responsible, and the bias that nobody's activation explains. It holds
that `output = sum of link.forward(input) + bias`. A gate (squeeze-excite) gets no link: it scales
the signal, and the signal carries the evidence.

Rules live in one file per family, which it names, and register themselves by the call's name:

    rule = rule_of("pointwise")

    @rule("aten.relu")
    def relu(call: Call, output: Value) -> Step: ...

The in-place variant of a call (`aten.relu_`) has the same rule, and so have its overloads.
"""

from __future__ import annotations

from . import (  # noqa: F401 - each registers its rules
    attention,
    branches,
    convolution,
    linear,
    movement,
    pointwise,
    pooling,
    reductions,
    regions,
)
from .registry import Refusal, Step, family_of, find_rule, rule, rules

__all__ = ["Refusal", "Step", "family_of", "find_rule", "rule", "rules"]
