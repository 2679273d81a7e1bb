"""The HTTP API: what it answers, with which status, and what it keeps out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import howyouseeme as hysm
from howyouseeme.cli import main
from howyouseeme.web import Limits, Settings, serve

pytest.importorskip("fastapi", reason="pip install 'howyouseeme[serve]'")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from howyouseeme.explanation import Explanation
from howyouseeme.tape import Tape
from howyouseeme.web.app import make_app
from howyouseeme.web.scene import make_scene
from howyouseeme.web.service import Question, Service
from howyouseeme.web.shelf import Shelf
from howyouseeme.web.worker import BusyError, Worker
from howyouseeme.written import as_json

jsonschema = pytest.importorskip("jsonschema")

HOME = "http://127.0.0.1"
TOKEN = "a token that nobody guesses"
CAT = hysm.sample_photo("cat").read_bytes()


def tiny(name: str = "tiny") -> hysm.Network:
    """A network that takes no time."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    classes = ("cat", "dog", "tiger cat", "rocket")
    return hysm.Network(name, module.eval(), hysm.Preprocess((32, 32)), classes)


def not_loaded() -> hysm.Network:
    """A factory that tells whether it was called."""
    FACTORY_CALLS.append("called")
    return tiny("made")


FACTORY_CALLS: list[str] = []


