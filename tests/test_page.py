"""The page, end to end, in a real browser without a screen.

`HOWYOUSEEME_SCREENSHOTS=docs/images/serve pytest tests/test_page.py` makes the pictures of the docs.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import networks
import numpy as np
import pytest
from PIL import Image

import howyouseeme as hysm

pytest.importorskip("gradio", reason="pip install 'howyouseeme[serve]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium (apt-get install chromium)", allow_module_level=True)

TESTS = Path(__file__).parent
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A camera that shows a green pie, and nobody who must be asked.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PATIENCE = 60_000  # milliseconds: the machine may be busy
ROCKET = "drilling platform"  # what the network takes it for
READY = ".hysm[aria-busy=false] canvas.view"


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    """A server with two networks, in a process of its own."""
    networks.squeezenet()  # skips where it can't be had
    paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    code = "from howyouseeme.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0"]
    command += ["--model", "efficientnet-lite0", "--model", "serving:squeezenet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        line = run.stdout.readline()
        assert line.startswith("howyouseeme is at "), line
        yield line.split()[3]
        run.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """Somebody who has opened the page, and what went wrong meanwhile."""

    def __init__(self, browser: Any, home: str, width: int = 1280, height: int = 940) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, home))
        self.page.goto(home)
        self.page.wait_for_selector(READY)

    def _check(self, url: str, home: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            self.wrong.append(f"asked for {url}")

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.wrong == []

    def part(self, name: str) -> Any:
        return self.page.locator(f"#viewer [data-part={name}]")

    @property
    def view(self) -> Any:
        return self.page.locator("#viewer canvas.view").first

    def pixels(self, number: int = 0) -> np.ndarray:
        """What the viewer shows, as seen."""
        data = self.page.locator("#viewer canvas.view").nth(number).screenshot()
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"), dtype=float)

    def label(self) -> str:
        return self.page.locator("#viewer .head strong").first.inner_text()

    def wait_for_label(self, text: str) -> None:
        self.page.locator("#viewer .head strong", has_text=text).first.wait_for()
        self.page.wait_for_selector(READY)

    def upload(self, file: Path) -> None:
        button = self.page.locator("#photo button[aria-label='Remove Image']")
        if button.count():
            button.first.click()
        self.page.locator("#photo input[type=file]").set_input_files(file)

    def copy(self, photo: bytes) -> None:
        """Put a photo on the clipboard, as a PNG, which is what browsers keep there."""
        with Image.open(io.BytesIO(photo)) as image:
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page.evaluate(
            """async (url) => {
                const photo = await (await fetch(url)).blob();
                await navigator.clipboard.write([new ClipboardItem({"image/png": photo})]);
            }""",
            "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A spot of the photo, in shares of it, in pixels of the window."""
        self.view.scroll_into_view_if_needed()
        box = self.view.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def saved(self, name: str) -> bytes:
        with self.page.expect_download() as saving:
            self.page.locator(".saving:visible").get_by_text(name, exact=True).first.click()
        return Path(saving.value.path()).read_bytes()

    def shoot(self, name: str, whole: bool = False) -> None:
        """Keep a picture for the docs, where it is asked for."""
        folder = os.environ.get("HOWYOUSEEME_SCREENSHOTS")
        if not folder:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(600)
        with Image.open(io.BytesIO(self.page.screenshot(full_page=whole))) as image:
            image.convert("RGB").save(Path(folder, f"{name}.jpg"), quality=80, optimize=True)


def changed(before: np.ndarray, after: np.ndarray) -> bool:
    return before.shape != after.shape or bool(np.abs(before - after).mean() > 1)


