"""The page: Gradio's inputs around a viewer of our own, on top of the service."""

from __future__ import annotations

import hashlib
import html
import os
import secrets
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while it is imported

import gradio as gr
import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import Response
from PIL import Image
from starlette.concurrency import run_in_threadpool

from ..draw import data_uri
from ..errors import HowYouSeeMeError, ImageError, InputError
from ..images import sample_photo
from ..track import COLUMNS, Tracker, annotate, row
from ..video import Table, Video, VideoWriter, open_video
from .scene import Scene, make_scene, palette
from .service import Service, TooLargeError, read_photo
from .shelf import Shelf

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

_SAMPLES = ("cat", "coffee", "rocket")
_LIKELIEST = 5
_SIDE = 1600  # a larger photo is made smaller: no network looks at more of it
_KEPT = 512 * 2**20  # bytes of scenes and tracks: 40 of large photos, or more of small ones
_FRAME = 1280  # side of a video's frames, at most

_FOLDER = files("howyouseeme") / "web" / "static"

#: Video files by their first bytes, and how FFmpeg is to read them: nothing else is, for some formats
#: are lists of other files.
_VIDEOS = (
    (4, b"ftyp", "mp4"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (0, b"RIFF", "avi"),
)


@dataclass(frozen=True)
class _Tracked:
    """A finished track: the video and the table, as files."""

    video: bytes
    table: bytes


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
        css=(_FOLDER / "page.css").read_text("utf-8"),
        js=(_FOLDER / "page.js").read_text("utf-8"),
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
        self.service = service
        self.shelf = Shelf(_KEPT)
        self.router = self._routes()

    async def open(self) -> None:
        """Explain what the page opens on, so that nobody waits for it."""
        await self.scene(sample_photo(_SAMPLES[0]).read_bytes(), None, None)

    # -- explaining ---------------------------------------------------------------------------------

    async def scene(self, photo: bytes, model: str | None, target: str | None) -> dict[str, Any]:
        """What the viewer shows of a photo: the answer of a network for a class, or the likeliest one.

        Errors are those of `Service.explain`.
        """
        name = self.service.check(model)
        key = self.shelf.key(hashlib.sha256(photo).digest(), name, target or "")
        scene: Scene | None = self.shelf.get(key)
        if scene is None:
            scene = await self.service.do(partial(self._make, photo, name, target or None))
            self.shelf.put(key, scene, scene.size)
        return {"key": key, **scene.drawn}

    def _make(self, data: bytes, model: str, target: str | None) -> Scene:
        photo = read_photo(data, self.service.limits)
        photo.thumbnail((_SIDE, _SIDE))
        ready = self.service.ready(model)
        explainer, classes = ready.explainer("evidence"), ready.network.classes
        likeliest = explainer.top(photo, min(_LIKELIEST, len(classes)) if classes else 1)
        if target is None:
            return make_scene(likeliest[0], likeliest)
        index = ready.network.class_index(target)
        known = [one for one in likeliest if one.target[0] == index]
        return make_scene(known[0] if known else explainer(photo, index), likeliest)

    # -- what the viewer asks for later -------------------------------------------------------------

    def _routes(self) -> APIRouter:
        router = APIRouter(prefix="/page", include_in_schema=False)

        @router.get("/{key}/path")
        async def path(key: str, point: int) -> dict[str, Any]:
            scene = self._kept(key, Scene)
            try:
                return await self.service.do(partial(scene.path, point))
            except IndexError:
                raise HTTPException(404, "There is no such point.") from None

        @router.get("/{key}/explanation.png")
        async def picture(key: str) -> Response:
            scene = self._kept(key, Scene)
            return _file(await self.service.do(partial(scene.picture, True)), "image/png")

        @router.get("/{key}/explanation.json")
        async def numbers(key: str) -> Response:
            scene = self._kept(key, Scene)
            return _file(await self.service.do(scene.numbers), "application/json")

        @router.get("/{key}/explanation.zip")
        async def archive(key: str) -> Response:
            scene = self._kept(key, Scene)
            return _file(await self.service.do(scene.archive), "application/zip")

        @router.get("/{key}/track.mp4")
        async def video(key: str, request: Request) -> Response:
            return _part(self._kept(key, _Tracked).video, "video/mp4", request)

        @router.get("/{key}/track.csv")
        async def table(key: str) -> Response:
            return _file(self._kept(key, _Tracked).table, "text/csv")

        return router

    def _kept(self, key: str, kind: type[Any]) -> Any:
        thing = self.shelf.get(key)
        if not isinstance(thing, kind):
            raise HTTPException(404, "This is no longer kept; explain the photo once more.")
        return thing

    # -- the page itself ----------------------------------------------------------------------------

    def blocks(self) -> Any:
        """The page, for Gradio to serve."""
        names = self.service.names
        with gr.Blocks(
            title="howyouseeme",
            analytics_enabled=False,
            delete_cache=(1800, 7200),
            fill_width=True,
        ) as blocks:
            gr.HTML((_FOLDER / "header.html").read_text("utf-8"), elem_id="header")
            with gr.Tabs():
                with gr.Tab("Photo", id="photo"):
                    opened = self._photo_tab(names)
                with gr.Tab("Video", id="video"):
                    self._video_tab(names)
            blocks.load(**opened)
        return blocks

    def _photo_tab(self, names: list[str]) -> dict[str, Any]:
        with gr.Row(elem_id="photo-row"):
            with gr.Column(scale=1, min_width=290, elem_id="controls"):
                photo = gr.Image(
                    label="Photo",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    height=230,
                    buttons=[],
                    elem_id="photo",
                )
                with gr.Row(elem_id="samples"):
                    samples = [
                        gr.Button(name.capitalize(), size="sm", min_width=60, elem_id=name)
                        for name in _SAMPLES
                    ]
                network = gr.Dropdown(
                    names,
                    value=names[0],
                    label="Network",
                    elem_id="network",
                    filterable=len(names) > 8,
                )
                target = gr.Radio([], label="Class", elem_id="class")
                # What is typed is a class's name too, or an error that says which names are close.
                other = gr.Dropdown(
                    [],
                    label="Any other class",
                    elem_id="other-class",
                    filterable=True,
                    allow_custom_value=True,
                )
                with gr.Accordion("Beside it, on the same photo", open=False, elem_id="beside"):
                    second = gr.Dropdown(
                        [("the same", ""), *((name, name) for name in names)],
                        value="",
                        label="Network",
                        elem_id="second-network",
                        filterable=len(names) > 8,
                    )
                    against = gr.Dropdown(
                        [],
                        label="Class",
                        elem_id="second-class",
                        filterable=True,
                        allow_custom_value=True,
                    )
                    alone = gr.Button("Only one again", size="sm", elem_id="alone")
            with gr.Column(scale=3, min_width=320, elem_id="stage"):
                viewer = _html("viewer", elem_id="viewer", palette=_gradient())
        inputs = [photo, network, target, other, second, against]
        outputs = [viewer, target, other, second, against]
        shown = {"outputs": outputs, "show_progress_on": viewer, **_QUIET}

        async def on_photo(photo: Any, network: Any) -> Any:
            return await self._look(photo, network)

        async def on_class(
            photo: Any, network: Any, target: Any, _other: Any, second: Any, against: Any
        ) -> Any:
            return await self._look(photo, network, target, second, against)

        async def on_other(
            photo: Any, network: Any, _target: Any, other: Any, second: Any, against: Any
        ) -> Any:
            return await self._look(photo, network, other, second, against)

        async def on_beside(
            photo: Any, network: Any, target: Any, other: Any, second: Any, against: Any
        ) -> Any:
            return await self._look(photo, network, target or other, second, against)

        async def on_alone(photo: Any, network: Any, target: Any, other: Any, *_: Any) -> Any:
            return await self._look(photo, network, target or other)

        photo.input(on_photo, [photo, network], **shown)
        network.input(on_photo, [photo, network], **shown)
        target.input(on_class, inputs, **shown)
        other.input(on_other, inputs, **shown)
        second.input(on_beside, inputs, **shown)
        against.input(on_beside, inputs, **shown)
        alone.click(on_alone, inputs, **shown)
        for name, button in zip(_SAMPLES, samples, strict=True):

            async def on_sample(network: Any, name: str = name) -> Any:
                file = str(sample_photo(name))
                return [file, *await self._look(file, network)]

            button.click(
                on_sample,
                network,
                [photo, *outputs],
                show_progress_on=viewer,
                **_QUIET,
            )

        async def on_open() -> Any:
            file = str(sample_photo(_SAMPLES[0]))
            return [file, *await self._look(file, names[0])]

        return {
            "fn": on_open,
            "outputs": [photo, *outputs],
            "show_progress_on": viewer,
            **_QUIET,
        }

    async def _look(
        self,
        photo: Any,
        network: Any,
        target: Any = None,
        second: Any = None,
        against: Any = None,
    ) -> list[Any]:
        """Values for the viewer, the class among the likeliest, any other, and what is beside it."""
        if not photo:
            return [gr.skip()] * 5
        try:
            data = await run_in_threadpool(_bytes, photo, self.service.limits.upload)
            wanted = [(network, target)]
            if second or against:
                wanted.append((second or network, against))
            scenes = [await self.scene(data, _text(model), _text(index)) for model, index in wanted]
        except HowYouSeeMeError as error:
            return [_said(error), *[gr.skip()] * 4]
        first = scenes[0]
        likeliest = [
            (_choice(one["label"], one["probability"]), _value(one["index"]))
            for one in first["likeliest"]
        ]
        chosen = _value(first["index"])
        among = chosen in {index for _, index in likeliest}
        classes = self._classes(first["model"])
        beside = scenes[1] if len(scenes) > 1 else None
        return [
            {"scenes": scenes, "palette": palette()},
            gr.update(choices=likeliest, value=chosen if among else None),
            gr.update(choices=classes, value=None if among else chosen),
            gr.update(value=_text(second) or ""),
            gr.update(
                choices=self._classes(beside["model"] if beside else first["model"]),
                value=_value(beside["index"]) if beside else None,
            ),
        ]

    def _classes(self, model: str) -> list[tuple[str, str]]:
        network = self.service.loaded(model)
        names = (network and network.classes) or ()
        return sorted((name, str(index)) for index, name in enumerate(names))

    # -- videos -------------------------------------------------------------------------------------

    def _video_tab(self, names: list[str]) -> None:
        with gr.Row(elem_id="video-row"):
            with gr.Column(scale=1, min_width=290):
                clip = gr.Video(
                    label="Your video", sources=["upload", "webcam"], height=230, elem_id="clip"
                )
                network = gr.Dropdown(
                    names,
                    value=names[0],
                    label="Network",
                    elem_id="video-network",
                    filterable=len(names) > 8,
                )
                name = gr.Textbox(
                    label="Class to follow",
                    info="Its place in the first frame is found by its evidence.",
                    placeholder="for example: tabby",
                    elem_id="video-class",
                )
                box = gr.Textbox(
                    label="Or the box around it",
                    info="Drag it over the first frame, or write x0, y0, x1, y1 in pixels.",
                    placeholder="120, 80, 260, 300",
                    elem_id="video-box",
                )
                start = gr.Button("Follow", variant="primary", elem_id="follow")
            with gr.Column(scale=3, min_width=320):
                told = gr.HTML("", elem_id="track-said")
                picker = _html("picker", elem_id="picker", palette=_gradient())
                result = gr.HTML("", elem_id="tracked")

        async def on_clip(clip: Any) -> Any:
            if not clip:
                return None, "", "", ""
            try:
                frame = await self.service.do(partial(self._first_frame, _text(clip) or ""))
            except HowYouSeeMeError as error:
                return None, _alert(error), "", ""
            return _framed(frame), _hint("Drag a box around what is to be followed."), "", ""

        async def on_box(event: gr.EventData) -> Any:
            return str(event._data.get("box", ""))[:100], ""

        async def on_start(clip: Any, network: Any, name: Any, box: Any) -> AsyncIterator[Any]:
            try:
                async for said, made in self._track(clip, network, name, box):
                    yield said, made
            except HowYouSeeMeError as error:
                yield _alert(error), gr.skip()

        clip.input(on_clip, clip, [picker, told, box, result], **_QUIET)
        picker.select(on_box, None, [box, name], **_QUIET)
        start.click(
            on_start, [clip, network, name, box], [told, result], show_progress="hidden", **_QUIET
        )

    def _first_frame(self, clip: str) -> np.ndarray:
        with self._open(clip) as video:
            return _fitting(next(iter(video)))

    def _open(self, clip: str) -> Video:
        with Path(clip).open("rb") as file:
            head = file.read(16)
        kind = next((kind for at, mark, kind in _VIDEOS if head[at:].startswith(mark)), None)
        if kind is None:
            raise InputError("This is no video that can be read; give MP4, MOV, WebM, MKV or AVI.")
        try:
            return open_video(clip, kind, self.service.limits.pixels)
        except InputError as error:  # our name for the file says nothing to the visitor
            raise InputError(str(error).replace(str(clip), "The video")) from error

    async def _track(
        self, clip: Any, network: Any, name: Any, box: Any
    ) -> AsyncIterator[tuple[Any, Any]]:
        """What to say, and what to show, frame by frame; each in its turn among other requests."""
        path, wanted, sides = _text(clip), _text(name), _text(box)
        if not path:
            raise InputError("Give a video first.")
        if not (wanted or sides):
            raise InputError(
                "Say what to follow: drag a box over the first frame, or name a class."
            )
        model = self.service.check(_text(network))
        with tempfile.TemporaryDirectory(prefix="howyouseeme-") as folder:
            file, table = Path(folder) / "track.mp4", Path(folder) / "track.csv"
            video = await self.service.do(partial(self._open, path))
            with (
                video,
                VideoWriter(file, video.rate or 25) as writer,
                Table(table, COLUMNS) as rows,
            ):
                frames = iter(video)
                tracker: Tracker | None = None
                number = found = 0
                first = _read_box(sides) if sides else None

                def step() -> np.ndarray | None:
                    nonlocal tracker, number, found
                    frame = next(frames, None)
                    if frame is None:
                        return None
                    frame = _fitting(frame)
                    if tracker is None:
                        ready = self.service.ready(model)
                        where = first or ready.proposer.find(frame, wanted or "")
                        tracker = Tracker(ready.network)
                        seen = tracker.start(frame, where)
                    else:
                        seen = tracker(frame)
                    picture = annotate(frame, seen)
                    writer.write(picture)
                    rows.write(row(number, video.seconds, seen))
                    number, found = number + 1, found + seen.found
                    return picture

                most = self.service.limits.frames
                while number < most and (picture := await self.service.do(step)) is not None:
                    if number % 10 == 1:
                        count = f" of {video.count}" if video.count else ""
                        yield _hint(f"Following: frame {number}{count}."), _live(picture)
            made = _Tracked(*[await run_in_threadpool(one.read_bytes) for one in (file, table)])
        key = self.shelf.put(secrets.token_hex(16), made, len(made.video) + len(made.table))
        cut = f" (the first {most}; the rest was left out)" if number == most else ""
        yield _hint(f"Found in {found} of {number} frames{cut}."), _player(key)


_QUIET: dict[str, Any] = {
    "api_visibility": "private",
    "trigger_mode": "always_last",
    "concurrency_limit": None,  # the service has its own queue
}


# Small things


def _value(index: int | None) -> str:
    """A class as a choice; empty for the answer of a network that says no to its only class."""
    return "" if index is None else str(index)


def _fitting(frame: np.ndarray) -> np.ndarray:
    """A frame, made smaller where it is very large."""
    if max(frame.shape[:2]) <= _FRAME:
        return frame
    picture = Image.fromarray(frame)
    picture.thumbnail((_FRAME, _FRAME))
    return np.asarray(picture)


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


def _html(name: str, **more: Any) -> gr.HTML:
    """An HTML component of ours, from the files of that name."""
    return gr.HTML(
        value=None,
        html_template=(_FOLDER / f"{name}.html").read_text("utf-8"),
        css_template=(_FOLDER / "viewer.css").read_text("utf-8"),
        js_on_load=(_FOLDER / f"{name}.js").read_text("utf-8"),
        apply_default_css=False,
        **more,
    )


def _gradient() -> str:
    return ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in palette()[::15])


