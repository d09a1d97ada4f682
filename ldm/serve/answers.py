"""What all APIs answer alike: errors in OpenAI's shape, and what an exception is in HTTP."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi.responses import JSONResponse

# "height 641 is not allowed: ...": the messages of a Request begin with its fields.
FIELD = re.compile(r"^(?:hires )?(\w+) (?:.* )?(?:is not allowed|is too long|has too many)")
UNKNOWN = re.compile(r"^(\w+) is not a field of a Request")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(
    message: str, status: int = 400, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; `param` is the field that is wrong, where one is."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param or field_in(message), "code": code}}


def field_in(message: str) -> str | None:
    """The field of a request that an error's first words name."""
    found = FIELD.match(message) or UNKNOWN.match(message)
    return found[1] if found else None


def missing(what: str) -> JSONResponse:
    return JSONResponse(error_body(f"there is no {what} of that id", 404, code="not_found"), 404)


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
