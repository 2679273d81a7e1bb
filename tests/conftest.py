from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from inspect import signature

import pytest
import torch
from click.testing import CliRunner

if "mix_stderr" in signature(CliRunner).parameters:  # click 8.1; later ones keep both apart
    CliRunner.__init__ = partialmethod(CliRunner.__init__, mix_stderr=False)  # type: ignore[assignment]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors of these tests are tiny: waking a second thread costs more than it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
