"""What the page and the API have in common: networks, each loaded once, and explaining in a queue."""

from __future__ import annotations

import asyncio
import io
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image

from .. import localize
from ..asking import targets_of
from ..errors import HowYouSeeMeError, ImageError, InputError
from ..explainer import Explainer
from ..explanation import Explanation
from ..images import load_image
from ..methods import METHODS
from ..models import Network, check_name, load_model
from ..propose import Proposals, Proposer
from . import Limits
from .worker import BusyError, LateError, Worker

__all__ = ["Model", "Question", "Service", "TooLargeError", "read_photo"]

T = TypeVar("T")

#: What is taken as a photo. Pillow knows more, but some of these start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

#: So many of the likeliest classes can be asked for at once.
MOST_CLASSES = 10

_LATEST = 5.0  # seconds more than its limit that a job may run before it is given up


class TooLargeError(HowYouSeeMeError):
    """A photo, video or request is larger than the server takes."""


class NotAllowedError(InputError):
    """The network isn't one of those that the server was started with."""


@dataclass(frozen=True)
class Question:
    """What to explain: a class by name or index, against another if wanted, so many of the likeliest ones, or the
    box of a number that a detector finds.

    >>> Question(photo, target="tabby"), Question(photo, top=3), Question(photo, versus="lynx")

    `photo` are the bytes of a file, `name` is how it was called.
    """

    photo: bytes
    name: str | None = None
    model: str | None = None
    method: str = "evidence"
    target: str | int | None = None
    top: int | None = None
    versus: str | int | None = None
    box: int | None = None


