"""Likelihood and bound against mixtures whose density is known."""

import math

import pytest
import torch
from mixture import LINE, PLANE

from ldm.diffusion.bound import bits_per_dim, bound
from ldm.diffusion.likelihood import log_likelihood
from ldm.diffusion.noise import Noise
from ldm.diffusion.solvers import Denoised
from ldm.errors import UserError

LOW, HIGH = 1e-3, 1e4
EXACT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize("mixture", [LINE, PLANE])
def test_the_odes_likelihood_is_the_truth(mixture):
    for x in mixture.sample(3, seed=1).split(1):
        found = log_likelihood(mixture.denoise, x, LOW, HIGH, trace="exact", **EXACT)
        truth = float(bits_per_dim(-mixture.log_prob(x), mixture.dims))
        assert abs(found.bits_per_dim - truth) < 1e-3
        assert found.std_error == 0


def test_wrong_density_is_seen():
    """The flow of another mixture gives another likelihood: the figure above is no accident."""
    x = LINE.sample(1)
    shifted = log_likelihood(lambda x, s: LINE.denoise(x + 0.3, s), x, LOW, HIGH, trace="exact", **EXACT)
    assert abs(shifted.bits_per_dim - float(bits_per_dim(-LINE.log_prob(x), 1))) > 0.01


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_hutchinsons_mean_is_the_exact_trace(trace):
    x = PLANE.sample(1, seed=4)
    exact = log_likelihood(PLANE.denoise, x, 0.05, 50.0, trace="exact")
    probes = log_likelihood(PLANE.denoise, x, 0.05, 50.0, trace=trace, probes=256)
    assert 0 < probes.std_error < 1
    assert abs(probes.nats - exact.nats) < 4 * probes.std_error + 1e-6


def test_rademacher_is_exact_where_the_jacobian_is_diagonal():
    """Of one number v^2 is 1: no error, and the spread says so."""
    x = LINE.sample(1)
    exact = log_likelihood(LINE.denoise, x, 0.05, 50.0, trace="exact", **EXACT)
    found = log_likelihood(LINE.denoise, x, 0.05, 50.0, probes=3, **EXACT)
    assert found.nats == pytest.approx(exact.nats, rel=1e-5)
    assert found.std_error < 1e-6
    assert log_likelihood(LINE.denoise, x, 0.05, 50.0, probes=1).std_error == math.inf


def test_the_bound_lies_above_the_truth_and_closes():
    x = PLANE.sample(1, seed=2)
    truth, many = float(-PLANE.log_prob(x)), x.expand(2000, -1, -1, -1)
    gaps = []
    for n in (10, 40, 160):
        sigmas = torch.logspace(math.log10(80), math.log10(0.01), n, dtype=torch.float64)
        total = sum(term.nats for term in bound(PLANE.denoise, many, sigmas, Noise(range(2000))))
        error = float(total.std() / 2000**0.5)
        gaps.append(float(total.mean()) - truth)
        assert gaps[-1] > -3 * error
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_terms_of_the_bound_in_closed_form():
    """x_0 = 0 and a network that says 0.1: each step is half the difference of SNR times 0.01."""
    x0 = torch.zeros(1, 1, 1, 3, dtype=torch.float64)
    sigmas = torch.tensor([4.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    terms = list(bound(lambda x, sigma: Denoised(torch.full_like(x, 0.1)), x0, sigmas, Noise([0])))
    assert [term.name for term in terms] == ["prior", "step", "step", "decoder"]
    prior, first, second, decoder = (float(term.nats) for term in terms)
    assert prior == pytest.approx(3 * 0.5 * (16 / 17 - 1 - math.log(16 / 17)), rel=1e-9)
    assert first == pytest.approx(3 * 0.5 * (1 / 4 - 1 / 16) * 0.01, rel=1e-9)
    assert second == pytest.approx(3 * 0.5 * (1 / 0.25 - 1 / 4) * 0.01, rel=1e-9)
    variance = 0.25 / 1.25
    assert decoder == pytest.approx(3 * 0.5 * (0.01 / variance + math.log(2 * math.pi * variance)), rel=1e-9)


def test_a_tolerance_that_is_never_met_ends():
    """A field that is rough at any scale: no step is small enough."""
    rough = torch.Generator().manual_seed(0)
    with pytest.raises(
        UserError, match=r"stopped at .* after 3000 evaluations: give a larger tolerance than 1e"
    ):
        log_likelihood(
            lambda x, s: Denoised(x * torch.rand(1, generator=rough, dtype=torch.float64)),
            LINE.sample(1),
            LOW,
            HIGH,
            **EXACT,
        )
    with pytest.raises(UserError, match="the exact trace of 4097 dimensions needs as many gradients a step"):
        log_likelihood(LINE.denoise, torch.zeros(1, 1, 1, 4097), LOW, HIGH, trace="exact")


def test_what_has_no_likelihood_is_told():
    with pytest.raises(UserError, match="one picture of finite numbers"):
        log_likelihood(LINE.denoise, torch.full((1, 1, 1, 1), torch.nan), LOW, HIGH)
    with pytest.raises(UserError, match=r"stopped at noise level .* of"):
        log_likelihood(
            lambda x, s: Denoised(x * torch.nan if s > 1 else x), LINE.sample(1), LOW, HIGH, trace="exact"
        )
