"""The application: the API, the page on it, and what guards both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from .. import __version__
from ..models import Network
from . import Settings
from .api import add_api, health, router
from .guard import (
    BodyLimit,
    KnownHost,
    OnlyThese,
    OtherMethods,
    SafeHeaders,
    SameOrigin,
    TokenNeeded,
    UnderPath,
)
from .metrics import Metrics
from .service import Service

__all__ = ["make_app"]

_ABOUT = """Shows which pixels made a convolutional network answer what it answered.

Photos are sent as `multipart/form-data`, in the field `photo`. The answer is the JSON of the command
line or, with `Accept: image/png`, a picture. An error is `{"detail": "one sentence"}`.

```console
$ curl -F photo=@photo.jpg http://127.0.0.1:8000/v1/explain
$ curl -F photo=@photo.jpg -H 'Accept: image/png' 'http://127.0.0.1:8000/v1/explain?target=top3' > photo.png
```

Where the server was started with a token, each request needs the header `Authorization: Bearer TOKEN`.
"""

_PATHS = ("/v1/", "/healthz", "/metrics", "/docs", "/openapi.json", "/static-offline-docs/")


def make_app(networks: Sequence[Network], settings: Settings | None = None) -> FastAPI:
    """The application that `serve` runs, to be run by any ASGI server.

    >>> app = make_app([load_model()], Settings(token=secret))

    Raises:
        InputError, ModelError: a network can't be served; see `Service`.
    """
    settings = settings or Settings()
    metrics = Metrics()
    service = Service(
        networks, settings.allowed, settings.device, settings.limits, watch=metrics.watch
    )
    metrics.wait_for(lambda: service.worker.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.open()  # where it was closed: an application may be started again
        if settings.page:
            await app.state.page.open()
        yield
        service.close()

    app = FastAPIOffline(
        redoc_url=None,
        title="howyouseeme",
        version=__version__,
        description=_ABOUT,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        middleware=_middleware(settings, metrics),
        # Swagger UI shows a badge of an outside service otherwise.
        swagger_ui_parameters={"validatorUrl": None},
    )
    app.state.service = service
    add_api(app)

    @app.get("/metrics", include_in_schema=False)
    async def measured() -> Response:
        return metrics.page()

    _describe(app, service, settings)
    if not settings.page:

        @app.get("/", include_in_schema=False)
        async def start(request: Request) -> Response:
            return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")

    _take_head(app)
    _refuse_others(app)
    if settings.page:
        from .page import add_page  # noqa: PLC0415 - Gradio takes seconds to import

        app.state.page = add_page(app, service, settings.root_path)
    return app


def _middleware(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """What guards the application, the outermost first."""
    paths = list(_PATHS)
    if settings.page:
        from .page import PATHS  # noqa: PLC0415

        paths += PATHS
    guards = [Middleware(metrics.count), Middleware(SafeHeaders)]
    if settings.root_path:
        guards.insert(0, Middleware(UnderPath, root=settings.root_path))
    if settings.local or settings.host_names:
        names = ["localhost", "127.0.0.1", "::1", settings.host, *settings.host_names]
        guards.append(Middleware(KnownHost, names=names))
    guards += [Middleware(SameOrigin), Middleware(BodyLimit, limits=settings.limits)]
    if settings.token is not None:
        guards.append(Middleware(TokenNeeded, token=settings.token))
    return [*guards, Middleware(OnlyThese, paths=paths)]


def _take_head(app: FastAPI) -> None:
    """Let a page be asked whether it is there; FastAPI's routes take GET alone."""
    for route in app.routes:
        if isinstance(route, Route) and route.methods == {"GET"} and not route.include_in_schema:
            route.methods.add("HEAD")


def _refuse_others(app: FastAPI) -> None:
    """Answer what the API's paths are asked wrongly, or it would go on to the page, which says 404."""
    methods: dict[str, set[str]] = {}
    for route in (*router.routes, *health.routes, *app.routes):
        if isinstance(route, Route):
            methods.setdefault(route.path, set()).update(route.methods or ())
    app.router.routes += [Route(path, OtherMethods(them)) for path, them in methods.items()]
    app.router.routes.append(Route("/v1/{rest:path}", OtherMethods()))


def _describe(app: FastAPI, service: Service, settings: Settings) -> None:
    """Tell of this server's networks, and of the token, in the OpenAPI document too."""
    made = app.openapi

    def described() -> dict[str, Any]:
        schema = made()
        for operation in (one for path in schema["paths"].values() for one in path.values()):
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    parameter["schema"] = {"type": "string", "enum": service.names}
                    parameter["example"] = service.names[0]
                    parameter.pop("examples", None)
        if settings.token is not None:
            schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["token"] = {"type": "http", "scheme": "bearer"}
            schema["security"] = [{"token": []}]
        return schema

    app.openapi = described  # type: ignore[method-assign]
