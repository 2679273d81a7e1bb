"""In front of people: the page and the HTTP API that `howyouseeme serve` starts."""

from __future__ import annotations

import gc
import ipaddress
import math
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from ..errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from ..models import Network

__all__ = ["Limits", "Settings", "serve"]

_LEAST_TOKEN = 16  # characters: a shorter one can be guessed


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    >>> Limits(queue=64, seconds=60)

    - `body`: bytes of a request to the API; `upload`: of one to the page, which takes videos too;
    - `pixels`: of a photo, or of a frame; `frames`: of a video;
    - `queue`: requests that wait; one more is told that the server is busy;
    - `seconds`: from a request to its answer; `batch`: requests that are explained together: more than
      four take more memory, and on a CPU hardly any less time;
    - `connections`: at once, the page's among them.

    Raises:
        InputError: one of them is 0 or less.
    """

    body: int = 20 * 2**20
    upload: int = 200 * 2**20
    pixels: int = 50_000_000
    frames: int = 1500
    queue: int = 32
    seconds: float = 60.0
    batch: int = 4
    connections: int = 500

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not getattr(self, limit.name) > 0:
                raise InputError(
                    f"{limit.name}={getattr(self, limit.name)!r} lets nothing through: give more than 0."
                )


@dataclass(frozen=True)
class Settings:
    """How a server is started.

    >>> Settings(host="0.0.0.0", token="...")

    Any `host` but this machine's own needs a `token`; with `page` false there is only the API.
    `allowed` are the names of models that are loaded when they are first asked for. Behind a proxy,
    `host_names` are those by which others reach it, `root_path` is where it lies there, such as `/see`.
    `access_log` writes a line for each request, without its photo and token.

    Raises:
        InputError: the token is missing, or too short; a host name or the path is none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    page: bool = True
    allowed: tuple[str, ...] = ()
    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)
    host_names: tuple[str, ...] = ()
    root_path: str = ""
    access_log: bool = False

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < _LEAST_TOKEN:
            raise InputError(
                f"The token has {len(self.token)} characters and can be guessed; give "
                f"{_LEAST_TOKEN} or more, such as those of: python -c 'import secrets; "
                "print(secrets.token_urlsafe())'"
            )
        if self.token is None and not self.local:
            raise InputError(
                f"On {self.host} others can reach this server: give a token that they must know, "
                "in the environment variable HOWYOUSEEME_TOKEN, or leave out --host."
            )
        for name in self.host_names:
            if re.fullmatch(r"[a-zA-Z0-9.-]+", name) is None:
                raise InputError(
                    f"{name!r} is no host name; give it without scheme and port, as in "
                    "--host-name photos.example.org."
                )
        if re.fullmatch(r"((/[\w.~-]+)+)?", self.root_path, re.ASCII) is None:
            raise InputError(
                f"The root path {self.root_path!r} must begin with a slash and not end with one, as in "
                "--root-path /see."
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(
    networks: Sequence[Network],
    settings: Settings | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the page and the API until interrupted.

    >>> serve([howyouseeme.load_model()])

    The first of the `networks` is the one that is used where none is asked for. `say` is told the
    address, once the server answers there.

    Raises:
        MissingExtraError: a package that the server needs is missing.
        InputError: the address is taken, or isn't this machine's.
    """
    settings = settings or Settings()
    try:
        import uvicorn  # noqa: PLC0415

        from .app import make_app  # noqa: PLC0415

        if settings.page:
            import gradio  # noqa: F401, PLC0415
    except ImportError as error:
        if error.name is not None and error.name.startswith("howyouseeme"):
            raise
        raise MissingExtraError(
            f"howyouseeme serve needs the package {error.name}: pip install 'howyouseeme[serve]'"
        ) from error
    with _listen(settings.host, settings.port) as listening:
        app = make_app(networks, settings)
        config = uvicorn.Config(
            app,
            log_level="info" if settings.access_log else "warning",
            access_log=settings.access_log,
            server_header=False,
            limit_concurrency=settings.limits.connections,
            timeout_graceful_shutdown=5,
            # Who waits as long as told when it was busy finds the connection open.
            timeout_keep_alive=math.ceil(settings.limits.seconds),
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    # What is there now stays: it need not be looked through after each request.
                    gc.collect()
                    gc.freeze()
                    say(
                        f"howyouseeme is at {_address(listening)} (the API: /docs); Ctrl+C ends it."
                    )

        Server(config).run(sockets=[listening])


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there: made here, so that what is wrong can be told in a sentence."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(kind, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise InputError(
            f"{host}:{port} can't be listened on ({error.strerror or error}); give another --port, "
            "or --host."
        ) from error
    return listening
