"""What steers a drawing from inside, decided once for a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.schedule import Grid
from ldm.errors import UserError
from ldm.pipeline.conditioning import Telling
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.model import Model
from ldm.pipeline.networks import is_compiled
from ldm.pipeline.steering.freeu import FreeU
from ldm.pipeline.steering.prompt_to_prompt import Swap, swap_of
from ldm.pipeline.steering.regions import areas_of
from ldm.request import Request


@dataclass(frozen=True, eq=False)
class Steering:
    """None is what is not asked for, and costs nothing."""

    areas: Tensor | None = None  # [K + 1, 1, h, w] shares of the prompt and of regions
    freeu: FreeU | None = None
    swap: Swap | None = None  # an edit between two prompts


UNSTEERED = Steering()


def steering_of(
    model: Model,
    requests: Sequence[Request],
    inputs: Inputs,
    telling: Telling,
    grid: Grid,
    has_image: bool,
) -> Steering:
    """Of resolved requests. Raises UserError for what cannot be."""
    first = requests[0]
    swaps = first.target_prompt is not None and not has_image
    if not swaps and first.freeu is None and not first.regions:
        return UNSTEERED
    if is_compiled(model.unet) and (swaps or first.freeu is not None):
        name = "target_prompt" if swaps else "freeu"
        raise UserError(f"{name} is not allowed with pipe.compiled(), which has no place for it: load anew")
    return Steering(
        areas_of(first, inputs, model.vae.downscale),
        None if first.freeu is None else FreeU(*first.freeu),
        swap_of(model, requests, telling, grid) if swaps else None,
    )
