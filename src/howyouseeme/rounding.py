"""GPUs round the factors of products to TF32, 10 bits, if PyTorch lets them, as it does for convolutions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["is_unrounded", "rounds", "settings", "unrounded"]

_PRECISION = threading.Lock()
_unrounded_walks = 0  # how many there are now, walks and programs, which share the setting
_HERE = threading.local()


def rounds(tensor: Tensor) -> bool | None:
    """Whether a convolution of a tensor is rounded, `unrounded` aside; None if there is no saying, or no helping it."""
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return False
    try:
        if torch.backends.cuda.matmul.allow_tf32:  # which is not to be set back and forth
            return None
        return _convolutions_round()
    except RuntimeError:  # settings that differ between kinds of calls
        return None


def settings() -> tuple[object, ...]:
    """All that PyTorch is told of how exact products are, `unrounded` aside."""
    matmul = torch.backends.cuda.matmul
    reduced = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    try:
        return (*reduced, matmul.allow_tf32, _convolutions_round())
    except RuntimeError:  # settings that differ between kinds of calls
        return reduced


def _convolutions_round() -> bool:
    with _PRECISION:
        return bool(_unrounded_walks) or torch.backends.cudnn.allow_tf32


@contextmanager
def unrounded(needed: bool = True) -> Iterator[None]:
    """Convolutions in float32 proper, where that is `needed`."""
    global _unrounded_walks  # noqa: PLW0603
    if not needed:
        yield
        return
    with _PRECISION:
        if not _unrounded_walks:
            torch.backends.cudnn.allow_tf32 = False
        _unrounded_walks += 1
    before, _HERE.unrounded = is_unrounded(), True
    try:
        yield
    finally:
        _HERE.unrounded = before
        with _PRECISION:
            _unrounded_walks -= 1
            if not _unrounded_walks:
                torch.backends.cudnn.allow_tf32 = True


def is_unrounded() -> bool:
    """Whether this thread's convolutions are `unrounded` now."""
    return getattr(_HERE, "unrounded", False)
