"""One description of a picture: what the command line, Python and the PNG's own metadata all speak.

A `Request` is validated once, when it is made, and never changes afterwards. None always means "the model's
default"; the pipeline fills those in, so that the request it writes into a PNG draws the same picture again
even when defaults change. Nothing here needs torch.
"""

from __future__ import annotations

import itertools
import json
import operator
import secrets
from collections.abc import Container, Iterable
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ldm.errors import UserError, abbreviate
from ldm.prompts.grammar import Grammar
from ldm.prompts.script import Scripts, read_scripts
from ldm.prompts.tags import take_tags

VERSION: Literal[3] = 3  # of the JSON form, and of the rules by which pictures are drawn
MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


def _writable(text: str) -> str:
    # Undecodable bytes of a command line arrive as lone surrogates, which no PNG chunk can hold.
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("not writable")
    return text


Side = Annotated[
    int, Field(ge=8, le=MAX_SIDE, multiple_of=8, description=f"a multiple of 8 from 8 to {MAX_SIDE}")
]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS, description=f"a whole number from 1 to {MAX_STEPS}")]
Scale = Annotated[float, Field(allow_inf_nan=False, description="a finite number")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")]
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
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="a SHA-256 in 64 hex digits")]
Pixels = Annotated[int, Field(ge=0, le=2**20)]
Size = Annotated[tuple[Pixels, Pixels], Field(description="two whole numbers of pixels, height first")]
NoiseLevel = Annotated[int, Field(ge=0, description="a whole number from 0 up")]