def test_it_opens_on_a_photo_that_is_explained(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        assert visitor.label() == "Egyptian cat"
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert visitor.page.evaluate(wide) <= 0
        assert visitor.part("points").get_attribute("aria-pressed") == "true"
        visitor.shoot("page")


def test_a_choice_is_no_surer_than_the_network() -> None:
    from howyouseeme.web.page.photo import _choice  # noqa: PLC0415

    assert _choice("tabby", 0.99996) == "tabby · >99.9 %"
    assert _choice("tabby", 0.5) == "tabby · 50.0 %"
    assert _choice("tabby", None) == "tabby"


def test_what_is_shown_can_be_switched(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        seen = [visitor.pixels()]
        for name in ("points", "attention", "saliency", "boxes"):
            visitor.part(name).click()
            seen.append(visitor.pixels())
            assert changed(seen[-2], seen[-1]), name
        visitor.shoot("saliency-boxes")


def test_upload_choose_unroll_click_save(browser: Any, home: str, tmp_path: Path) -> None:
    with Visitor(browser, home) as visitor:
        own = tmp_path / "own.jpg"
        with Image.open(hysm.sample_photo("rocket")) as image:
            image.crop((0, 0, image.width, image.height - 10)).save(own)
        visitor.upload(own)
        visitor.wait_for_label(ROCKET)

        second = visitor.page.locator("#class label").nth(1)
        name = second.inner_text().split(" · ")[0]
        second.click()
        visitor.wait_for_label(name)

        end = int(visitor.part("slider").get_attribute("max"))
        seen = [visitor.pixels()]
        for stage in (0, end // 2, end - 1):
            visitor.part("slider").fill(str(stage))
            seen.append(visitor.pixels())
            assert changed(seen[-2], seen[-1]), stage
        assert f"Stage {end - 1} of {end - 1}" in visitor.part("caption").inner_text()
        visitor.part("slider").fill("0")
        visitor.part("play").click()
        visitor.page.wait_for_function(
            "document.querySelector('#viewer [data-part=slider]').value === "
            "document.querySelector('#viewer [data-part=slider]').max"
        )

        told = json.loads(visitor.saved("Numbers"))
        schema = (files("howyouseeme") / "data" / "explanation.schema.json").read_text()
        jsonschema.validate(told, json.loads(schema))
        assert told["target"]["label"] == name
        y, x, _ = told["points"][0]
        height, width = told["image"]["size"]
        visitor.page.mouse.click(*visitor.at((x + 0.5) / width, (y + 0.5) / height))
        visitor.page.wait_for_selector("#viewer table.path")
        rows = visitor.page.locator("#viewer table.path tbody tr").all_inner_texts()
        assert len(rows) > 10
        assert rows[-1].startswith("pixels")

        with Image.open(io.BytesIO(visitor.saved("Picture"))) as image:
            assert image.format == "PNG"
        with Image.open(io.BytesIO(visitor.saved("This view"))) as image:
            assert image.format == "PNG"
        with zipfile.ZipFile(io.BytesIO(visitor.saved("All (ZIP)"))) as file:
            assert file.testzip() is None
            assert {"explanation.json", "attention.png", "stages.json"} <= set(file.namelist())


def test_a_photo_is_taken_with_the_camera(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        visitor.context.grant_permissions(["camera"])
        visitor.page.get_by_label("Remove Image").click()
        photo = visitor.page.locator("#photo")
        photo.get_by_label("Capture from camera").click()
        photo.get_by_text("Click to Access Webcam").click()
        visitor.page.wait_for_function("document.querySelector('#photo video').videoWidth > 0")
        photo.get_by_label("capture photo").click()
        visitor.page.wait_for_function(
            "document.querySelector('#viewer .head strong').textContent !== 'Egyptian cat'"
        )
        visitor.page.wait_for_selector(READY)
        visitor.part("points").click()
        visitor.part("attention").click()
        red, green, blue = visitor.pixels().mean((0, 1))
        assert green > 2 * max(red, blue)  # the pie, and no other photo


def test_a_photo_is_pasted_with_the_button(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        visitor.copy(hysm.sample_photo("rocket").read_bytes())
        visitor.page.locator("#photo").get_by_label("Paste from clipboard").click()
        visitor.wait_for_label(ROCKET)


def test_a_photo_is_pasted_with_the_keys(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        visitor.copy(hysm.sample_photo("rocket").read_bytes())
        visitor.view.press("Control+v")
        visitor.wait_for_label(ROCKET)
        # Also where the camera is in the place of the photo.
        visitor.page.get_by_label("Remove Image").click()
        visitor.page.locator("#photo").get_by_label("Capture from camera").click()
        visitor.page.locator("#photo").get_by_text("Click to Access Webcam").wait_for()
        visitor.copy(hysm.sample_photo("coffee").read_bytes())
        visitor.page.locator("body").press("Control+v")
        visitor.wait_for_label("espresso")


def test_pictures_of_the_way_back(browser: Any, home: str) -> None:
    with Visitor(browser, home, height=1060) as visitor:
        visitor.part("slider").fill("8")
        visitor.shoot("unroll")
        visitor.view.focus()
        visitor.page.keyboard.press("ArrowRight")
        visitor.page.wait_for_selector("#viewer table.path")
        visitor.shoot("path", whole=True)


def test_any_other_class_by_name(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        box = visitor.page.locator("#other-class input")
        box.click()
        box.press_sequentially("golden retriever")
        visitor.page.get_by_role("option", name="golden retriever").click()
        visitor.wait_for_label("golden retriever")


def test_which_classes_look_at_a_region(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        visitor.page.mouse.move(*visitor.at(0.28, 0.2))
        visitor.page.mouse.down()
        visitor.page.mouse.move(*visitor.at(0.5, 0.55), steps=4)
        visitor.page.mouse.up()
        rows = visitor.page.locator("#viewer .bars li")
        assert rows.count() == 5
        shares = [float(text.split()[0]) for text in rows.locator(".number").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
        assert 5 < shares[0] < 100
        visitor.shoot("region", whole=True)


def test_with_the_keyboard_alone(browser: Any, home: str) -> None:
    with Visitor(browser, home) as visitor:
        visitor.view.focus()
        press = visitor.page.keyboard.press
        press("ArrowRight")
        visitor.page.wait_for_selector("#viewer table.path")
        press("r")
        before = visitor.page.locator("#viewer .bars .number").first.inner_text()
        for _ in range(8):
            press("ArrowDown")
        assert visitor.page.locator("#viewer .bars .number").first.inner_text() != before
        press("Escape")
        assert visitor.page.locator("#viewer .bars, #viewer table.path").count() == 0
        visitor.part("slider").focus()
        press("ArrowLeft")
        assert "conv_stem" in visitor.part("caption").inner_text()


def test_two_classes_and_two_networks_side_by_side(browser: Any, home: str) -> None:
    with Visitor(browser, home, height=1000) as visitor:
        visitor.page.locator("#beside button").first.click()
        visitor.page.locator("#second-network input").click()
        visitor.page.get_by_role("option", name="squeezenet").click()
        visitor.page.locator("#viewer .pane").nth(1).wait_for()
        models = visitor.page.locator("#viewer .head .model").all_inner_texts()
        assert models == ["efficientnet-lite0", "squeezenet"]
        assert changed(visitor.pixels(0), visitor.pixels(1))
        visitor.shoot("side-by-side", whole=True)
        visitor.part("slider").fill("6")
        told = "document.querySelector('#second-class input').value !== ''"
        visitor.page.wait_for_function(told)  # a choice before that would be lost
        visitor.page.locator("#second-class input").click()
        visitor.page.keyboard.press("Control+a")
        visitor.page.keyboard.type("tiger cat")
        visitor.page.get_by_role("option", name="tiger cat").click()
        visitor.page.locator("#viewer .head strong", has_text="tiger cat").wait_for()
        visitor.page.locator("#alone").click()
        visitor.page.wait_for_function("document.querySelectorAll('#viewer .pane').length === 1")


def test_a_failure_is_a_sentence_and_the_page_lives_on(
    browser: Any, home: str, tmp_path: Path
) -> None:
    with Visitor(browser, home) as visitor:
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(hysm.sample_photo("cat").read_bytes()[:4000])
        visitor.upload(broken)
        said = visitor.part("said")
        said.wait_for()
        assert "damaged or cut short" in said.inner_text()
        assert visitor.label() == "Egyptian cat"
        visitor.shoot("failure")
        visitor.page.locator("#coffee").click()
        visitor.wait_for_label("espresso")
        assert said.is_hidden()


def test_two_visitors_at_once(home: str) -> None:
    def visit(sample: str) -> str:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            with Visitor(browser, home) as visitor:
                visitor.page.locator(f"#{sample}").click()
                visitor.page.wait_for_function(
                    "document.querySelector('#viewer .head strong').textContent !== 'Egyptian cat'"
                )
                label = visitor.label()
                visitor.view.focus()
                visitor.page.keyboard.press("ArrowRight")
                visitor.page.wait_for_selector("#viewer table.path")
            browser.close()
            return label

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(visit, ["coffee", "rocket"])) == ["espresso", ROCKET]


def test_on_a_phone(browser: Any, home: str) -> None:
    with Visitor(browser, home, width=390, height=844) as visitor:
        # Wider than the window, and it would have to be pushed about.
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert visitor.page.evaluate(wide) <= 0
        assert visitor.view.bounding_box()["width"] > 300
        visitor.shoot("phone", whole=True)


def test_a_target_is_followed_through_a_video(browser: Any, home: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from howyouseeme.video import VideoWriter  # noqa: PLC0415

    cat = np.asarray(Image.open(hysm.sample_photo("cat")).resize((150, 100)))
    with VideoWriter(tmp_path / "walk.mp4", 10) as writer:
        for step in range(12):
            frame = np.full((240, 360, 3), 96, dtype=np.uint8)
            frame[:, ::24] = 140
            frame[70:170, 20 + 12 * step : 170 + 12 * step] = cat
            writer.write(frame)
    with Visitor(browser, home) as visitor:
        visitor.page.get_by_role("tab", name="Video").click()
        visitor.page.locator("#clip input[type=file]").set_input_files(tmp_path / "walk.mp4")
        canvas = visitor.page.locator("#picker canvas")
        canvas.wait_for()
        box = canvas.bounding_box()
        across, down = box["width"] / 360, box["height"] / 240
        visitor.page.mouse.move(box["x"] + 20 * across, box["y"] + 70 * down)
        visitor.page.mouse.down()
        visitor.page.mouse.move(box["x"] + 170 * across, box["y"] + 170 * down, steps=4)
        visitor.page.mouse.up()
        text = visitor.page.locator("#video-box input, #video-box textarea")
        sync_api.expect(text).to_have_value("20, 70, 170, 170", timeout=PATIENCE)
        visitor.page.locator("#follow").click()
        visitor.page.wait_for_selector("#tracked video")
        assert "of 12 frames" in visitor.page.locator("#track-said").inner_text()
        rows = visitor.saved("Table (CSV)").decode().splitlines()
        assert len(rows) == 13
        assert float(rows[-1].split(",")[4]) > 60  # it has moved to the right
        visitor.shoot("video", whole=True)


def test_each_frame_of_a_video_is_explained(browser: Any, home: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from howyouseeme.video import VideoWriter  # noqa: PLC0415

    photo = Image.open(hysm.sample_photo("cat")).resize((450, 300))
    with VideoWriter(tmp_path / "walk.mp4", 10) as writer:
        for step in range(3):
            writer.write(np.asarray(photo.crop((30 * step, 20, 30 * step + 360, 260))))
    with Visitor(browser, home) as visitor:
        visitor.page.get_by_role("tab", name="Video").click()
        visitor.page.locator("#clip input[type=file]").set_input_files(tmp_path / "walk.mp4")
        visitor.page.locator("#picker canvas").wait_for()
        visitor.page.locator("#watch").click()
        visitor.page.wait_for_selector("#tracked video")
        said = visitor.page.locator("#track-said").inner_text()
        assert "Explained 3 of 3 frames: " in said
        rows = visitor.saved("Table (CSV)").decode().splitlines()
        assert len(rows) == 4
        assert rows[1].split(",")[2] in said
        visitor.shoot("watch", whole=True)


def test_what_is_no_video_is_told(browser: Any, home: str, tmp_path: Path) -> None:
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    with Visitor(browser, home) as visitor:
        visitor.page.get_by_role("tab", name="Video").click()
        visitor.page.locator("#clip input[type=file]").set_input_files(playlist)
        visitor.page.locator("#track-said .said").wait_for()
        assert "no video that can be read" in visitor.page.locator("#track-said").inner_text()


def test_no_file_of_the_server_can_be_had(home: str, tmp_path: Path) -> None:
    import httpx  # noqa: PLC0415

    secret = tmp_path / "secret.jpg"
    shutil.copy(hysm.sample_photo("coffee"), secret)
    with httpx.Client(base_url=home, timeout=60) as client:
        for path in (
            f"/gradio_api/file={secret}",
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=..%2f..%2fetc%2fpasswd",
            "/gradio_api/file=http://127.0.0.1/",
            "/gradio_api/proxy=http://127.0.0.1/",
            "/static/..%2f..%2froutes.py",
            "/assets/..%2f..%2f..%2froutes.py",
            "/gradio_api/info",
            "/gradio_api/vibe-code/",
            "/monitoring",
        ):
            assert client.get(path).status_code in {403, 404, 405}, path
        # Nor by naming one, or an address, as if it had been uploaded.
        marked = {"meta": {"_type": "gradio.FileData"}}
        named = [{"path": str(secret)}, {"path": f"{home}/healthz"}, {"path": "conftest.py"}]
        asked = 0
        for call in client.get("/config").json()["dependencies"]:
            for given in [one | more for one in named for more in (marked, {})]:
                count = len(call["inputs"])
                for data in ([given] * count, [given, *[None] * (count - 1)]) if count else ():
                    asked += 1
                    told = called(client, call, data, f"visitor{asked}")
                    assert '"success":false' in told, (call["id"], given)
                    assert "espresso" not in told
        assert asked > 40


def called(client: Any, call: Any, data: list[Any], session: str) -> str:
    """What the page tells when one of its functions is called."""
    asked = {"data": data, "fn_index": call["id"], "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
    told = ""
    with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line:
                break
    return told