def picture(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def client_of(app: FastAPI, **headers: str) -> TestClient:
    return TestClient(app, HOME, headers=headers, raise_server_exceptions=False)


@pytest.fixture
def limits() -> Limits:
    return Limits(body=200_000, pixels=100_000, seconds=20, queue=4, batch=3)


@pytest.fixture
def app(limits: Limits) -> FastAPI:
    return make_app([tiny(), tiny("other")], Settings(page=False, limits=limits))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with client_of(app) as client:
        yield client


def send(client: TestClient, path: str = "/v1/explain", photo: bytes | None = None, **more: Any):
    given = {"photo": ("folder/photo.png", picture() if photo is None else photo)}
    return client.post(path, files=given, **more)


# -- answers


def test_explain_gives_the_json_of_the_command_line(tmp_path: Path) -> None:
    photo = tmp_path / "cat.jpg"
    photo.write_bytes(CAT)
    network = hysm.load_model()
    hysm.explain(network, photo).save(tmp_path / "out")
    with client_of(make_app([network], Settings(page=False))) as client:
        answer = client.post("/v1/explain", files={"photo": ("cat.jpg", CAT)})
    told = answer.json()
    schema = json.loads((files("howyouseeme") / "data" / "explanation.schema.json").read_text())
    jsonschema.validate(told, schema)
    command_line = json.loads((tmp_path / "out" / "cat.json").read_text())
    command_line["image"]["name"] = "cat.jpg"  # it tells the path that it was given
    assert told == command_line


def test_a_class_can_be_asked_for(client: TestClient) -> None:
    for target in ("dog", "1"):
        told = send(client, params={"target": target}).json()
        assert told["target"]["index"] == 1
        assert told["target"]["label"] == "dog"
    assert told["image"] == {"name": "photo.png", "size": [30, 40]}


def test_the_likeliest_classes_come_in_a_list(client: TestClient) -> None:
    told = send(client, params={"target": "top3"}).json()
    chances = [one["target"]["probability"] for one in told]
    assert len(told) == 3
    assert chances == sorted(chances, reverse=True)


def test_one_class_against_another(client: TestClient) -> None:
    told = send(client, params={"target": "dog", "versus": "rocket"}).json()
    label = "dog, not rocket"
    assert told["target"] == {"index": None, "label": label, "probability": None, "box": None}
    answer = send(client).json()["target"]["label"]
    other = "dog" if answer != "dog" else "cat"
    assert (
        send(client, params={"versus": other}).json()["target"]["label"] == f"{answer}, not {other}"
    )
    for params in ({"versus": answer}, {"target": "top2", "versus": "dog"}, {"versus": "lamp"}):
        assert send(client, params=params).status_code == 422


class Finds(nn.Module):
    """A detector that answers as YOLOv8 does, with one box for each of 4 x 4 cells."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Conv2d(3, 2, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(16.0)
        place = torch.stack([at % 4 * 4 + 2, (at / 4).floor() * 4 + 2, at * 0 + 4, at * 0 + 4])
        scores = self.score(x).flatten(2).sigmoid()
        return torch.cat([place.expand(len(x), 4, 16), scores], 1)


def test_a_box_of_a_detector() -> None:
    network = hysm.Network("finds", Finds().eval(), hysm.Preprocess((16, 16)), ("cat", "dog"))
    with client_of(make_app([network], Settings(page=False))) as client:
        told = send(client, params={"box": 1})
        assert told.status_code == 200, told.text
        target = told.json()["target"]
        assert target["label"] in {"cat, box 1", "dog, box 1"}
        x0, y0, x1, y1 = target["box"]
        assert (x1 - x0, y1 - y0) == pytest.approx((10, 7.5))  # of 40 x 30
        assert send(client, params={"box": 1}, headers={"Accept": "image/png"}).status_code == 200
        for params in ({"box": 99}, {"box": -1}, {"box": 0, "target": "dog"}, {}):
            refused = send(client, params=params)
            assert refused.status_code == 422, params
        assert "There is no box 99" in send(client, params={"box": 99}).json()["detail"]


def test_the_boxes_that_a_detector_finds_itself() -> None:
    network = hysm.Network("finds", Finds().eval(), hysm.Preprocess((16, 16)), ("cat", "dog"))
    with client_of(make_app([network], Settings(page=False))) as client:
        told = send(client, "/v1/detect", params={"own": True})
        assert told.status_code == 200, told.text
        annotations = told.json()["annotations"]
        names = {one["id"]: one["name"] for one in told.json()["categories"]}
        scores = [one["score"] for one in annotations]
        assert len(scores) > 1
        assert scores == sorted(scores, reverse=True)
        for one in annotations[:2]:
            asked = send(client, params={"box": one["number"]}).json()["target"]
            assert asked["label"] == f"{names[one['category_id']]}, box {one['number']}"
            assert asked["probability"] == pytest.approx(one["score"], abs=1e-4)
        png = send(client, "/v1/detect?own=true", headers={"Accept": "image/png"})
        assert png.status_code == 200
        for params in ({"target": "dog"}, {"top": 1}, {"threshold": 0.5}):
            assert send(client, "/v1/detect", params={"own": True, **params}).status_code == 422
    classifier = hysm.load_model("efficientnet-lite0")
    with client_of(make_app([classifier], Settings(page=False))) as client:
        refused = send(client, "/v1/detect?own=true")
        assert refused.status_code == 422
        assert "no detector" in refused.json()["detail"]


def test_a_parameter_that_there_is_not_is_refused(client: TestClient) -> None:
    refused = send(client, params={"trget": "dog"})
    assert refused.status_code == 422
    assert refused.json()["detail"] == (
        "There is no parameter 'trget'; /v1/explain takes model, target, versus, box, method, layers."
    )
    assert client.get("/v1/models?all=1").status_code == 422


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"photo": ("a.png", picture()), "target": (None, "tiger cat")},
            "The form field 'target' is a parameter, which goes into the address: "
            "/v1/explain?target=tiger+cat",
        ),
        (
            {"photo": ("a.png", picture()), "image": ("b.png", picture())},
            "There is no form field 'image'; /v1/explain takes photo.",
        ),
        (
            [("photo", ("a.png", picture())), ("photo", ("b.png", picture()))],
            "There are 2 photos; send one in a request.",
        ),
        (
            {"photo": (None, "cat.jpg")},
            "The form field 'photo' is the text 'cat.jpg', not a file; with curl, write photo=@cat.jpg",
        ),
    ],
    ids=["parameter", "unknown", "two photos", "no file"],
)
def test_a_form_that_is_more_than_a_photo_is_refused(
    client: TestClient, fields: Any, said: str
) -> None:
    refused = client.post("/v1/explain", files=fields)
    assert refused.status_code == 422
    assert detail(refused) == said


def test_a_parameter_that_is_repeated_is_refused_where_one_counts(client: TestClient) -> None:
    refused = client.post(
        "/v1/explain?target=cat&target=dog", files={"photo": ("a.png", picture())}
    )
    assert refused.status_code == 422
    assert detail(refused) == "The parameter 'target' is given 2 times; give it once."
    assert send(client, "/v1/detect?target=cat&target=dog").status_code == 200
    assert send(client, "/v1/detect?target=cat&model=tiny&model=other").status_code == 422


def test_another_network_and_method(client: TestClient) -> None:
    told = send(client, params={"model": "other", "method": "seed"}).json()
    assert told["provenance"]["model"] == "other"
    assert told["provenance"]["method"] == "seed"


@pytest.mark.parametrize("path", ["/v1/explain", "/v1/detect", "/v1/propose"])
def test_png_where_it_is_asked_for(client: TestClient, path: str) -> None:
    answer = send(client, path, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == "PNG"
        image.load()


def test_the_picture_of_several_classes_and_of_layers_is_taller(client: TestClient) -> None:
    heights = []
    for params in ({}, {"target": "top2"}, {"layers": "true"}):
        answer = send(client, params=params, headers={"Accept": "image/png"})
        with Image.open(io.BytesIO(answer.content)) as image:
            heights.append(image.height)
    assert heights[0] < min(heights[1:])


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("application/json, image/png;q=0.5", "application/json"),
        ("application/json;q=0.1, image/*", "image/png"),
        ("text/html, image/png", "image/png"),
        ("image/png;q=nonsense, application/json", "application/json"),
    ],
)
def test_what_is_accepted_decides(client: TestClient, accept: str, kind: str) -> None:
    answer = send(client, headers={"Accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


def test_detect_gives_coco(client: TestClient) -> None:
    told = send(client, "/v1/detect", params={"target": ["dog", "cat"]}).json()
    assert told["images"] == [{"id": 1, "file_name": "photo.png", "width": 40, "height": 30}]
    assert {one["name"] for one in told["categories"]} <= {"dog", "cat"}
    for one in told["annotations"]:
        x, y, width, height = one["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 40.01
        assert y + height <= 30.01


def test_propose_gives_regions(client: TestClient) -> None:
    told = send(client, "/v1/propose", params={"count": 7}).json()
    assert told["image"] == {"name": "photo.png", "size": [30, 40]}
    assert 1 <= len(told["regions"]) <= 7


def test_models(client: TestClient) -> None:
    told = client.get("/v1/models").json()["models"]
    assert told[0] == {"name": "tiny", "loaded": True, "classes": 4, "input": [32, 32]}
    assert [one["name"] for one in told] == ["tiny", "other"]


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "waiting": 0}
    send(client)
    client.get("/v1/models")
    told = ""
    until = time.monotonic() + 20
    while "howyouseeme_batch_size_count 1.0" not in told and time.monotonic() < until:
        told = client.get("/metrics").text  # the worker tells after it has answered
    line = 'howyouseeme_requests_total{method="POST",path="/v1/explain",status="200"} 1.0'
    assert line in told
    assert "howyouseeme_batch_size_count 1.0" in told
    assert "process_resident_memory_bytes" in told


def test_labels_of_metrics_are_few(client: TestClient) -> None:
    for path in ("/a", "/b", "/v1/c"):
        client.get(path)
    told = client.get("/metrics").text
    assert 'path="page"' in told
    assert "/v1/c" not in told


def test_the_openapi_page_works_offline(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http" not in page.replace("http://www.w3.org", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert client.get(f"/static-offline-docs/{name}").status_code == 200
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/explain",
        "/v1/detect",
        "/v1/propose",
        "/v1/models",
        "/healthz",
    }


def test_examples_of_the_openapi_document_fit_their_schemas(client: TestClient) -> None:
    checked = 0
    for methods in client.get("/openapi.json").json()["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                for content in response.get("content", {}).values():
                    if "example" in content:
                        jsonschema.validate(content["example"], content["schema"])
                        checked += 1
    assert checked > 20


# -- what is refused


def detail(answer: Any) -> str:
    sentence = answer.json()["detail"]
    assert isinstance(sentence, str)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"target": "cart"}, "no class 'cart'"),
        ({"target": "4"}, "no class 4"),
        ({"target": ""}, "no class ''"),
        ({"target": "top0"}, "from top1 to top10"),
        ({"target": "top11"}, "from top1 to top10"),
        ({"target": "top9"}, "no class of rank"),
        ({"model": "torchvision:vgg16"}, "it has tiny, other"),
        ({"model": "os:getcwd"}, "it has tiny, other"),
        ({"model": "/etc/passwd"}, "it has tiny, other"),
        ({"method": "magic"}, "method"),
        ({"target": "x" * 300}, "target"),
    ],
)
def test_422_for_what_cannot_be_asked(client: TestClient, params: Any, part: str) -> None:
    answer = send(client, params=params)
    assert answer.status_code == 422
    assert part in detail(answer)


@pytest.mark.parametrize(
    "photo",
    [
        b"",
        b"no picture",
        picture()[:200],
        picture(kind="PPM"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["empty", "text", "cut", "ppm", "eps", "svg"],
)
@pytest.mark.parametrize("path", ["/v1/explain", "/v1/detect", "/v1/propose"])
def test_422_for_what_is_no_photo(client: TestClient, path: str, photo: bytes) -> None:
    answer = send(client, path, photo)
    assert answer.status_code == 422
    assert "photo" in detail(answer).lower() or "data" in detail(answer)


def test_422_without_a_photo(client: TestClient) -> None:
    answer = client.post("/v1/explain")
    assert answer.status_code == 422
    assert detail(answer) == (
        "There is no photo: send one as the form field 'photo', multipart/form-data."
    )
    assert client.post("/v1/explain", data={"photo": "text"}).status_code == 422


def test_422_for_two_ways_to_say_what_to_detect(client: TestClient) -> None:
    answer = send(client, "/v1/detect", params={"target": "dog", "top": 2})
    assert answer.status_code == 422
    assert "not both" in detail(answer)
    assert send(client, "/v1/detect", params={"threshold": 1}).status_code == 422
    assert send(client, "/v1/propose", params={"count": 0}).status_code == 422


def test_413_for_a_request_that_is_too_large(client: TestClient) -> None:
    answer = send(client, photo=bytes(300_000))
    assert answer.status_code == 413
    assert "0.191 MiB" in detail(answer)


def test_413_also_where_the_size_is_not_told_before(client: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(10_000)
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/explain", content=parts(), headers=headers)
    assert answer.status_code == 413


def test_413_for_too_many_pixels(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("L", (400, 300)).save(buffer, "PNG")
    answer = send(client, photo=buffer.getvalue())
    assert answer.status_code == 413
    assert detail(answer).startswith("The photo has 400 x 300 pixels, more than the limit")


def test_413_for_a_picture_that_unpacks_to_far_too_much(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 200_000
    assert send(client, photo=buffer.getvalue()).status_code == 413


def test_400_404_405_406(client: TestClient) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    assert client.post("/v1/explain", content=b"junk", headers=headers).status_code == 400
    for path in ("/v1/nothing", "/gradio_api/file=/etc/passwd", "/../../etc/passwd", "/x"):
        assert client.get(path).status_code == 404
    refused = client.get("/v1/explain")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"
    assert send(client, headers={"Accept": "text/html"}).status_code == 406
    assert send(client, headers={"Accept": "image/png;q=0"}).status_code == 406


def test_500_tells_no_more_than_it_must(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(app.state.service, "explain", fail)
    with client_of(app) as client:
        answer = send(client)
    assert answer.status_code == 500
    assert detail(answer) == "unexpected error, please report it (RuntimeError)"


def slow_app(limits: Limits, seconds: float) -> FastAPI:
    """An application whose network takes its time."""
    network = tiny()
    network.module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return make_app([network], Settings(page=False, limits=limits))


def test_503_when_the_queue_is_full() -> None:
    app = slow_app(Limits(queue=2, batch=1, seconds=30), 0.3)
    with client_of(app) as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: send(client), range(12)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 3
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert int(busy.headers["retry-after"]) >= 1
    assert detail(busy) == f"The server is busy; try again in {busy.headers['retry-after']} s."


def test_504_when_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("howyouseeme.web.service._LATEST", 0.2)
    app = slow_app(Limits(queue=8, batch=1, seconds=0.5), 2.0)
    with client_of(app) as client:
        late = send(client)
        assert late.status_code == 504
        assert "longer than 0.5 s" in detail(late)


def test_503_when_the_turn_does_not_come_in_time() -> None:
    app = slow_app(Limits(queue=8, batch=1, seconds=0.5), 1.5)
    with client_of(app) as client, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: send(client), range(3)))
    # The first one was begun in time, and is let finish.
    assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
    assert all("retry-after" in one.headers for one in answers if one.status_code == 503)


def test_the_event_loop_answers_while_the_worker_works() -> None:
    app = slow_app(Limits(seconds=30), 2.0)
    with client_of(app) as client, ThreadPoolExecutor(1) as pool:
        working = pool.submit(send, client)
        time.sleep(0.3)
        begun = time.monotonic()
        assert client.get("/healthz").status_code == 200
        assert time.monotonic() - begun < 1.0
        assert not working.done()
        assert working.result().status_code == 200


# -- other sites, tokens, hosts


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl, say
        ({"Origin": HOME, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": HOME}, 200),  # a browser without Fetch Metadata
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:9999", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert send(client, headers=headers).status_code == status
    assert client.get("/v1/models", headers=headers).status_code == 200


def test_an_origin_that_is_no_address_is_refused(client: TestClient) -> None:
    assert send(client, headers={"Origin": "http://["}).status_code == 403


def test_forms_say_where_they_come_from(client: TestClient) -> None:
    # With `no-referrer` browsers send `Origin: null`, and nobody could log in.
    assert client.get("/v1/models").headers["referrer-policy"] == "same-origin"


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(Settings(token=TOKEN))


@pytest.fixture
def guarded() -> Iterator[TestClient]:
    with client_of(make_app([tiny()], Settings("0.0.0.0", token=TOKEN, page=False))) as client:
        yield client


def test_401_without_the_token(guarded: TestClient) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        answer = guarded.get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/openapi.json").status_code == 401
    assert guarded.get("/healthz").status_code == 200


def test_the_token_opens(guarded: TestClient) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert send(guarded, headers=headers).status_code == 200
    schema = guarded.get("/openapi.json", headers=headers).json()
    assert schema["security"] == [{"token": []}]


def test_a_browser_logs_in(guarded: TestClient) -> None:
    page = guarded.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 401
    assert "<form" in page.text
    wrong = guarded.post("/login", data={"token": "wrong"})
    assert wrong.status_code == 401
    right = guarded.post("/login", data={"token": TOKEN}, follow_redirects=False)
    assert right.status_code == 303
    cookie = right.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert guarded.get("/v1/models").status_code == 200


def test_a_wide_host_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(hysm.InputError, match="give a token"):
            Settings(host)
        Settings(host, token=TOKEN)
    with pytest.raises(hysm.InputError, match="can be guessed"):
        Settings("0.0.0.0", token="short")
    for host in ("127.0.0.1", "::1", "localhost"):
        Settings(host)


def test_a_name_that_was_made_to_mean_this_machine_is_refused(app: FastAPI) -> None:
    with TestClient(app, "http://evil.example") as client:
        assert client.get("/v1/models").status_code == 400


def test_a_proxy_may_call_the_server_by_names_that_were_given() -> None:
    app = make_app([tiny()], Settings(page=False, host_names=("Photos.example.org",)))
    statuses = {}
    for host in (
        "photos.example.org:8443",
        "photos.example.org.",
        "evil.example",
        "127.0.0.1:8000",
        "[::1]:80",
        "[",
        "",
    ):
        with client_of(app, Host=host) as client:
            statuses[host] = client.get("/v1/models").status_code
            assert client.get("/healthz").status_code == 200
            if host == "evil.example":
                assert "--host-name NAME" in detail(client.get("/v1/models"))
    assert [*statuses.values()] == [200, 200, 400, 200, 200, 400, 400]
    for name in ("https://photos.example.org", "photos.example.org:443", "*", ""):
        with pytest.raises(hysm.InputError, match="is no host name"):
            Settings(host_names=(name,))


@pytest.mark.parametrize("before", ["", "/see"], ids=["taken off", "left"])
def test_a_proxy_may_put_the_server_under_a_path(before: str) -> None:
    settings = Settings("0.0.0.0", token=TOKEN, page=False, root_path="/see")
    with client_of(make_app([tiny()], settings)) as client:
        assert client.get(f"{before}/healthz").status_code == 200
        form = client.get(f"{before}/docs", headers={"Accept": "text/html"})
        assert 'action="/see/login"' in form.text
        right = client.post(f"{before}/login", data={"token": TOKEN}, follow_redirects=False)
        assert right.headers["location"] == "/see/"
        assert "Path=/see;" in right.headers["set-cookie"]
        client.headers["Authorization"] = f"Bearer {TOKEN}"  # the cookie is for /see
        assert client.get(f"{before}/", follow_redirects=False).headers["location"] == "/see/docs"
        docs = client.get(f"{before}/docs").text
        assert "/see/openapi.json" in docs
        assert "/see/static-offline-docs/" in docs
        assert client.get(f"{before}/static-offline-docs/swagger-ui.css").status_code == 200
        assert client.get(f"{before}/openapi.json").json()["servers"] == [{"url": "/see"}]
        assert send(client, f"{before}/v1/explain").status_code == 200
        assert client.get("/see", follow_redirects=False).headers["location"] == "/see/"
        assert 'path="/v1/explain"' in client.get(f"{before}/metrics").text


def test_a_root_path_that_is_none_is_refused() -> None:
    for path in ("see", "/see/", "/", "//evil.example", "/a b", "https://a.example/see"):
        with pytest.raises(hysm.InputError, match="must begin with a slash"):
            Settings(root_path=path)


@pytest.mark.parametrize("page", [True, False])
def test_the_api_answers_other_methods_beside_the_page_too(page: bool) -> None:
    if page:
        pytest.importorskip("gradio")
    with client_of(make_app([tiny()], Settings(page=page, root_path="/see"))) as client:
        for path in ("/", "/healthz", "/v1/models", "/metrics"):
            assert client.head(path).status_code == 200
        refused = client.get("/v1/explain")
        assert refused.status_code == 405
        assert refused.headers["allow"] == "POST"
        assert detail(refused) == "/v1/explain takes POST, not GET."
        assert client.delete("/v1/models").headers["allow"] == "GET, HEAD"
        unknown = client.get("/v1/nothing")
        assert unknown.status_code == 404
        assert detail(unknown) == "There is nothing here."
        if page:
            assert '"root":"http://127.0.0.1/see"' in client.get("/").text


def test_every_answer_forbids_to_load_from_elsewhere(client: TestClient) -> None:
    headers = client.get("/healthz").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


# -- networks


def test_an_allowed_network_is_loaded_when_it_is_first_asked_for() -> None:
    FACTORY_CALLS.clear()
    name = f"{__name__}:not_loaded"
    with client_of(make_app([tiny()], Settings(page=False, allowed=(name,)))) as client:
        listed = client.get("/v1/models").json()["models"][1]
        assert listed == {"name": name, "loaded": False, "classes": None, "input": None}
        assert FACTORY_CALLS == []
        for _ in range(2):
            assert send(client, params={"model": name}).json()["provenance"]["model"] == name
        assert FACTORY_CALLS == ["called"]
        assert client.get("/v1/models").json()["models"][1]["loaded"] is True


def test_500_where_an_allowed_network_cannot_be_loaded() -> None:
    with client_of(make_app([tiny()], Settings(page=False, allowed=("math:where",)))) as client:
        answer = send(client, params={"model": "math:where"})
        assert answer.status_code == 500
        assert "can't be imported" in detail(answer)
        assert send(client).status_code == 200


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eficientnet-lite0", "did you mean efficientnet-lite0"),
        ("torchvision:resnet5", "did you mean torchvision:resnet"),
        ("no/such.onnx", "no model file"),
        ("no.such:where", "no module 'no.such'"),
    ],
)
def test_an_allowed_network_that_cannot_be_is_told_at_the_start(name: str, said: str) -> None:
    with pytest.raises(hysm.ModelError, match=said):
        make_app([tiny()], Settings(page=False, allowed=(name,)))


def test_networks_of_one_name_or_without_preprocessing_are_refused() -> None:
    with pytest.raises(hysm.InputError, match="each of its own name"):
        Service([tiny(), tiny()])
    with pytest.raises(hysm.InputError, match="one network or more"):
        Service([])
    with pytest.raises(hysm.ModelError, match="is not known"):
        Service([hysm.Network("bare", tiny().module)])


# -- the worker


def test_requests_that_come_together_are_explained_together() -> None:
    sizes: list[int] = []
    network = tiny()
    network.module.register_forward_pre_hook(
        lambda _, inputs: (sizes.append(len(inputs[0])), time.sleep(0.2))[:0] or None
    )

    async def ask(service: Service) -> list[int | None]:
        photos = [picture(40 + i) for i in range(6)]
        asked = [Question(photo, target=i % 4) for i, photo in enumerate(photos)]
        return await asyncio.gather(
            *(service.explain(one, lambda found, _: found[0].target[0]) for one in asked)
        )

    service = Service([network], limits=Limits(batch=4))
    try:
        assert asyncio.run(ask(service)) == [0, 1, 2, 3, 0, 1]
    finally:
        service.close()
    assert max(sizes) == 4
    assert sum(sizes) == 6


def test_explained_together_is_as_alone() -> None:
    network = hysm.load_model()
    photos = {name: hysm.sample_photo(name).read_bytes() for name in ("cat", "coffee", "rocket")}

    async def ask(service: Service) -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(
                service.explain(Question(data, name), lambda found, _: found[0].to_dict())
                for name, data in photos.items()
            )
        )

    service = Service([network])
    try:
        together = asyncio.run(ask(service))
    finally:
        service.close()
    for told, (name, data) in zip(together, photos.items(), strict=True):
        alone = hysm.explain(network, data).to_dict()
        assert told["image"]["name"] == name
        assert told["target"]["index"] == alone["target"]["index"]
        assert told["coverage"] == pytest.approx(alone["coverage"], rel=1e-3)
        spots = [tuple(point[:2]) for point in told["points"][:50]]
        others = {tuple(point[:2]) for point in alone["points"][:60]}
        assert len(others & set(spots)) >= 45


def test_a_job_lets_only_so_many_others_pass() -> None:
    order: list[str] = []

    def note(given: Any) -> Any:
        order.extend(given)
        return given

    worker = Worker(queue=99, batch=3)
    gate = threading.Event()
    worker.submit(lambda given: (gate.wait(), given)[1], None, seconds=99)
    names = ["a", "other", *["a"] * 9]
    futures = [
        worker.submit(note, name, key=name if name == "a" else None, seconds=99) for name in names
    ]
    gate.set()
    for future in futures:
        future.result(60)
    worker.close()
    assert sorted(order) == sorted(names)
    assert order.index("other") == 3


def test_one_bad_request_does_not_hurt_those_beside_it() -> None:
    def work(given: Any) -> list[int]:
        if 0 in given:
            raise ZeroDivisionError
        return [10 // one for one in given]

    worker = Worker(queue=8, batch=8)
    gate = threading.Event()
    worker.submit(lambda given: (gate.wait(), given)[1], None, seconds=99)
    futures = [worker.submit(work, one, key="k", seconds=99) for one in (1, 0, 5)]
    gate.set()
    assert futures[0].result(60) == 10
    assert futures[2].result(60) == 2
    with pytest.raises(ZeroDivisionError):
        futures[1].result(60)
    worker.close()


def test_closing_waits_only_a_moment_for_a_long_job() -> None:
    worker, ends = Worker(queue=4, batch=1), threading.Event()
    running = worker.submit(lambda given: [ends.wait(60)], None, seconds=60)
    while not running.running():
        time.sleep(0.01)
    begun = time.monotonic()
    worker.close()
    try:
        assert time.monotonic() - begun < 20
    finally:
        ends.set()


def test_one_slow_network_lets_others_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its jobs, nor what is loaded for a first one, tell how long those of another take."""
    monkeypatch.setattr(
        "howyouseeme.web.worker._give_back", lambda: None
    )  # which takes longer here
    worker = Worker(queue=9, batch=1)

    def take(seconds: float) -> Callable[[Sequence[None]], Sequence[None]]:
        return lambda given: (time.sleep(seconds), given)[1]

    worker.submit(take(0.5), None, kind="first", seconds=9).result(9)
    many = [worker.submit(take(0), None, kind="first", seconds=3) for _ in range(4)]
    for _ in range(4):
        worker.submit(take(0.6), None, kind="slow", seconds=9).result(9)
    many += [worker.submit(take(0), None, kind="fast", seconds=3) for _ in range(5)]
    for future in many:
        future.result(9)
    worker.submit(take(0.6), None, kind="slow", seconds=9)
    held = [worker.submit(take(0.6), None, kind="slow", seconds=9) for _ in range(4)]
    with pytest.raises(BusyError):  # these are what takes time
        worker.submit(take(0), None, kind="fast", seconds=3)
    for future in held:
        future.cancel()
    worker.close()


def test_the_worker_keeps_nothing_of_what_it_was_asked() -> None:
    service = Service([tiny()])

    async def ask() -> None:
        question = Question(picture(), target="cat", versus="dog")
        await service.explain(question, lambda found, _: found[0].label)

    try:
        asyncio.run(ask())
        deadline = time.monotonic() + 30
        while not service.worker._each and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(service.worker._each) == {"tiny"}
    finally:
        service.worker.close()


def test_the_worker_runs_nothing_that_nobody_waits_for() -> None:
    ran = []
    worker = Worker(queue=3, batch=1)
    gate = threading.Event()
    first = worker.submit(lambda given: (gate.wait(), given)[1], None, seconds=99)
    while worker.waiting:
        time.sleep(0.01)
    cancelled = worker.submit(lambda given: ran.append(given) or [None], "cancelled", seconds=99)
    late = worker.submit(lambda given: ran.append(given) or [None], "late", seconds=0.0)
    wanted = worker.submit(lambda given: ran.append(given) or [None], "wanted", seconds=99)
    with pytest.raises(BusyError) as busy:
        worker.submit(lambda given: given, None, seconds=99)
    assert busy.value.seconds >= 1
    cancelled.cancel()
    time.sleep(0.05)
    gate.set()
    first.result(60)
    with pytest.raises(BusyError):
        late.result(60)
    wanted.result(60)
    assert ran == [["wanted"]]
    worker.close()
    with pytest.raises(BusyError):
        worker.submit(lambda given: given, None, seconds=99)


def test_a_request_that_is_given_up_is_not_worked_on() -> None:
    service = Service([tiny()], limits=Limits(seconds=20))
    ran: list[str] = []

    async def give_up() -> None:
        gate = threading.Event()
        first = asyncio.create_task(service.do(gate.wait))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(service.do(lambda: ran.append("second")))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        await first
        await service.do(lambda: ran.append("third"))

    asyncio.run(give_up())
    service.close()
    assert ran == ["third"]


def test_health_tells_of_a_worker_that_has_ended(app: FastAPI) -> None:
    with client_of(app) as client:
        app.state.service.close()
        answer = client.get("/healthz")
    assert answer.status_code == 503
    assert "has ended" in detail(answer)


def test_408_for_a_request_that_never_arrives() -> None:
    limits = Limits(seconds=0.5)
    served = running([tiny()], Settings(port=0, page=False, limits=limits))
    with served as port, socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(
            b"POST /v1/explain HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        line.settimeout(10)
        assert b" 408 " in line.recv(4096).splitlines()[0]


# -- starting it


class running:  # noqa: N801 - used as a with statement
    """A server in a thread, at a port of its own."""

    def __init__(self, networks: list[hysm.Network], settings: Settings) -> None:
        import uvicorn  # noqa: PLC0415

        self._socket = socket.create_server(("127.0.0.1", settings.port))
        config = uvicorn.Config(make_app(networks, settings), log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )

    def __enter__(self) -> int:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)


def test_the_command_refuses_a_wide_host_without_a_token() -> None:
    found = CliRunner().invoke(main, ["serve", "--host", "0.0.0.0"], env={"HOWYOUSEEME_TOKEN": ""})
    assert found.exit_code == 2
    assert "give a token" in found.stderr


def test_a_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(hysm.InputError, match=f"127.0.0.1:{port} can't be listened on"):
            serve([tiny()], Settings(port=port, page=False))


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(hysm.MissingExtraError, match=r"pip install 'howyouseeme\[serve\]'"):
        serve([tiny()], Settings(page=False))


def test_the_command_serves_and_ends_when_it_is_interrupted() -> None:
    """Who waits for a while, as one does who is told that it is busy, finds the connection open."""
    code = "from howyouseeme.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--no-page", "--access-log"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            assert run.stdout is not None
            line = run.stdout.readline()
            assert line.startswith("howyouseeme is at http://127.0.0.1:")
            connection = http.client.HTTPConnection("127.0.0.1", int(line.split()[3].split(":")[2]))
            held: list[Any] = []
            for wait in (0, 6):  # uvicorn's own patience is 5 s
                time.sleep(wait)
                connection.request("GET", "/healthz")
                assert connection.getresponse().read()
                held.append(connection.sock)
            assert held[0] is held[1] is not None
            connection.close()
        finally:
            run.send_signal(2)
        output, errors = run.communicate(timeout=60)
    assert "Traceback" not in errors
    assert "GET /healthz" in output


def test_what_would_hardly_be_done_in_time_is_refused_at_once() -> None:
    worker = Worker(queue=100, batch=1)

    def sleep(given: Any) -> Any:
        time.sleep(0.2)
        return given

    for _ in range(8):
        worker.submit(sleep, None, seconds=30).result(30)
    accepted: list[Any] = []
    with contextlib.suppress(BusyError):
        for _ in range(50):
            accepted.append(worker.submit(sleep, None, seconds=4))
    assert 1 <= len(accepted) < 30
    for future in accepted:
        future.result(30)  # none is late
    worker.close()


def test_memory_of_what_was_explained_is_given_back() -> None:
    """Passes refer to themselves: each is collected before the next batch is done."""
    live: list[Any] = []

    class Held:
        def __init__(self) -> None:
            self.itself = self
            live.append(weakref.ref(self))

    worker = Worker(queue=8, batch=1)
    for _ in range(3):
        worker.submit(lambda given: [Held() and None], None, seconds=99).result(60)
    worker.close()
    assert [one() for one in live] == [None] * 3


def test_no_pass_outlives_its_answer(client: TestClient) -> None:
    def alive() -> list[Any]:
        return [one for one in gc.get_objects() if type(one) in {Tape, Explanation}]

    before = set(map(id, alive()))
    answers = ("explain", "explain?target=dog", "explain?target=top3", "detect", "propose")
    failures = ("explain?target=cart", "explain?target=top9")
    for _ in range(3):
        for path in (*answers, *failures):
            assert send(client, f"/v1/{path}").status_code == (422 if path in failures else 200)
    until = time.monotonic() + 5  # the last answer is there before its worker has tidied up
    while (left := [one for one in alive() if id(one) not in before]) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []


def test_the_shelf_holds_so_many_bytes() -> None:
    shelf = Shelf(100)
    for name in "abcd":
        shelf.put(name, name, 30)
    assert [shelf.get(name) for name in "abcd"] == [None, "b", "c", "d"]
    shelf.get("b")
    shelf.put("d", "d once more", 40)  # in the place of the other, and c is what nobody asks for
    shelf.put("e", "e", 30)
    assert [shelf.get(name) for name in "bcde"] == ["b", None, "d once more", "e"]
    shelf.put("f", "f", 1000)
    assert [shelf.get(name) for name in "bdef"] == [None, None, None, "f"]
    shelf.put("g", "g", 100)
    assert [shelf.get(name) for name in "fg"] == [None, "g"]


@pytest.mark.parametrize("side", [100, 1500])
def test_a_scene_tells_what_it_holds(side: int) -> None:
    pytest.importorskip("matplotlib")
    explainer = hysm.Explainer(hysm.load_model())
    first = explainer(Image.open(io.BytesIO(CAT)).resize((side, side)))
    scene = make_scene(first, [first])
    del first
    scene.picture(layers=True)
    scene.archive()
    assert scene.size == pytest.approx(held(scene), rel=0.3)


def held(thing: Any) -> int:
    """The bytes of tensors, arrays, pictures and texts that can be reached, networks aside."""
    total, waiting, seen = 0, [thing], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            one = one.untyped_storage()
        key = one._cdata if isinstance(one, torch.UntypedStorage) else id(one)
        if key in seen or isinstance(one, (type, hysm.Network, hysm.Explainer)):
            continue
        seen.add(key)
        if isinstance(one, (torch.UntypedStorage, np.ndarray)):
            total += one.nbytes() if isinstance(one, torch.UntypedStorage) else one.nbytes
        elif isinstance(one, Image.Image):
            total += 4 * one.width * one.height
        elif isinstance(one, (str, bytes)):
            total += len(one)
        elif not callable(one) or hasattr(
            one, "func"
        ):  # the walk that can be done again is a partial
            waiting += gc.get_referents(one)
    return total


def test_a_scene_leaves_padding_out() -> None:
    """Of a wide photo in a square input, most of whose rows are padding."""
    network = hysm.load_model("efficientnet-lite0")
    prepare = replace(network.photo_input, resize="fit", crop_from=None)
    photo = hysm.load_image(hysm.sample_photo("rocket"))
    wide = photo.crop((0, 0, photo.width, photo.height // 3))
    explanation = hysm.explain(network, wide, preprocess=prepare)
    assert not torch.equal(explanation.inside, explanation.evidence)
    scene = make_scene(explanation, [explanation])
    assert scene.total == pytest.approx(float(explanation.inside.clamp(min=0).sum()), rel=1e-5)
    for stage, layer in zip(scene.drawn["stages"], scene.stages.values(), strict=True):
        assert len(stage["nodes"]) <= len(layer.nodes)
        shares = {(node.channel, round(node.share, 5)) for node in layer.nodes}
        assert all((channel, share) in shares for _, _, channel, share in stage["nodes"])
    assert scene.numbers() == as_json(explanation)


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_a_limit_lets_something_through(name: str) -> None:
    with pytest.raises(hysm.InputError, match=f"{name}=0 lets nothing through"):
        Limits(**{name: 0})