class _Checked(BaseModel):
    """A frozen pydantic model whose validation errors are one line in the user's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UserError(_explain(type(self), error)) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


class LoraUse(_Checked):
    """An adapter by its name, how strongly it acts, and which file it was."""

    name: Text
    weight: Scale = 1.0  # on the U-Net
    text_weight: Scale | None = None  # on the text encoders; None: the same
    sha256: Digest | None = None


class EmbeddingUse(_Checked):
    """A textual inversion by the word that it is written as, and which file it was."""

    name: Text
    sha256: Digest


class Request(_Checked):
    """What to draw. One picture per seed; the pictures of one request share everything else.

    Names and meanings are diffusers' (`clip_skip` counts skipped layers, so 1 is the penultimate layer).
    `sampler` takes every spelling that `resolve_sampler` knows and holds the canonical name; "DPM++ 2M
    Karras" also sets `spacing`. `timesteps` or `sigmas` replace the grid that
    `num_inference_steps` and `spacing` would give.

    `image` and `mask_image` are paths; the pipeline notes the SHA-256 of their bytes beside them, so that a
    picture drawn from a file is not drawn again from another one. The sizes of SDXL are (height, width): of
    the picture that the drawn one is to look like a crop of; None is the drawn one's own, and a negative one
    that is None is that of the prompt.

    `not_kept` names the arguments of Python's call that no JSON can hold (a solver of one's own, latents, an
    image in memory): without them, this is not the request that draws the picture again.

    `target_prompt` makes an edit of it: the image is inverted under `prompt` up to `strength`, and drawn
    again under that (`ldm.pipeline.edit`).

    Tags in the prompt, `<lora:name:0.8>`, leave it and become `loras`: None is those that the pipeline has.

    Raises `ldm.errors.UserError`, naming the field, its value and what is allowed.
    """

    prompt: Text = ""
    negative_prompt: Text | None = None  # None and "" differ in SDXL: zeros, or the encoding of no words
    prompt_2: Text | None = None  # for a second text encoder; None: as the first
    negative_prompt_2: Text | None = None
    target_prompt: Text | None = None  # what an edit makes of the image, which `prompt` tells
    prompt_grammar: Marks | None = None  # what marks in prompts mean
    height: Side | None = None  # pixels
    width: Side | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Scale | None = None
    guidance_rescale: Fraction = 0.0
    seeds: Seeds = (0,)
    sampler: str | None = None
    spacing: str | None = None
    eta: Fraction | None = None
    clip_skip: Layers | None = None
    timesteps: Levels | None = None
    sigmas: Levels | None = None
    image: Text | None = None  # path
    image_sha256: Digest | None = None
    mask_image: Text | None = None  # path; white is drawn anew, or what is painted on a transparent layer
    mask_image_sha256: Digest | None = None
    strength: Fraction | None = None  # of the steps, the share that is drawn, from the image
    image_guidance_scale: Scale | None = None  # instruct-pix2pix
    noise_level: NoiseLevel | None = None  # upscaler: timestep to which its input is noised
    classifier_class: Text | None = None  # towards which a classifier's gradient goes
    classifier_scale: Scale | None = None  # how strongly: 1 is Bayes' rule
    classifier_sha256: Digest | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size | None = None
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size | None = None
    negative_target_size: Size | None = None
    aesthetic_score: Scale | None = None  # SDXL refiner
    negative_aesthetic_score: Scale | None = None
    loras: Annotated[tuple[LoraUse, ...], Field(description="a list of adapters")] | None = None
    embeddings: Annotated[tuple[EmbeddingUse, ...], Field(description="a list of words")] | None = None
    model: Text | None = None  # for the record in the PNG: not used to find the model
    model_hash: Text | None = None
    upscaling: Request | None = None  # by a second model; prompt, seed and image are those of the picture
    not_kept: Annotated[tuple[Text, ...], Field(description="a list of names")] = ()
    version: Literal[1, 2, 3] = VERSION  # 1: drawn by the rules of before, `ldm.pipeline.before`

    @property
    def is_old(self) -> bool:
        """Whether it is of a picture that was drawn by the rules of version 1 (`ldm.pipeline.before`)."""
        return self.version == 1

    @property
    def num_images(self) -> int:
        return len(self.seeds)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, of a request that is filled in. Raises ValueError for another."""
        if self.height is None or self.width is None:
            raise ValueError("this request leaves its size to the model")
        return self.height, self.width

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """Prompt, negative prompt, and an edit's target, as a first text encoder reads them, and a second."""
        negative = self.negative_prompt or ""
        target = [] if self.target_prompt is None else [self.target_prompt]
        first = [self.prompt, negative, *target]
        return first, [self.prompt_2 or self.prompt, self.negative_prompt_2 or negative, *target]

    @property
    def grammar(self) -> Grammar:
        """What marks in its texts mean; before version 3 they were text."""
        return self.prompt_grammar or ("a1111" if self.version > 2 else "plain")

    @property
    def scripts(self) -> Scripts:
        """What its texts say over the steps, in the order of `read_scripts`."""
        (prompt, negative, *target), (prompt_2, negative_2, *_) = self.texts
        return read_scripts(self.grammar, prompt, negative, prompt_2, negative_2, *target)

    @property
    def shown(self) -> str:
        """What the finished picture shows: the prompt, or an edit's target."""
        return self.prompt if self.target_prompt is None else self.target_prompt

    @property
    def num_grid_steps(self) -> int | None:
        """Steps of the whole grid, given by a number or by the grid itself."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return self.num_inference_steps if self.sigmas is None else len(self.sigmas) - 1

    @property
    def num_steps(self) -> int:
        """Steps of the last `strength` of the grid, rounded down; 0 if not known."""
        steps = self.num_grid_steps or 0
        return steps if self.strength is None else int(steps * self.strength)

    def check_given(self, given: Container[str]) -> None:
        """Raise UserError if this request is of a picture that more was `given` to than now."""
        lost = [name for name in self.not_kept if name not in given]
        if lost:
            files = " (images also by -i and --mask)" if {*lost} & {"image", "mask_image"} else ""
            raise UserError(
                f"this was drawn in Python with {abbreviate(lost, 4)} from memory, which is not kept: "
                f"it cannot be drawn again without the same{files}"
            )

    def to_json(self) -> str:
        """One JSON object with a `version`, without the fields that are None or hold nothing."""
        return json.dumps({"version": self.version, **self.filled_in("json")}, ensure_ascii=False)

    def filled_in(self, mode: str = "python") -> dict[str, Any]:
        """The fields that say something, as Python's values or JSON's."""
        fields = self.model_dump(mode=mode, exclude_none=True)
        for each in (fields, fields.get("upscaling", {})):
            if not each.get("not_kept"):
                each.pop("not_kept", None)
        return fields

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`, of any version. Raises UserError on damaged text and on a newer one."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"this request is not valid JSON: {error}") from None
        version = fields.get("version") if isinstance(fields, dict) else None
        if version not in range(1, VERSION + 1):
            raise UserError(
                f"this request has version {_short(version)}; this ldm reads versions 1 to {VERSION}"
            )
        if isinstance(fields.get("upscaling"), dict):
            fields["upscaling"] = {"version": version, **fields["upscaling"]}
        try:
            return cls(**fields)
        except RecursionError:
            raise UserError("this request holds one in one in one, too deep to be read") from None

    @model_validator(mode="before")
    @classmethod
    def _canonical_names(cls, fields: Any) -> Any:
        if not isinstance(fields, dict | BaseModel):
            return fields  # no fields at all: pydantic says so
        fields = dict(fields)
        names = {name: fields.get(name) for name in ("sampler", "spacing")}
        for name, value in names.items():
            if value is not None and not isinstance(value, str):
                raise UserError(f"{name} {_short(value)} is not allowed: it must be a name")
        if names == {"sampler": None, "spacing": None}:
            return fields
        # Solvers need torch, and a request that names none does not.
        from ldm.diffusion.samplers import SPACINGS, resolve_sampler, resolve_spacing

        if names["sampler"] is not None:
            sampler, implied = resolve_sampler(names["sampler"])
            names = {"sampler": sampler.name, "spacing": names["spacing"] or implied}
        if names["spacing"] not in (None, *SPACINGS):
            names["spacing"] = resolve_spacing(names["spacing"])
        fields |= names
        return fields

    @model_validator(mode="before")
    @classmethod
    def _tags_are_loras(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        texts = {name: fields[name] for name in _PROMPTS if isinstance(fields.get(name), str)}
        taken = {name: take_tags(text) for name, text in texts.items()}
        for name, (_, uses) in taken.items():
            if uses and name != "prompt":
                raise UserError(f"{name} has a <lora:...> tag: write it in the prompt, or give it by --lora")
        text, uses = taken.get("prompt", ("", []))
        if not uses or not isinstance(fields.get("loras") or (), list | tuple):
            return fields
        return {**fields, "prompt": text, "loras": [*(fields.get("loras") or ()), *uses]}

    @field_validator("loras")
    @classmethod
    def _each_once(cls, loras: tuple[LoraUse, ...] | None) -> tuple[LoraUse, ...] | None:
        names = [use.name for use in loras or ()]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the LoRA {name} is given twice: give it once, with one weight")
        return loras or None

    @model_validator(mode="after")
    def _marks_are_allowed(self) -> Self:
        self.scripts  # noqa: B018  # raises
        return self

    @model_validator(mode="after")
    def _one_grid(self) -> Self:
        if self.timesteps is not None and self.sigmas is not None:
            raise UserError("give timesteps or sigmas, not both: each is a whole grid")
        return self

    @field_validator("timesteps", "sigmas")
    @classmethod
    def _falling(cls, levels: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if levels is not None and any(a <= b for a, b in itertools.pairwise(levels)):
            raise ValueError("not falling")
        return levels


_PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "target_prompt")


def consecutive_seeds(seed: int | Iterable[int] | None, count: int = 1) -> tuple[int, ...]:
    """The seeds of `count` pictures: seed, seed + 1, ...; None or a negative seed starts at a random one.

    Several are taken as they are and must be `count` seeds (any number when `count` is 1). Whole numbers of
    numpy and torch are as good as Python's. Raises UserError for what is none.
    """
    first = None if seed is None else _whole(seed)
    if seed is not None and first is None:
        seeds = None if isinstance(seed, str | float) or not _is_several(seed) else [*map(_whole, seed)]
        if seeds is None or None in seeds:
            raise UserError(f"seed {_short(seed)} is not allowed: give a whole number, or one per picture")
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


def _explain(model: type[BaseModel], error: ValidationError) -> str:
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
            allowed = _allowed(model, name) or fault["msg"]
            lines.setdefault(name, f"{name} {_short(fault['input'])} is not allowed: it must be {allowed}")
    return "; ".join(lines.values())


def _allowed(model: type[BaseModel], name: str) -> str:
    # Optional fields keep the description on the member of their union that is not None.
    whole = model.model_json_schema()
    whole = whole.get("$defs", {}).get(model.__name__, whole)  # where a model holds its own kind
    schema = whole["properties"][name]
    members = [schema, *schema.get("anyOf", [])]
    return next((str(member["description"]) for member in members if "description" in member), "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