def _bytes(path: Any, most: int) -> bytes:
    file = Path(str(path))
    if file.stat().st_size > most:
        raise TooLargeError(f"The photo is larger than {most / 2**20:.3g} MiB, the limit.")
    data = file.read_bytes()
    if not data:
        raise ImageError("The photo is empty; give a file that holds a picture.")
    return data


def _text(given: Any) -> str | None:
    """What came from the page, which anybody may have written."""
    return str(given).strip()[:500] or None if isinstance(given, (str, int)) else None


def _choice(label: str, probability: float | None) -> str:
    return label if probability is None else f"{label} · {100 * probability:.1f} %"


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def _said(error: Exception) -> dict[str, Any]:
    # The number makes the same sentence a new one, which is told again.
    return {"said": _sentence(error), "number": secrets.token_hex(4)}


def _alert(error: Exception) -> str:
    return f'<p class="said" role="alert">{html.escape(_sentence(error))}</p>'


def _hint(text: str) -> str:
    return f'<p class="doing" role="status">{html.escape(text)}</p>'


def _framed(frame: np.ndarray) -> dict[str, Any]:
    return {"frame": _jpeg(frame), "width": frame.shape[1], "height": frame.shape[0]}


def _jpeg(frame: np.ndarray) -> str:
    return data_uri(Image.fromarray(frame), "JPEG", quality=85)


