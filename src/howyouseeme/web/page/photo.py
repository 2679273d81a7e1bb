"""The tab that explains a photo."""

from __future__ import annotations

import hashlib
import secrets
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from PIL import Image
from starlette.concurrency import run_in_threadpool

from ...draw import percent
from ...errors import HowYouSeeMeError, ImageError, InputError
from ...explainer import Explainer
from ...explanation import Explanation
from ...images import sample_photo
from ..scene import Scene, make_scene, palette
from ..service import Service, TooLargeError, read_photo
from ..shelf import Shelf
from .parts import QUIET, gradient, kept, network_choice, response, sentence, template, text

__all__ = ["Photos"]

_SAMPLES = ("cat", "coffee", "rocket")
_LIKELIEST = 5
_SIDE = 1600  # a larger photo is made smaller: no network looks at more of it


class Photos:
    """Explains photos, and keeps what it has shown lately.

    >>> photos = Photos(service, Shelf(2**29))
    >>> photos.tab(["efficientnet-lite0"])             # among blocks of Gradio
    """

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self.service, self.shelf = service, shelf

    async def open(self) -> None:
        """Explain what the page opens on, so that nobody waits for it."""
        await self.scene(sample_photo(_SAMPLES[0]).read_bytes(), None, None)

    async def scene(self, photo: bytes, model: str | None, target: str | None) -> dict[str, Any]:
        """What the viewer shows of a photo: the answer of a network for a class, or the likeliest one.

        Errors are those of `Service.explain`.
        """
        name = self.service.check(model)
        key = self.shelf.key(hashlib.sha256(photo).digest(), name, target or "")
        scene: Scene | None = self.shelf.get(key)
        if scene is None:
            scene = await self.service.do(partial(self._make, photo, name, target or None))
            self.shelf.put(key, scene, scene.size)
        return {"key": key, **scene.drawn}

    def _make(self, data: bytes, model: str, target: str | None) -> Scene:
        photo = read_photo(data, self.service.limits)
        photo.thumbnail((_SIDE, _SIDE))
        ready = self.service.ready(model)
        explainer, classes = ready.explainer("evidence"), ready.network.classes
        likeliest = _top(explainer, photo, min(_LIKELIEST, len(classes)) if classes else 1)
        if target is None:
            return make_scene(likeliest[0], likeliest)
        index = ready.network.class_index(target)
        known = [one for one in likeliest if one.target[0] == index]
        return make_scene(known[0] if known else explainer(photo, index), likeliest)

    # -- what the viewer asks for later -------------------------------------------------------------

    def add_to(self, router: APIRouter) -> None:
        """The addresses of what the viewer asks for later."""

        @router.get("/{key}/path")
        async def path(key: str, point: int) -> dict[str, Any]:
            scene = kept(self.shelf, key, Scene)
            try:
                return await self.service.do(partial(scene.path, point))
            except IndexError:
                raise HTTPException(404, "There is no such point.") from None

        @router.get("/{key}/explanation.png")
        async def picture(key: str) -> Response:
            scene = kept(self.shelf, key, Scene)
            return response(await self.service.do(partial(scene.picture, True)), "image/png")

        @router.get("/{key}/explanation.json")
        async def numbers(key: str) -> Response:
            scene = kept(self.shelf, key, Scene)
            return response(await self.service.do(scene.numbers), "application/json")

        @router.get("/{key}/explanation.zip")
        async def archive(key: str) -> Response:
            scene = kept(self.shelf, key, Scene)
            return response(await self.service.do(scene.archive), "application/zip")

    # -- the tab ------------------------------------------------------------------------------------

    def tab(self, names: list[str]) -> dict[str, Any]:
        """The tab; returned is what the page is to do when it is opened."""
        with gr.Row(elem_id="photo-row"):
            with gr.Column(scale=1, min_width=290, elem_id="controls"):
                photo = gr.Image(
                    label="Photo",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    height=230,
                    buttons=[],
                    elem_id="photo",
                )
                with gr.Row(elem_id="samples"):
                    samples = [
                        gr.Button(name.capitalize(), size="sm", min_width=60, elem_id=name)
                        for name in _SAMPLES
                    ]
                network = network_choice(names, names[0], "network")
                target = gr.Radio([], label="Class", elem_id="class")
                # What is typed is a class's name too, or an error that says which names are close.
                other = gr.Dropdown(
                    [],
                    label="Any other class",
                    elem_id="other-class",
                    filterable=True,
                    allow_custom_value=True,
                )
                with gr.Accordion("Beside it, on the same photo", open=False, elem_id="beside"):
                    same = ("the same", "")
                    second = network_choice([same, *names], "", "second-network")
                    against = gr.Dropdown(
                        [],
                        label="Class",
                        elem_id="second-class",
                        filterable=True,
                        allow_custom_value=True,
                    )
                    alone = gr.Button("Only one again", size="sm", elem_id="alone")
            with gr.Column(scale=3, min_width=320, elem_id="stage"):
                viewer = template("viewer", elem_id="viewer", palette=gradient())
        inputs = [photo, network, target, other, second, against]
        outputs = [viewer, target, other, second, against]
        shown = {"outputs": outputs, "show_progress_on": viewer, **QUIET}

        async def on_photo(photo: Any, network: Any) -> Any:
            return await self._look(photo, network)

        async def on_class(
            photo: Any, network: Any, target: Any, _other: Any, second: Any, against: Any
        ) -> Any:
            return await self._look(photo, network, target, second, against)

        async def on_other(
            photo: Any, network: Any, _target: Any, other: Any, second: Any, against: Any
        ) -> Any:
            return await self._look(photo, network, other, second, against)

        async def on_beside(
            photo: Any, network: Any, target: Any, other: Any, second: Any, against: Any
        ) -> Any:
            return await self._look(photo, network, target or other, second, against)

        async def on_alone(photo: Any, network: Any, target: Any, other: Any, *_: Any) -> Any:
            return await self._look(photo, network, target or other)

        photo.input(on_photo, [photo, network], **shown)
        network.input(on_photo, [photo, network], **shown)
        target.input(on_class, inputs, **shown)
        other.input(on_other, inputs, **shown)
        second.input(on_beside, inputs, **shown)
        against.input(on_beside, inputs, **shown)
        alone.click(on_alone, inputs, **shown)
        for name, button in zip(_SAMPLES, samples, strict=True):

            async def on_sample(network: Any, name: str = name) -> Any:
                file = str(sample_photo(name))
                return [file, *await self._look(file, network)]

            button.click(
                on_sample,
                network,
                [photo, *outputs],
                show_progress_on=viewer,
                **QUIET,
            )

        async def on_open() -> Any:
            file = str(sample_photo(_SAMPLES[0]))
            return [file, *await self._look(file, names[0])]

        return {
            "fn": on_open,
            "outputs": [photo, *outputs],
            "show_progress_on": viewer,
            **QUIET,
        }

    async def _look(
        self,
        photo: Any,
        network: Any,
        target: Any = None,
        second: Any = None,
        against: Any = None,
    ) -> list[Any]:
        """Values for the viewer, the class among the likeliest, any other, and what is beside it."""
        if not photo:
            return [gr.skip()] * 5
        try:
            data = await run_in_threadpool(_bytes, photo, self.service.limits.upload)
            wanted = [(network, target)]
            if second or against:
                wanted.append((second or network, against))
            scenes = [await self.scene(data, text(model), text(index)) for model, index in wanted]
        except HowYouSeeMeError as error:
            return [_said(error), *[gr.skip()] * 4]
        first = scenes[0]
        likeliest = [
            (_choice(one["label"], one["probability"]), _value(one["index"]))
            for one in first["likeliest"]
        ]
        chosen = _value(first["index"])
        among = chosen in {index for _, index in likeliest}
        classes = self._classes(first["model"])
        beside = scenes[1] if len(scenes) > 1 else None
        return [
            {"scenes": scenes, "palette": palette()},
            gr.update(choices=likeliest, value=chosen if among else None),
            gr.update(choices=classes, value=None if among else chosen),
            gr.update(value=text(second) or ""),
            gr.update(
                choices=self._classes(beside["model"] if beside else first["model"]),
                value=_value(beside["index"]) if beside else None,
            ),
        ]

    def _classes(self, model: str) -> list[tuple[str, str]]:
        network = self.service.loaded(model)
        names = (network and network.classes) or ()
        return sorted((name, str(index)) for index, name in enumerate(names))


def _top(explainer: Explainer, photo: Image.Image, count: int) -> list[Explanation]:
    """Of the likeliest classes so many, or as many as the network does not leave out."""
    while True:
        try:
            return explainer.top(photo, count)
        except InputError:
            if count == 1:
                raise
            count -= 1


def _value(index: int | None) -> str:
    """A class as a choice; empty for the answer of a network that says no to its only class."""
    return "" if index is None else str(index)


def _bytes(path: Any, most: int) -> bytes:
    file = Path(str(path))
    if file.stat().st_size > most:
        raise TooLargeError(f"The photo is larger than {most / 2**20:.3g} MiB, the limit.")
    data = file.read_bytes()
    if not data:
        raise ImageError("The photo is empty; give a file that holds a picture.")
    return data


def _choice(label: str, probability: float | None) -> str:
    if probability is None:
        return label
    return f"{label} · {percent(probability).replace('%', ' %')}"  # as the viewer writes it


def _said(error: Exception) -> dict[str, Any]:
    # The number makes the same sentence a new one, which is told again.
    return {"said": sentence(error), "number": secrets.token_hex(4)}
