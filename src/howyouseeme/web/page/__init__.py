"""The page: Gradio's inputs around a viewer of our own, on top of the service."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while it is imported

import gradio as gr
from fastapi import APIRouter, FastAPI

from ...images import sample_photo
from ..service import Service
from ..shelf import Shelf
from .parts import FOLDER
from .photo import Photos
from .video import Videos

__all__ = ["PATHS", "add_page"]

#: Where requests of the page go: the viewer's own, and those of Gradio that it needs.
PATHS = (
    "/page/",
    "/assets/",
    "/static/",
    "/svelte/",
    "/theme.css",
    "/config",
    "/favicon.ico",
    "/gradio_api/startup-events",
    "/gradio_api/heartbeat/",
    "/gradio_api/queue/",
    "/gradio_api/cancel",
    "/gradio_api/reset",
    "/gradio_api/upload",
    "/gradio_api/file=",
)

_KEPT = 512 * 2**20  # bytes of scenes and tracks: 40 of large photos, or more of small ones


def add_page(app: FastAPI, service: Service, root_path: str = "") -> Page:
    """Put the page at `/` of an application that has its other routes already, and lies under a path.

    >>> add_page(app, Service([load_model()]))
    """
    # Uploads go into a folder of this server alone, and with it.
    folder = tempfile.TemporaryDirectory(prefix="howyouseeme-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    app.state.uploads = folder
    page = Page(service)
    app.include_router(page.router)
    blocks = page.blocks()
    photos = sample_photo().parent
    _keep_to(blocks, Path(folder.name), photos)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        root_path=root_path or None,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        allowed_paths=[str(photos)],
        enable_monitoring=False,
        show_error=True,
        max_file_size=service.limits.upload,
        theme=_theme(),
        css=(FOLDER / "page.css").read_text("utf-8"),
        js=(FOLDER / "page.js").read_text("utf-8"),
        head='<meta name="color-scheme" content="light dark">',
    )
    return page


def _theme() -> Any:
    """Quiet, and in fonts that every machine has: none are loaded."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.neutral,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_lg,
        font=[gr.themes.Font(name) for name in fonts],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    )
    # Gradio's own greys are too pale to be read by all.
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300",
        button_primary_background_fill="#1c1c20",
        button_primary_background_fill_hover="#3a3a42",
        button_primary_text_color="white",
    )


class Page:
    """The page of one server, with what it has shown lately.

    >>> page = Page(service)
    >>> page.blocks(), page.router
    """

    def __init__(self, service: Service) -> None:
        self.names = service.names
        shelf = Shelf(_KEPT)
        self.photos, self.videos = Photos(service, shelf), Videos(service, shelf)
        self.router = APIRouter(prefix="/page", include_in_schema=False)
        self.photos.add_to(self.router)
        self.videos.add_to(self.router)

    async def open(self) -> None:
        """Explain what the page opens on, so that nobody waits for it."""
        await self.photos.open()

    def blocks(self) -> Any:
        """The page, for Gradio to serve."""
        with gr.Blocks(
            title="howyouseeme",
            analytics_enabled=False,
            delete_cache=(1800, 7200),
            fill_width=True,
        ) as blocks:
            gr.HTML((FOLDER / "header.html").read_text("utf-8"), elem_id="header")
            with gr.Tabs():
                with gr.Tab("Photo", id="photo"):
                    opened = self.photos.tab(self.names)
                with gr.Tab("Video", id="video"):
                    self.videos.tab(self.names)
            blocks.load(**opened)
        return blocks


def _keep_to(blocks: Any, *folders: Path) -> None:
    """Let the page take files from these folders alone, and nothing by its address.

    A visitor can send the path of any file, or an address, as if it had been uploaded. Gradio checks
    paths only in applications that it has launched itself, where they are marked as files; addresses
    it fetches. What passes is given to our functions as a path: they read it themselves, since
    Gradio's reading tells of a broken file in other words, and converts.
    """
    blocks.has_launched = blocks.is_running = True
    inside = [folder.resolve() for folder in folders]

    def checked(path: Any) -> Any:
        place = Path(str(path)).resolve()
        if path is not None and not any(place.is_relative_to(folder) for folder in inside):
            raise gr.Error("This was not uploaded here.", print_exception=False)
        return path

    def preprocess(payload: Any) -> Any:
        return None if payload is None else checked(payload.path)

    for block in blocks.blocks.values():
        if isinstance(block, (gr.Image, gr.Video)):
            block.preprocess = preprocess  # type: ignore[method-assign]
        if isinstance(block, gr.components.Component):
            # An error if Gradio has it no more: then this guard has to be written anew.
            take = block.async_move_resource_to_block_cache

            async def take_checked(path: Any, take: Any = take) -> Any:
                return await take(checked(path))

            block.async_move_resource_to_block_cache = take_checked  # type: ignore
