"""What a field of a `Request` may hold, and how what it may not is told: pydantic's types with our words."""

from __future__ import annotations

import hashlib
import operator
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ldm.errors import UserError
from ldm.prompts.grammar import Grammar

MAX_SIDE = 4096
MAP_BYTES = 512  # of a pixel: 256 features, the most that Stable Diffusion's VAE has at full size, in 16 bits
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
PUBLIC_MARK, KEY_VARIABLE = "ldm", "LDM_WATERMARK_KEY"  # of watermarks


def _writable(text: str) -> str:
    # Undecodable bytes of a command line arrive as lone surrogates, which no PNG chunk can hold.
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("not writable")
    return text


def mark_named(key: bytes | None) -> str:
    """What a request keeps of the key of a watermark: which it is, and not the key; None: everybody's."""
    return PUBLIC_MARK if key is None else f"key:{hashlib.sha256(key).hexdigest()[:16]}"


def own_key() -> bytes | None:
    """The secret key of whoever draws, by the environment."""
    text = os.environ.get(KEY_VARIABLE)
    return text.encode("utf-8", "surrogateescape") if text else None


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] < pair[1]:
        raise ValueError("not rising")
    return pair


Side = Annotated[
    int, Field(ge=8, le=MAX_SIDE, multiple_of=8, description=f"a multiple of 8 from 8 to {MAX_SIDE}")
]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS, description=f"a whole number from 1 to {MAX_STEPS}")]
Scale = Annotated[float, Field(allow_inf_nan=False, description="a finite number")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")]
Interval = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]],
    AfterValidator(_rising),
    Field(description="two numbers from 0 to 1, the smaller first"),
]
CacheInterval = Annotated[int, Field(ge=1, le=100, description="a whole number from 1 to 100")]
Branch = Annotated[int, Field(ge=0, description="a whole number from 0 up")]
Options = Annotated[
    tuple[tuple[str, Scale], ...],
    BeforeValidator(lambda given: given.items() if isinstance(given, Mapping) else given),
    Field(description="names of options, each with a finite number"),
]
Layers = Annotated[int, Field(ge=0, le=100, description="how many last text layers to skip, 0 or more")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seeds = Annotated[
    tuple[Seed, ...], Field(min_length=1, description="at least one seed, each from 0 to 2**63 - 1")
]
Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Levels = Annotated[
    tuple[Level, ...],
    Field(min_length=1, max_length=MAX_STEPS + 1, description="finite numbers from 0 up, strictly falling"),
]
Marks = Annotated[Grammar, Field(description="a1111, comfy or plain")]
Text = Annotated[
    str, AfterValidator(_writable), Field(description="valid Unicode text without NUL characters")
]
_Name = Annotated[Text, Field(min_length=1, max_length=200)]
DrawnAs = Annotated[
    tuple[tuple[_Name, _Name], ...],
    BeforeValidator(lambda given: given.items() if isinstance(given, Mapping) else given),
    Field(max_length=1000, description="words, each with the one that is drawn in its place"),
]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="a SHA-256 in 64 hex digits")]
Pixels = Annotated[int, Field(ge=0, le=2**20)]
Size = Annotated[tuple[Pixels, Pixels], Field(description="two whole numbers of pixels, height first")]
Factor = Annotated[float, Field(ge=1, le=8, allow_inf_nan=False, description="a number from 1 to 8")]
Overlap = Annotated[
    int,
    Field(ge=0, lt=MAX_SIDE, multiple_of=8, description=f"a multiple of 8 from 0 to less than {MAX_SIDE}"),
]
Axes = Annotated[Literal["x", "y", "xy"], Field(description="x, y or xy")]
Sides = Annotated[
    tuple[Pixels, Pixels, Pixels, Pixels],
    Field(description="four whole numbers of pixels: left, top, right, bottom"),
]
Radius = Annotated[float, Field(ge=0, le=1024, allow_inf_nan=False, description="0 to 1024 pixels")]
Growth = Annotated[int, Field(ge=-1024, le=1024, description="-1024 to 1024 whole pixels")]
Delta = Annotated[int, Field(ge=0, le=2**32, description="a whole number from 0 to 2**32")]
NoiseSource = Annotated[Literal["cpu", "gpu"], Field(description="cpu or gpu")]
ResizeMode = Annotated[
    Literal["resize", "crop", "fill", "latent"], Field(description="resize, crop, fill or latent")
]
MaskFill = Annotated[
    Literal["original", "blur", "noise", "nothing"],
    Field(description="original, blur, noise or nothing"),
]
Watermark = Annotated[
    Annotated[str, Field(pattern="^(ldm|key:[0-9a-f]{16})$", description="true, ldm or key:...")] | None,
    BeforeValidator(lambda given: mark_named(own_key()) if given is True else given or None),
]
NoiseLevel = Annotated[int, Field(ge=0, description="a whole number from 0 up")]


