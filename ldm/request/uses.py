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
