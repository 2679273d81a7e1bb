"""The quality benchmark, small, so that it cannot rot: it runs, it goes on, and it tells good from bad."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import howyouseeme as hysm
from howyouseeme.evaluate import Settings, make_grids, score_grid

PATH = Path(__file__).parent.parent / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = spec_from_file_location("quality", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


# -- a network that is known -----------------------------------------------------------------------


class Colours(nn.Module):
    """Answers with the colour of which there is most: the truth is where that colour is."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU())
        self.last_conv = self.last[0]
        self.tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
        with torch.no_grad():
            for layer in (self.middle[0], self.last[0]):
                layer.weight.copy_(torch.eye(3)[:, :, None, None])
            self.tail[2].weight.copy_(60 * torch.eye(4)[:, :3])
            self.tail[2].bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.last(self.middle(x)))


SIZE = 32


@pytest.fixture(scope="module")
def subject(quality: ModuleType) -> Any:
    def prepare(photo: Image.Image) -> Tensor:
        array = np.asarray(photo.convert("RGB").resize((SIZE, SIZE)))
        return torch.tensor(array).permute(2, 0, 1).float() / 255

    def plain(module: nn.Module, _: bool) -> nn.Module:
        made = Colours().eval()
        made.load_state_dict(module.state_dict())
        return made

    return quality.Subject("colours", Colours().eval(), SIZE, prepare, plain)


def box_of(i: int) -> tuple[int, int, int, int]:
    return 4 + 2 * i, 6, 20 + 2 * i, 24


def photo(i: int) -> Image.Image:
    """A patch of one of three colours; all black has the fourth class."""
    array = np.zeros((SIZE, SIZE, 3), np.uint8)
    x0, y0, x1, y1 = box_of(i)
    if i % 4 < 3:
        array[y0:y1, x0:x1, i % 4] = 255
    return Image.fromarray(array)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    rows = ["file,class,original_width,original_height,x0,y0,x1,y1"]
    for i in range(3):
        for half in range(2):
            name = f"{i}-{half}.png"
            photo(i).save(folder / "images" / name)
            rows.append(",".join(map(str, [name, i, SIZE, SIZE, *box_of(i)])))
    photo(0).save(folder / "images" / "wrong.png")
    rows.append("wrong.png,1,32,32,0,0,9,9")
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")
    return folder


def usable(quality: ModuleType, *left_out: str) -> list[str]:
    return [
        name
        for name, method in quality.METHODS.items()
        if quality.installed(method.package) is not None and name not in left_out
    ]


def test_images_are_those_that_the_network_gets_right(
    quality: ModuleType, subject: Any, data: Path
) -> None:
    items = quality.load_items(subject, data, "all")
    assert [item.name for item in items] == [f"{i}-{half}.png" for i in range(3) for half in (0, 1)]
    assert [item.name for item in quality.load_items(subject, data, "1")] == [
        "0-1.png",
        "1-1.png",
        "2-1.png",
    ]
    assert items[2].target == 1
    assert items[2].boxes.tolist() == [list(map(float, box_of(1)))]
    assert items[0].input.shape == (3, SIZE, SIZE)


@pytest.mark.filterwarnings("ignore")
def test_every_installed_method_finds_the_patch(
    quality: ModuleType, subject: Any, data: Path, tmp_path: Path
) -> None:
    items = quality.load_items(subject, data, "1")[:2]
    names = usable(quality)
    settings = Settings(steps=4)
    results = quality.measure(subject, items, [], names, tmp_path, settings, 2, lambda _: None)
    assert list(results) == names
    for name, row in quality.summaries(results).items():
        assert row["grid"] is None
        assert (row["randomised"] is None) == quality.METHODS[name].slow
        assert (row["second_class"] is None) == quality.METHODS[name].slow
        assert row["time"].low > 0
        for column, value in row.items():
            if value is not None and column != "time":
                least = -1 if column in ("road", "second_class", "randomised") else 0
                assert least <= value.low <= value.mean <= value.high <= 1, (name, column)
        if name not in ("random", "edges", "centre", "rise"):
            assert row["pointing"].mean == 1, name
        if name in ("evidence", "input-x-gradient", "lrp", "excitation"):
            assert row["energy"].mean > 0.9, name
            assert row["box"].mean == 1, name
    text = quality.table(results)
    assert len(text.splitlines()) == 2 + len(names)
    assert all(quality.METHODS[name].label in text for name in names)


def test_slow_methods_get_few_images(
    quality: ModuleType, subject: Any, data: Path, tmp_path: Path
) -> None:
    items = quality.load_items(subject, data, "1")
    settings = Settings(steps=2, road=False)
    results = quality.measure(
        subject, items, [], ["edges", "rise"], tmp_path, settings, 2, lambda _: None
    )
    assert [len(result["images"]) for result in results.values()] == [3, 2]
    rows = quality.table(results).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["3", "2"]
    assert "**" not in rows[1]


