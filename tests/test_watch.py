from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import howyouseeme as hysm
from howyouseeme import Explainer, Explanation, Network, cli, load_model, sample_photo
from howyouseeme.errors import InputError, ModelError
from howyouseeme.video import FrameWriter, Video, VideoWriter, open_video
from howyouseeme.watch import COLUMNS, Moment, annotate, watch


@pytest.fixture(scope="module")
def network() -> Network:
    return load_model("efficientnet-lite0")


@pytest.fixture(scope="module")
def explainer(network: Network) -> Explainer:
    return Explainer(network)


def panning(count: int) -> list[np.ndarray]:
    """A camera that goes across the cat."""
    photo = hysm.load_image(sample_photo("cat"))
    width, height = photo.width * 2 // 3, photo.height * 2 // 3
    return [
        np.asarray(photo.crop((5 * i, 0, 5 * i + width, height)).resize((160, 120)))
        for i in range(count)
    ]


def video_of(frames: list[np.ndarray], rate: float | None = 10.0) -> Video:
    return Video("test", rate, len(frames), lambda: iter(frames))


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def test_each_frame_has_what_its_photo_has(explainer: Explainer, tmp_path: Path) -> None:
    frames, table = panning(3), tmp_path / "walk.csv"
    moments = list(watch(video_of(frames), explainer, table, FrameWriter(tmp_path / "walk")))
    rows = rows_of(table)
    assert list(rows[0]) == COLUMNS
    for i, (frame, moment, row) in enumerate(zip(frames, moments, rows, strict=True)):
        alone = explainer(frame)
        assert moment.explanation is not None
        assert torch.equal(moment.explanation.saliency, alone.saliency)
        assert row == {
            "frame": str(i),
            "seconds": f"{i / 10:.3f}",
            "label": alone.label[0],
            "target": str(alone.target[0]),
            "probability": f"{alone.probability[0]:.4f}",
            "coverage": f"{alone.coverage[0]:.4f}",
            "problem": "",
        }
        with Image.open(tmp_path / "walk" / f"{i:05d}.jpg") as drawn:
            wanted = annotate(frame, moment).astype(int)
            assert np.abs(np.asarray(drawn).astype(int) - wanted).mean() < 6  # as JPEG keeps it


def test_the_frame_is_drawn_under_its_saliency(explainer: Explainer) -> None:
    frame = panning(1)[0]
    before = frame.copy()
    explanation = explainer(frame)
    drawn = annotate(frame, Moment(0, None, explanation)).astype(int)
    assert drawn.shape == frame.shape
    assert np.array_equal(frame, before)
    below = slice(24, None)  # the answer is written above
    warmer = (drawn[..., 0] - drawn[..., 2])[below] - (frame[..., 0].astype(int) - frame[..., 2])[
        below
    ]
    seen = explanation.saliency[0].numpy()[below]
    assert warmer[seen > 0.6].mean() > 40 + warmer[seen < 0.05].mean()
    assert np.array_equal(annotate(frame, Moment(0, None, None, "no box")), frame)


def test_every_so_manyth_frame_is_explained(tmp_path: Path) -> None:
    frames, seen = panning(7), []

    def explain(frame: np.ndarray) -> Explanation:
        seen.append(frame)
        raise InputError("not asked")

    moments = list(watch(video_of(frames), explain, tmp_path / "walk.csv", every=3))
    assert [moment.number for moment in moments] == [0, 3, 6]
    assert [moment.seconds for moment in moments] == [0.0, 0.3, 0.6]
    assert all(np.array_equal(seen[i], frames[3 * i]) for i in range(3))
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="1 or more"):
            next(watch(video_of(frames), explain, tmp_path / "walk.csv", every=wrong))


def test_a_frame_that_cannot_be_explained_is_told_and_the_next_go_on(
    explainer: Explainer, tmp_path: Path
) -> None:
    frames = panning(3)

    def explain(frame: np.ndarray) -> Explanation:
        if frame is frames[1]:
            raise InputError("There is no\nbox 0.")
        return explainer(frame)

    video = video_of(frames, None)
    picture = FrameWriter(tmp_path / "walk")
    moments = list(watch(video, explain, tmp_path / "walk.csv", picture))
    assert [moment.problem for moment in moments] == ["", "There is no box 0.", ""]
    second = rows_of(tmp_path / "walk.csv")[1]
    assert second["problem"] == "There is no box 0."
    assert second["label"] == second["target"] == second["seconds"] == ""
    with Image.open(tmp_path / "walk" / "00001.jpg") as kept:
        assert np.abs(np.asarray(kept).astype(int) - frames[1]).mean() < 6


