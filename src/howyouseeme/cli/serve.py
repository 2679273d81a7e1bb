"""`howyouseeme serve`: the page and the API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import click

from ..web import Limits, Settings
from ..web import serve as serve_web
from .network import DEFAULT_MODEL, Asked, find_here, options_of_each_network
from .program import verbose_option


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Its port."
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=[DEFAULT_MODEL],
    show_default=True,
    help="Network to load now, as for `howyouseeme explain`; repeatable, the first is the default. Where "
    "there is one, the options for networks below are its.",
)
@options_of_each_network
@click.option(
    "--allow-model",
    "allowed",
    multiple=True,
    help="Network that may be asked for too, and is loaded then; repeatable. No other ever is.",
)
@click.option(
    "--token",
    envvar="HOWYOUSEEME_TOKEN",
    help="What all must know who use the server; needed with a --host that others can reach. "
    "Better given in the environment variable HOWYOUSEEME_TOKEN, which no list of processes shows.",
)
@click.option(
    "--host-name",
    "host_names",
    multiple=True,
    metavar="NAME",
    help="Name by which a proxy's visitors reach the server, such as photos.example.org; repeatable. "
    "Requests by others, but this machine's own, are refused.",
)
@click.option(
    "--root-path",
    default="",
    metavar="PATH",
    help="Path under which a proxy shows the server, such as /see.",
)
@click.option("--page/--no-page", default=True, help="Serve the page too, or the API alone.")
@click.option(
    "--max-mb",
    default=Limits.body / 2**20,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Size of a request to the API, in MiB.",
)
@click.option(
    "--max-pixels",
    default=Limits.pixels,
    show_default=True,
    type=click.IntRange(min=1),
    help="Pixels of a photo.",
)
@click.option(
    "--max-seconds",
    default=Limits.seconds,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="From a request to its answer.",
)
@click.option(
    "--max-queue",
    default=Limits.queue,
    show_default=True,
    type=click.IntRange(min=1),
    help="Requests that wait; more are told that the server is busy.",
)
@click.option(
    "--access-log/--no-access-log",
    default=False,
    show_default=True,
    help="Write a line for each request: its address, path and status, never its photo or token.",
)
@verbose_option
def serve(
    *,
    host: str,
    port: int,
    models: tuple[str, ...],
    asked: Callable[[str], Asked],
    allowed: tuple[str, ...],
    token: str | None,
    host_names: tuple[str, ...],
    root_path: str,
    page: bool,
    max_mb: float,
    max_pixels: int,
    max_seconds: float,
    max_queue: int,
    access_log: bool,
) -> None:
    """Serve a page to play with in a browser, and an HTTP API (described at /docs)."""
    networks = [asked(model) for model in dict.fromkeys(models)]
    first = networks[0]
    if len(networks) > 1 and any(
        getattr(first, field.name) not in {None, False}
        for field in fields(first)
        if field.name not in {"model", "device"}
    ):
        raise click.UsageError(
            "--weights, --classes, --size and the like are those of one --model; let a factory prepare the "
            "others."
        )
    limits = Limits(
        body=round(max_mb * 2**20), pixels=max_pixels, queue=max_queue, seconds=max_seconds
    )
    device = first.device
    settings = Settings(
        host=host,
        port=port,
        token=token or None,
        page=page,
        allowed=allowed,
        device=device,
        limits=limits,
        host_names=host_names,
        root_path=root_path.rstrip("/"),
        access_log=access_log,
    )
    find_here(allowed)
    serve_web([network.load() for network in networks], settings, say=click.echo)