def test_grids_ask_for_the_cell_of_each_class(
    quality: ModuleType, subject: Any, tmp_path: Path
) -> None:
    items = [
        quality.make_item(subject, str(i), photo(i), np.array([box_of(i)], float)) for i in range(4)
    ]
    items = [quality.dataclasses.replace(item, probability=0.95) for item in items]
    (grid,) = make_grids(items, 1)
    assert grid.input.shape == (3, 2 * SIZE, 2 * SIZE)
    assert sorted(grid.targets) == [0, 1, 2, 3]
    for cell, target in enumerate(grid.targets):
        down, right = divmod(cell, 2)
        part = grid.input[:, down * SIZE : (down + 1) * SIZE, right * SIZE : (right + 1) * SIZE]
        assert torch.equal(part, items[target].input)
    asked: list[int] = []

    def only_there(x: Tensor, target: int) -> Tensor:
        asked.append(target)
        cell = grid.targets.index(target)
        return (
            x.new_zeros(2, SIZE, 2, SIZE)
            .index_put_(
                (torch.tensor(cell // 2), torch.arange(SIZE), torch.tensor(cell % 2)),
                torch.tensor(1.0),
            )
            .reshape(2 * SIZE, 2 * SIZE)
        )

    assert score_grid(only_there, grid) == {"grid": 1.0}
    assert asked == [grid.targets[0], grid.targets[3]]
    assert score_grid(lambda x, target: torch.ones(x.shape[1:]), grid) == {"grid": 0.25}


def test_a_run_that_was_broken_off_goes_on(
    quality: ModuleType, subject: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = quality.load_items(subject, data, "1")
    settings = Settings(steps=2, road=False, second=False, randomised=False)
    asked: list[int] = []

    def breaking(_: Any) -> Any:
        def explain(x: Tensor, target: int) -> Tensor:
            asked.append(target)
            if len(asked) == 4:
                raise KeyboardInterrupt
            return x[target]

        return explain

    method = quality.Method("broken off", "peer", breaking)
    monkeypatch.setitem(quality.METHODS, "breaking", method)
    ask = (subject, items, [], ["breaking"], tmp_path, settings, 2, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        quality.measure(*ask)
    assert asked == [0, 0, 1, 2]  # the first warms up
    kept = json.loads((tmp_path / "colours" / "breaking.json").read_text())
    assert list(kept["found"]) == ["0-1.png", "1-1.png"]
    results = quality.measure(*ask)
    assert asked[4:] == [2]
    assert len(results["breaking"]["images"]) == 3
    other = (*ask[:5], Settings(steps=3, road=False, second=False, randomised=False), *ask[6:])
    quality.measure(*other)
    assert asked[5:] == [0, 0, 1, 2]  # other settings, other scores


# -- peers get the network that they are said to get -------------------------------------------------


@pytest.mark.parametrize(
    "name", ["efficientnet-lite0", "efficientnet-lite2", "squeezenet", "cifar"]
)
def test_plain_network_answers_the_same(quality: ModuleType, name: str) -> None:
    try:
        subject = quality.SUBJECTS[name]()
    except click.ClickException as missing:
        pytest.skip(missing.message)
    x = subject.prepare(hysm.load_image(hysm.sample_photo("cat")))[None]
    with torch.no_grad():
        expected = subject.module(x)
        for for_zennit in {False, quality.installed("zennit") is not None}:
            plain = subject.plain(subject.module, for_zennit)
            tolerance = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(plain(x), expected, rtol=0, atol=tolerance)
            assert plain.middle
            assert plain.last
            assert plain.last_conv


def test_peers_get_the_randomised_network(quality: ModuleType, subject: Any) -> None:
    x = torch.rand(3, SIZE, SIZE)
    forgetful = quality.dataclasses.replace(
        subject, module=quality.evaluate.randomised(subject.module, x[None])
    )
    plain = forgetful.plain(forgetful.module, False)
    torch.testing.assert_close(plain(x[None]), forgetful.module(x[None]))
    assert not torch.allclose(plain(x[None]), subject.module(x[None]))


def test_cifar_comes_with_samples_of_its_own(quality: ModuleType, tmp_path: Path) -> None:
    try:
        subject = quality.cifar()
    except click.ClickException as missing:
        pytest.skip(missing.message)
    items = quality.load_items(subject, tmp_path / "nowhere", "1")
    assert len(items) == 20
    assert all(item.boxes is None for item in items)
    settings = Settings(steps=2, road=False)
    results = quality.measure(
        subject, items[:2], [], ["evidence", "grad-cam"], tmp_path, settings, 2, lambda _: None
    )
    for row in quality.summaries(results).values():
        measured = {key for key, mean in row.items() if mean is not None}
        assert measured == {"insertion", "deletion", "second_class", "randomised", "time"}


# -- what is kept belongs to the source that made it -------------------------------------------------


def test_scores_are_dropped_with_the_source_of_their_method_alone(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[str] = []
    read = Path.read_bytes

    def other(path: Path) -> bytes:
        return read(path) + b"#" * (path.name in changed)

    monkeypatch.setattr(Path, "read_bytes", other)

    def prints() -> dict[str, str]:
        names = ("evidence", "seed", "edges", "rise")
        return {name: quality.fingerprint(quality.METHODS[name], Settings()) for name in names}

    before = prints()
    assert len(set(before.values())) == 4

    def dropped(*files: str) -> set[str]:
        changed[:] = files
        return {name for name, made_by in prints().items() if made_by != before[name]}

    for file in ("evidence.py", "descent.py", "excitation.py"):
        assert dropped(file) == {"evidence"}
    assert dropped("seed.py") == {"seed"}
    assert dropped("backtrack.py") == {"evidence", "seed"}
    assert dropped("explain.py", "draw.py", "run.py", "onnx.py") == set()
    assert dropped("measures.py") == {"evidence", "seed", "edges", "rise"}
    assert dropped() == set()
    other_settings = quality.fingerprint(quality.METHODS["edges"], Settings(steps=3))
    assert other_settings != before["edges"]


# -- command line ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_command_writes_the_page(
    quality: ModuleType, subject: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quality.SUBJECTS, "efficientnet-lite0", lambda: subject)
    monkeypatch.setitem(
        quality.METHODS,
        "absent",
        quality.Method("Absent", "peer", lambda _: None, "no-such-package"),
    )

    def not_there() -> None:
        raise click.ClickException("cifar needs something")

    out = tmp_path / "docs" / "quality.md"
    monkeypatch.setitem(quality.SUBJECTS, "cifar", not_there)
    call = ["--data", str(data), "--images", "3", "--grids", "0", "--no-road", "--out", str(out)]
    call += ["--network", "efficientnet-lite0", "--network", "cifar"]
    call += ["--scores", str(tmp_path / "scores"), "--methods", "evidence,edges,absent"]
    result = CliRunner().invoke(quality.main, call)
    assert result.exit_code == 0, result.output
    page = out.read_text()
    assert "| howyouseeme: evidence, saliency |" in page
    assert "3 images of half 1" in page
    assert "- Absent: no-such-package is missing" in page
    assert "- cifar needs something" in page
    for line in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (out.parent / line).is_file()
    assert f"torch {torch.__version__}".split("+")[0] in page
    for path in (
        out.with_name("quality-pictures.jpg"),  # of the package's own photos
        out.with_name("quality-efficientnet-lite0.png"),
        tmp_path / "scores" / "pictures-efficientnet-lite0.jpg",  # of the data
    ):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 10
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "quality-efficientnet-lite0.png",
        "quality-pictures.jpg",
        "quality.md",
    ]


def test_the_page_of_pictures_begins_with_our_worst(quality: ModuleType, subject: Any) -> None:
    items = [
        quality.make_item(subject, str(i), photo(i % 3), np.array([box_of(i % 3)], float))
        for i in range(14)
    ]
    scores = [{"energy": (5 * i % 14) / 14, "insertion": 0.5, "deletion": 0.2} for i in range(14)]
    subject = quality.dataclasses.replace(
        subject, samples=lambda: [(str(i), photo(i % 3), i % 3) for i in range(14)]
    )
    result = {"items": items, "images": scores}
    columns = quality.ten_photos(subject, Path("nowhere"), result, "evidence")
    order = [5 * i % 14 for i in range(14)]
    assert [item.name for _, _, item in columns[:5]] == [
        str(order.index(rank)) for rank in range(5)
    ]
    assert len({item.name for _, _, item in columns}) == 10
    assert columns[0][0].startswith("worst 1 of evidence\nenergy 0.00")
    assert columns[9][0].startswith("one of the others")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["--data", "nowhere"], "no benchmark data in nowhere"),
        (["--methods", "magic"], "No method magic"),
    ],
)
def test_command_says_what_is_wrong(
    quality: ModuleType,
    subject: Any,
    call: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(quality.SUBJECTS, "efficientnet-lite0", lambda: subject)
    call = [*call, "--network", "efficientnet-lite0"]
    result = CliRunner().invoke(quality.main, call)
    assert result.exit_code == 1
    assert message in result.stderr
