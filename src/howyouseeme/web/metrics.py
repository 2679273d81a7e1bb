"""What is counted for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .guard import path_of

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters of one server.

    >>> metrics = Metrics()
    >>> metrics.watch(3, 0.8)             # three were explained together, in 0.8 s
    >>> metrics.page()                    # the answer to GET /metrics
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = Counter(
            "howyouseeme_requests",
            "Requests answered.",
            ["method", "path", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "howyouseeme_request_seconds",
            "From a request to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._together = Histogram(
            "howyouseeme_batch_size",
            "Requests that were worked on together.",
            buckets=(1, 2, 4, 8, 16),
            registry=self._registry,
        )
        self._work = Histogram(
            "howyouseeme_work_seconds",
            "What each of these batches took.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._waiting = Gauge(
            "howyouseeme_waiting", "Requests in the queue.", registry=self._registry
        )

    def watch(self, together: int, seconds: float) -> None:
        """Note what the worker did."""
        self._together.observe(together)
        self._work.observe(seconds)

    def wait_for(self, waiting: Callable[[], int]) -> None:
        """Where to look up how many requests wait."""
        self._waiting.set_function(waiting)

    def page(self) -> Response:
        """All of it, as Prometheus reads it."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def count(self, app: ASGIApp) -> ASGIApp:
        """The application, with its requests counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            begun, status = time.monotonic(), 500

            async def noted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                path = _path(path_of(scope))
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._requests.labels(method, path, str(status)).inc()
                if path.startswith("/v1/"):
                    self._seconds.labels(path).observe(time.monotonic() - begun)

        return counted


_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_PATHS = {"/v1/explain", "/v1/detect", "/v1/propose", "/v1/models", "/healthz", "/metrics"}


def _path(path: str) -> str:
    """One of few names, so that nobody can make a label of every path that they think up."""
    return path if path in _PATHS else "page"
