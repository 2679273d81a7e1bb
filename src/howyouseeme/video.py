"""Videos in and out: files and webcams by PyAV, folders of frames by Pillow.

A frame is a uint8 array [height, width, 3], RGB.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from .draw import encoded
from .errors import InputError, MissingExtraError
from .files import PHOTOS, write
from .images import load_image

__all__ = ["FrameWriter", "Table", "Video", "VideoWriter", "is_webcam", "open_video", "write_each"]

T = TypeVar("T")

#: Files in a folder that are taken as frames.
SUFFIXES = PHOTOS - {".gif"}  # which is a video itself

WEBCAM = "webcam"

_BROKEN = "is damaged or no video that can be read; convert it to MP4 (H.264)"


@dataclass(eq=False)
class Video(AbstractContextManager["Video"]):
    """Frames in the order in which they are shown, to be read once.

    >>> with open_video("walk.mp4") as video:
    ...     for frame in video:                # uint8 [height, width, 3]
    ...         ...

    - `name`: what it was opened as;
    - `rate`: frames a second, None where nobody knows (a folder);
    - `count`: the number of frames, None where it isn't known before the end (a webcam);
    - `seconds`: when the frame read last is shown, from the first one on: as the file says, for frames
      may last differently long, or else by its number and the rate; None where neither is known.

    Raises, while it is read:
        InputError: there is no frame in it, a frame is damaged, or has another size than the first.
    """

    name: str
    rate: float | None
    count: int | None
    frames: Callable[[], Iterator[np.ndarray]]
    close: Callable[[], None] = lambda: None
    clock: Callable[[], float | None] = lambda: None
    seconds: float | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        size = None
        for number, frame in enumerate(self.frames()):
            size = size or frame.shape
            if frame.shape != size:
                raise InputError(
                    f"{self.name}: frame {number} has {_size(frame.shape)} pixels and the first "
                    f"{_size(size)}; give frames of one size."
                )
            self.seconds = self.clock()
            if self.seconds is None and self.rate:
                self.seconds = number / self.rate
            yield frame
        if size is None:
            raise InputError(f"{self.name} has no frames; give a video with at least one.")

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(
    source: str | Path,
    kind: str | None = None,
    max_pixels: int | None = None,
    name: str | None = None,
) -> Video:
    """A video file, a folder of frames (in the order of their names, 2.jpg before 10.jpg), or a webcam.

    >>> open_video("walk.mp4"), open_video("frames/"), open_video("webcam"), open_video("webcam:1")

    A webcam is named by its number; on Windows by its name, `webcam:Integrated Camera`. `kind` is the
    only format that a file may have, as FFmpeg calls it: for files from others, since some formats
    are lists of other files. Frames of a file with more than `max_pixels` are not read (None: any).
    Messages call a file or folder by its `name`, or as it was given.

    Raises:
        InputError: there is no such file, folder or webcam, or it is no video or has no frames, or
            frames that are too large.
        MissingExtraError: PyAV is missing, which all but folders need.
    """
    given, path = str(source), Path(source)
    if path.is_dir():
        return _open_folder(path, name or given)
    if is_webcam(given):
        return _open_webcam(given)
    if not path.is_file():
        raise InputError(f"There is no video {name or given}; check its name and folder.")
    return _open_stream(name or given, given, kind, max_pixels=max_pixels)


def is_webcam(source: str | Path) -> bool:
    """Whether `open_video` takes it for a webcam.

    >>> is_webcam("webcam"), is_webcam("webcam:1"), is_webcam("webcam.mp4")
    (True, True, False)
    """
    return str(source) == WEBCAM or str(source).startswith(f"{WEBCAM}:")


def _open_folder(folder: Path, name: str) -> Video:
    files = sorted(
        (
            file
            for file in folder.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ),
        key=_by_numbers,
    )
    if not files:
        known = " ".join(sorted(SUFFIXES))
        raise InputError(f"There are no frames in the folder {name}; frames end in {known}.")
    return Video(name, None, len(files), lambda: (np.asarray(load_image(f)) for f in files))


def _by_numbers(file: Path) -> tuple[list[str | int], str]:
    """A key to sort files by their names, 2.jpg before 10.jpg."""
    parts = re.split("([0-9]+)", file.name)  # every second one is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def _open_webcam(name: str) -> Video:
    which = name.partition(":")[2] or "0"
    file, system = {
        "darwin": (which, "avfoundation"),
        "win32": (f"video={which}", "dshow"),
    }.get(sys.platform, (f"/dev/video{which}", "v4l2"))
    return _open_stream(name, file, system, webcam=True)


def _open_stream(
    name: str,
    file: str,
    kind: str | None = None,
    webcam: bool = False,
    max_pixels: int | None = None,
) -> Video:
    av = _av()

    def check(frame: Any) -> None:
        if max_pixels is not None and frame.width * frame.height > max_pixels:
            raise InputError(
                f"{name} has frames of {frame.width} x {frame.height}, more than {max_pixels:,} "
                "pixels; make them smaller."
            )

    try:
        container = av.open(file, format=kind)
    except (av.FFmpegError, OSError, ValueError) as error:
        if webcam:
            raise InputError(
                f"{name} can't be opened ({_reason(error)}); is it connected?"
            ) from error
        raise InputError(f"{name} {_BROKEN} ({_reason(error)}).") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{name} has no frames: there is sound in it, perhaps, but no picture.")
    stream = container.streams.video[0]
    try:
        check(stream)
    except InputError:
        container.close()
        raise
    stream.thread_type = "AUTO"
    rate = stream.average_rate or stream.guessed_rate
    start: float | None = None
    now: float | None = None

    def frames() -> Iterator[np.ndarray]:
        nonlocal start, now
        number = 0
        try:
            for frame in container.decode(stream):
                check(frame)  # the size may change on the way
                now = None if webcam else frame.time
                if number == 0:
                    start = now
                yield _upright(frame)
                number += 1
        except (av.FFmpegError, OSError) as error:
            raise InputError(
                f"{name} is damaged after {number} frames ({_reason(error)}); cut it there, or copy "
                "it again."
            ) from error

    return Video(
        name,
        float(rate) if rate else None,
        stream.frames or None,
        frames,
        container.close,
        lambda: None if start is None or now is None else now - start,
    )


def _upright(frame: Any) -> np.ndarray:
    """The frame's pixels as they are shown, by the matrix that says where (x, y) goes."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # ax + cy, bx + dy
        if abs(b) > abs(a):
            pixels = pixels.transpose(1, 0, 2)
            right, down = c, b
        else:
            right, down = a, d
        pixels = pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
    return np.ascontiguousarray(pixels)