def _live(frame: np.ndarray) -> str:
    return f'<img class="track" alt="The frame that is being followed" src="{_jpeg(frame)}">'


def _player(key: str) -> str:
    return (
        f'<video class="track" controls autoplay muted loop playsinline src="page/{key}/track.mp4">'
        f'</video><p class="saving">Save <a class="button" download href="page/{key}/track.mp4">'
        f'Video (MP4)</a> <a class="button" download href="page/{key}/track.csv">Boxes (CSV)</a></p>'
    )


def _read_box(text: str) -> tuple[float, ...]:
    try:
        sides = tuple(float(side) for side in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) != 4:
        raise InputError(f"The box {text!r} isn't four numbers, such as 120, 80, 260, 300.")
    return sides


def _file(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})


def _part(content: bytes, kind: str, request: Request) -> Response:
    """All of it or, as video players ask, the bytes from one place to another."""
    unit, _, asked = request.headers.get("range", "").partition("=")
    first, _, last = asked.partition("-")
    if unit != "bytes" or not first.isdecimal() or (last and not last.isdecimal()):
        return Response(content, media_type=kind, headers={"Accept-Ranges": "bytes"})
    begin, end = int(first), min(int(last or len(content)), len(content) - 1)
    if begin > end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {begin}-{end}/{len(content)}"}
    return Response(content[begin : end + 1], 206, headers, kind)
