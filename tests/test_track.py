from __future__ import annotations

import csv
import math
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from howyouseeme import Network, Preprocess, cli, load_model, sample_photo
from howyouseeme.errors import InputError, ModelError
from howyouseeme.regions import check_box, components, edges, held, overlaps, suppress
from howyouseeme.track import (
    Sighting,
    Tracker,
    TrackerSettings,
    _inside,
    _Seen,
    _staying,
    annotate,
    follow,
)
from howyouseeme.video import Video, VideoWriter, open_video

Truth = tuple[int, int, int, int] | None


@pytest.fixture(scope="module")
def network() -> Network:
    return load_model("efficientnet-lite0")


def passing(
    count: int, target: str = "cat", back: str = "coffee"
) -> tuple[list[np.ndarray], list[Truth]]:
    """A small photo that crosses a large one, leaves it on the right, and returns."""
    width, height = 480, 270
    ground = Image.open(sample_photo(back)).convert("RGB").resize((width, height))
    photo = Image.open(sample_photo(target)).convert("RGB")
    across, down = round(0.35 * height * photo.width / photo.height), round(0.35 * height)
    photo = photo.resize((across, down))
    frames, truth = [], []
    for i in range(count):
        x = round(width * (0.3 + 0.9 * math.sin(math.pi * i / (count - 1))))
        y = round(height * 0.3 + 8 * math.sin(i / 4))
        frame = ground.copy()
        frame.paste(photo, (x, y))
        frames.append(np.asarray(frame))
        right = min(x + across, width)
        truth.append((x, y, right, y + down) if right > x else None)
    return frames, truth


def iou(box: tuple[float, ...], other: tuple[float, ...]) -> float:
    return float(overlaps(torch.tensor([box]), torch.tensor(other, dtype=torch.float32))[0])


def told(frames: list[np.ndarray], rate: float | None = None) -> Video:
    return Video("test", rate, len(frames), lambda: iter(frames))


def sightings(frames: Sequence[np.ndarray], box: Truth, network: Network) -> list[Sighting]:
    assert box is not None
    tracker = Tracker(network)
    return [tracker.start(frames[0], box), *(tracker(frame) for frame in frames[1:])]


# A target that moves, leaves and returns


@pytest.mark.parametrize(("target", "back"), [("cat", "coffee"), ("coffee", "rocket")])
def test_a_target_is_followed_lost_and_found_again(
    network: Network, target: str, back: str
) -> None:
    frames, truth = passing(60, target, back)
    first = truth[0]
    assert first is not None
    seen = sightings(frames, first, network)
    assert len(seen) == 60
    whole = [i for i, box in enumerate(truth) if box and box[2] - box[0] == first[2] - first[0]]
    before = [i for i in whole if i < 30]
    after = [i for i in whole if i > 50]
    gone = [i for i, box in enumerate(truth) if box is None]
    assert len(before) > 5
    assert len(after) > 5
    assert len(gone) > 15
    for i in [*before, *after]:
        assert seen[i].state == "found"
        assert iou(seen[i].box, truth[i]) > 0.7, i
    assert all(seen[i].state == "lost" and seen[i].box is None for i in gone[2:])
    assert max(seen[i].confidence for i in gone[2:]) < min(seen[i].confidence for i in before)


def test_a_target_that_stays_is_followed_still(network: Network) -> None:
    frames, truth = passing(20)
    for sighting in sightings([frames[0]] * 4, truth[0], network):
        assert iou(sighting.box, truth[0]) > 0.85


# The walks, from their definitions


