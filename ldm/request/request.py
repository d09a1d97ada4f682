"""One description of a picture: what the command line, Python and the PNG's own metadata all speak.

A `Request` is validated once, when it is made, and never changes afterwards. None always means "the model's
default"; the pipeline fills those in, so that the request it writes into a PNG draws the same picture again
even when defaults change. Nothing here needs torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ldm.errors import UserError, abbreviate
from ldm.prompts.grammar import Grammar
from ldm.prompts.script import Script, Scripts, read_script, read_scripts
from ldm.prompts.world import as_drawn
from ldm.request.fields import (
    Axes,
    Branch,
    CacheInterval,
    Delta,
    Digest,
    DrawnAs,
    Factor,
    Fraction,
    Growth,
    Interval,
    Layers,
    Levels,
    Marks,
    MaskFill,
    NoiseLevel,
    NoiseSource,
    Options,
    Overlap,
    Pixels,
    Radius,
    ResizeMode,
    Scale,
    Seed,
    Seeds,
    Side,
    Sides,
    Size,
    Steps,
    Text,
    Watermark,
    short,
)
from ldm.request.regions import Factors, Regions
from ldm.request.spelled import SHORT, Spelled
from ldm.request.uses import ControlUse, EmbeddingUse, ImagePromptUse, LoraUse, controls_of
from ldm.spelling import squash

VERSION: Literal[4] = 4  # of the JSON form, and of the rules by which pictures are drawn
# Fields that a pipeline notes of itself and its files: no argument of a drawing.
NOTED = (
    "image_sha256",
    "mask_image_sha256",
    "classifier_sha256",
    "loras",
    "embeddings",
    "model",
    "model_hash",
    "upscaling",
    "hires_upscaler_sha256",
    "refining",
    "safety_checker_sha256",
    "nsfw_content_detected",
    "not_kept",
    "version",
)
PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "target_prompt")
NESTED = ("upscaling", "hires", "refining")  # requests within one


class Request(Spelled):
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
    again under that (`ldm.pipeline.edit`); without an image, what `prompt` draws from the seed becomes that
    (`ldm.pipeline.steering.prompt_to_prompt`).

    Tags in the prompt, `<lora:name:0.8>`, leave it and become `loras`: None is those that the pipeline has.

    Raises `ldm.errors.UserError`, naming the field, its value and what is allowed.
    """

    prompts: ClassVar = PROMPTS

    prompt: Text = ""
    negative_prompt: Text | None = None  # None and "" differ in SDXL: zeros, or the encoding of no words
    prompt_2: Text | None = None  # for a second text encoder; None: as the first
    negative_prompt_2: Text | None = None
    target_prompt: Text | None = None  # what an edit makes of the image, which `prompt` tells
    prompt_grammar: Marks | None = None  # what marks in prompts mean
    drawn_as: DrawnAs | None = (
        None  # words of prompts, with what is drawn for each; None: by the model's table
    )
    height: Side | None = None  # pixels
    width: Side | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Scale | None = None
    guidance: str | None = None  # by name, with options: "apg:eta=0+interval:0.2,0.8"; None: plain
    guidance_rescale: Fraction = 0.0
    guidance_interval: Interval | None = None  # shares of the timesteps between which there is guidance
    seeds: Seeds = (0,)
    noise: NoiseSource | None = None  # gpu: as CUDA draws it; None: cpu
    variation_seed: Seed | None = None  # towards whose noise the first noise is turned,
    variation_strength: Fraction | None = None  # and how far
    seed_resize: Size | None = None  # (height, width) of the picture whose noise is in the middle of this
    noise_seed_delta: Delta | None = None  # added to the seed for all noise but the first: A1111's ENSD
    sampler: str | None = None
    spacing: str | None = None
    eta: Fraction | None = None
    sampler_options: Options | None = None  # such as s_churn, order; rho is that of the spacing
    clip_skip: Layers | None = None
    timesteps: Levels | None = None
    sigmas: Levels | None = None
    image: Text | None = None  # path
    image_sha256: Digest | None = None
    mask_image: Text | None = None  # path; white is drawn anew, or what is painted on a transparent layer
    mask_image_sha256: Digest | None = None
    resize_mode: ResizeMode | None = None  # how an image of another shape becomes the picture's; None: resize
    strength: Fraction | None = None  # of the steps, the share that is drawn, from the image
    extend: Sides | None = None  # of the image: pixels to draw beyond its left, top, right and bottom
    mask_invert: bool | None = None  # what is done to the mask, in this order
    mask_grow: Growth | None = None  # pixels; below 0 it shrinks
    mask_blur: Radius | None = None  # standard deviation, in pixels, of the edge where both pictures mix
    soft_mask: bool | None = None  # greys are strengths: of the steps, the share that is drawn there
    mask_fill: MaskFill | None = None  # what lies beneath the mask at the beginning, if its noise shows it
    padding_mask_crop: Pixels | None = None  # only the mask and so many pixels around it are drawn
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
    control: Annotated[tuple[ControlUse, ...], Field(description="a list of controls")] | None = None
    image_prompts: (
        Annotated[tuple[ImagePromptUse, ...], Field(description="a list of IP-Adapters with their pictures")]
        | None
    ) = None  # None: those that the pipeline has
    model: Text | None = None  # for the record in the PNG: not used to find the model
    model_hash: Text | None = None
    upscaling: Request | None = None  # by a second model; prompt, seed and image are those of the picture
    hires_scale: Factor | None = None  # how many times as large it is drawn again ("hires fix"); None: 2
    hires_upscaler: Text | None = None  # what enlarges it before: a name of `ldm.images.enlarging`, or a file
    hires_upscaler_sha256: Digest | None = None
    hires: Request | None = None  # the second pass: what it says nothing of is as in the first
    tile_size: Side | None = None  # pixels: the U-Net sees windows of at most so many a side
    tile_overlap: Overlap | None = None  # pixels that neighbours share; None: half of a tile
    tiling: Axes | None = None  # axes along which the picture continues at its other edge
    fast: bool | None = None  # what is noted of it are the fields that it fills in (`ldm.request.fast`)
    cache_interval: CacheInterval | None = None  # DeepCache: the U-Net is computed whole in one of so many
    cache_branch_id: Branch | None = None  # the layer that the others begin at; None: 0, the last
    token_merging_ratio: Fraction | None = None  # of the tokens, the share that self-attention merges
    denoising_start: Fraction | None = None  # diffusers' names: the share of the timesteps at which its
    denoising_end: Fraction | None = None  # latents begin, and at which it leaves them
    refiner_switch_at: Fraction | None = None  # the share at which a second model goes on
    watermark: Watermark = None  # by whose key the finished picture is marked (`ldm.images.watermark`)
    transparent: bool | None = None  # without its plain background (`ldm.images.keying`)
    safety_checker_sha256: Digest | None = None  # what looked at the finished picture,
    nsfw_content_detected: bool | None = None  # and whether it was flagged, and so is black
    freeu: Factors | None = None  # b1, b2, s1, s2 (`ldm.pipeline.steering.freeu`)
    cross_replace_steps: Fraction | None = None  # of an edit between two prompts: of the steps, the share
    self_replace_steps: Fraction | None = None  # in which it attends to words, and to itself, as before
    word_weights: Options | None = None  # of its target's words
    regions: Regions = None  # areas with prompts of their own; the rest of the picture shows `prompt`
    refining: Request | None = None  # by that; prompt, seed, sampler and steps are those of the picture
    not_kept: Annotated[tuple[Text, ...], Field(description="a list of names")] = ()
    version: Literal[1, 2, 3, 4] = VERSION  # 1: drawn by the rules of before, `ldm.pipeline.deciding.before`

    @property
    def is_old(self) -> bool:
        """Whether it is of a picture that was drawn by the rules of version 1."""
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
        second = [self.prompt_2 or self.prompt, self.negative_prompt_2 or negative, *target]
        if self.drawn_as:
            return [self.told(text) for text in first], [self.told(text) for text in second]
        return first, second

    def told(self, text: str) -> str:
        """A text of its prompts as encoders read it: other words in the place of those in `drawn_as`."""
        return as_drawn(text, self.drawn_as or ())

    @property
    def is_steered(self) -> bool:
        """Whether anything is asked of `ldm.pipeline.steering`."""
        return any(getattr(self, name) is not None for name in STEERING)

    @property
    def has_images(self) -> bool:
        """Whether it names a picture to draw from, or asks something of one."""
        return self.image is not None or self.mask_image is not None or self.changes_mask is not None

    @property
    def changes_mask(self) -> str | None:
        """The first field that says what is done to a mask, or to the picture beneath it; None if none is."""
        return next((name for name in OF_MASKS if getattr(self, name) not in (None, False)), None)

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
    def region_scripts(self) -> tuple[Script, ...]:
        """What regions say over the steps. Raises UserError for one that is composed."""
        scripts = tuple(read_script(self.told(each.prompt), self.grammar) for each in self.regions or ())
        for each in scripts:
            each.check(self.grammar)
            if each.shares != (1.0,):
                raise UserError("a region shows one prompt: write AND in the prompt, or give another region")
        return scripts

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

    @property
    def settings(self) -> dict[str, Any]:
        """What the requests of one job have alike."""
        return {**self.model_dump(exclude=OWN), "is an edit": self.target_prompt is not None}

    def check_given(self, given: Container[str]) -> None:
        """Raise UserError if this request is of a picture that more was `given` to than now."""
        lost = [name for name in self.not_kept if name not in given]
        if lost:
            files = " (images also by -i and --mask)" if {*lost} & {*IMAGES} else ""
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
        for name in ("hires", "refining"):  # which say what is other in them
            if (own := getattr(self, name)) is not None:
                fields[name] = own.model_dump(mode=mode, exclude_defaults=True)
                fields[name] |= {} if own.version == self.version else {"version": own.version}
        for each in (fields, *(fields.get(name, {}) for name in NESTED)):
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
                f"this request has version {short(version)}; this ldm reads versions 1 to {VERSION}"
            )
        for name in NESTED:
            if isinstance(fields.get(name), dict):
                fields[name] = {"version": version, **fields[name]}
        try:
            return cls(**fields)
        except RecursionError:
            raise UserError("this request holds one in one in one, too deep to be read") from None

    @field_validator("loras")
    @classmethod
    def _each_once(cls, loras: tuple[LoraUse, ...] | None) -> tuple[LoraUse, ...] | None:
        names = [use.name for use in loras or ()]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the LoRA {name} is given twice: give it once, with one weight")
        return loras or None

    @field_validator("control", mode="before")
    @classmethod
    def _each_control(cls, given: Any) -> Any:
        return controls_of(given)

    @model_validator(mode="after")
    def _marks_are_allowed(self) -> Self:
        self.scripts, self.region_scripts  # noqa: B018  # raise
        return self

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.variation_strength and self.variation_seed is None:
            raise UserError(
                "variation_strength is how far towards a variation_seed: give one (--variation-seed)"
            )
        if self.variation_seed is not None and self.variation_strength is None:
            raise UserError("variation_seed needs variation_strength, 0 to 1 (--variation-strength)")
        if self.timesteps is not None and self.sigmas is not None:
            raise UserError("give timesteps or sigmas, not both: each is a whole grid")
        return self

    @field_validator("timesteps", "sigmas")
    @classmethod
    def _falling(cls, levels: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if levels is not None and any(a <= b for a, b in itertools.pairwise(levels)):
            raise ValueError("not falling")
        return levels


OF_MASKS = ("extend", "mask_invert", "mask_grow", "mask_blur", "soft_mask", "mask_fill", "padding_mask_crop")
STEERING = (
    "target_prompt",
    "cross_replace_steps",
    "self_replace_steps",
    "word_weights",
    "freeu",
    "regions",
)
IMAGES = ("image", "mask_image")
OWN = {
    *PROMPTS,
    "drawn_as",
    "seeds",
    "embeddings",
    "variation_seed",
}  # in which requests of one job may differ


def field_named(name: str) -> str | None:
    """The field that a name means, as people spell it: "cfg scale", "steps"; None for no field."""
    names = SHORT | {squash(field): field for field in Request.model_fields}
    return names.get(squash(name))
