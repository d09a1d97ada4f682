"""What a request's `fast` fills in: what draws about twice as fast for at most two points (docs/fast.md)."""

from __future__ import annotations

from typing import Any

FEW = 20  # steps, below which fewer cost less than steps that are computed in part
DISTILLED = 8  # steps, below which none can be left out
WHOLE = 10  # steps that are to be computed whole
# Samplers that add noise at each step -> those that draw in fewer steps without it.
WITHOUT_NOISE = {"dpmpp_2m_sde": "dpmpp_2m"}
LONGEST = 5  # interval: Ma et al. 2024, "DeepCache", have 2.3 times the speed from it, in 50 steps


def fast_fields(steps: int, sampler: str | None = None) -> dict[str, Any]:
    """Fields of a `Request`, for a model that draws in so many steps.

    sampler: the model's own, where another may be taken.
    """
    if steps < DISTILLED:
        return {}
    if steps < FEW and sampler in WITHOUT_NOISE:
        return {"num_inference_steps": steps * 3 // 8, "sampler": WITHOUT_NOISE[sampler]}
    if steps < FEW:
        return {"num_inference_steps": (steps + 1) // 2}
    return {"cache_interval": min(LONGEST, steps // WHOLE), "guidance_interval": (0.0, 0.75)}
