"""The tab that explains a video frame by frame, or follows a target through it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
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
from ...explainer import Explainer
from ...regions import read_box
from ...track import Tracker, follow
from ...video import Video, VideoWriter, open_video
from ...watch import watch
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
class _Film:
    """A finished video and its table, as files."""

    video: bytes
    table: bytes


@dataclass(frozen=True)
class _Step:
    """One frame: as it was drawn, what was seen in it ('' if nothing), and how many there will be."""

    picture: np.ndarray
    seen: str
    count: int | None


@dataclass(frozen=True)
class _Work:
    """What is done with a video: what it is called, the steps given where to write, and what is told of them.

    `steps` make the table and the video; `told` is given how often each thing was seen, in how many frames.
    """

    name: str
    doing: str
    steps: Callable[[Video, Path, VideoWriter], Generator[str]]
    told: Callable[[Counter[str], int], str]


class _Screen(VideoWriter):
    """A video whose last frame can be seen while it is made."""

    last: np.ndarray

    def write(self, frame: np.ndarray) -> None:
        super().write(frame)
        self.last = frame


class Videos:
    """Explains videos and follows targets through them, and keeps what it has shown lately.

    >>> videos = Videos(service, Shelf(2**29))
    >>> videos.tab(["efficientnet-lite0"])             # among blocks of Gradio
    """

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf

    def add_to(self, router: APIRouter) -> None:
        """The addresses of finished videos."""

        @router.get("/{key}/video.mp4")
        async def video(key: str, request: Request) -> Response:
            return _part(kept(self.shelf, key, _Film).video, "video/mp4", request)

        @router.get("/{key}/video.csv")
        async def table(key: str) -> Response:
            return response(kept(self.shelf, key, _Film).table, "text/csv")

    def tab(self, names: list[str]) -> None:
        """The tab."""
        with gr.Row(elem_id="video-row"):
            with gr.Column(scale=1, min_width=290):
                clip = gr.Video(
                    label="Your video", sources=["upload", "webcam"], height=230, elem_id="clip"
                )
                network = network_choice(names, names[0], "video-network")
                name = gr.Textbox(
                    label="Class",
                    info="To explain or to follow; if empty, each frame's likeliest is explained.",
                    placeholder="for example: tabby",
                    elem_id="video-class",
                )
                look = gr.Button("Explain each frame", variant="primary", elem_id="watch")
                box = gr.Textbox(
                    label="Box to follow",
                    info="Drag it over the first frame, or write x0, y0, x1, y1 in pixels.",
                    placeholder="120, 80, 260, 300",
                    elem_id="video-box",
                )
                start = gr.Button("Follow it", variant="primary", elem_id="follow")
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
            told = "Explain each frame, or drag a box around what is to be followed."
            return _framed(frame), hint(told), "", ""

        async def on_box(event: gr.EventData) -> Any:
            return str(event._data.get("box", ""))[:100], ""

        async def on_look(clip: Any, network: Any, name: Any) -> AsyncIterator[Any]:
            async for made in self._shown(clip, lambda: self._watch(network, name)):
                yield made

        async def on_start(clip: Any, network: Any, name: Any, box: Any) -> AsyncIterator[Any]:
            async for made in self._shown(clip, lambda: self._track(network, name, box)):
                yield made

        clip.input(on_clip, clip, [picker, told, box, result], **QUIET)
        picker.select(on_box, None, [box, name], **QUIET)
        shown = {"outputs": [told, result], "show_progress": "hidden", **QUIET}
        look.click(on_look, [clip, network, name], **shown)
        start.click(on_start, [clip, network, name, box], **shown)

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

    def _watch(self, network: Any, name: Any) -> _Work:
        """Explains each frame: a class, if one is named, or the likeliest."""
        model, wanted = self.service.check(text(network)), text(name)
        problems: list[str] = []  # of the first frame that has one

        def steps(video: Video, table: Path, screen: VideoWriter) -> Generator[str]:
            asked = self.service.ready(model).network
            target = None if wanted is None else asked.class_index(wanted)
            explainer = Explainer(asked)  # a video's own: what it replays goes with it
            with closing(
                watch(video, lambda frame: explainer(frame, target), table, screen)
            ) as moments:
                for moment in moments:
                    if moment.problem and not problems:
                        problems.append(moment.problem)
                    yield moment.label

        def told(seen: Counter[str], number: int) -> str:
            often = ", ".join(f"{label} ({count})" for label, count in seen.most_common(3))
            of = f"Explained {seen.total()} of {number} frames: {often or 'none'}"
            return f"{of}. {problems[0].rstrip('.')}" if problems else of

        return _Work("watch", "Explaining", steps, told)

    def _track(self, network: Any, name: Any, box: Any) -> _Work:
        """Follows what is in a box of the first frame, or what is found of a class there."""
        wanted, sides = text(name), text(box)
        if not (wanted or sides):
            raise InputError(
                "Say what to follow: drag a box over the first frame, or name a class."
            )
        model = self.service.check(text(network))
        first = read_box(sides) if sides else None

        def choose(frame: np.ndarray) -> Sequence[float]:
            return first or self.service.ready(model).proposer.find(frame, wanted or "")

        def steps(video: Video, table: Path, screen: VideoWriter) -> Generator[str]:
            tracker = Tracker(self.service.ready(model).network)
            with closing(follow(video, tracker, choose, table, screen)) as sightings:
                yield from ("found" if seen.found else "" for seen in sightings)

        def told(seen: Counter[str], number: int) -> str:
            return f"Found in {seen.total()} of {number} frames"

        return _Work("track", "Following", steps, told)

    async def _shown(
        self, clip: Any, choose: Callable[[], _Work]
    ) -> AsyncIterator[tuple[Any, Any]]:
        """What to say, and what to show, frame by frame; a sentence where it fails."""
        try:
            async for said, made in self._show(clip, choose()):
                yield said, made
        except HowYouSeeMeError as error:
            yield alert(error), gr.skip()

    async def _show(self, clip: Any, work: _Work) -> AsyncIterator[tuple[Any, Any]]:
        """The same, each frame in its turn among other requests; errors are those of the work."""
        path = text(clip)
        if not path:
            raise InputError("Give a video first.")

        def steps() -> Iterator[_Step | _Film]:
            """In the worker, a turn each: frame by frame, and at last the files.

            All that it opens is its own, and goes with it, also when the visitor has left: then where it is
            dropped, by the last that holds it.
            """
            # Not a TemporaryDirectory, which may go before the files in it, where all are collected at once.
            folder = Path(tempfile.mkdtemp(prefix="howyouseeme-"))
            file, table = folder / "video.mp4", folder / "video.csv"
            try:
                with self._open(path) as video:
                    screen = _Screen(file, video.rate or 25)
                    with closing(work.steps(video, table, screen)) as each:
                        for seen in islice(each, most):
                            yield _Step(screen.last, seen, video.count)
                    film = _Film(file.read_bytes(), table.read_bytes())
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            yield film

        number, often = 0, Counter[str]()
        count: int | None = None
        most, run = self.service.limits.frames, steps()
        while isinstance(made := await self.service.do(partial(next, run)), _Step):
            number, count = number + 1, made.count
            often.update([made.seen] if made.seen else [])
            if number % 10 == 1:
                of = f" of {made.count}" if made.count else ""
                yield hint(f"{work.doing}: frame {number}{of}."), _live(made.picture)
        key = self.shelf.put(secrets.token_hex(16), made, len(made.video) + len(made.table))
        more = number == most and (count is None or count > most)
        cut = f" (the first {most}; the rest was left out)" if more else ""
        yield hint(f"{work.told(often, number)}{cut}."), _player(key, work.name)


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
    return f'<img class="track" alt="The frame that is being looked at" src="{_jpeg(frame)}">'


def _player(key: str, name: str) -> str:
    at = f"page/{key}/video"
    return (
        f'<video class="track" controls autoplay muted loop playsinline src="{at}.mp4">'
        f'</video><p class="saving">Save <a class="button" download="{name}.mp4" href="{at}.mp4">'
        f'Video (MP4)</a> <a class="button" download="{name}.csv" href="{at}.csv">Table (CSV)</a></p>'
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
