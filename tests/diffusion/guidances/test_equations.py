"""Guidances by name against their equations, written out picture by picture in numpy's float64."""

import numpy as np
import pytest
import torch

from ldm.diffusion.guidance import CFG
from ldm.diffusion.guidances.catalogue import read_guidance
from ldm.diffusion.guidances.chain import Chain
from ldm.diffusion.prediction import Prediction

SCALE, SIGMA = 6.0, torch.tensor(2.5, dtype=torch.float64)
OUTPUTS = {
    name: torch.randn(3, 4, 13, 10, generator=torch.Generator().manual_seed(k)).double() + 0.1 * k
    for k, name in enumerate(("cond", "uncond", "empty", "cond:worse", "x"))
}
X = OUTPUTS["x"]
V = Prediction.V.x0


def ours(text, to_x0=V, scale=SCALE, rows=slice(None)):
    def predict(x, sigma, names):
        return {name: OUTPUTS[name][rows] for name in names}

    return Chain(CFG(scale), read_guidance(text))(predict, to_x0)(X[rows], SIGMA)


def x0_of(output, x):
    s = float(SIGMA)
    return (x - s * np.sqrt(s * s + 1) * output) / (s * s + 1)


def perp_neg(o, x):
    good, bad = o["cond"] - o["empty"], o["uncond"] - o["empty"]
    perpendicular = bad - (bad * good).sum() / (good * good).sum() * good
    return x0_of(o["empty"] + SCALE * (good - 1.5 * perpendicular), x)


def apg(o, x):
    cond, difference = x0_of(o["cond"], x), x0_of(o["cond"], x) - x0_of(o["uncond"], x)
    difference *= min(1, 20 / np.linalg.norm(difference))
    unit = cond / np.linalg.norm(cond)
    parallel = (difference * unit).sum() * unit
    return cond + (SCALE - 1) * (difference - parallel + 0.25 * parallel)


def tcfg(o, x):
    rows = np.stack([o["cond"].ravel(), o["uncond"].ravel()])
    first = np.linalg.svd(rows, full_matrices=False)[2][0]
    uncond = ((rows[1] @ first) * first).reshape(x.shape)
    return x0_of(uncond + SCALE * (o["cond"] - uncond), x)


def zero_star(o, x):
    uncond = (o["cond"] * o["uncond"]).sum() / (o["uncond"] ** 2).sum() * o["uncond"]
    return x0_of(uncond + SCALE * (o["cond"] - uncond), x)


def mambo(o, x):
    ratio = np.linalg.norm(o["cond"] - o["uncond"]) / np.linalg.norm(o["uncond"])
    scale = 1 + (SCALE - 1) * np.exp(-2 * ratio)
    return x0_of(o["uncond"] + scale * (o["cond"] - o["uncond"]), x)


def dynamic_thresholding(o, x):
    uncond, cond = x0_of(o["uncond"], x), x0_of(o["cond"], x)
    guided, mimic = (uncond + scale * (cond - uncond) for scale in (SCALE, 2.0))
    out = []
    for channel, smaller in zip(guided, mimic, strict=True):
        far = np.abs(smaller - smaller.mean()).max()
        top = max(far, np.quantile(np.abs(channel - channel.mean()), 0.9))
        out.append(channel.mean() + np.clip(channel - channel.mean(), -top, top) / top * far)
    return np.stack(out)


def autoguidance(o, x):
    return x0_of(o["cond:worse"] + SCALE * (o["cond"] - o["cond:worse"]), x)


def blurred(plane):
    padded = np.pad(plane, 2, mode="reflect")
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    rows = np.stack([np.convolve(row, kernel, "valid") for row in padded])
    return np.stack([np.convolve(column, kernel, "valid") for column in rows.T]).T


def resized(plane, size):
    """Bilinear, pixels' centres kept."""
    for axis, (n, m) in enumerate(zip(plane.shape, size, strict=True)):
        at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, n - 1), at - low
        share = share[:, None] if axis == 0 else share
        plane = (1 - share) * plane.take(low, axis) + share * plane.take(high, axis)
    return plane


def fdg(o, x):
    out = []
    for cond, uncond in zip(o["cond"], o["uncond"], strict=True):
        d = cond - uncond
        low = blurred(resized(resized(blurred(d), (6, 5)), d.shape))
        out.append(uncond + SCALE * (d - low) + 2.0 * low)
    return x0_of(np.stack(out), x)


EQUATIONS = {
    "perp_neg:1.5": perp_neg,
    "apg:eta=0.25,r=20": apg,
    "tcfg": tcfg,
    "cfg_zero_star:0": zero_star,
    "mambo:2": mambo,
    "dynamic_thresholding:2,0.9": dynamic_thresholding,
    "autoguidance": autoguidance,
    "fdg:low=2": fdg,
}


@pytest.mark.parametrize("text", EQUATIONS)
def test_is_its_equation_for_each_picture(text):
    got = ours(text)
    assert got.anchor is got.x0
    for k in range(len(X)):
        o = {name: output[k].numpy().copy() for name, output in OUTPUTS.items()}
        want = torch.from_numpy(EQUATIONS[text](o, o["x"]))
        assert float((got.x0[k] - want).abs().max() / want.abs().max()) < 1e-11
        alone = ours(text, rows=slice(k, k + 1)).x0[0]
        assert float((alone - want).abs().max() / want.abs().max()) < 1e-11


@pytest.mark.parametrize("to_x0", [each.x0 for each in Prediction])
def test_apg_that_keeps_all_is_cfg(to_x0):
    """And so are a threshold at the scale itself, one scale for all frequencies, and no damping."""
    want = CFG(SCALE)(lambda *_: OUTPUTS, to_x0)(X, SIGMA).x0
    for text in ("apg:eta=1", f"dynamic_thresholding:{SCALE}", f"fdg:low={SCALE}", "mambo:alpha=0", "cfg"):
        got = ours(text, to_x0).x0
        assert float((got - want).abs().max() / want.abs().max()) < 1e-12, text


def test_momentum_is_of_one_drawing():
    chain = Chain(CFG(SCALE), read_guidance("apg:eta=0,momentum=-0.5"))
    predict, sigma = (lambda *_: OUTPUTS), SIGMA
    one, other = chain(predict, V), chain(predict, V)
    first, second = one(X, sigma).x0, one(X, sigma).x0
    assert float((second - first).abs().max()) > 0.1
    assert torch.equal(other(X, sigma).x0, first)
    d = x0_of(OUTPUTS["cond"].numpy(), X.numpy()) - x0_of(OUTPUTS["uncond"].numpy(), X.numpy())
    cond = x0_of(OUTPUTS["cond"].numpy(), X.numpy())
    for k in range(len(X)):
        unit = cond[k] / np.linalg.norm(cond[k])
        across = d[k] * 0.5 - (0.5 * d[k] * unit).sum() * unit  # d - 0.5 d
        want = torch.from_numpy(cond[k] + (SCALE - 1) * across)
        assert torch.allclose(second[k], want, rtol=1e-10, atol=1e-12)


def test_cfg_plus_plus_anchors_on_the_branch_without_text():
    got = ours("cfgpp:0.6")
    want = OUTPUTS["uncond"] + 0.6 * (OUTPUTS["cond"] - OUTPUTS["uncond"])
    assert torch.allclose(got.x0, V(want, X, SIGMA), rtol=1e-12)
    assert torch.equal(got.anchor, V(OUTPUTS["uncond"], X, SIGMA))