def unit(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
    nodes = rng.normal(size=(count, channels))
    return nodes / np.linalg.norm(nodes, axis=1, keepdims=True)


def test_nodes_stay_in_the_box_with_the_chance_of_a_walk() -> None:
    rng = np.random.default_rng(0)
    nodes, inside = unit(rng, 12, 5), (np.arange(12) < 7).astype(float)
    inside[6] = 0.5  # the box ends within this one

    def onward(i: int, j: int) -> float:
        odds = [math.exp(nodes[i] @ nodes[k] / 0.3) if k != i else 0.0 for k in range(12)]
        return odds[j] / sum(odds)

    def stays(i: int, steps: int) -> float:
        if steps == 0:
            return inside[i]
        return inside[i] * sum(onward(i, j) * stays(j, steps - 1) for j in range(12))

    wanted = np.array([stays(i, 3) for i in range(12)])
    found = _staying(torch.tensor(nodes), torch.tensor(inside), likeness=0.3, steps=3)
    np.testing.assert_allclose(found, np.minimum(wanted / wanted.max(), 1), atol=1e-12)


@pytest.mark.parametrize("near", [True, False])
def test_each_node_walks_back_to_what_looks_alike_and_lies_near(
    network: Network, near: bool
) -> None:
    tracker = Tracker(network, TrackerSettings(likeness=0.2, near=0.3, first=2.0))
    n = tracker._stages.cells**2
    rng = np.random.default_rng(1)
    now, first, last = (unit(rng, n, 6) for _ in range(3))
    shares = rng.uniform(size=(2, n))
    tracker._first = _Seen(torch.tensor(first), torch.tensor(shares[0]))
    tracker._last.append(_Seen(torch.tensor(last), torch.tensor(shares[1])))
    tracker._core = tracker._first.nodes[:5]
    tracker._stages.places = tracker._stages.places.double()
    share, likeness = tracker._back(torch.tensor(now), near)
    for i in (0, 17, n - 1):
        top = bottom = 0.0
        for weight, nodes, mine in ((2.0, first, shares[0]), (1.0, last, shares[1])):
            for j in range(n):
                if not near and nodes is last:
                    continue  # of a lost target, only the first frame is to be trusted
                (y, x), (v, u) = divmod(i, tracker._stages.cells), divmod(j, tracker._stages.cells)
                away = ((y - v) ** 2 + (x - u) ** 2) / tracker._stages.cells**2
                odds = weight * math.exp(now[i] @ nodes[j] / 0.2)
                odds *= math.exp(-away / (2 * 0.3**2)) if near else 1
                top, bottom = top + odds * mine[j], bottom + odds
        assert float(share[i]) == pytest.approx(top / bottom, rel=1e-5)
        assert float(likeness[i]) == pytest.approx((first[:5] @ now[i]).max())


def test_cells_are_covered_by_the_box_in_part() -> None:
    cover = _inside(np.array([1.0, 0.0, 4.0, 3.0]), (0, 0, 8, 8), 4)  # cells of 2 x 2 pixels
    assert cover.tolist() == [[0.5, 1, 0, 0], [0.25, 0.5, 0, 0], [0] * 4, [0] * 4]


# Regions


def test_components_are_those_of_a_flood() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        mask = rng.uniform(size=(9, 13)) < 0.35
        wanted = np.zeros(mask.shape, int)
        for start in zip(*np.nonzero(mask), strict=True):
            todo, name = [start], wanted.max() + 1
            while todo:
                y, x = todo.pop()
                inside = 0 <= y < 9 and 0 <= x < 13
                if inside and mask[y, x] and not wanted[y, x]:
                    wanted[y, x] = name
                    todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        found = components(torch.tensor(mask)).numpy()
        pairs = set(zip(wanted.ravel(), found.ravel(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert ((found == 0) == ~mask).all()
        heat = rng.uniform(size=mask.shape)
        holds = held(torch.tensor(found), torch.tensor(heat)).numpy()
        assert holds[0] == 0
        for number in np.unique(found[mask]):
            assert holds[number] == pytest.approx(heat[found == number].sum())


def test_an_edge_lies_where_the_map_crosses_the_level() -> None:
    heat = torch.tensor([[0.0, 0.2, 0.8, 1.0, 0.0]]).repeat(3, 1)
    x0, y0, x1, y1 = edges(heat, heat > 0.5, 0.5)
    assert (x0, x1) == pytest.approx((2.5 - 0.5, 3.5 + 0.5))
    assert (y0, y1) == (0, 3)  # the map ends before it crosses the level
    sharper = edges(heat, heat > 0.3, 0.3)
    assert sharper[0] == pytest.approx(2.5 - (0.8 - 0.3) / 0.6)


def test_overlaps_and_suppression() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [0, 0, 2, 1.8], [5, 5, 6, 6]])
    assert overlaps(boxes, boxes[0]).tolist() == pytest.approx([1, 1 / 3, 0.9, 0])
    scores = torch.tensor([0.5, 0.7, 0.9, 0.1])
    assert suppress(boxes, scores, 0.5, 10).tolist() == [2, 1, 3]
    assert suppress(boxes, scores, 0.5, 2).tolist() == [2, 1]


# What is refused


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ((5, 5, 5, 9), "The box 5,5,5,9 is empty"),
        ((5, 9, 7, 2), "is empty"),
        ((100, 0, 120, 10), "lies outside of the picture, which has 100 x 50 pixels"),
        ((-9, -9, 0, 5), "lies outside"),
        ((0, 0, math.nan, 5), "is not four numbers"),
        ((1, 2, 3), "is not four numbers"),
        ("1234", "is not four numbers"),
        (None, "is not four numbers"),
    ],
)
def test_boxes_that_hold_nothing_are_refused(box: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_box(box, (50, 100))


def test_a_box_is_cut_at_the_edge_of_the_picture() -> None:
    assert check_box((-5, 10, 200, 20), (50, 100)) == (0, 10, 100, 20)


def test_a_tracker_wants_a_target_and_frames_of_one_size(network: Network) -> None:
    tracker = Tracker(network)
    frame = passing(2)[0][0]
    for ask in (lambda: tracker(frame), tracker.channels):
        with pytest.raises(InputError, match="call start"):
            ask()
    tracker.start(frame, (100, 80, 200, 170))
    with pytest.raises(InputError, match=r"A frame has 480 x 200 pixels and the first 480 x 270"):
        tracker(frame[:200])


def test_a_module_and_its_preprocessing_do(network: Network) -> None:
    frames = passing(2)[0]
    box = (100, 80, 200, 170)
    found = []
    for tracker in (Tracker(network), Tracker(network.module, preprocess=network.preprocess)):
        tracker.start(frames[0], box)
        found.append(tracker(frames[1]))
    assert found[0] == found[1]


def test_networks_that_cannot_track_are_named() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ModelError, match="in training mode"):
        Tracker(Network("plain", plain, Preprocess((32, 32)), None))
    plain.eval()
    with pytest.raises(ModelError, match="How a photo becomes the input of plain"):
        Tracker(Network("plain", plain))
    with pytest.raises(ModelError, match="plain has no stage whose maps are about 56 cells wide"):
        Tracker(Network("plain", plain, Preprocess((32, 32)), None))
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    with pytest.raises(ModelError, match="fixed can't run on an input of 224 x 224"):
        Tracker(Network("fixed", fixed, Preprocess((2, 2)), None))


