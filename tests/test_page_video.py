"""The page's tab for videos, frame by frame in a worker, without a browser."""

from __future__ import annotations

import asyncio
import csv
import gc
import io
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("gradio", reason="pip install 'howyouseeme[serve]'")
av = pytest.importorskip("av", reason="pip install 'howyouseeme[serve]'")

import howyouseeme as hysm  # noqa: E402
from howyouseeme.errors import HowYouSeeMeError, InputError  # noqa: E402
from howyouseeme.regions import check_box  # noqa: E402
from howyouseeme.track import Sighting  # noqa: E402
from howyouseeme.video import VideoWriter  # noqa: E402
from howyouseeme.web import Limits  # noqa: E402
from howyouseeme.web.page import video as page_video  # noqa: E402
from howyouseeme.web.page.video import Videos  # noqa: E402
from howyouseeme.web.service import LateError, Service  # noqa: E402
from howyouseeme.web.shelf import Shelf  # noqa: E402
from howyouseeme.web.worker import Worker  # noqa: E402

BOX = "10, 10, 40, 40"


class Following:
    """A tracker that sees the target in every second frame."""

    def __init__(self, network: Any) -> None:
        self.frames = 0

    def start(self, frame: np.ndarray, box: Sequence[float]) -> Sighting:
        return Sighting(check_box(box, frame.shape[:2]), 1.0)

    def __call__(self, frame: np.ndarray) -> Sighting:
        self.frames += 1
        return Sighting(None if self.frames % 2 else (1.0, 1.0, 9.0, 9.0), 0.5)


class OneWorker:
    """What the tab asks of a service, with a real worker."""

    names = ("a network",)

    def __init__(self, limits: Limits) -> None:
        self.limits, self.worker = limits, Worker(4, 1)

    do, _do = Service.do, Service._do

    def check(self, name: str | None) -> str:
        return name or self.names[0]

    def ready(self, name: str) -> Any:
        def find(frame: np.ndarray, wanted: str) -> tuple[float, ...]:
            if wanted != "cat":
                raise InputError(f"There is no class {wanted!r}.")
            return 10, 10, 40, 40

        return SimpleNamespace(network=network(), proposer=SimpleNamespace(find=find))


