"""What draws: a model, and what gives another one."""

from ldm.pipeline.model.model import Model

__all__ = ["Model"]
