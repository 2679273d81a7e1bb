"""The HTTP API: the JSON of the command line, or PNG, for a photo that is sent."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Container, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, File, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from .. import localize
from ..detectors import SURE
from ..draw import boxes_picture, encoded, stack_pictures
from ..errors import HowYouSeeMeError, InputError, MissingExtraError, ModelError
from ..explanation import Explanation
from ..propose import Proposals
from . import schemas
from .guard import problem
from .schemas import JSON, PNG
from .service import MOST_CLASSES, Question, Service, TooLargeError
from .worker import BusyError, LateError

__all__ = ["add_api", "health", "router", "status_of"]

T = TypeVar("T")

log = logging.getLogger(__name__)

_Photo = Annotated[
    UploadFile, File(description="A JPEG, PNG, WebP, GIF, BMP or TIFF; its first frame is taken.")
]
_ModelName = Annotated[
    str | None,
    Query(
        description="A name that `GET /v1/models` lists; the first of them if none is given.",
    ),
]
_TOP = re.compile(r"top([0-9]{1,4})", re.IGNORECASE)


async def _only_known(request: Request) -> None:
    """Refuses what would go unnoticed: a typing error would ask another question."""
    route = request.scope["route"]
    known = {one.alias: one.field_info.annotation for one in route.dependant.query_params}
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise InputError(f"There is no parameter {name[:100]!r}; {route.path} {takes}.")
        # Those that may be repeated are `list[...] | None`.
        many = any(get_origin(one) is list for one in get_args(known[name]))
        if given.count(name) > 1 and not many:
            raise InputError(
                f"The parameter {name!r} is given {given.count(name)} times; give it once."
            )
    if route.body_field is not None:
        _check_form(await request.form(), route.path, known)


def _check_form(form: FormData, path: str, known: Container[str]) -> None:
    """Refuses a form that is more than one photo."""
    for name, value in form.multi_items():
        text = value if isinstance(value, str) and len(value) <= 100 else ""
        if name in known:
            raise InputError(
                f"The form field {name!r} is a parameter, which goes into the address: "
                f"{path}?{urlencode({name: text or '...'})}"
            )
        if name != "photo":
            raise InputError(f"There is no form field {name[:100]!r}; {path} takes photo.")
        if isinstance(value, str):
            raise InputError(
                f"The form field 'photo' is the text {value[:100]!r}, not a file; with curl, "
                f"write photo=@{text or 'photo.jpg'}"
            )
    if (count := len(form.getlist("photo"))) > 1:
        raise InputError(f"There are {count} photos; send one in a request.")


router = APIRouter(prefix="/v1", dependencies=[Depends(_only_known)])


@router.post(
    "/explain",
    summary="Which pixels made the network say this?",
    response_class=JSONResponse,
    responses=schemas.EXPLAINED,
)
async def explain(
    request: Request,
    photo: _Photo,
    model: _ModelName = None,
    target: Annotated[
        str | None,
        Query(
            description="The class to explain, by name or index; or `top3` for the three likeliest "
            f"(top1 to top{MOST_CLASSES}), which gives a list. The likeliest one if not given.",
            max_length=200,
            examples=["tiger cat", "282", "top3"],
        ),
    ] = None,
    versus: Annotated[
        str | None,
        Query(
            description="Explain what speaks for the target and not for this class, by name or index.",
            max_length=200,
            examples=["lynx"],
        ),
    ] = None,
    box: Annotated[
        int | None,
        Query(
            description="Of a detector: the number of the box to explain in its list, from 0.",
            ge=0,
            le=10_000,
        ),
    ] = None,
    method: Annotated[
        Literal["evidence", "seed", "exact"], Query(description="How to walk back.")
    ] = "evidence",
    layers: Annotated[
        bool, Query(description="Add to the picture where each stage of the network looks.")
    ] = False,
) -> Response:
    """The points that the answer came from, strongest first, and how it was made.

    The JSON is that of the command line, described in docs/json.md and by `explanation.schema.json`.
    """
    kind = _kind(request)
    top = None if target is None else _TOP.fullmatch(target.strip())
    data, name = await _read(photo)
    question = Question(
        data,
        name,
        model,
        method,
        target if top is None else None,
        None if top is None else int(top[1]),
        versus,
        box,
    )

    def render(found: list[Explanation], _: Image.Image) -> bytes:
        if kind == PNG:
            return encoded(stack_pictures(*(one.picture(0, layers) for one in found)))
        told = [one.to_dict() for one in found]
        return _json(told[0] if top is None else told)

    return Response(await _service(request).explain(question, render), media_type=kind)


@router.post(
    "/detect",
    summary="Where are the objects?",
    response_class=JSONResponse,
    responses=schemas.DETECTED,
)
async def detect(
    request: Request,
    photo: _Photo,
    model: _ModelName = None,
    target: Annotated[
        list[Annotated[str, Query(max_length=200)]] | None,
        Query(
            description=f"Classes to look for, by name or index; {MOST_CLASSES} at most.",
            max_length=MOST_CLASSES,
            examples=[["tabby"]],
        ),
    ] = None,
    top: Annotated[
        int | None,
        Query(
            description="Look for so many of the likeliest classes instead, 1 if not given.",
            ge=1,
            le=MOST_CLASSES,
        ),
    ] = None,
    threshold: Annotated[
        float,
        Query(
            description="Level of its map at which an object ends; more makes boxes smaller.",
            gt=0,
            lt=1,
        ),
    ] = localize.THRESHOLD,
    own: Annotated[
        bool,
        Query(
            description="Of a detector: the boxes that it finds itself, in their order, each with the number that "
            "/explain takes as box. The picture has those that it is sure of."
        ),
    ] = False,
) -> Response:
    """Boxes around objects, as a COCO data set of one image; the network was only trained to name them (but see own)."""
    kind = _kind(request)
    if target and top is not None:
        raise InputError("Say what to look for: target or top, not both.")
    if own and (target or top is not None or threshold != localize.THRESHOLD):
        raise InputError("own is asked for alone: give no target, top and threshold with it.")
    data, name = await _read(photo)

    def render(found: Sequence[localize.Detection], image: Image.Image) -> bytes:
        if kind == PNG:
            shown = [one for one in found if not own or one.score >= SURE]
            told = [(one.box, one.label, one.caption) for one in shown]
            return encoded(boxes_picture(image, told))
        return _json(localize.to_coco({name: found}, {name: (image.height, image.width)}))

    content = await _service(request).detect(
        data, render, model=model, targets=target or (), top=top or 1, threshold=threshold, own=own
    )
    return Response(content, media_type=kind)


@router.post(
    "/propose",
    summary="What is worth looking at?",
    response_class=JSONResponse,
    responses=schemas.PROPOSED,
)
async def propose(
    request: Request,
    photo: _Photo,
    model: _ModelName = None,
    count: Annotated[int, Query(description="Regions at most.", ge=1, le=1000)] = 100,
) -> Response:
    """Regions of the photo, the most promising first, before anybody asks for a class."""
    kind = _kind(request)
    data, name = await _read(photo)

    def render(found: Proposals, image: Image.Image) -> bytes:
        return encoded(found.picture(image)) if kind == PNG else _json(found.to_dict(name))

    content = await _service(request).propose(data, render, model=model, count=count)
    return Response(content, media_type=kind)


@router.head("/models", include_in_schema=False)
@router.get(
    "/models",
    summary="Which networks can be asked?",
    responses=schemas.MODELS,
)
async def models(request: Request) -> dict[str, Any]:
    """Their names, whether they are loaded, and, if so, the number of classes and the input's size.

    `classes` is null where their names aren't known; `input` is [height, width] in pixels.
    """
    service = _service(request)
    listed = []
    for name in service.names:
        network = service.loaded(name)
        known = network is not None and network.classes is not None
        listed.append(
            {
                "name": name,
                "loaded": network is not None,
                "classes": len(network.classes or ()) if network is not None and known else None,
                "input": list(network.preprocess.size)
                if network is not None and network.preprocess is not None
                else None,
            }
        )
    return {"models": listed}


health = APIRouter()


@health.head("/healthz", include_in_schema=False)
@health.get(
    "/healthz",
    summary="Is it alive?",
    responses=schemas.ALIVE,
)
async def healthz(request: Request) -> Response:
    """Whether explanations are being made, and how many requests wait."""
    worker = _service(request).worker
    if not worker.alive:
        return problem(503, "The worker has ended; start the server again.")
    return JSONResponse({"status": "ok", "waiting": worker.waiting})


# Errors


def status_of(error: HowYouSeeMeError) -> int:
    """The HTTP status of an error.

    >>> status_of(BusyError(3))
    503
    """
    for kind, status in (
        (BusyError, 503),
        (LateError, 504),
        (TooLargeError, 413),
        (ModelError, 500),
        (MissingExtraError, 500),
    ):
        if isinstance(error, kind):
            return status
    return 422


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, HowYouSeeMeError)
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, BusyError) else None
    return problem(status_of(error), " ".join(str(error).split()), headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = []
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"] if part not in {"query", "body"})
        if (where, one["type"]) == ("photo", "missing"):
            said.append(
                "There is no photo: send one as the form field 'photo', multipart/form-data"
            )
            continue
        said.append(f"{where or 'The request'}: {one['msg']}")
    return problem(422, "; ".join(said) + ".")


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _unexpected(_: Request, error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    return problem(500, f"unexpected error, please report it ({type(error).__name__})")


def add_api(app: FastAPI) -> None:
    """Add the API's routes and the way that it tells errors; `app.state.service` answers.

    >>> add_api(app)
    """
    app.include_router(router)
    app.include_router(health)
    app.add_exception_handler(HowYouSeeMeError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


# In and out


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _kind(request: Request) -> str:
    """What the other side wants: PNG if it says so, or else JSON."""
    wanted: dict[str, float] = {}
    for part in request.headers.get("accept", "*/*").split(","):
        name, *parameters = (item.strip().lower() for item in part.split(";"))
        weight = next((item[2:] for item in parameters if item.startswith("q=")), "1")
        try:
            wanted[name] = float(weight)
        except ValueError:
            wanted[name] = 0.0
    best = {
        kind: max(wanted.get(kind, 0.0), *(wanted.get(any_, 0.0) - 1e-6 for any_ in wildcards))
        for kind, wildcards in ((JSON, ("application/*", "*/*")), (PNG, ("image/*", "*/*")))
    }
    if max(best.values()) <= 0:
        raise HTTPException(406, schemas.SAID[406][1])
    return PNG if best[PNG] > best[JSON] else JSON


async def _read(photo: UploadFile) -> tuple[bytes, str]:
    """The bytes of what was uploaded, and the last part of its name."""
    name = PurePath((photo.filename or "").replace("\\", "/")).name
    return await photo.read(), name[:255] or "photo"


def _json(data: Any) -> bytes:
    return json.dumps(data, allow_nan=False).encode()
