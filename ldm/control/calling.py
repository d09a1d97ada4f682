"""Controls as Python's call takes them: fields of `ControlUse`, pictures in memory, and diffusers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.images.fitting import InMemory
from ldm.request import ControlUse

# diffusers' arguments, each one value for all controls or a list of one for each -> fields of a use.
CALLED = {
    "control_image": "image",
    "controlnet_conditioning_scale": "scale",
    "adapter_conditioning_scale": "scale",
    "control_guidance_start": "start",
    "control_guidance_end": "end",
    "control_mode": "type",
    "guess_mode": "mode",
}
InMemories = tuple[InMemory | None, ...] | None


def take_controls(
    given: Mapping[str, Any],
    networks: Sequence[str],
    as_image: Callable[[Any, str], tuple[str | None, InMemory | None]],
) -> tuple[dict[str, Any], InMemories]:
    """Arguments of a call with `control` as a request holds it, and the controls' pictures in memory.

    Args:
        networks: those of the pipeline, for a call that names none itself.
        as_image: gives a picture's path, or the picture.

    Raises:
        UserError: for pictures without a network, and another number of values than of networks.
    """
    fields = dict(given)
    called = {CALLED[name]: (name, fields.pop(name)) for name in CALLED if fields.get(name) is not None}
    uses = fields.pop("control", None)
    if uses is None and called:
        uses = [{"model": each} for each in networks]
        if not uses:
            name = next(iter(called.values()))[0]
            raise UserError(
                f"{name} is of a ControlNet or T2I-Adapter: write pipe = pipe.with_controlnet(FOLDER) "
                'before, or give control=[{"model": FOLDER, "image": ...}]'
            )
    if uses is None:
        return fields, None
    several = [uses] if isinstance(uses, Mapping | ControlUse) else list(uses)
    rows = [dict(each) for each in several]
    for field, (name, value) in called.items():
        for row, own in zip(rows, _each(value, len(rows), name), strict=True):
            row[field] = _value(field, own)
    pictures: list[InMemory | None] = []
    for row in rows:
        path, picture = as_image(row.get("image"), "control_image")
        row["image"] = path
        pictures.append(picture)
    fields["control"] = rows
    return fields, tuple(pictures) if any(each is not None for each in pictures) else None


def _each(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise UserError(f"{name} has {len(value)} values for {count} controls: give one, or one for each")
    return list(value)


def _value(field: str, value: Any) -> Any:
    if field == "mode":
        return "guess" if value else "balanced"
    return str(value) if field == "type" else value
