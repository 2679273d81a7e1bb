"""The tab that follows a target through a video."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from PIL import Image

from ...draw import data_uri
from ...errors import HowYouSeeMeError, InputError
from ...regions import read_box
from ...track import Tracker, follow
from ...video import Video, VideoWriter, open_video
from ..service import Service
from ..shelf import Shelf
from .parts import QUIET, alert, gradient, hint, kept, network_choice, response, template, text

__all__ = ["Videos"]

_FRAME = 1280  # side of a video's frames, at most

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


@dataclass(frozen=True)
class _Step:
    """One frame, followed: with its boxes drawn, whether the target was found, and how many there will be."""

    picture: np.ndarray
    found: bool
    count: int | None


class _Screen(VideoWriter):
    """A video whose last frame can be seen while it is made."""

    last: np.ndarray

    def write(self, frame: np.ndarray) -> None:
        super().write(frame)
        self.last = frame


class Videos:
    """Follows targets through videos, and keeps what it has shown lately.

    >>> videos = Videos(service, Shelf(2**29))
    >>> videos.tab(["efficientnet-lite0"])             # among blocks of Gradio
    """

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf

    def add_to(self, router: APIRouter) -> None:
        """The addresses of finished tracks."""

        @router.get("/{key}/track.mp4")
        async def video(key: str, request: Request) -> Response:
            return _part(kept(self.shelf, key, _Tracked).video, "video/mp4", request)

        @router.get("/{key}/track.csv")
        async def table(key: str) -> Response:
            return response(kept(self.shelf, key, _Tracked).table, "text/csv")

    def tab(self, names: list[str]) -> None:
        """The tab."""
        with gr.Row(elem_id="video-row"):
            with gr.Column(scale=1, min_width=290):
                clip = gr.Video(
                    label="Your video", sources=["upload", "webcam"], height=230, elem_id="clip"
                )
                network = network_choice(names, names[0], "video-network")
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
                picker = template("picker", elem_id="picker", palette=gradient())
                result = gr.HTML("", elem_id="tracked")

        async def on_clip(clip: Any) -> Any:
            if not clip:
                return None, "", "", ""
            try:
                frame = await self.service.do(partial(self._first_frame, text(clip) or ""))
            except HowYouSeeMeError as error:
                return None, alert(error), "", ""
            return _framed(frame), hint("Drag a box around what is to be followed."), "", ""

        async def on_box(event: gr.EventData) -> Any:
            return str(event._data.get("box", ""))[:100], ""

        async def on_start(clip: Any, network: Any, name: Any, box: Any) -> AsyncIterator[Any]:
            try:
                async for said, made in self._track(clip, network, name, box):
                    yield said, made
            except HowYouSeeMeError as error:
                yield alert(error), gr.skip()

        clip.input(on_clip, clip, [picker, told, box, result], **QUIET)
        picker.select(on_box, None, [box, name], **QUIET)
        start.click(
            on_start, [clip, network, name, box], [told, result], show_progress="hidden", **QUIET
        )

    def _first_frame(self, clip: str) -> np.ndarray:
        with self._open(clip) as video:
            return next(iter(video))

    def _open(self, clip: str) -> Video:
        with Path(clip).open("rb") as file:
            head = file.read(16)
        kind = next((kind for at, mark, kind in _VIDEOS if head[at:].startswith(mark)), None)
        if kind is None:
            raise InputError("This is no video that can be read; give MP4, MOV, WebM, MKV or AVI.")
        video = open_video(clip, kind, self.service.limits.pixels, name="The video")
        return replace(video, frames=lambda: map(_fitting, video.frames()))

    async def _track(
        self, clip: Any, network: Any, name: Any, box: Any
    ) -> AsyncIterator[tuple[Any, Any]]:
        """What to say, and what to show, frame by frame; each in its turn among other requests."""
        path, wanted, sides = text(clip), text(name), text(box)
        if not path:
            raise InputError("Give a video first.")
        if not (wanted or sides):
            raise InputError(
                "Say what to follow: drag a box over the first frame, or name a class."
            )
        model = self.service.check(text(network))
        first = read_box(sides) if sides else None

        def choose(frame: np.ndarray) -> Sequence[float]:
            return first or self.service.ready(model).proposer.find(frame, wanted or "")

        def steps() -> Iterator[_Step | _Tracked]:
            """In the worker, a turn each: frame by frame, and at last the files.

            All that it opens is its own, and goes with it, also when the visitor has left: then where it is
            dropped, by the last that holds it.
            """
            # Not a TemporaryDirectory, which may go before the files in it, where all are collected at once.
            folder = Path(tempfile.mkdtemp(prefix="howyouseeme-"))
            file, table = folder / "track.mp4", folder / "track.csv"
            try:
                with self._open(path) as video:
                    screen = _Screen(file, video.rate or 25)
                    tracker = Tracker(self.service.ready(model).network)
                    with closing(follow(video, tracker, choose, table, screen)) as sightings:
                        for seen in islice(sightings, most):
                            yield _Step(screen.last, seen.found, video.count)
                    tracked = _Tracked(file.read_bytes(), table.read_bytes())
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            yield tracked

        number = found = 0
        count: int | None = None
        most, run = self.service.limits.frames, steps()
        while isinstance(made := await self.service.do(partial(next, run)), _Step):
            number, found, count = number + 1, found + made.found, made.count
            if number % 10 == 1:
                of = f" of {made.count}" if made.count else ""
                yield hint(f"Following: frame {number}{of}."), _live(made.picture)
        key = self.shelf.put(secrets.token_hex(16), made, len(made.video) + len(made.table))
        more = number == most and (count is None or count > most)
        cut = f" (the first {most}; the rest was left out)" if more else ""
        yield hint(f"Found in {found} of {number} frames{cut}."), _player(key)


def _fitting(frame: np.ndarray) -> np.ndarray:
    """A frame, made smaller where it is very large."""
    if max(frame.shape[:2]) <= _FRAME:
        return frame
    picture = Image.fromarray(frame)
    picture.thumbnail((_FRAME, _FRAME))
    return np.asarray(picture)


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