class Checked(BaseModel):
    """A frozen pydantic model whose validation errors are one line in the user's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UserError(explain(type(self), error)) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """One line for all that is wrong: field, value, what is allowed."""
    lines: dict[str, str] = {}  # by field: a tuple reports each of its bad items, and the first is enough
    for fault in error.errors(include_url=False):
        name = str(next(iter(fault["loc"]), ""))
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            lines.setdefault(name, str(cause))
        elif name not in model.model_fields:
            lines.setdefault(name, f"{name} is not a field of a {model.__name__}")
        else:
            allowed = (_allowed(model, name) or fault["msg"]) + _nearest(fault) + _too_large(fault)
            lines.setdefault(name, f"{name} {short(fault['input'])} is not allowed: it must be {allowed}")
    return "; ".join(lines.values())


def _nearest(fault: Mapping[str, Any]) -> str:
    """The multiples beside a whole number that is none."""
    unit = fault.get("ctx", {}).get("multiple_of")
    if fault["type"] != "multiple_of" or not isinstance(fault["input"], int):
        return ""
    below = fault["input"] // unit * unit
    return f" (the nearest are {below} and {below + unit})"


def _too_large(fault: Mapping[str, Any]) -> str:
    """What a picture of such a side would take."""
    side = fault["input"]
    if fault.get("ctx", {}).get("le") != MAX_SIDE or not isinstance(side, int):
        return ""
    gib = side * side * MAP_BYTES / 2**30
    return f" (at {side} x {side} one feature map of Stable Diffusion's VAE takes {gib:,.0f} GiB in 16 bits)"


def _allowed(model: type[BaseModel], name: str) -> str:
    # Optional fields keep the description on the member of their union that is not None.
    whole = model.model_json_schema()
    whole = whole.get("$defs", {}).get(model.__name__, whole)  # where a model holds its own kind
    schema = whole["properties"][name]
    members = [schema, *schema.get("anyOf", [])]
    return next((str(member["description"]) for member in members if "description" in member), "")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def consecutive_seeds(seed: int | Iterable[int] | None, count: int = 1) -> tuple[int, ...]:
    """The seeds of `count` pictures: seed, seed + 1, ...; None or a negative seed starts at a random one.

    Several are taken as they are and must be `count` seeds (any number when `count` is 1). Whole numbers of
    numpy and torch are as good as Python's. Raises UserError for what is none.
    """
    first = None if seed is None else _whole(seed)
    if seed is not None and first is None:
        seeds = None if isinstance(seed, str | float) or not _is_several(seed) else [*map(_whole, seed)]
        if seeds is None or None in seeds:
            raise UserError(f"seed {short(seed)} is not allowed: give a whole number, or one per picture")
        if count not in (1, len(seeds)):
            raise UserError(f"{len(seeds)} seeds for {count} pictures: give one seed, or one per picture")
        return tuple(each for each in seeds if each is not None)
    if first is None or first < 0:
        first = secrets.randbelow(2**32)
    return tuple(range(first, first + count))


def _whole(number: Any) -> int | None:
    """A whole number of any library as Python's; None for what is none."""
    try:
        return operator.index(number)
    except TypeError:
        return None


def _is_several(seed: Any) -> TypeGuard[Iterable[int]]:
    return isinstance(seed, Iterable) and getattr(seed, "ndim", 1) > 0