class VideoWriter(AbstractContextManager["VideoWriter"]):
    """Writes frames into an MP4 (H.264), complete up to the last one whenever it is closed.

    >>> with VideoWriter("walk.mp4", rate=25) as out:
    ...     out.write(frame)                   # uint8 [height, width, 3], all of one size

    Where no frame is written, there is no file. Sides of an odd length get one more row or column.

    Raises:
        MissingExtraError: PyAV is missing.
        OSError: the file can't be written.
    """

    def __init__(self, path: str | Path, rate: float) -> None:
        self.path = Path(path)
        self._rate = Fraction(rate).limit_denominator(1001)
        self._av = _av()
        self._container: Any = None
        self._stream: Any = None

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, uint8 [height, width, 3] RGB, of the size of the first.

        >>> out.write(frame)

        Raises:
            OSError: the file can't be written.
        """
        height, width = frame.shape[:2]
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._container = self._av.open(str(self.path), "w", format="mp4")
            self._stream = self._container.add_stream("h264", rate=self._rate)
            self._stream.height, self._stream.width = even.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None

    def drop_later(self) -> None:
        """Nothing: a file that is written anew keeps no frames of the one before.

        >>> out.drop_later()
        """


class FrameWriter(AbstractContextManager["FrameWriter"]):
    """Writes frames into a folder, made if it is missing: 00000.jpg, 00001.jpg ...

    >>> with FrameWriter("out/frames") as out:
    ...     out.write(frame)                   # uint8 [height, width, 3]

    Frames of these names that were there before are replaced; `drop_later` removes those of higher numbers.

    Raises:
        OSError: the folder or a file can't be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._count = 0

    def write(self, frame: np.ndarray) -> None:
        """Write the next frame, uint8 [height, width, 3] RGB, as a JPEG.

        >>> out.write(frame)

        Raises:
            OSError: the folder or the file can't be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        picture = encoded(Image.fromarray(frame), "JPEG", quality=90)
        write(self.path / f"{self._count:05d}.jpg", picture)
        self._count += 1

    def __exit__(self, *_: object) -> None:
        pass

    def drop_later(self) -> None:
        """Remove the frames after those that were written, which a longer video left in the folder.

        >>> out.drop_later()
        """
        for file in self.path.glob("*.jpg"):
            number = re.fullmatch(r"\d{5,}", file.stem, re.ASCII)
            if number is not None and int(file.stem) >= self._count:
                file.unlink()


class Table(AbstractContextManager["Table"]):
    """A CSV in UTF-8, each row of which is in the file as soon as it is written.

    >>> with Table("boxes.csv", ["frame", "state"]) as table:
    ...     table.write([0, "found"])
    """

    def __init__(self, path: str | Path, columns: Sequence[str]) -> None:
        self.path = Path(path)
        # Line by line, so that whatever ends the work leaves what is finished.
        self._file = self.path.open("w", encoding="utf-8", newline="", buffering=1)
        self._rows = csv.writer(self._file, lineterminator="\n")
        self.write(columns)

    def write(self, row: Sequence[Any]) -> None:
        self._rows.writerow(row)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_each(
    video: Video,
    look: Callable[[int, np.ndarray], T],
    row: Callable[[int, float | None, T], list[Any]],
    draw: Callable[[np.ndarray, T], np.ndarray],
    table: Path,
    columns: Sequence[str],
    picture: FrameWriter | VideoWriter | None = None,
    every: int = 1,
) -> Generator[T]:
    """Look at the frames of a video and yield what is seen, each when it is in the table and drawn into the picture.

    >>> for brightness in write_each(video, lambda number, frame: frame.mean(), row, draw, Path("a.csv"), ["mean"]):
    ...     ...

    `look` is given each frame, uint8 [height, width, 3], and its number from 0; `row` that number, the seconds and
    what was seen; `draw` the frame and what was seen. Of `every` so many frames the first is looked at. No file
    is made before the first one was.

    Raises:
        InputError: the video has no frames, or is damaged from some frame on.
        OSError: the table or the picture can't be written.
    """
    frames = ((number, frame) for number, frame in enumerate(video) if number % every == 0)
    number, frame = next(frames)  # a video without frames says so here
    seen = look(number, frame)
    with Table(table, columns) as rows, picture or nullcontext():
        while True:
            rows.write(row(number, video.seconds, seen))
            if picture is not None:
                picture.write(draw(frame, seen))
            yield seen
            following = next(frames, None)
            if following is None:
                return
            number, frame = following
            seen = look(number, frame)


def _av() -> Any:
    try:
        import av  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError(
            "Videos need the package av: pip install 'howyouseeme[video]' (a folder of frames works "
            "without)."
        ) from error
    return av


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
