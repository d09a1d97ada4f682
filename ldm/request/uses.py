"""What a request says of the files that it uses: by which name, how, and which file it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ldm.errors import UserError
from ldm.request.fields import Checked, Digest, Fraction, Scale, Text, short
from ldm.spelling import squash

# How a control and the prompt share a picture, by AUTOMATIC1111's names and diffusers' guess mode.
_MODES = {
    **dict.fromkeys(("0", "balanced"), "balanced"),
    **dict.fromkeys(("1", "prompt", "mypromptismoreimportant"), "prompt"),
    **dict.fromkeys(("2", "control", "controlnetismoreimportant"), "control"),
    **dict.fromkeys(("3", "guess", "guessmode"), "guess"),
}
ControlMode = Annotated[
    Literal["balanced", "prompt", "control", "guess"],
    BeforeValidator(lambda given: _MODES.get(squash(str(given)), given)),
    Field(description="balanced, prompt, control or guess"),
]

Several = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
    Field(description="a path, or a list of paths"),
]


class LoraUse(Checked):
    """An adapter by its name, how strongly it acts, and which file it was."""

    name: Text
    weight: Scale = 1.0  # on the U-Net
    text_weight: Scale | None = None  # on the text encoders; None: the same
    sha256: Digest | None = None


class EmbeddingUse(Checked):
    """A textual inversion by the word that it is written as, and which file it was."""

    name: Text
    sha256: Digest


DEPTH = "depth"  # the model of a use that is a depth model's own input


class ControlUse(Checked):
    """A network that shows the model a picture: which, of what, how strongly, and in which steps."""

    model: Text  # folder, file or hub name
    sha256: Digest | None = None  # of its weights
    image: Text | None = None  # path; None: of the picture that is drawn from, or given in memory
    image_sha256: Digest | None = None
    preprocess: Text | None = None  # a name of `ldm.preprocess`, with options: canny:low=50:high=120
    resize: Annotated[Literal["stretch", "crop"], Field(description="stretch or crop")] = "stretch"
    scale: Scale = 1.0
    start: Fraction = 0.0  # shares of the steps between which it acts
    end: Fraction = 1.0
    mode: ControlMode = "balanced"
    mask: Text | None = None  # path; white is where it acts
    mask_sha256: Digest | None = None
    type: Text | None = None  # of a union model: what kind of picture it is

    @model_validator(mode="after")
    def _in_order(self) -> ControlUse:
        if self.start >= self.end:
            raise UserError(
                f"a control from start {self.start:g} to end {self.end:g} never acts: start is first"
            )
        return self


def controls_of(given: Any) -> Any:
    """A list of `ControlUse`, or one alone, of their fields; None for none. Raises UserError."""
    if given is None or isinstance(given, str):
        return given
    several = [given] if isinstance(given, Mapping | ControlUse) else list(given)
    for each in several:
        if not isinstance(each, Mapping | ControlUse):
            raise UserError(f"control {short(each)} is not allowed: give fields such as model and image")
    return tuple(each if isinstance(each, ControlUse) else ControlUse(**each) for each in several) or None


def _in_blocks(scale: Any) -> Any:
    """{"down": {"block_2": [0, 1]}, "mid": 1} -> (("down.block_2", (0, 1)), ("mid", (1,)))."""
    if not isinstance(scale, Mapping):
        return scale
    found: list[tuple[str, Any]] = []
    for name, value in scale.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        found += [(f"{name}.{block}", own) for block, own in inner] if inner else [(name, value)]
    return tuple((name, value if isinstance(value, list | tuple) else (value,)) for name, value in found)


# By the blocks of the U-Net as diffusers names them, each transformer's own or one for all of a block.
BlockScales = tuple[tuple[str, tuple[Scale, ...]], ...]


class ImagePromptUse(Checked):
    """An IP-Adapter, the pictures that it shows, where and how strongly, and which files these were.

    `scale` is a number, or one for each transformer of a block, as diffusers has it: {"down": {"block_2":
    [0, 1]}, "up": {"block_0": [0, 1, 0]}}; blocks that are not named have 0.
    """

    adapter: Text  # a path or a hub name; or the name of one that the pipeline has
    images: Several = ()  # paths
    masks: Several = ()  # paths: white is where a picture acts; one, or one for each picture
    scale: Annotated[
        Scale | BlockScales,
        BeforeValidator(_in_blocks),
        Field(description='a finite number, or numbers by block: {"up": {"block_0": [0, 1, 0]}}'),
    ] = 1.0
    weight_name: Text | None = None  # of several files of a folder or hub name
    image_encoder: Text | None = None  # a folder; None: beside the adapter
    sha256: Digest | None = None
    images_sha256: tuple[Digest, ...] = ()
    masks_sha256: tuple[Digest, ...] = ()
    image_encoder_sha256: Digest | None = None
