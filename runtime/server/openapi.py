"""The OpenAPI document: `page/openapi.json`, and the options and formats as they are declared."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from u2moe.runtime.declarations import Option
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.protocols.rest import RESPONSE_FORMATS

FILE = resources.files("u2moe.runtime.server.page") / "openapi.json"
_TYPES = {"integer": "integer", "number": "number", "flag": "boolean", "record": "array"}


def document() -> bytes:
    """The document, as JSON."""
    found = json.loads(FILE.read_bytes())
    body = found["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]
    body["schema"]["properties"]["response_format"]["enum"] = list(RESPONSE_FORMATS)
    body["schema"]["properties"] |= {name: _schema(declared) for name, declared in REQUEST_OPTIONS.items()}
    return json.dumps(found).encode()


def _schema(declared: Option) -> dict[str, Any]:
    limits = {"minimum": declared.least, "maximum": declared.most}
    told = {"type": _TYPES[declared.kind], "description": declared.about}
    return told | {name: limit for name, limit in limits.items() if limit is not None}
