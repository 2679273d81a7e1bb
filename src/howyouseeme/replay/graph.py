"""Calls of a GPU that are started all at once, by a CUDA graph: starting them one by one takes most of the time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graph", "Turns", "makes_graphs"]

#: A graph keeps the memory of what its calls make: none is made where less than this share of a device's is free.
_SPARED = 0.25

#: PyTorch captures one graph at a time.
_CAPTURE = threading.Lock()


def makes_graphs(device: torch.device) -> bool:
    """Whether calls of a device can be made a graph."""
    return device.type == "cuda"


class Graph:
    """The calls that a function of tensors makes, to be made again for other contents.

    >>> graph = Graph.of(run, tensors, 0)       # None where it waits on the way, or memory is short
    >>> made = graph(others)                    # what run(others) returns

    What it returns lies where it lay before: the next call writes over it. The first `steady` of what it
    is given lie where they lay, as what another graph has made; the others are copied.
    """

    def __init__(self, graph: Any, given: Sequence[Tensor], steady: int, made: Any) -> None:
        self._graph, self._given, self._steady, self._made = graph, list(given), steady, made

    def __call__(self, given: Sequence[Tensor]) -> Any:
        for own, item in zip(self._given[self._steady :], given[self._steady :], strict=True):
            own.copy_(item)
        self._graph.replay()
        return self._made

    @classmethod
    def of(cls, run: Callable[..., Any], given: Sequence[Tensor], steady: int) -> Graph | None:
        """The graph of `run`, which makes the same calls for all contents, and leaves those as they are."""
        own = [*given[:steady], *(item.clone() for item in given[steady:])]
        if any(one.stride() != item.stride() for one, item in zip(own, given, strict=True)):
            return None  # elements that share memory
        with _CAPTURE, torch.cuda.device(own[0].device):
            now, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(now)
            # Once without the graph, as libraries set themselves up, and a call that waits would break it off.
            with torch.cuda.stream(stream):
                waits = _waits(run, own)
            now.wait_stream(stream)
            free, all_ = torch.cuda.mem_get_info()
            free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if waits or free < _SPARED * all_:
                return None
            graph = torch.cuda.CUDAGraph()
            capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            try:
                with torch.cuda.stream(stream), capture:  # which leaves its stream on if it fails
                    made = run(own)
            except RuntimeError:  # what else it doesn't take, or there is no memory for it
                return None
        return cls(graph, own, steady, made)


def _waits(run: Callable[..., Any], given: Sequence[Tensor]) -> bool:
    """Whether calls wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says of itself that it is new
        torch.cuda.set_sync_debug_mode("warn")
    try:
        return warned(run, given, "called a synchronizing")
    finally:
        torch.cuda.set_sync_debug_mode(before)


def warned(run: Callable[..., Any], given: Sequence[Tensor], text: str) -> bool:
    """Whether calls of PyTorch warn of something.

    >>> warned(run, tensors, "called a synchronizing")
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _Calls.apply(run, given, torch.empty(0))
    return any(text in str(one.message) for one in seen)


class _Calls(torch.autograd.Function):
    """Calls as a part of one: the warnings of calls by `torch.ops` go past Python else."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], given: Sequence[Tensor], made: Tensor) -> Tensor:
        run(given)
        return made


class Turns:
    """Work of several streams on the same memory, one after the other.

    >>> turns = Turns(device)
    >>> with turns:
    ...     made = graph(tensors)[0].clone()
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._graphs = device, makes_graphs(device)
        self._last: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def __exit__(self, *error: object) -> None:
        if self._graphs:
            self._last = torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        """Wait for what is going on."""
        if self._graphs:
            torch.cuda.current_stream(self._device).synchronize()
