"""Numbers of Python, whoever made them: PyTorch, NumPy, or Python itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["plain"]


def plain(item: Any) -> Any:
    """Python's numbers and lists in place of a tensor's or NumPy's; anything else as it is.

    >>> plain(np.int64(3)), plain(torch.tensor([1, 2])), plain("tabby")
    (3, [1, 2], 'tabby')
    """
    return item.tolist() if isinstance(item, (Tensor, np.ndarray, np.generic)) else item