# Networks


def test_stages_are_the_blocks_before_the_next_stride(network: Network) -> None:
    assert Tracker(network)._stages.names == ["_blocks.2", "_blocks.4", "_blocks.10"]
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    other = Network("resnet18", models.resnet18().eval(), Preprocess((224, 224)), None)
    tracker = Tracker(other)
    assert tracker._stages.names == ["layer1", "layer2", "layer3"]
    frames, truth = passing(20)
    tracker.start(frames[0], truth[0])
    assert iou(tracker(frames[1]).box, truth[1]) > 0.5
    assert {channel.module for channel in tracker.channels(400)} == {"layer1", "layer2", "layer3"}


def test_the_network_is_left_as_it_was(network: Network) -> None:
    frames, truth = passing(20)
    sightings(frames[:3], truth[0], network)
    assert not any(module._forward_hooks for module in network.module.modules())
    assert not network.module.training


def test_channels_tell_the_target_from_its_surroundings(network: Network) -> None:
    frames, truth = passing(20)
    tracker = Tracker(network)
    tracker.start(frames[0], truth[0])
    told = tracker.channels(5)
    assert len(told) == 5
    strength = [abs(channel.contrast) for channel in told]
    assert strength == sorted(strength, reverse=True)
    assert strength[0] > 3 * abs(tracker.channels(10**6)[-1].contrast)


