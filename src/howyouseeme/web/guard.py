"""What every request passes before it reaches the API or the page: tokens, sizes, and no more than is used."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import Limits

__all__ = [
    "BodyLimit",
    "KnownHost",
    "OnlyThese",
    "OtherMethods",
    "SafeHeaders",
    "SameOrigin",
    "TokenNeeded",
    "UnderPath",
    "path_of",
    "problem",
]

_COOKIE = "howyouseeme"

_LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>howyouseeme</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:24rem;margin:15vh auto;padding:0 1rem;
color:#1c1c20}input,button{font:inherit;width:100%;box-sizing:border-box;padding:.6rem;margin:.3rem 0;
border:1px solid #8a8a94;border-radius:.5rem}button{background:#1c1c20;color:#fff;border:0}</style>
<h1>howyouseeme</h1><form method="post" action="{root}/login"><label>Token of this server
<input name="token" type="password" autocomplete="current-password" autofocus required></label>
<button>Open</button><p role="alert">{said}</p></form></html>"""


def problem(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error, as the API tells it.

    >>> problem(413, "The request is too large.")
    """
    return JSONResponse({"detail": sentence}, status, headers)


def path_of(scope: Scope) -> str:
    """The path of a request, without what comes before it at a proxy.

    >>> path_of({"path": "/see/healthz", "root_path": "/see"})
    '/healthz'
    """
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class UnderPath:
    """Lets the application lie under a path at a proxy, whether the proxy takes it off or leaves it."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self.app, self._root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path == self._root:  # what the page refers to lies beside it
                await RedirectResponse(f"{self._root}/", 308)(scope, receive, send)
                return
            if not path.startswith(f"{self._root}/"):
                path = self._root + path
            scope = {**scope, "path": path, "root_path": self._root}
        await self.app(scope, receive, send)


class KnownHost:
    """Refuses requests by other names than the server's.

    Or a page from elsewhere, whose name was made to mean this machine, could use the server.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Who looks whether the server is well may call it by its address.
        if scope["type"] == "http" and path_of(scope) != "/healthz":
            given = Headers(scope=scope).get("host", "")
            try:
                known = (urlsplit(f"//{given}").hostname or "").removesuffix(".") in self._names
            except ValueError:  # it is no address
                known = False
            if not known:
                said = (
                    f"This server doesn't know the host name {given[:100]!r}; if it is reached by it, start "
                    "it with --host-name NAME."
                )
                await problem(400, said)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class OtherMethods:
    """Answers what none of a path's routes did: it takes other methods, or, if it has none, isn't there."""

    def __init__(self, methods: Iterable[str] = ()) -> None:
        self._methods = sorted(methods)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._methods:
            raise HTTPException(404, "There is nothing here.")
        said = f"{path_of(scope)} takes {' and '.join(self._methods)}, not {scope['method'][:20]}."
        raise HTTPException(405, said, {"Allow": ", ".join(self._methods)})


def _login(scope: Scope, said: str = "") -> str:
    # The root is the operator's and has no characters of HTML.
    return _LOGIN.replace("{said}", said).replace("{root}", scope.get("root_path", ""))


class OnlyThese:
    """Lets requests through only where their paths begin with one of some, or are `/`.

    Gradio has many routes, some of which read files or fetch from elsewhere; the page needs few.
    """

    def __init__(self, app: ASGIApp, paths: Iterable[str]) -> None:
        self.app, self._paths = app, tuple(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope) != "/":
            if not path_of(scope).startswith(self._paths):
                await problem(404, "There is nothing here.")(scope, receive, send)
                return
        elif scope["type"] == "websocket":  # there are none
            return
        await self.app(scope, receive, send)


class SameOrigin:
    """Refuses what a page of another site has the visitor's browser send.

    Browsers say where a request comes from (Fetch Metadata, or the older `Origin`); other programs
    say nothing, and pass.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] not in {"GET", "HEAD", "OPTIONS"}
        if asks and self._foreign(Headers(scope=scope)):
            said = "This server takes no requests that pages of other sites send."
            await problem(403, said)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @staticmethod
    def _foreign(headers: Headers) -> bool:
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site not in {"same-origin", "none"}
        origin = headers.get("origin")
        try:
            return origin is not None and urlsplit(origin).netloc != headers.get("host")
        except ValueError:  # it is no address
            return True


class BodyLimit:
    """Refuses requests that are too large, or too slow to arrive."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = path_of(scope).startswith("/gradio_api/upload")
        most = self._limits.upload if upload else self._limits.body
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.seconds * (10 if upload else 1)
        got = 0
        arrived = started = False

        async def measured() -> Message:
            nonlocal got, arrived
            if arrived:  # what comes now is that the other side has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - loop.time()))
            except asyncio.TimeoutError:
                raise HTTPException(408, "The request took too long to arrive.", _CLOSE) from None
            got += len(message.get("body", b""))
            if got > most:
                raise _too_large(most)
            arrived = not message.get("more_body", False)
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            length = Headers(scope=scope).get("content-length", "")
            if length.isascii() and length.isdecimal() and int(length[:20]) > most:
                raise _too_large(most)
            await self.app(scope, measured, noted)
        except HTTPException as refused:
            if started:
                raise
            await problem(refused.status_code, refused.detail, _CLOSE)(scope, receive, send)


_CLOSE = {"Connection": "close"}


def _too_large(most: int) -> HTTPException:
    return HTTPException(
        413, f"The request is larger than {most / 2**20:.3g} MiB, the limit.", _CLOSE
    )


class SafeHeaders:
    """Tells browsers to load nothing from elsewhere, and to show the page in no other."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                # To this server alone, whose forms say by it where they come from (`SameOrigin`).
                headers["Referrer-Policy"] = "same-origin"
                headers["Content-Security-Policy"] = _POLICY
            await send(message)

        await self.app(scope, receive, noted)


# Gradio's page has scripts and styles in it, and makes functions of text.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


class TokenNeeded:
    """Lets only those through who know the token: by a header, or by a cookie after logging in."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._token = token.encode()
        # The cookie isn't the token, which may be used elsewhere.
        self._cookie = hmac.new(self._token, b"howyouseeme page", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) == "/healthz":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        if path_of(scope) == "/login":
            await (await self._login(request))(scope, receive, send)
        elif self._known(request):
            await self.app(scope, receive, send)
        else:
            await self._refuse(request)(scope, receive, send)

    def _known(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._same(given.strip()):
            return True
        return hmac.compare_digest(request.cookies.get(_COOKIE, "").encode(), self._cookie.encode())

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token)

    def _refuse(self, request: Request) -> Response:
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_login(request.scope), 401, {"WWW-Authenticate": "Bearer"})
        return problem(
            401,
            "This server needs its token: send the header Authorization: Bearer TOKEN.",
            {"WWW-Authenticate": "Bearer"},
        )

    async def _login(self, request: Request) -> Response:
        if request.method != "POST":
            return HTMLResponse(_login(request.scope))
        form: Any = await request.form(max_files=0, max_fields=4)
        given = form.get("token")
        if not isinstance(given, str) or not self._same(given.strip()):
            await asyncio.sleep(0.5)
            return HTMLResponse(_login(request.scope, "That isn't it."), 401)
        root = request.scope.get("root_path", "")
        response = RedirectResponse(f"{root}/", 303)
        response.set_cookie(
            _COOKIE,
            self._cookie,
            path=root or "/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response
