"""Latent diffusion, text to image.

    import ldm
    pipe = ldm.load()
    pipe("a red sailboat on a calm sea at sunset", seed=1).images[0].save("boat.png")

Names are loaded when they are first used, so that `import ldm` is instant: torch takes a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm.version import __version__

if TYPE_CHECKING:
    from ldm.errors import UserError
    from ldm.pipeline import Pipeline, load
    from ldm.request import Request

__all__ = ["Pipeline", "Request", "UserError", "__version__", "load"]

_HOME = {
    "Pipeline": "ldm.pipeline",
    "Request": "ldm.request",
    "UserError": "ldm.errors",
    "load": "ldm.pipeline",
}


def __getattr__(name: str) -> Any:
    if (name.endswith(("Pipeline", "Scheduler")) and name not in _HOME) or name.startswith("AutoPipeline"):
        way = "ldm.load(MODEL) draws with every kind of model" if "Pipeline" in name else f'sampler="{name}"'
        raise ImportError(f"{name} is of diffusers: here, {way}")
    if name not in _HOME:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