# Files


def test_a_table_and_frames_are_written_up_to_an_interruption(
    network: Network, tmp_path: Path
) -> None:
    frames, truth = passing(20)

    def broken() -> object:
        yield from frames[:3]
        raise KeyboardInterrupt

    video = Video("test", 10.0, None, broken)
    path = tmp_path / "a.csv"
    with pytest.raises(KeyboardInterrupt):
        list(follow(video, Tracker(network), lambda frame: truth[0], path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == ["0", "1", "2"]
    assert [row["seconds"] for row in rows] == ["0.000", "0.100", "0.200"]
    assert float(rows[0]["x0"]) == truth[0][0]
    assert rows[1]["state"] == "found"


def test_a_lost_target_has_no_box_in_the_table(network: Network, tmp_path: Path) -> None:
    frames, truth = passing(40)
    seen = list(follow(told(frames[:20]), Tracker(network), lambda _: truth[0], tmp_path / "a.csv"))
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert seen[-1].state == rows[-1]["state"] == "lost"
    assert rows[-1]["x0"] == rows[-1]["seconds"] == ""


def test_the_table_has_the_times_of_the_frames(network: Network, tmp_path: Path) -> None:
    frames, truth = passing(20)
    times = iter([0.0, 0.1, 0.9])
    video = Video("test", 10.0, 3, lambda: iter(frames[:3]), clock=lambda: next(times))
    list(follow(video, Tracker(network), lambda _: truth[0], tmp_path / "a.csv"))
    with (tmp_path / "a.csv").open() as file:
        assert [row["seconds"] for row in csv.DictReader(file)] == ["0.000", "0.100", "0.900"]


def test_the_box_is_drawn_on_the_frame() -> None:
    frame = np.zeros((60, 80, 3), np.uint8)
    drawn = annotate(frame, Sighting((10.0, 20.0, 50.0, 40.0), 0.9))
    assert drawn.shape == frame.shape
    assert tuple(drawn[39, 30]) == tuple(drawn[25, 49]) == (255, 200, 0)
    assert not drawn[45:, :].any()
    assert annotate(frame, Sighting(None, 0.1)).any()
    assert not frame.any()


def folder_of(folder: Path, frames: Sequence[np.ndarray], name: str) -> Path:
    """The folder, with the frames in it, named by their numbers."""
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def test_the_command_follows_a_folder_of_frames(tmp_path: Path) -> None:
    frames, truth = passing(20)
    folder = folder_of(tmp_path / "walk", frames[:3], "{}.png")
    longer = tmp_path / "out" / "walk.track" / "00003.jpg"
    longer.parent.mkdir(parents=True)
    longer.write_bytes(b"of a longer video")
    box = ",".join(map(str, truth[0]))
    words = ["track", str(folder), "--box", box, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    assert "found in 3 of 3 frames" in result.stdout
    assert len((tmp_path / "out" / "walk.csv").read_text().splitlines()) == 4
    assert len(list((tmp_path / "out" / "walk.track").iterdir())) == 3


def test_a_video_is_whole_when_the_command_is_terminated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    frames, truth = passing(20)
    with VideoWriter(tmp_path / "walk.mp4", 10) as writer:
        for frame in frames[:4]:
            writer.write(frame)
    follow_on, seen = Tracker.__call__, []

    def terminated(self: Tracker, frame: np.ndarray) -> Sighting:
        seen.append(frame)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
        return follow_on(self, frame)

    monkeypatch.setattr(Tracker, "__call__", terminated)
    box, out = ",".join(map(str, truth[0])), tmp_path / "out"
    words = ["track", str(tmp_path / "walk.mp4"), "--box", box, "--out", str(out)]
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        result = CliRunner().invoke(cli.main, words)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143
    assert "of 3 frames" in result.stdout
    with open_video(out / "walk.track.mp4") as video:
        assert len(list(video)) == 3


def test_the_command_replaces_neither_its_source_nor_a_table_of_others(tmp_path: Path) -> None:
    frames, truth = passing(20)
    folder = folder_of(tmp_path / "walk", frames[:2], "{:05d}.jpg")
    before = [path.read_bytes() for path in sorted(folder.iterdir())]

    def track(source: Path) -> Result:
        box = ",".join(map(str, truth[0]))
        words = ["track", str(source), "--box", box, "--out", str(tmp_path)]
        return CliRunner().invoke(cli.main, words)

    for _ in range(2):  # a table of its own it does replace
        result = track(folder)
        assert result.exit_code == 0, result.output
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == before
    (tmp_path / "walk.csv").write_text("frame,x,y\n0,1,2\n")
    result = track(folder)
    assert result.exit_code == 2
    assert "walk.csv is there already and was not made by track" in " ".join(result.stderr.split())
    assert (tmp_path / "walk.csv").read_text() == "frame,x,y\n0,1,2\n"
    (tmp_path / "again").symlink_to(folder)
    (tmp_path / "again.track").symlink_to(folder)
    result = track(tmp_path / "again")
    assert result.exit_code == 2
    assert "again.track is read, and would be replaced" in result.stderr


def test_the_command_doubts_a_class_that_the_network_does_not_see(tmp_path: Path) -> None:
    folder = tmp_path / "cats"
    folder.mkdir()
    Image.open(sample_photo("cat")).save(folder / "0.png")

    def track(target: str) -> Result:
        words = ["track", str(folder), "--target", target, "--out", str(tmp_path / "out")]
        return CliRunner().invoke(cli.main, words)

    result = track("espresso")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"{folder}: espresso may not be in the picture: ")
    assert len(result.stderr.splitlines()) == 1
    assert track("tabby").stderr == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Say what to follow"),
        (["--box", "1,2,3,4", "--target", "tabby"], "--target CLASS, not both"),
        (["--box", "1,2,3"], "--box: '1,2,3' isn't four numbers"),
        (["--box", "9,9,9,9"], "is empty"),
        (["--box", "900,0,950,9"], "lies outside"),
        (["--target", "no such thing"], "has no class"),
        (["--target", "top3"], "name one class"),
    ],
)
def test_the_command_says_what_it_misses(tmp_path: Path, words: list[str], sentence: str) -> None:
    Image.fromarray(passing(2)[0][0]).save(tmp_path / "0.png")
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.main, ["track", str(tmp_path), *words, "--out", str(out)])
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())
    assert not list(out.glob("*"))


