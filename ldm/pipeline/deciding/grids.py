"""Where a sampler goes in the drawing of a resolved request: its grid, and the options of its solver."""

from __future__ import annotations

from typing import Any

from ldm.checkpoint.save import pipeline_class
from ldm.diffusion.samplers import Sampler
from ldm.diffusion.schedule import Grid
from ldm.errors import UserError
from ldm.pipeline.deciding import before
from ldm.pipeline.deciding.passes import cut
from ldm.pipeline.edit import invertible
from ldm.pipeline.model import Model
from ldm.request import Request

LCM = "LatentConsistencyModelPipeline"  # as diffusers names it


def grid_of(model: Model, request: Request, sampler: Sampler, has_image: bool) -> tuple[Grid, dict[str, Any]]:
    """The part of its grid that is drawn, and the keyword arguments of the sampler's solver.

    Raises UserError where nothing is left to draw, and for options that neither solver nor spacing takes.
    """
    n, spacing = request.num_inference_steps, request.spacing
    if request.timesteps or request.sigmas:
        n = spacing = None
    # As in diffusers: its pipeline for LCMs makes all steps within the strength, the others their last share.
    spread = spacing == "lcm" and not request.is_old and pipeline_class(model.parts) == LCM
    strength = 1.0 if request.strength is None or not spread else request.strength
    chosen, rho = chosen_options(request, sampler, spacing) if request.sampler_options else ({}, None)
    grid = model.schedule.grid(n, spacing, sampler, request.timesteps, request.sigmas, strength, rho)
    if request.is_old and spacing == "ays" and n is not None:
        grid = before.align_your_steps(model.schedule, sampler, n)
    grid = grid if spread else trim_to_strength(grid, request)
    if any(each is not None for each in (request.denoising_start, request.denoising_end, request.refining)):
        grid = cut(grid, request, sampler)
    if request.target_prompt is not None and has_image:
        grid = invertible(grid)
    return grid, chosen | options_of(request, sampler, grid)


def chosen_options(
    request: Request, sampler: Sampler, spacing: str | None
) -> tuple[dict[str, float], float | None]:
    """`sampler_options` of a request: the solver's keyword arguments, and ``rho`` of its spacing or None.

    Raises UserError for what neither takes.
    """
    asked: dict[str, float] = dict(request.sampler_options or ())
    rho = asked.pop("rho", None)
    if rho is not None and (spacing is None or rho <= 0):
        raise UserError(f"sampler option rho={rho:g} is not allowed: it is above 0, and of a spacing")
    return sampler.chosen(asked), rho


def options_of(request: Request, sampler: Sampler, grid: Grid) -> dict[str, Any]:
    """Keyword arguments of the sampler's solver, but for the request's own options."""
    options: dict[str, Any] = {}
    if sampler.takes_eta and request.eta is not None:
        options["eta"] = request.eta
    if grid.orders and not request.is_old:
        options["orders"] = grid.orders
    if sampler.takes_variance:
        options["variance"] = grid.schedule.variance
    if sampler.takes_times:
        options["times"] = grid
    return options


def trim_to_strength(grid: Grid, request: Request) -> Grid:
    """The part of a grid that is drawn: its last `strength`. Raises UserError where that is nothing."""
    skipped = len(grid.timesteps) - request.num_steps
    if request.strength is None or skipped == 0:
        return grid
    if request.num_steps == 0:
        raise UserError(
            f"strength {request.strength:g} of {len(grid.timesteps)} steps leaves none: give more of either"
        )
    return grid.last(request.num_steps)
