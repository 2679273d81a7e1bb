"""The API against its own OpenAPI document, with requests that Schemathesis makes up."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="pip install 'howyouseeme[serve]'")
schemathesis = pytest.importorskip("schemathesis", reason="pip install 'howyouseeme[dev]'")

from hypothesis import HealthCheck, settings  # noqa: E402
from test_serve import tiny  # noqa: E402

from howyouseeme.web import Limits, Settings  # noqa: E402
from howyouseeme.web.app import make_app  # noqa: E402

#: Requests for each operation; more finds more: HOWYOUSEEME_EXAMPLES=2000 pytest tests/test_serve_schema.py
EXAMPLES = int(os.environ.get("HOWYOUSEEME_EXAMPLES", "40"))


HOST = {"Host": "127.0.0.1"}


def photos() -> Iterator[bytes]:
    """Pictures of all kinds, whole and damaged."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 4), dtype=np.uint8)
    for kind, mode in [
        ("PNG", "RGBA"),
        ("JPEG", "RGB"),
        ("GIF", "L"),
        ("WEBP", "RGB"),
        ("TIFF", "L"),
    ]:
        buffer = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, kind)
        yield buffer.getvalue()
        yield buffer.getvalue()[: len(buffer.getvalue()) // 2]


PHOTOS = [*photos()]


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A photo where a file is wanted: the document can't tell which bytes make one."""
    if isinstance(body, dict) and isinstance(body.get("photo"), (bytes, str)):
        given = body["photo"] if isinstance(body["photo"], bytes) else body["photo"].encode()
        if given[-1:] != b"0":  # some stay as they are
            body["photo"] = PHOTOS[sum(given) % len(PHOTOS)]
    return body


APP = make_app([tiny()], Settings(page=False, limits=Limits(body=200_000, pixels=10_000)))

# Whether bytes are a photo, and a text the name of a class, no schema tells: such requests fit it, and
# are refused all the same.
CONFIG = schemathesis.config.SchemathesisConfig.from_dict(
    {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", 400, 413, 422]}}}
)

schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers=HOST, config=CONFIG)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES <= 40,  # the same in every run, so that what fails is what changed
)
def test_nothing_breaks_the_contract(case: Any) -> None:
    case.call_and_validate(headers=HOST)
