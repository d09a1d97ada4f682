"""What to draw, as a value: the `Request` that the command line, Python and a PNG's own metadata speak."""

from ldm.request.regions import Region
from ldm.request.request import (
    IMAGES,
    NOTED,
    OF_MASKS,
    OWN,
    PROMPTS,
    VERSION,
    Request,
    field_named,
)
from ldm.request.uses import ControlUse, EmbeddingUse, ImagePromptUse, LoraUse

__all__ = [
    "IMAGES",
    "NOTED",
    "OF_MASKS",
    "OWN",
    "PROMPTS",
    "VERSION",
    "ControlUse",
    "EmbeddingUse",
    "ImagePromptUse",
    "LoraUse",
    "Region",
    "Request",
    "field_named",
]
