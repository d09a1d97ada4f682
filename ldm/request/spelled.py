"""A request's fields as people spell them: samplers and guidances by any of their names, LoRAs as tags."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, model_validator

from ldm.errors import UserError
from ldm.prompts.tags import take_tags
from ldm.request.fields import Checked, short

# Shorter names of fields, and those of flags.
SHORT = {
    "seed": "seeds",
    "steps": "num_inference_steps",
    "ddimsteps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfgscale": "guidance_scale",
    "scale": "guidance_scale",
    "scheduler": "spacing",
    "scheduletype": "spacing",
    "denoising": "strength",
    "initimage": "image",
    "mask": "mask_image",
    "to": "target_prompt",
    "w": "width",
    "h": "height",
}


class Spelled(Checked):
    """Fields of a request, put into their one spelling before they are checked."""

    prompts: ClassVar[tuple[str, ...]]  # the names of its fields that are prompts

    @model_validator(mode="before")
    @classmethod
    def _canonical_names(cls, fields: Any) -> Any:
        if not isinstance(fields, dict | BaseModel):
            return fields  # no fields at all: pydantic says so
        fields = dict(fields)
        names = {name: fields.get(name) for name in ("sampler", "spacing")}
        for name, value in names.items():
            if value is not None and not isinstance(value, str):
                raise UserError(f"{name} {short(value)} is not allowed: it must be a name")
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
    def _canonical_guidance(cls, fields: Any) -> Any:
        given = fields.get("guidance") if isinstance(fields, dict) else None
        if given is None:
            return fields
        if not isinstance(given, str):
            raise UserError(f"guidance {short(given)} is not allowed: it must be a name, such as apg:eta=0")
        from ldm.diffusion.guidances.catalogue import canonical_guidance  # as above

        return {**fields, "guidance": canonical_guidance(given)}

    @model_validator(mode="before")
    @classmethod
    def _tags_are_loras(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        texts = {name: fields[name] for name in cls.prompts if isinstance(fields.get(name), str)}
        taken = {name: take_tags(text) for name, text in texts.items()}
        for name, (_, uses) in taken.items():
            if uses and name != "prompt":
                raise UserError(f"{name} has a <lora:...> tag: write it in the prompt, or give it by --lora")
        text, uses = taken.get("prompt", ("", []))
        if not uses or not isinstance(fields.get("loras") or (), list | tuple):
            return fields
        return {**fields, "prompt": text, "loras": [*(fields.get("loras") or ()), *uses]}