def test_what_is_not_about_a_frame_ends_it(tmp_path: Path) -> None:
    def explain(frame: np.ndarray) -> Explanation:
        raise ModelError("no rule")

    with pytest.raises(ModelError, match="no rule"):
        list(watch(video_of(panning(2)), explain, tmp_path / "walk.csv"))
    assert not (tmp_path / "walk.csv").exists()


# The command


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    folder = tmp_path / "walk"
    folder.mkdir()
    for i, frame in enumerate(panning(4)):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def invoke(*words: object) -> Result:
        return CliRunner().invoke(
            cli.main, ["watch", *map(str, words), "--out", str(tmp_path / "out")]
        )

    return invoke


def test_the_command_explains_a_folder_of_frames(run: Run, clip: Path, tmp_path: Path) -> None:
    longer = tmp_path / "out" / "walk.watch" / "00004.jpg"
    longer.parent.mkdir(parents=True)
    longer.write_bytes(b"of a longer video")
    result = run(clip, "--target", "tabby")
    assert result.exit_code == 0, result.output
    assert "4 of 4 frames explained: tabby (4)" in result.stdout
    assert {row["label"] for row in rows_of(tmp_path / "out" / "walk.watch.csv")} == {"tabby"}
    names = sorted(path.name for path in (tmp_path / "out" / "walk.watch").iterdir())
    assert names == [f"{i:05d}.jpg" for i in range(4)]


def test_the_command_explains_a_video(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("av")
    with VideoWriter(tmp_path / "walk.mp4", 10) as writer:
        for frame in panning(5):
            writer.write(frame)
    result = run(tmp_path / "walk.mp4", "--every", 2, "--versus", "lynx")
    assert result.exit_code == 0, result.output
    assert "3 of 3 frames explained" in result.stdout
    assert "not lynx" in result.stdout
    with open_video(tmp_path / "out" / "walk.watch.mp4") as video:
        assert len(list(video)) == 3
        assert video.rate == 5.0


def test_a_video_is_whole_when_the_command_is_terminated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    with VideoWriter(tmp_path / "walk.mp4", 10) as writer:
        for frame in panning(4):
            writer.write(frame)
    explain, seen = Explainer.many, []

    def terminated(self: Explainer, *asked: object) -> Explanation:
        seen.append(asked)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
        return explain(self, *asked)  # type: ignore[arg-type]

    monkeypatch.setattr(Explainer, "many", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result = run(tmp_path / "walk.mp4")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143
    assert "2 of 2 frames explained" in result.stdout
    with open_video(tmp_path / "out" / "walk.watch.mp4") as video:
        assert len(list(video)) == 2


def test_frames_without_a_box_are_told(run: Run, clip: Path, tmp_path: Path) -> None:
    result = run(clip, "--box", 0)
    assert result.exit_code == 1
    assert "0 of 4 frames explained: none" in result.stdout
    assert result.stderr.count("\n") == 1
    assert "frame 0: " in result.stderr
    assert all(row["problem"] for row in rows_of(tmp_path / "out" / "walk.watch.csv"))


def test_what_cannot_be_watched_is_refused(run: Run, clip: Path, tmp_path: Path) -> None:
    for words, told in (
        ([clip, "--target", "top3"], "name one class to watch"),
        ([sample_photo("cat")], "is a picture"),
        ([tmp_path / "none.mp4"], "There is no video"),
        ([clip, "--every", 0], "0 is not in the range"),
        ([clip, "--box", 0, "--target", "tabby"], "--box goes without"),
    ):
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_table_of_others_is_left_alone(run: Run, clip: Path, tmp_path: Path) -> None:
    table = tmp_path / "out" / "walk.watch.csv"
    table.parent.mkdir()
    table.write_text("mine,too\n1,2\n")
    result = run(clip)
    assert result.exit_code == 2
    assert "was not made by watch" in result.stderr
    assert table.read_text() == "mine,too\n1,2\n"