def test_a_frame_that_cannot_be_read_ends_the_command_and_keeps_what_was_found(
    tmp_path: Path,
) -> None:
    frames, truth = passing(20)
    folder = tmp_path / "walk"
    folder.mkdir()
    for i, frame in enumerate(frames[:2]):
        Image.fromarray(frame).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"")
    box = ",".join(map(str, truth[0]))
    words = ["track", str(folder), "--box", box, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 1  # 2 where nothing could be done
    assert "found in 2 of 2 frames" in result.stdout
    assert "2.png is empty" in result.stderr
    assert len((tmp_path / "out" / "walk.csv").read_text().splitlines()) == 3


def test_the_command_takes_no_picture(tmp_path: Path) -> None:
    words = ["track", str(sample_photo()), "--box", "1,1,30,30", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 2
    assert "cat.jpg is a picture: give a video, or a folder of frames" in result.stderr


@pytest.mark.parametrize(
    "setting", [{"likeness": 0}, {"side": -1}, {"strides": (4, 8)}, {"memory": -1}, {"near": 0.0}]
)
def test_settings_that_are_of_no_use_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(setting))}="):
        TrackerSettings(**setting)  # type: ignore[arg-type]


def test_a_network_in_training_mode_keeps_its_statistics() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2)
    ).train()
    before = net[1].running_mean.clone()
    with pytest.raises(ModelError, match="training mode"):
        Tracker(Network("net", net, Preprocess((32, 32)), None))
    assert torch.equal(net[1].running_mean, before)


def test_another_default_device_changes_nothing(network: Network) -> None:
    frames, truth = passing(20)
    usual = sightings(frames[:3], truth[0], network)
    with torch.device("meta"):
        assert sightings(frames[:3], truth[0], network) == usual
