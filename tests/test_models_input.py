"""How pictures become a network's input: on the command line, and a warning when they did not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import howyouseeme as hysm
from howyouseeme.cli import main
from howyouseeme.images import Preprocess, load_image, sample_photo
from howyouseeme.models import Network


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network in it, as a module and as a program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_nets.py").write_text(
        "import howyouseeme, torch\n"
        "from torch import nn\n"
        "def bare():\n"
        "    torch.manual_seed(0)\n"
        "    body = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(*body, nn.Linear(4, 3))\n"
        "def known():\n"
        "    preprocess = howyouseeme.Preprocess((16, 16), 'crop', 20, mean=(0.5,), std=(0.25,))\n"
        "    return howyouseeme.Network('known', bare(), preprocess, None)\n"
    )
    return tmp_path


def explain(*options: str) -> dict:
    """The preprocessing that the command used."""
    command = ["explain", str(sample_photo("cat")), "--out", "out", *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return json.loads(Path("out/cat.json").read_text())["provenance"]["preprocess"]


def refused(*options: str) -> str:
    result = CliRunner().invoke(main, ["explain", str(sample_photo("cat")), *options])
    assert result.exit_code == 2
    return result.stderr


def test_all_of_it(here: Path) -> None:
    options = "--size 16x24 --mean 104,117,124 --std 1 --channels bgr --range 255".split()
    options += ["--interpolation", "bicubic"]
    mean = (104.0, 117.0, 124.0)
    wanted = Preprocess(
        (16, 24), mean=mean, std=(1.0,), scale=1.0, channels="bgr", interpolation="bicubic"
    )
    assert explain("--model", "their_nets:bare", *options) == wanted.describe()


def test_values_are_from_0_to_1_if_nothing_is_said(here: Path) -> None:
    used = explain("--model", "their_nets:bare", "--size", "16", "--mean", "0.5", "--std", "0.5")
    assert used == Preprocess((16, 16), mean=(0.5,), std=(0.5,)).describe()


def test_what_is_said_replaces_what_is_known(here: Path) -> None:
    known = Preprocess((16, 16), "crop", 20, mean=(0.5,), std=(0.25,))
    assert explain("--model", "their_nets:known") == known.describe()
    assert explain("--model", "their_nets:known", "--channels", "bgr") == {
        **known.describe(),
        "channels": "bgr",
    }
    assert explain("--model", "their_nets:known", "--interpolation", "bicubic") == {
        **known.describe(),
        "interpolation": "bicubic",
    }
    assert explain("--model", "their_nets:known", "--size", "24") == {
        **known.describe(),
        "size": [24, 24],
        "resize": "squash",
        "crop_from": None,
    }


def test_the_choices_are_those_of_python() -> None:
    by_name = {option.name: option for option in main.commands["explain"].params}
    for name in ("channels", "interpolation"):
        allowed = get_args(get_type_hints(Preprocess)[name])
        assert tuple(by_name[name].type.choices) == allowed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "big"], "--size big: give a number, or HEIGHTxWIDTH"),
        (["--size", "16", "--mean", "a,b"], "--mean a,b: give a number, or one for each channel"),
        (["--size", "16", "--std", "1,2"], "std has one number for all channels"),
        (["--size", "16", "--std", "0"], "scale and std can't be zero"),
        (["--size", "0"], "The size 0 x 0 is none: sizes go from 1 up"),
        (["--mean", "0.5"], "input of their_nets:bare is not known; give --size"),
        (
            ["--size", "16", "--mean", "127"],
            "can't be right for their_nets:bare where its values go up to 1: give --range 255",
        ),
        (
            ["--size", "16", "--mean", "0.5", "--range", "255"],
            "where --range says that values go up to 255: give --range 1",
        ),
        (["--size", "16", "--classes", "none.txt"], "'none.txt' does not exist"),
    ],
)
def test_mistakes(here: Path, options: list[str], message: str) -> None:
    said = " ".join(refused("--model", "their_nets:bare", *options).split())
    assert message in said


def test_the_usual_crop(here: Path) -> None:
    used = explain("--model", "their_nets:bare", "--size", "16", "--crop-from", "20")
    assert used == Preprocess((16, 16), "crop", 20).describe()


def test_a_mean_of_the_wrong_range_is_refused_where_the_network_is_known(here: Path) -> None:
    said = " ".join(refused("--mean", "0.485,0.456,0.406").split())
    assert "A mean of 0.485, 0.456, 0.406 can't be right for efficientnet-lite0" in said
    assert "where its values go up to 255: give --range 1" in said
    assert "can't be right" in refused("--range", "1")


def test_classes_are_read_from_a_file(here: Path) -> None:
    Path("names.txt").write_text("cat\ndog\n\nfox\n", encoding="utf-8")
    options = ["--model", "their_nets:bare", "--size", "16", "--classes", "names.txt"]
    assert explain(*options)["size"] == [16, 16]
    words = ["explain", str(sample_photo("cat")), "--out", "out", *options, "--target", "fox"]
    result = CliRunner().invoke(main, words)
    assert "→ fox " in result.output
    listed = CliRunner().invoke(main, ["classes", *options[:2], "--classes", "names.txt"])
    assert listed.output.split() == ["0", "cat", "1", "dog", "2", "fox"]
    known = CliRunner().invoke(main, ["classes", "--classes", "names.txt"])
    assert known.output == listed.output


def test_a_server_of_several_networks_takes_no_options_of_one(here: Path) -> None:
    words = ["serve", "--model", "their_nets:bare", "--model", "their_nets:known", "--size", "16"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "are those of one --model" in " ".join(result.stderr.split())


def test_code_in_files_has_to_be_allowed(here: Path) -> None:
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 3)), "net.pt")
    options = ["--model", "net.pt", "--size", "16"]
    assert "allow it with --allow-code" in refused(*options)
    assert explain(*options, "--allow-code")["size"] == [16, 16]


@pytest.mark.parametrize("command", ["detect", "propose"])
def test_other_commands_take_the_same_options(here: Path, command: str) -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
    torch.save(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), "a.pt")
    words = [command, str(sample_photo("cat")), "--out", "out", "--model", "a.pt"]
    refused = CliRunner().invoke(main, [*words, "--allow-code"])
    assert refused.exit_code == 2
    assert "input of a.pt is not known; give --size" in refused.stderr
    done = CliRunner().invoke(main, [*words, "--allow-code", "--size", "64"])
    assert done.exit_code == 0, done.output


# --- inputs that don't fit


@pytest.fixture
def explainer() -> hysm.Explainer:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 3)).eval()
    preprocess = Preprocess((16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return hysm.Explainer(Network("mine", module, preprocess, None))


@pytest.mark.parametrize("white", [1, 255])
def test_an_unnormalised_input_is_told(explainer: hysm.Explainer, white: int) -> None:
    picture = Preprocess((16, 16))(load_image(sample_photo("cat")))[0][None] * white
    with pytest.warns(
        UserWarning, match=r"values go from .* as mine takes them: is it norm"
    ) as told:
        explainer(picture)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_inputs_that_fit_are_not(explainer: hysm.Explainer) -> None:
    photo = load_image(sample_photo("cat"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer(explainer.network.preprocess(photo)[0][None])
        explainer(photo)
        explainer(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        explainer(torch.zeros(1, 3, 16, 16))
        # Nothing is known about the preprocessing of a bare module.
        hysm.explain(explainer.network.module, torch.rand(1, 3, 16, 16))