def network() -> hysm.Network:
    """Two classes, of which noise is the second."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with torch.no_grad():
        module[-1].bias += torch.tensor([0.0, 5.0])
    return hysm.Network("small", module.eval(), hysm.Preprocess((32, 32)), ("quiet", "loud"))


@pytest.fixture
def tab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Videos]]:
    """Makes the tab of a service with some limits; all its temporary files lie under tmp_path."""
    monkeypatch.setattr(page_video, "Tracker", Following)
    (tmp_path / "held").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "held"))
    services = []

    def make(**limits: Any) -> Videos:
        services.append(OneWorker(replace(Limits(), **limits)))
        return Videos(services[-1], Shelf(2**29))  # type: ignore[arg-type]

    yield make
    for service in services:
        service.worker.close()


def clip(path: Path, count: int = 7, size: tuple[int, int] = (64, 96)) -> str:
    noise = np.random.default_rng(0)
    with VideoWriter(path, 25) as out:
        for _ in range(count):
            out.write(noise.integers(0, 255, (*size, 3), dtype=np.uint8))
    return str(path)


def followed(tab: Videos, path: str, name: Any = None, box: Any = None) -> tuple[list[str], Any]:
    """What was said, and the finished track."""

    async def run() -> list[tuple[str, Any]]:
        return [made async for made in tab._show(path, tab._track(None, name, box))]

    return _finished(tab, asyncio.run(run()))


def _finished(tab: Videos, made: list[tuple[str, Any]]) -> tuple[list[str], Any]:
    key = re.search(r"page/(\w+)/video.mp4", made[-1][1])
    assert key is not None
    return [said for said, _ in made], tab.shelf.get(key[1])


@pytest.mark.parametrize(("name", "box"), [("cat", None), (None, BOX)])
def test_a_video_is_followed_to_its_end(
    tab: Callable[..., Videos], tmp_path: Path, name: str | None, box: str | None
) -> None:
    said, track = followed(tab(), clip(tmp_path / "a.mp4"), name, box)
    assert "frame 1 of 7" in said[0]
    assert "Found in 4 of 7 frames." in said[-1]
    rows = list(csv.DictReader(io.StringIO(track.table.decode())))
    assert [row["state"] for row in rows] == ["found", "lost"] * 3 + ["found"]
    with av.open(io.BytesIO(track.video)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 7
    assert not list((tmp_path / "held").iterdir())


def test_a_video_of_just_so_many_frames_is_not_cut(
    tab: Callable[..., Videos], tmp_path: Path
) -> None:
    said, _ = followed(tab(frames=5), clip(tmp_path / "a.mp4", 5), None, "10, 10, 100, 100")
    assert "of 5 frames." in said[-1]


def test_each_frame_is_explained(tab: Callable[..., Videos], tmp_path: Path) -> None:
    """The likeliest class of each, or the one that was named."""
    tabs, path = tab(), clip(tmp_path / "a.mp4", 3)

    async def run(name: str) -> list[tuple[str, Any]]:
        return [made async for made in tabs._show(path, tabs._watch(None, name))]

    for name, expected in (("", {"1"}), ("quiet", {"0"})):
        said, film = _finished(tabs, asyncio.run(run(name)))
        assert "Explaining: frame 1 of 3" in said[0]
        assert f"Explained 3 of 3 frames: {name or 'loud'} (3)." in said[-1]
        rows = list(csv.DictReader(io.StringIO(film.table.decode())))
        assert {row["target"] for row in rows} == expected
        with av.open(io.BytesIO(film.video)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 3
    with pytest.raises(HowYouSeeMeError, match="has no class 'purple'"):
        asyncio.run(run("purple"))
    gc.collect()
    assert not list((tmp_path / "held").iterdir())


def test_a_long_video_is_cut_and_a_large_one_made_smaller(
    tab: Callable[..., Videos], tmp_path: Path
) -> None:
    said, track = followed(
        tab(frames=3), clip(tmp_path / "a.mp4", 5, (200, 1600)), None, "10, 10, 100, 100"
    )
    assert "of 3 frames (the first 3; the rest was left out)" in said[-1]
    with av.open(io.BytesIO(track.video)) as video:
        assert [(one.width, one.height) for one in video.decode(video=0)] == [(1280, 160)] * 3
    assert not list((tmp_path / "held").iterdir())


def test_what_cannot_be_followed_is_told_in_a_sentence(
    tab: Callable[..., Videos], tmp_path: Path
) -> None:
    good = clip(tmp_path / "a.mp4")
    hurt = tmp_path / "hurt.mp4"
    hurt.write_bytes(Path(good).read_bytes()[:-200])
    text = tmp_path / "text.mp4"
    text.write_text("no video at all")
    for path, name, box, told in [
        (None, None, BOX, "Give a video first"),
        (good, None, None, "Say what to follow"),
        (good, "dog", None, "no class 'dog'"),
        (good, None, "1, 2, 3", "isn't four numbers"),
        (good, None, "1000, 1000, 1100, 1100", "box"),
        (str(hurt), None, BOX, "The video"),
        (str(text), None, BOX, "no video that can be read"),
    ]:
        with pytest.raises(HowYouSeeMeError, match=told) as error:
            followed(tab(), path, name, box)  # type: ignore[arg-type]
        assert str(tmp_path) not in str(error.value)
        del error
    gc.collect()
    assert not list((tmp_path / "held").iterdir())


def test_nothing_stays_of_a_video_whose_visitor_leaves(
    tab: Callable[..., Videos], tmp_path: Path
) -> None:
    videos = tab()

    async def leave() -> None:
        steps = videos._show(clip(tmp_path / "a.mp4"), videos._track(None, None, BOX))
        await anext(steps)
        await steps.aclose()

    asyncio.run(leave())
    videos.service.worker.close()  # the last to hold it
    gc.collect()
    assert not list((tmp_path / "held").iterdir())


def test_nothing_stays_of_a_video_that_takes_too_long(
    tab: Callable[..., Videos], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frame that is being followed ends in the worker, and with it all that was opened."""
    go, videos = threading.Event(), tab(seconds=2)

    def slow(self: Following, frame: np.ndarray) -> Sighting:
        go.wait(30)
        return Sighting(None, 0.5)

    monkeypatch.setattr(Following, "__call__", slow)
    monkeypatch.setattr("howyouseeme.web.service._LATEST", 0.5)
    with pytest.raises(LateError):
        followed(videos, clip(tmp_path / "a.mp4"), None, BOX)
    assert list((tmp_path / "held").iterdir())  # the worker is still at it
    go.set()
    videos.service.worker.close()
    gc.collect()
    assert not list((tmp_path / "held").iterdir())
