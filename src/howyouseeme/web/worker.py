"""One thread that does the heavy work, in the order of a queue; what comes together is done together."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import HowYouSeeMeError

__all__ = ["BusyError", "LateError", "Worker"]

G = TypeVar("G")
T = TypeVar("T")

_PATIENCE = 0.25  # of the time that a request has, the share that it may wait for its turn
_LAST = 2.0  # seconds that the last job has when all ends
_FADING = 0.3  # of what an average remembers, the share of the last one


class BusyError(HowYouSeeMeError):
    """The queue is full; `seconds` from now there should be room."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"The server is busy; try again in {seconds} s.")
        self.seconds = seconds


class LateError(HowYouSeeMeError):
    """It took too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"This took longer than {seconds:g} s; try again, or with a smaller task.")


@dataclass(eq=False)
class _Job(Generic[G, T]):
    run: Callable[[Sequence[G]], Sequence[T]]
    given: G
    key: Hashable  # jobs of one key are run together; None: alone
    kind: str  # jobs of one kind take about as long as each other
    until: float
    future: Future[T]
    passed: int = 0  # how many that came later were run before


class Worker:
    """Runs jobs one after the other, in a thread of its own.

    >>> worker = Worker(queue=32, batch=4)
    >>> future = worker.submit(explain, photo, key="efficientnet-lite0", seconds=30)

    One thread, because explaining keeps a core busy and holds the GIL for much of the time: more
    would only slow each other down, and the answers to everything else.

    `run` is given what was given of several jobs with the same key, up to `batch`, and returns as many
    results; each job lets at most so many later ones go ahead. If it fails, each is run alone, so that
    none suffers from another. A job that is cancelled, or too late, before its turn is not run. How long jobs take
    is told by those of their `kind`, of which there are few.
    """

    def __init__(
        self, queue: int, batch: int, watch: Callable[[int, float], None] = lambda *_: None
    ) -> None:
        self._most, self._batch, self._watch = queue, batch, watch
        self._jobs: deque[_Job[Any, Any]] = deque()
        self._ready = threading.Condition()
        self._closed = True
        self._each: dict[str, float] = {}  # seconds that a job of a kind takes, about
        self.open()

    def open(self) -> None:
        """Begin to work; does nothing where it has begun."""
        if self._closed:
            self._closed = False
            name = "howyouseeme-worker"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(
        self,
        run: Callable[[Sequence[G]], Sequence[T]],
        given: G,
        *,
        seconds: float,
        key: Hashable = None,
        kind: str = "",
    ) -> Future[T]:
        """A result that will be there, or fail with `BusyError`, if its turn doesn't come within `seconds`.

        Raises:
            BusyError: the queue is full, or those that wait will take more than a quarter of that time.
        """
        future: Future[T] = Future()
        job = _Job(run, given, key, kind, time.monotonic() + seconds, future)
        with self._ready:
            wait = self._wait()
            # What would hardly be done in time is better refused at once.
            full = len(self._jobs) >= self._most or wait > seconds * _PATIENCE
            if self._closed or full:
                raise self._busy()
            self._jobs.append(job)
            self._ready.notify()
        return future

    def _busy(self) -> BusyError:
        return BusyError(max(1, math.ceil(self._wait() / 2)))

    def _wait(self) -> float:
        """Seconds until all that wait are done, about."""
        return sum(self._each.get(job.kind, 0) for job in self._jobs)

    def close(self) -> None:
        """End after the job that is running, or in a moment without it; the others are cancelled."""
        with self._ready:
            self._closed = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._ready.notify()
        self._thread.join(_LAST)  # nobody is left to wait for it, and it can't be broken off

    def _work(self) -> None:
        while jobs := self._take():
            begun = time.monotonic()
            self._run(jobs)
            count, kind = len(jobs), jobs[0].kind
            del jobs  # a thread that waits shall keep nobody's photo
            _give_back()
            taken = time.monotonic() - begun
            # What comes first loads a network, or compiles: it tells nothing of the next.
            before = self._each.get(kind)
            self._each[kind] = 0 if before is None else before + _FADING * (taken / count - before)
            self._watch(count, taken)

    def _take(self) -> list[_Job[Any, Any]]:
        """The next jobs; none when there will be no more."""
        with self._ready:
            while True:
                self._ready.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return []
                first = self._jobs.popleft()
                together = [first, *self._pull(first.key)]
                if wanted := [job for job in together if self._wanted(job)]:
                    return wanted

    def _pull(self, key: Hashable) -> list[_Job[Any, Any]]:
        """The jobs of that key that may go ahead of others, of which each lets only so many pass."""
        found: list[_Job[Any, Any]] = []
        others: list[_Job[Any, Any]] = []
        for job in self._jobs if key is not None else ():
            if len(found) + 1 >= self._batch or any(one.passed >= self._batch for one in others):
                break
            if job.key == key:
                found.append(job)
                for other in others:
                    other.passed += 1
            else:
                others.append(job)
        for job in found:
            self._jobs.remove(job)
        return found

    def _wanted(self, job: _Job[Any, Any]) -> bool:
        if not job.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() > job.until:
            job.future.set_exception(self._busy())
            return False
        return True

    @staticmethod
    def _run(jobs: Sequence[_Job[Any, Any]]) -> None:
        try:
            results = jobs[0].run([job.given for job in jobs])
        except BaseException as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                Worker._run([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)


def _give_back() -> None:
    """Give the memory of what was done back to the system.

    What refers to itself may hold hundreds of megabytes: Python, which counts objects and not bytes, would
    let much of it pile up, and glibc would keep the holes that it leaves.
    """
    gc.collect()
    if _TRIM is not None:
        _TRIM(0)


def _find_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library than glibc
        return None
    return found


_TRIM = _find_trim()
