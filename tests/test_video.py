from __future__ import annotations

import csv
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from howyouseeme import video as videos
from howyouseeme.cli.videos import table_in
from howyouseeme.errors import InputError, MissingExtraError
from howyouseeme.video import FrameWriter, Table, VideoWriter, is_webcam, open_video


def frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Each of one grey, brighter from frame to frame."""
    return [np.full((height, width, 3), 40 + 20 * i, np.uint8) for i in range(count)]


def write(path: Path, pictures: list[np.ndarray]) -> Path:
    pytest.importorskip("av")
    with VideoWriter(path, rate=12.5) as out:
        for picture in pictures:
            out.write(picture)
    return path


def test_a_video_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = frames(6)
    with open_video(write(tmp_path / "a.mp4", made)) as video:
        assert (video.rate, video.count) == (12.5, 6)
        read = list(video)
    assert [frame.shape for frame in read] == [(48, 64, 3)] * 6
    for before, after in zip(made, read, strict=True):
        assert abs(int(before.mean()) - int(after.mean())) <= 3  # H.264 loses a little


def test_frames_are_timed_as_the_file_says(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("h264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, milliseconds in zip(frames(4), (2000, 2100, 2900, 3000), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with open_video(path) as video:
        assert video.seconds is None  # no frame is read yet
        assert [video.seconds for _ in video] == pytest.approx([0, 0.1, 0.9, 1.0])


def test_odd_sides_get_one_more_row_and_column(tmp_path: Path) -> None:
    with open_video(write(tmp_path / "odd.mp4", frames(2, 47, 63))) as video:
        assert next(iter(video)).shape == (48, 64, 3)


def test_what_was_written_is_whole_when_the_work_is_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = tmp_path / "cut.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, rate=10) as out:  # noqa: PT012
        for frame in frames(3):
            out.write(frame)
        raise KeyboardInterrupt
    with open_video(path) as video:
        assert len(list(video)) == 3


@pytest.mark.parametrize(
    ("matrix", "shown"),  # (x, y) goes to (ax + cy, bx + dy), of a, b, c, d
    [
        ((1, 0, 0, 1), "12 34"),
        ((0, 1, -1, 0), "31 42"),
        ((-1, 0, 0, -1), "43 21"),
        ((0, -1, 1, 0), "24 13"),
        ((-1, 0, 0, 1), "21 43"),
        ((1, 0, 0, -1), "34 12"),
        ((0, 1, 1, 0), "13 24"),
        ((0, -1, -1, 0), "42 31"),
    ],
)
def test_a_turned_or_mirrored_video_is_read_as_it_is_shown(
    tmp_path: Path, matrix: tuple[int, ...], shown: str
) -> None:
    picture = np.kron([[1, 2], [3, 4]], np.ones((24, 32)))[..., None].repeat(3, 2) * 50
    path = write(tmp_path / "a.mp4", [picture.astype(np.uint8)])
    a, b, c, d = (one << 16 for one in matrix)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44  # where the track's header has its matrix
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    with open_video(path) as video:
        (frame,) = video
    height, width = frame.shape[:2]
    assert (height, width) == ((48, 64) if matrix[0] else (64, 48))
    corners = frame[height // 4 :: height // 2, width // 4 :: width // 2, 0]
    found = [[str(round(level / 50)) for level in row] for row in corners.tolist()]
    assert " ".join(map("".join, found)) == shown


def test_without_a_frame_no_video_is_made(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with VideoWriter(tmp_path / "none.mp4", rate=10):
        pass
    assert not (tmp_path / "none.mp4").exists()


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name, frame in zip(("02.png", "00.png", "01.PNG"), frames(3), strict=True):
        Image.fromarray(frame).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    with open_video(tmp_path) as video:
        assert (video.rate, video.count) == (None, 3)
        assert [int(frame[0, 0, 0]) for frame in video] == [60, 80, 40]
        assert video.seconds is None


def test_frames_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10, 11):
        Image.new("L", (8, 8), 20 * number).save(tmp_path / f"{number}.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "end-1.png")
    with open_video(tmp_path) as video:
        assert [int(frame[0, 0, 0]) for frame in video] == [0, 20, 40, 200, 220, 255]


def test_frames_are_written_by_number(tmp_path: Path) -> None:
    with FrameWriter(tmp_path / "out") as out:
        for frame in frames(2):
            out.write(frame)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "00000.jpg",
        "00001.jpg",
    ]


def test_frames_of_a_longer_video_do_not_stay(tmp_path: Path) -> None:
    for name in ("00001.jpg", "00002.jpg", "123456.jpg", "2.jpg", "cover.jpg", "00002.png"):
        (tmp_path / name).write_bytes(b"before")
    with FrameWriter(tmp_path) as out:
        for frame in frames(2):
            out.write(frame)
    assert len(list(tmp_path.iterdir())) == 7  # nothing goes unasked
    out.drop_later()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"00000.jpg", "00001.jpg", "2.jpg", "cover.jpg", "00002.png"}


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    for name, side in (("0.png", 20), ("1.png", 30)):
        Image.new("RGB", (side, 10)).save(tmp_path / name)
    with pytest.raises(InputError, match=r"frame 1 has 30 x 10 pixels and the first 20 x 10"):
        list(open_video(tmp_path))


def test_frames_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "wide.mp4", rate=25) as out:
        out.write(np.zeros((48, 64, 3), np.uint8))
    with open_video(tmp_path / "wide.mp4", max_pixels=48 * 64) as video:
        assert len(list(video)) == 1
    with pytest.raises(InputError, match=r"frames of 64 x 48, more than 3,071 pixels"):
        open_video(tmp_path / "wide.mp4", max_pixels=48 * 64 - 1)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(InputError, match=r"There is no video .*none\.mp4"):
        open_video(tmp_path / "none.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="There are no frames in the folder"):
        open_video(tmp_path / "empty")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match=r"text\.mp4 is damaged or no video"):
        open_video(tmp_path / "text.mp4")


class Camera:
    """Stands in for PyAV: a container that gives two frames, and then fails."""

    class FFmpegError(Exception):
        strerror = "Input/output error"

    def __init__(self) -> None:
        self.opened: list[tuple[str, str | None]] = []
        self.closed = False
        self.streams = SimpleNamespace(
            video=[SimpleNamespace(average_rate=30, guessed_rate=None, frames=0)]
        )

    def open(self, file: str, format: str | None = None) -> Camera:
        self.opened.append((file, format))
        return self

    def decode(self, stream: object) -> Iterator[object]:
        for matrix in ((1, 0, 0, 0, 1), (0, -1, 0, 1, 0)):
            picture = np.zeros((2, 2, 3), np.uint8)
            picture[0, 1] = 255  # above, on the right
            yield SimpleNamespace(
                to_ndarray=lambda format, it=picture: it,
                side_data={"DISPLAYMATRIX": np.array([*matrix, 0, 0, 0, 1], np.int32).tobytes()},
                time=None,
            )
        raise self.FFmpegError

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Camera:
    made = Camera()
    monkeypatch.setattr(videos, "_av", lambda: made)
    return made


def test_a_damaged_video_says_how_far_it_is_whole(camera: Camera, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    read = []
    with (  # noqa: PT012
        pytest.raises(InputError, match=r"a\.mp4 is damaged after 2 frames \(Input/output error\)"),
        open_video(tmp_path / "a.mp4") as video,
    ):
        for frame in video:
            read.append(frame)
    assert len(read) == 2
    assert camera.closed


def test_frames_are_turned_upright(camera: Camera) -> None:
    frames = iter(open_video("webcam"))
    assert next(frames)[0, 1].all()
    assert next(frames)[0, 0].all()  # a quarter turn to the left


@pytest.mark.parametrize("name", ["a.mp4", "webcam"])
def test_frames_are_timed_by_the_rate_where_the_file_says_nothing(
    camera: Camera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.mp4").touch()
    video = open_video(name)
    times = [video.seconds for _, _ in zip(range(2), video, strict=False)]
    assert times == [0, 1 / 30]


@pytest.mark.parametrize(
    ("system", "name", "opened"),
    [
        ("linux", "webcam", ("/dev/video0", "v4l2")),
        ("linux", "webcam:2", ("/dev/video2", "v4l2")),
        ("darwin", "webcam:1", ("1", "avfoundation")),
        ("win32", "webcam:Front Camera", ("video=Front Camera", "dshow")),
    ],
)
def test_a_webcam_is_opened_as_the_system_names_it(
    camera: Camera, monkeypatch: pytest.MonkeyPatch, system: str, name: str, opened: tuple[str, str]
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with open_video(name) as video:
        assert (video.rate, video.count) == (30, None)
    assert camera.opened == [opened]


def test_a_webcam_that_is_not_there_is_named() -> None:
    pytest.importorskip("av")
    with pytest.raises(InputError, match=r"webcam:98 can't be opened .* is it connected\?"):
        open_video("webcam:98")


def test_a_video_with_sound_alone_has_no_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        sound.rate = 8000
        out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    with pytest.raises(InputError, match="has no frames: there is sound"):
        open_video(path)


def test_without_pyav_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'howyouseeme\[video\]'"):
        open_video(tmp_path / "a.mp4")


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with Table(tmp_path / "a.csv", ["frame", "state"]) as table:
        table.write([0, "found"])
        with (tmp_path / "a.csv").open() as file:
            assert list(csv.reader(file)) == [["frame", "state"], ["0", "found"]]


def test_a_table_holds_names_in_any_script_whatever_the_locale_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    code = (
        f"from howyouseeme.video import Table\nTable({str(path)!r}, ['label']).write(['\\u732b'])"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **plain}, check=True)
    assert path.read_bytes() == "label\n猫\n".encode()


def test_a_file_that_begins_like_a_webcam_is_none(tmp_path: Path) -> None:
    assert is_webcam("webcam")
    assert is_webcam("webcam:Integrated Camera")
    for name in ("webcam-videos/walk.mp4", "webcam_walk.mp4", "webcams"):
        assert not is_webcam(name)
    out = tmp_path / "out"
    assert table_in(out, "webcam-videos/walk.mp4") == out / "walk.csv"
    assert table_in(out, "webcam_walk.mp4") == out / "webcam_walk.csv"
    assert table_in(out, "webcam:1") == out / "webcam-1.csv"
