"""A forward pass, recorded: every ATen call that the network made for this input.

The tape sees what really ran - functional or module ops, reused modules, data-dependent control
flow - because it listens below the modules, at PyTorch's dispatcher. It changes nothing: the model's
mode, gradients, hooks and buffers are as they were.
"""

from __future__ import annotations

from .recorder import Reader, opened, record, refuse_training
from .values import (
    Call,
    Dropped,
    Tape,
    Value,
    at_hand,
    harmless,
    looks_are_harmless,
    with_looks,
    without_looks,
)

__all__ = [
    "Call",
    "Dropped",
    "Reader",
    "Tape",
    "Value",
    "at_hand",
    "harmless",
    "looks_are_harmless",
    "opened",
    "record",
    "refuse_training",
    "with_looks",
    "without_looks",
]