def read_photo(data: bytes, limits: Limits) -> Image.Image:
    """A photo from the bytes of a file, as RGB.

    >>> photo = read_photo(upload, Limits())

    Raises:
        TooLargeError: it has too many pixels.
        ImageError: it is none, or damaged.
    """
    if not data:
        raise ImageError("The photo is empty; give a file that holds a picture.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as head:
            width, height = head.size
    except Image.DecompressionBombError:
        raise TooLargeError(
            f"The photo has far more than {limits.pixels:,} pixels, the limit; make it smaller."
        ) from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ImageError(f"The photo can't be read; give one of {', '.join(FORMATS)}.") from error
    if width * height > limits.pixels:
        raise TooLargeError(
            f"The photo has {width} x {height} pixels, more than the limit of {limits.pixels:,}; "
            "make it smaller."
        )
    try:
        return load_image(data, max_pixels=limits.pixels)
    except ImageError as error:
        raise ImageError(str(error).replace("The given data", "The photo")) from error


class Model:
    """A network with all that was made to ask it."""

    def __init__(self, network: Network) -> None:
        _ = network.photo_input  # or an error: photos are all that it is asked about
        self.network = network
        self.proposer = Proposer(network)
        self._explainers: dict[str, Explainer] = {}

    def explainer(self, method: str) -> Explainer:
        if method not in self._explainers:
            self._explainers[method] = Explainer(self.network, method, together=True)
        return self._explainers[method]


class Service:
    """Networks, and a queue in front of them.

    >>> service = Service([load_model()])
    >>> png = await service.explain(Question(photo), lambda found, photo: draw(found[0]))

    `allowed` are names of networks that are loaded, on `device`, when they are first asked for; no other
    is ever loaded.

    Raises:
        InputError: two networks have one name, or there is none.
        ModelError: how a photo becomes the input of a network isn't known, or a name that is allowed can't
            be loaded.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        allowed: Sequence[str] = (),
        device: str = "cpu",
        limits: Limits | None = None,
        watch: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        names = [network.name for network in networks]
        self.names = list(dict.fromkeys([*names, *allowed]))
        if not networks or len(set(names)) < len(names):
            raise InputError(
                f"A server needs one network or more, each of its own name, not {names}."
            )
        for name in allowed:
            check_name(name)
        self.limits = limits or Limits()
        self._device = device
        self._models = {network.name: Model(network) for network in networks}
        self._loading = threading.Lock()
        self.worker = Worker(self.limits.queue, self.limits.batch, watch)

    # -- networks -----------------------------------------------------------------------------------

    def loaded(self, name: str) -> Network | None:
        """The network of that name, if it is loaded already."""
        return self._models[name].network if name in self._models else None

    def check(self, name: str | None) -> str:
        """The name of a network that may be asked: the first one if none is given.

        Raises:
            NotAllowedError: all others.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise NotAllowedError(
                f"This server has no model {name[:100]!r}; it has {', '.join(self.names)}."
            )
        return name

    def ready(self, name: str) -> Model:
        """The network of that name with all that asks it, loaded if it isn't yet; for the worker."""
        with self._loading:
            if name not in self._models:
                network = load_model(self.check(name)).to(self._device)
                self._models[name] = Model(replace(network, name=name))
            return self._models[name]

    # -- asking -------------------------------------------------------------------------------------

    async def explain(
        self, question: Question, render: Callable[[list[Explanation], Image.Image], T]
    ) -> T:
        """What `render` makes of the explanations that were asked for; it runs in the worker too.

        Raises:
            BusyError, LateError, TooLargeError, InputError, ImageError, ModelError
        """
        name = self.check(question.model)
        if question.method not in METHODS:
            raise InputError(
                f"There is no method {question.method!r}; choose from {', '.join(METHODS)}."
            )
        if question.top is not None and not 1 <= question.top <= MOST_CLASSES:
            raise InputError(f"The likeliest classes can be had from top1 to top{MOST_CLASSES}.")
        if question.top is not None and question.versus is not None:
            raise InputError("versus stands one class against one: give a target, or none.")
        others = (question.target, question.top, question.versus)
        if question.box is not None and others != (None, None, None):
            raise InputError("box is asked for alone: give no target and no versus with it.")
        own = question.versus is not None or question.box is not None
        alone = question if own else None  # asked on its own
        key = (name, question.method, question.top, question.target is None, alone)
        return await self._do(self._explain, (replace(question, model=name), render), key, name)

    async def detect(
        self,
        photo: bytes,
        render: Callable[[Sequence[localize.Detection], Image.Image], T],
        *,
        model: str | None = None,
        targets: Sequence[str | int] = (),
        top: int = 1,
        threshold: float = localize.THRESHOLD,
        own: bool = False,
    ) -> T:
        """What `render` makes of the objects in a photo, and the photo; see `localize.detect`, and for the
        boxes that are a detector's own `localize.found_in`."""
        name = self.check(model)

        def work() -> T:
            ready, image = self.ready(name), read_photo(photo, self.limits)
            if own:
                return render(localize.found_in(ready.network, image), image)
            known = [ready.network.class_index(target) for target in targets]
            found = localize.detect(ready.explainer("evidence"), image, known, top, threshold)
            return render(found, image)

        return await self.do(work)

    async def propose(
        self,
        photo: bytes,
        render: Callable[[Proposals, Image.Image], T],
        *,
        model: str | None = None,
        count: int = 100,
    ) -> T:
        """What `render` makes of the regions worth looking at, and the photo; see `Proposer`."""
        name = self.check(model)

        def work() -> T:
            image = read_photo(photo, self.limits)
            return render(self.ready(name).proposer(image, count), image)

        return await self.do(work)

    async def do(self, work: Callable[[], T]) -> T:
        """Anything else that is heavy, in its turn.

        >>> await service.do(lambda: tracker(frame))
        """
        return await self._do(lambda given: [one() for one in given], work, None)

    async def _do(
        self, run: Callable[[Sequence[Any]], Sequence[T]], given: Any, key: Any, kind: str = ""
    ) -> T:
        seconds = self.limits.seconds
        future = self.worker.submit(run, given, key=key, kind=kind, seconds=seconds)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds + _LATEST)
        except asyncio.TimeoutError:
            if future.cancelled():  # its turn never came
                raise BusyError(math.ceil(seconds)) from None
            raise LateError(seconds) from None

    def _explain(
        self, jobs: Sequence[tuple[Question, Callable[[list[Explanation], Image.Image], T]]]
    ) -> list[T]:
        """Questions of one key, answered together."""
        first = jobs[0][0]
        assert first.model is not None
        ready = self.ready(first.model)
        images = [read_photo(question.photo, self.limits) for question, _ in jobs]
        explainer = ready.explainer(first.method)
        target: Any = first.target
        if target is not None and first.versus is None:
            target = [
                ready.network.class_index(question.target)
                for question, _ in jobs
                if question.target is not None  # none is: that is part of the key
            ]
        asked = targets_of(target, top=first.top, versus=first.versus, box=first.box)
        together = explainer.many(images, asked)
        return [
            render([_named(found[i], question.name) for found in together], images[i])
            for i, (question, render) in enumerate(jobs)
        ]

    def close(self) -> None:
        """End the queue."""
        self.worker.close()


def _named(explanation: Explanation, name: str | None) -> Explanation:
    return replace(
        explanation, samples=tuple(replace(sample, name=name) for sample in explanation.samples)
    )
