"""The part of a recipe that says how the loss is made, and what is drawn anew where inpainting is learnt."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm.train.recipe import Finite, Section, Shape


class LossSection(Section):
    """How the loss is made; the defaults are the plain one of Ho et al. 2020, equation 14.

    What the U-Net predicts is the model's own: `load_parts` takes another `prediction_type`, and it is saved
    with it.
    """

    timestep_sampling: Literal["uniform", "logit_normal", "importance", "loss_second_moment"] = "uniform"
    """how often each noise level is trained on; loss_second_moment, for variance bound: by its last losses"""
    logit_mean: Finite = 0.0
    """logit_normal: mean of logit(t / T); above 0, more noise"""
    logit_std: Finite = Field(1.0, gt=0)
    """logit_normal: its standard deviation"""
    timestep_histogram: tuple[Annotated[Finite, Field(gt=0)], ...] = ()
    """importance: how often, in equal bins over 0..T"""
    min_timestep: int = Field(0, ge=0)
    """train from this timestep"""
    max_timestep: int | None = Field(None, ge=1)
    """to the one before this; by default all"""

    noise_offset: Finite = Field(0.0, ge=0)
    """0.05 to 0.1 teaches an eps model dark and bright pictures"""
    multires_noise_discount: Finite = Field(0.0, ge=0, lt=1)
    """pyramid noise: the weight of each coarser level"""
    input_perturbation: Finite = Field(0.0, ge=0)
    """more noise in the input than in the target; 0.1 is recommended"""

    loss_type: Literal["l2", "huber"] = "l2"
    """huber: a broken picture weighs less"""
    huber_c: Finite = Field(0.1, gt=0)
    """huber: errors above it count linearly"""
    snr_gamma: Finite | None = Field(None, gt=0)
    """min-SNR weighting of noise levels; 5 is recommended"""

    variance: Shape[Literal["none", "hybrid", "bound"]] = "none"
    """the U-Net learns the variance of DDPM's steps too, by the variational bound; hybrid: all else by the
    loss above; bound: all else by the bound too"""
    variance_weight: Finite = Field(0.001, ge=0)
    """hybrid: how much the bound counts"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.timestep_sampling == "importance") != bool(self.timestep_histogram):
            raise ValueError("timestep_sampling: importance and timestep_histogram go together: give both")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"max_timestep {self.max_timestep} must be above min_timestep {self.min_timestep}"
            )
        if self.timestep_sampling == "loss_second_moment" and self.variance != "bound":
            raise ValueError("timestep_sampling: loss_second_moment is for variance: bound")
        return self

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        """The bound is of unit noise, measures errors in its own way, and needs each timestep at times."""
        fixed = {
            "noise_offset": 0.0,
            "multires_noise_discount": 0.0,
            "input_perturbation": 0.0,
            **({"loss_type": "l2", "snr_gamma": None} if self.variance == "bound" else {}),
        }
        if self.variance != "none":
            for name, value in fixed.items():
                if getattr(self, name) != value:
                    raise ValueError(f"variance: {self.variance} does not go with {name}: leave it out")
            if self.timestep_sampling == "logit_normal":
                raise ValueError(f"variance: {self.variance} does not go with logit_normal: take uniform")
        return self


class MaskSection(Section):
    """Which share of the masks of inpainting is of each kind.

    A quarter cover the whole picture, as in the training of stable-diffusion-inpainting (its model card): the
    model goes on drawing from the prompt alone.
    """

    rectangles: float = Field(0.35, ge=0)  # one to three
    strokes: float = Field(0.35, ge=0)  # one to three, of a round brush
    whole: float = Field(0.25, ge=0)  # all is drawn anew
    none: float = Field(0.05, ge=0)  # nothing is

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = math.fsum(self.shares)
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"rectangles, strokes, whole and none sum to {total:g}: they are shares of 1")
        return self

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """Of rectangles, strokes, whole, none."""
        return self.rectangles, self.strokes, self.whole, self.none
