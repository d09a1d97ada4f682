"""A request as people write it in JSON: fields in any of their spellings, `seed` for consecutive seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.request.fields import consecutive_seeds
from ldm.request.request import field_named


def fields_of(given: Mapping[str, Any], count: int = 1) -> dict[str, Any]:
    """The fields of a `Request` that a JSON object gives.

    `seed` gives `count` pictures consecutive ones, `seeds` are taken as they are. Raises UserError.
    """
    fields = {field_named(name) or name: value for name, value in given.items()}
    if len(fields) < len(given):
        raise UserError("one field has two names here: give it once")
    for name in ("prompt", "seeds"):
        if name in fields and fields[name] is None:
            del fields[name]
    if not isinstance(fields.get("prompt", ""), str) or not isinstance(
        fields.get("negative_prompt") or "", str
    ):
        raise UserError("a prompt must be a text")
    if isinstance(fields.get("seeds"), int):
        fields["seeds"] = consecutive_seeds(fields["seeds"], count)
    fields.pop("embeddings", None)  # they follow from the words of the prompt
    return fields
