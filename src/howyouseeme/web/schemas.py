"""What the HTTP API answers, as OpenAPI tells it: the schema and an example of each answer, and of each error."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from .. import __version__

__all__ = ["ALIVE", "DETECTED", "EXPLAINED", "JSON", "MODELS", "PNG", "PROPOSED", "SAID"]

PNG, JSON = "image/png", "application/json"

#: By status.
Responses = dict[int | str, dict[str, Any]]

_EXAMPLE = {
    "schema": 1,
    "image": {"name": "photo.jpg", "size": [300, 451]},
    "target": {"index": 285, "label": "Egyptian cat", "probability": 0.797, "box": None},
    "coverage": 0.049,
    "points": [[104.63, 169.63, 8.13183e-05], [107.31, 169.63, 7.41407e-05]],
    "provenance": {
        "howyouseeme": __version__,
        "torch": "2.14.1",
        "python": "3.11.7",
        "model": "efficientnet-lite0",
        "method": "evidence",
        "parameters": {"contrast": True, "focus": True, "likeness": True, "nodes": None},
        "input_shape": [3, 224, 224],
        "dtype": "float32",
        "device": "cpu",
        "preprocess": {
            "size": [224, 224],
            "resize": "crop",
            "crop_from": 256,
            "mean": [127.0, 127.0, 127.0],
            "std": [128.0, 128.0, 128.0],
            "scale": 1.0,
            "channels": "rgb",
            "interpolation": "bicubic",
            "fill": 0,
        },
    },
}

_BOXES = {
    "images": [{"id": 1, "file_name": "photo.jpg", "width": 451, "height": 300}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 285,
            "bbox": [101.5, 20.25, 240.0, 260.5],
            "area": 62520.0,
            "iscrowd": 0,
            "score": 0.797,
        }
    ],
    "categories": [{"id": 285, "name": "Egyptian cat"}],
}

_REGIONS = {
    "image": {"name": "photo.jpg", "size": [300, 451]},
    "regions": [{"box": [96.0, 12.5, 350.1, 290.0], "share": 0.8312}],
}

_NUMBER = {"type": "number"}
_WHOLE = {"type": "integer"}
_TEXT = {"type": "string"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _explanation_schema() -> dict[str, Any]:
    """The schema that comes with the package, without what only a file has."""
    text = (files("howyouseeme") / "data" / "explanation.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return {name: item for name, item in schema.items() if not name.startswith("$")}


_ANNOTATION = _object(
    id=_WHOLE,
    image_id=_WHOLE,
    category_id=_WHOLE,
    bbox=_list(_NUMBER, minItems=4, maxItems=4),
    area=_NUMBER,
    iscrowd=_WHOLE,
    score=_NUMBER,
)
_ANNOTATION["properties"]["number"] = {
    **_WHOLE,
    "description": "Of a detector's own box: what /explain takes as box.",
}

_COCO_SCHEMA = _object(
    images=_list(_object(id=_WHOLE, file_name=_TEXT, width=_WHOLE, height=_WHOLE)),
    annotations=_list(_ANNOTATION),
    categories=_list(_object(id=_WHOLE, name=_TEXT)),
)

_REGIONS_SCHEMA = _object(
    image=_object(name=_TEXT, size=_list(_WHOLE, minItems=2, maxItems=2)),
    regions=_list(_object(box=_list(_NUMBER, minItems=4, maxItems=4), share=_NUMBER)),
)

_ERROR = _object(detail={"type": "string", "description": "One sentence: what was wrong."})

_RETRY = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
}

SAID: dict[int, tuple[str, str]] = {
    400: ("The request can't be read.", "There was an error parsing the body"),
    401: ("The token is missing or wrong.", "This server needs its token: send the header Authorization: Bearer TOKEN."),
    406: ("Neither JSON nor PNG will do.", "This can be had as application/json or image/png."),
    408: ("The request took too long to arrive.", "The request took too long to arrive."),
    413: ("The request has too many bytes, or the photo too many pixels.", "The request is larger than 20 MiB, the limit."),
    422: ("There is no such class, model, method or parameter, or the photo can't be read.", "efficientnet-lite0 has no class 'cart'; did you mean oxcart (690)?"),
    500: ("The model can't be loaded, or a mistake of ours.", "unexpected error, please report it"),
    503: ("Busy: the queue is full. Try again after `Retry-After` seconds.", "The server is busy; try again in 3 s."),
    504: ("It took too long.", "This took longer than 60 s; try again, or with a smaller task."),
}  # fmt: skip


def _errors(*statuses: int) -> Responses:
    return {
        status: {
            "description": SAID[status][0],
            "content": {JSON: {"schema": _ERROR, "example": {"detail": SAID[status][1]}}},
            **({"headers": _RETRY} if status == 503 else {}),
        }
        for status in statuses
    }


def _answers(schema: dict[str, Any], example: Any, *, png: str) -> Responses:
    good = {
        "description": f"JSON, or with `Accept: image/png` {png}.",
        "content": {
            JSON: {"schema": schema, "example": example},
            PNG: {"schema": {"type": "string", "format": "binary"}},
        },
    }
    return {200: good, **_errors(*SAID)}


EXPLAINED = _answers(
    {
        "anyOf": [
            _explanation_schema(),
            _list(_explanation_schema(), description="Where `target` is topN."),
        ]
    },
    _EXAMPLE,
    png="the picture",
)
DETECTED = _answers(_COCO_SCHEMA, _BOXES, png="the photo with the boxes")
PROPOSED = _answers(_REGIONS_SCHEMA, _REGIONS, png="the saliency and the first regions")
MODELS: Responses = {
    200: {
        "description": "Those that the server was started with; the first one is the default.",
        "content": {
            JSON: {
                "schema": _object(
                    models=_list(
                        _object(
                            name=_TEXT,
                            loaded={"type": "boolean"},
                            classes={"type": ["integer", "null"]},
                            input={"anyOf": [_list(_WHOLE), {"type": "null"}]},
                        )
                    )
                ),
                "example": {
                    "models": [
                        {
                            "name": "efficientnet-lite0",
                            "loaded": True,
                            "classes": 1000,
                            "input": [224, 224],
                        }
                    ]
                },
            }
        },
    },
    **_errors(401),
}
ALIVE: Responses = {
    200: {
        "description": "Yes.",
        "content": {
            JSON: {
                "schema": _object(status={"const": "ok"}, waiting=_WHOLE),
                "example": {"status": "ok", "waiting": 0},
            }
        },
    },
    503: {
        "description": "No: start it again.",
        "content": {JSON: {"schema": _ERROR}},
    },
}
