"""Hugging Face's hub: where it does not answer, that is told at once, and what was downloaded is used."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from howyouseeme.errors import ModelError
from howyouseeme.images import sample_photo
from howyouseeme.models import hub, load_model

constants = pytest.importorskip("huggingface_hub.constants", reason="pip install huggingface_hub")

#: Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


def run(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for the settings are read when huggingface_hub is imported."""
    names = ("HTTP_PROXY", "HF_HUB_OFFLINE", "HF_ENDPOINT", "NO_PROXY")
    known = {name: value for name, value in os.environ.items() if name.upper() not in names}
    return subprocess.run(
        [sys.executable, *command],
        env=known | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


class Refusing(BaseHTTPRequestHandler):
    """A server that has nothing, as a mirror answers at its root."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Refusing.asked = []
    with HTTPServer(("127.0.0.1", 0), Refusing) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("settings", "answers"),
    [
        ({"HF_ENDPOINT": "{server}"}, True),
        ({"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": "{server}"}, True),
        ({"HF_ENDPOINT": "{server}", "HF_HUB_OFFLINE": "1"}, False),
        ({"HF_ENDPOINT": NOWHERE}, False),
    ],
    ids=["a mirror", "a proxy", "offline", "no network"],
)
def test_whether_it_answers(server: str, settings: dict[str, str], answers: bool) -> None:
    filled = {name: value.format(server=server) for name, value in settings.items()}
    done = run("-c", "from howyouseeme.models import hub; print(hub.answers())", **filled)
    assert done.stdout.split() == [str(answers)], done.stderr
    assert len(Refusing.asked) == answers


@pytest.mark.parametrize("name", ["transformers:nobody/nothing", "timm:lcnet_050"])
def test_without_a_network_it_is_one_sentence(name: str, tmp_path: Path) -> None:
    program = ("-m", "howyouseeme", "explain", str(sample_photo("cat")), "--model", name)
    done = run(*program, HF_ENDPOINT=NOWHERE, HF_HUB_CACHE=str(tmp_path))
    (line,) = done.stderr.splitlines()  # no attempt is told, for there is but one
    assert line.startswith("Error: ")
    assert f"{NOWHERE} does not answer" in line
    assert (done.returncode, done.stdout) == (2, "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "answers", lambda: False)
    return tmp_path


def kept(cache: Path, repository: str) -> Path:
    """A folder for the files of a repository, as if they had been downloaded."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    files = folder / "snapshots" / ("0" * 40)
    files.mkdir(parents=True)
    return files


def test_what_was_downloaded_from_timm_is_used(cache: Path) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    from safetensors.torch import save_file  # noqa: PLC0415

    torch.manual_seed(1)
    state = timm.create_model("lcnet_050").state_dict()
    save_file(state, kept(cache, "timm/lcnet_050.ra2_in1k") / "model.safetensors")
    found = load_model("timm:lcnet_050").module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_pickles_that_were_downloaded_are_not(cache: Path) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    state = timm.create_model("lcnet_050").state_dict()
    torch.save(state, kept(cache, "timm/lcnet_050.ra2_in1k") / "pytorch_model.bin")
    with pytest.raises(ModelError, match="does not answer"):
        load_model("timm:lcnet_050")


def test_what_was_downloaded_from_transformers_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    at = (transformers.utils.hub, "TRANSFORMERS_CACHE")  # where 4.45 keeps what it was at first
    monkeypatch.setattr(*at, str(cache), raising=False)
    config = transformers.ResNetConfig(
        depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", num_labels=3
    )
    torch.manual_seed(1)
    model = transformers.ResNetForImageClassification(config)
    files = kept(cache, "nobody/resnet")
    model.save_pretrained(files)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(files)
    network = load_model("transformers:nobody/resnet")
    assert network.preprocess is not None
    found = network.module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
