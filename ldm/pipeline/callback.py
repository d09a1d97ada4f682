"""diffusers' `callback_on_step_end`: what it may see of a batch, and replace from one step to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import CFG, ClassifierGuidance, InstructPix2Pix, Limited
from ldm.diffusion.guidances.chain import Chain
from ldm.diffusion.solvers import Step
from ldm.diffusion.variance import LearnedVariance
from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.pipeline.deciding.prepare import completed, guidance_of
from ldm.pipeline.job import Batch, Job
from ldm.pipeline.sample import Change, texts_of

# (pipeline, step, timestep, {"latents": ...}) -> None, or what to replace: {"latents": ...}
Callback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]

# Name -> the field of a Conditioning, and the branch; None: all that guidance asks for, in diffusers' order.
TEXTS: Mapping[str, tuple[str, str | None]] = {
    "prompt_embeds": ("tokens", None),
    "negative_prompt_embeds": ("tokens", "uncond"),
    "add_text_embeds": ("pooled", None),
    "negative_pooled_prompt_embeds": ("pooled", "uncond"),
    "add_time_ids": ("time_ids", None),
}
SHOWN = ("latents", "guidance_scale", *TEXTS)


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for what a callback cannot see."""
    for name in names:
        if name not in SHOWN:
            raise UserError(f"a callback cannot see {name!r}: it may ask for {', '.join(SHOWN)}")


class Watch:
    """The callback of one batch, as what `draw_batch` calls after each step."""

    def __init__(
        self, pipe: Any, job: Job, batch: Batch, callback: Callback, names: Sequence[str] = ("latents",)
    ) -> None:
        self.pipe, self.job, self.batch, self.callback, self.names = pipe, job, batch, callback, names
        self.guidance_scale = job.request.guidance_scale
        self.stopped = False

    @cached_property
    def texts(self) -> dict[str, Conditioning]:
        """What the branches have of the texts now."""
        return texts_of(self.job, self.batch, 0)[0]

    @property
    def branches(self) -> tuple[str, ...]:
        """Those that guidance asks for, in the order in which diffusers has them in one tensor."""
        guidance = self.job.guidance
        while isinstance(guidance, ClassifierGuidance | LearnedVariance | Limited):
            guidance = guidance.base
        if isinstance(guidance, CFG | Chain | InstructPix2Pix):
            return tuple(name for name in guidance.branches if name in ("cond", "image", "uncond"))
        return ("uncond", "cond")

    def __call__(self, step: Step) -> Change:
        if step.i >= len(self.job.grid.timesteps):  # of what goes on from the first pass
            return Change()
        timestep = float(self.job.grid.timesteps[step.i])
        given = {name: self._show(name, step) for name in self.names}
        try:
            answer = self.callback(self.pipe, step.i, timestep, given) or {}
        except StopIteration:
            answer = {"stop": True}
        for name in answer:
            if name not in (*SHOWN, "stop"):
                raise UserError(f"a callback cannot replace {name!r}: it may return {', '.join(SHOWN)}, stop")
        if "latents" in answer:
            old = step.latents
            new = _checked("latents", answer["latents"], old, len(old))
            if not torch.equal(new, old):  # also where it was changed in place
                step.x.copy_(new * math.hypot(step.sigma, 1))
        self.stopped = bool(answer.get("stop"))
        return Change(self._texts(answer), self._guidance(answer), self.stopped)

    def _show(self, name: str, step: Step) -> Any:
        if name == "latents":
            return step.latents
        return self.guidance_scale if name == "guidance_scale" else self._text(name)

    def _text(self, name: str) -> Tensor:
        field, branch = TEXTS[name]
        of = self.branches if branch is None else (branch,)
        rows = [getattr(self.texts[each], field) for each in of]
        if rows[0] is None:
            raise UserError(f"this model has no {name}: a callback cannot see it")
        return torch.cat(rows)

    def _texts(self, answer: Mapping[str, Any]) -> dict[str, Conditioning]:
        """The branches whose texts are others from now on."""
        changed = set()
        for name in (each for each in TEXTS if each in answer):
            old, (field, branch) = self._text(name), TEXTS[name]
            new = _checked(name, answer[name], old, len(old), len(self.batch))
            if branch is not None:
                without = [each for each in self.branches if each != "cond"] or [branch]
                replaced = [(each, new) for each in without]
            elif len(new) == len(self.batch):  # the texts alone, as guidance that is off asks for them
                replaced = [("cond", new)]
            else:
                replaced = list(zip(self.branches, new.chunk(len(self.branches)), strict=True))
            for each, rows in replaced:
                if not torch.equal(rows, getattr(self.texts[each], field)):
                    self.texts[each] = replace(self.texts[each], **{field: rows})
                    changed.add(each)
        return {each: self.texts[each] for each in changed}

    def _guidance(self, answer: Mapping[str, Any]) -> Any:
        """The guidance of another scale; None if it is the same."""
        scale = answer.get("guidance_scale", self.guidance_scale)
        if scale == self.guidance_scale:
            return None
        self.guidance_scale = scale
        asked, model = self.job.request.replace(guidance_scale=scale), self.job.model
        return completed(guidance_of(asked, model, self.job.grid), asked, model)


def _checked(name: str, new: Any, old: Tensor, *rows: int) -> Tensor:
    """What a callback returned, as the tensor it replaces is. Raises UserError for another shape."""
    if not isinstance(new, Tensor) or new.shape[1:] != old.shape[1:] or len(new) not in rows:
        shape = list(new.shape) if isinstance(new, Tensor) else f"{new!r:.60}"
        raise UserError(f"a callback returned {shape} as {name}: give a tensor of {list(old.shape)}")
    return new.to(old)
