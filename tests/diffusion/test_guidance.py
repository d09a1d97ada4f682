"""Classifier-free guidance, against diffusers' formula."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.diffusion.guidance import CFG, CFGPlusPlus, InstructPix2Pix, Limited
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.solvers import Denoised

COND, UNCOND, X = (
    torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(k)).double() for k in range(3)
)
SIGMA = torch.tensor(2.5, dtype=torch.float64)


class Network:
    """Answers with COND and UNCOND, and notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, sigma, branches):
        self.asked.append(branches)
        return {branch: {"cond": COND, "uncond": UNCOND}[branch] for branch in branches}


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.5, 7.5])
@pytest.mark.parametrize("prediction", Prediction)
def test_equals_diffusers(prediction, scale, rescale):
    network = Network()
    got = CFG(scale, rescale)(network, prediction.x0)(X, SIGMA)
    output = UNCOND + scale * (COND - UNCOND)
    output = rescale_noise_cfg(output, COND, guidance_rescale=rescale) if rescale else output
    want = prediction.x0(output, X, SIGMA)
    assert float((got.x0 - want).abs().max() / want.abs().max()) < 1e-12
    assert got.anchor is got.x0
    assert network.asked == [("uncond", "cond")]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scale_1_is_the_conditional_model(rescale):
    network = Network()
    got = CFG(1, rescale)(network, Prediction.EPSILON.x0)(X, SIGMA)
    assert torch.equal(got.x0, X - SIGMA * COND)
    assert network.asked == [("cond",)]


def test_rescaling_is_per_image():
    together = CFG(7.5, 0.7)(Network(), Prediction.SAMPLE.x0)(X, SIGMA).x0

    def second(x, sigma, branches):
        return {"cond": COND[1:2], "uncond": UNCOND[1:2]}

    assert torch.allclose(CFG(7.5, 0.7)(second, Prediction.SAMPLE.x0)(X[1:2], SIGMA).x0, together[1:2])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_instruct_pix2pix_has_a_scale_for_each(rescale):
    outputs = dict(zip(("cond", "image", "uncond"), (COND, X, UNCOND), strict=True))
    asked = []

    def network(x, sigma, branches):
        asked.append(branches)
        return {branch: outputs[branch] for branch in branches}

    got = InstructPix2Pix(7.5, 1.5, rescale)(network, Prediction.SAMPLE.x0)(X, SIGMA).x0
    want = UNCOND + 7.5 * (COND - X) + 1.5 * (X - UNCOND)
    want = rescale_noise_cfg(want, COND, guidance_rescale=rescale) if rescale else want
    assert torch.allclose(got, want, rtol=1e-12)
    assert asked == [("cond", "image", "uncond")]


def test_own_guidance():
    """Any callable will do; this one anchors on the unconditional x0, as CFG++ does."""

    def cfg_plus_plus(predict, to_x0):
        def denoise(x, sigma):
            outputs = predict(x, sigma, ("uncond", "cond"))
            uncond, cond = (to_x0(outputs[branch], x, sigma) for branch in ("uncond", "cond"))
            return Denoised(uncond + 0.6 * (cond - uncond), anchor=uncond)

        return denoise

    denoise = cfg_plus_plus(Network(), Prediction.SAMPLE.x0)
    sigmas = torch.tensor([2.5, 1.0], dtype=torch.float64)
    (step,) = SAMPLERS["ddim"].solver(denoise, X, sigmas, None)
    want = UNCOND + 0.6 * (COND - UNCOND) + (X - UNCOND) / 2.5
    assert torch.allclose(step.x, want, rtol=1e-12)


def test_cfg_plus_plus_renoises_with_the_unconditional_branch():
    """Chung et al. 2024, algorithm 2, in sigma space."""
    outputs = {"uncond": 0.2 * X, "cond": 0.5 * X - 1}
    branches = lambda x, sigma, names: {name: outputs[name] for name in names}  # noqa: E731
    denoise = CFGPlusPlus(0.6)(branches, lambda output, x, sigma: x - sigma * output)
    sigmas = torch.tensor([4.0, 1.0], dtype=torch.float64)
    (step,) = SAMPLERS["euler_cfg_pp"].solver(denoise, X, sigmas, None)
    eps = outputs["uncond"] + 0.6 * (outputs["cond"] - outputs["uncond"])
    assert torch.allclose(step.x, (X - 4 * eps) + 1 * outputs["uncond"], rtol=1e-12)


@pytest.mark.parametrize("base", [CFG(7.5, 0.7), CFGPlusPlus(0.6)])
def test_outside_of_an_interval_it_is_the_conditional_model(base):
    network, to_x0 = Network(), Prediction.EPSILON.x0
    limited = Limited(base, 1.0, 2.5)(network, to_x0)
    inside, plain = base(Network(), to_x0), CFG(1.0)(Network(), to_x0)
    for level, whole in ((3.0, False), (2.5, False), (2.4, True), (1.0, True), (0.9, False)):
        network.asked, sigma = [], torch.tensor(level, dtype=torch.float64)
        got, want = limited(X, sigma), (inside if whole else plain)(X, sigma)
        assert torch.equal(got.x0, want.x0)
        assert torch.equal(got.anchor, want.anchor)
        assert network.asked == [("uncond", "cond") if whole else ("cond",)]
