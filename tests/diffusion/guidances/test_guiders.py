"""Guidances by name against diffusers' guiders, on the same outputs over several steps."""

import pytest
import torch
from diffusers import guiders

from ldm.diffusion.guidance import CFG
from ldm.diffusion.guidances.catalogue import read_guidance
from ldm.diffusion.guidances.chain import Chain
from ldm.diffusion.prediction import Prediction

SCALE, STEPS = 7.5, 8
LEVELS = [14.0, 9.0, 6.0, 3.0, 2.0, 1.0, 0.5, 0.2]
PAIRS = [
    tuple(torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(10 * k + i)) for i in range(2))
    for k in range(STEPS)
]
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(99))

# Ours -> diffusers' class and what it is made with. APG's scale counts from 0 in the paper's formula.
APG = "adaptive_projected_guidance"
PEERS = {
    "cfg": ("ClassifierFreeGuidance", {}),
    "cfg_rescale:0.7": ("ClassifierFreeGuidance", {"guidance_rescale": 0.7}),
    "cfg_zero_star:0": ("ClassifierFreeZeroStarGuidance", {"zero_init_steps": 0}),
    "tcfg": ("TangentialClassifierFreeGuidance", {}),
    "tcfg+cfg_rescale:0.5": ("TangentialClassifierFreeGuidance", {"guidance_rescale": 0.5}),
    "mambo:alpha=2": ("MagnitudeAwareGuidance", {"alpha": 2.0}),
    "apg:eta=0.3,r=15,momentum=-0.5,space=output": (
        "AdaptiveProjectedGuidance",
        {"eta": 0.3, f"{APG}_rescale": 15.0, f"{APG}_momentum": -0.5, "guidance_scale": SCALE - 1,
         "use_original_formulation": True},
    ),
    "apg_mix:eta=0.3,r=15,momentum=-0.5,space=output,first=3": (
        "AdaptiveProjectedMixGuidance",
        {"eta": 0.3, f"{APG}_rescale": 15.0, f"{APG}_momentum": -0.5, "guidance_scale": SCALE - 1,
         f"{APG}_scale": SCALE - 1, f"{APG}_start_step": 2, "use_original_formulation": True},
    ),
    "fdg:low=3,levels=2": ("FrequencyDecoupledGuidance", {"guidance_scales": [SCALE, 3.0]}),
    "fdg:low=3,levels=3": ("FrequencyDecoupledGuidance", {"guidance_scales": [SCALE, SCALE, 3.0]}),
}  # fmt: skip


@pytest.mark.parametrize("text", PEERS)
def test_equals_diffusers_guider(text):
    name, how = PEERS[text]
    if "Frequency" in name:
        pytest.importorskip("kornia")
    else:
        how = {"guidance_scale": SCALE, **how}
    guider, now = getattr(guiders, name)(**how), {}

    def predict(x, sigma, names):
        return {each: now[each] for each in names}

    chain = Chain(CFG(SCALE), read_guidance(text), tuple(LEVELS))
    denoise = chain(predict, Prediction.SAMPLE.x0 if "output" in text else Prediction.EPSILON.x0)
    for i, (cond, uncond) in enumerate(PAIRS):
        now |= {"cond": cond, "uncond": uncond}
        guider.set_state(i, STEPS, torch.tensor(0))
        if i == 0 and hasattr(guider, "momentum_buffer"):
            guider.prepare_inputs({"x": (cond, uncond)})
        pair = {"pred_cond": cond, "pred_uncond": uncond}
        if "Magnitude" in name:  # whose norms take two dimensions beside the batch's
            pair = {each: output.flatten(2) for each, output in pair.items()}
        want = guider.forward(**pair).pred.view_as(X)
        sigma = torch.tensor(LEVELS[i], dtype=torch.float64)
        want = want if "output" in text else X - sigma * want
        got = denoise(X, sigma).x0
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5, i


def test_zero_init_is_diffusers_on_velocities():
    """diffusers puts zeros in the output's place, whatever it means; of a v model that is v = 0."""
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=2)
    asked = []

    def predict(x, sigma, names):
        asked.append(float(sigma))
        return dict(zip(("cond", "uncond"), PAIRS[len(asked) + 1], strict=True))

    denoise = Chain(CFG(SCALE), read_guidance("cfg_zero_star:2"), tuple(LEVELS))(predict, Prediction.V.x0)
    for i in range(4):
        guider.set_state(i, STEPS, torch.tensor(0))
        cond, uncond = PAIRS[i]
        sigma = torch.tensor(LEVELS[i], dtype=torch.float64)
        want = Prediction.V.x0(guider.forward(pred_cond=cond, pred_uncond=uncond).pred, X, sigma)
        got = denoise(X, sigma).x0
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    assert asked == LEVELS[2:4]  # in still steps the network is not called
