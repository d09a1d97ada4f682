"""Solvers against their published formulas, written plainly in float64."""

import functools
import itertools
import math

import pytest
import torch
from cheap_denoiser import LEVELS, NOISES, SCHEDULE, SameNoise, error, ours, x0_at
from scipy.integrate import quad

from ldm.diffusion.methods.churned import restart_levels
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.solvers import Denoised


def churned(kind, levels, s_churn, s_tmin, s_tmax, s_noise):
    """Karras et al. 2022, algorithm 2, with Euler, its line 8, or k-diffusion's midpoint."""
    x, noise, n = levels[0] * NOISES[0], SameNoise(), len(levels) - 1
    for t, t_next in itertools.pairwise(levels):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        if gamma:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * noise()
        d = (x - x0_at(x, t_hat)) / t_hat
        if kind == "euler" or t_next == 0:
            x = x + (t_next - t_hat) * d
        elif kind == "heun":
            x_next = x + (t_next - t_hat) * d
            x = x + (t_next - t_hat) * (d + (x_next - x0_at(x_next, t_next)) / t_next) / 2
        else:
            middle = math.exp((math.log(t_hat) + math.log(t_next)) / 2)
            between = x + (middle - t_hat) * d
            x = x + (t_next - t_hat) * (between - x0_at(between, middle)) / middle
    return x


@pytest.mark.parametrize(
    "values", [(0.0, 0.0, math.inf, 1.0), (2.0, 0.0, math.inf, 1.0), (40.0, 0.5, 6.0, 1.007)]
)
@pytest.mark.parametrize("kind", ["euler", "heun", "dpm2"])
def test_churn_is_algorithm_2(kind, values):
    options = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), values, strict=True))
    got = ours(kind, [*LEVELS, 0.0], **options)
    assert error(got, churned(kind, [*LEVELS, 0.0], **options)) < 1e-12


def two_s_ancestral(levels, eta):
    """k-diffusion's formula, of ``t = -log sigma``."""
    x, noise = levels[0] * NOISES[0], SameNoise()
    for s, s_next in itertools.pairwise(levels):
        up = min(s_next, eta * math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        down = math.sqrt(s_next**2 - up**2)
        first = x0_at(x, s)
        if down == 0:
            x = first
            continue
        h = math.log(s / down)
        middle = math.exp(-(-math.log(s) + h / 2))
        between = middle / s * x - math.expm1(-h / 2) * first
        x = down / s * x - math.expm1(-h) * x0_at(between, middle) + (noise() * up if up else 0)
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_2s_ancestral(eta):
    assert error(ours("dpmpp_2s_a", [*LEVELS, 0.0], eta=eta), two_s_ancestral([*LEVELS, 0.0], eta)) < 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [2, 3])
def test_dpmpp_3m_sde(order, eta):
    """k-diffusion's formulas, of orders 2 (its "heun") and 3."""
    levels, noise = [*LEVELS, 0.0], SameNoise()
    x, history, lengths = levels[0] * NOISES[0], [], []
    for s, s_next in itertools.pairwise(levels[:-1]):
        h = math.log(s / s_next)
        a = h * (eta + 1)
        history = [x0_at(x, s), *history]
        x = math.exp(-a) * x - math.expm1(-a) * history[0]
        phi_2 = math.expm1(-a) / a + 1
        if order == 3 and len(history) > 2:
            r0, r1 = lengths[0] / h, lengths[1] / h
            d10, d11 = (history[0] - history[1]) / r0, (history[1] - history[2]) / r1
            x = x + phi_2 * (d10 + (d10 - d11) * r0 / (r0 + r1))
            x = x - (phi_2 / a - 0.5) * (d10 - d11) / (r0 + r1)
        elif len(history) > 1:
            x = x + phi_2 * (history[0] - history[1]) / (lengths[0] / h)
        if eta:
            x = x + s_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise()
        lengths = [h, *lengths]
    name = "dpmpp_3m_sde" if order == 3 else "dpmpp_2m_sde_heun"
    assert error(ours(name, levels, eta=eta), x0_at(x, levels[-2])) < 1e-12


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_res_multistep(eta):
    """Zhang et al. 2023's weights ``b_1 = phi_1 - phi_2 / c_2``, ``b_2 = phi_2 / c_2``."""
    levels, noise = [*LEVELS, 0.0], SameNoise()
    x, old, old_down, before = levels[0] * NOISES[0], None, None, None
    for s, s_next in itertools.pairwise(levels[:-1]):
        up = min(s_next, eta * math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2))
        down = math.sqrt(s_next**2 - up**2)
        x0, h = x0_at(x, s), math.log(s / down)
        phi_1 = math.expm1(-h) / -h
        b_1, b_2 = phi_1, 0.0
        if old is not None:
            c_2 = (-math.log(before) + math.log(old_down)) / h
            phi_2 = (phi_1 - 1) / -h
            b_1, b_2 = phi_1 - phi_2 / c_2, phi_2 / c_2
        x = math.exp(-h) * x + h * (b_1 * x0 + b_2 * (x0 if old is None else old))
        x = x + up * noise() if up else x
        old, old_down, before = x0, down, s
    name = "res_multistep_a" if eta else "res_multistep"
    assert error(ours(name, levels), x0_at(x, levels[-2])) < 1e-12


@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def test_gradient_estimation(gamma):
    levels, old = [*LEVELS, 0.0], None
    x = levels[0] * NOISES[0]
    for s, s_next in itertools.pairwise(levels[:-1]):
        d = (x - x0_at(x, s)) / s
        x = x + (s_next - s) * (d if old is None else gamma * d + (1 - gamma) * old)
        old = d
    assert error(ours("gradient_estimation", levels, gamma=gamma), x0_at(x, levels[-2])) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde(order):
    """Cui et al. 2023, algorithm 3, with adaptive quadrature."""

    def f(s):
        return s * (math.exp(s**0.3) + 10)

    levels, noise = [*LEVELS, 0.0], SameNoise()
    x, x0s, slopes = levels[0] * NOISES[0], [], []
    for i, (s, s_next) in enumerate(itertools.pairwise(levels[:-1])):
        x0s = [x0_at(x, s), *x0s]
        r = f(s_next) / f(s)
        x = r * x + (1 - r) * x0s[0]
        if i > 0:
            slopes = [(x0s[0] - x0s[1]) / (s - levels[i - 1]), *slopes]
        if i > 0 and order > 1:
            x = x + (s_next - s + f(s_next) * quad(lambda u: 1 / f(u), s_next, s)[0]) * slopes[0]
        if i > 1 and order > 2:
            bend = (slopes[0] - slopes[1]) / ((s - levels[i - 2]) / 2)
            moment = quad(functools.partial(lambda u, s: (u - s) / f(u), s=s), s_next, s)[0]
            x = x + ((s_next - s) ** 2 / 2 + f(s_next) * moment) * bend
        x = x + math.sqrt(s_next**2 - s**2 * r**2) * noise()
    assert error(ours("er_sde", levels, order=order), x0_at(x, levels[-2])) < 1e-7


def test_ipndm_v_is_adams_bashforth_on_any_steps():
    """Zhang and Chen's weights of order 2 on uneven steps; those of order 4 on even ones are iPNDM's."""
    x, old = LEVELS[0] * NOISES[0], None
    for i, (s, s_next) in enumerate(itertools.pairwise(LEVELS)):
        d = (x - x0_at(x, s)) / s
        r = (s_next - s) / (s - LEVELS[i - 1]) if i else 0.0
        x = x + (s_next - s) * ((1 + r / 2) * d - r / 2 * (d if old is None else old))
        old = d
    assert error(ours("ipndm_v", LEVELS, order=2), x) < 1e-12
    even = [10.0 - k for k in range(10)]
    assert error(ours("ipndm_v", [*even, 0.0]), ours("ipndm", [*even, 0.0])) < 1e-12


# --- steps of one's own ------------------------------------------------------------------------------------


def adaptive(high, low, rtol, atol=0.0078, h=0.05):
    """k-diffusion's dpm_solver_adaptive of order 3, for one picture."""

    def eps(x, t):
        sigma = math.exp(-t)
        return (x - x0_at(x, sigma)) / sigma

    def at(t):
        return math.exp(-t)

    x = high * NOISES[0][:1]
    before, s, end, told = x, -math.log(high), -math.log(low), []
    while s < end - 1e-5:
        t = min(end, s + h)
        h_now = t - s
        e0 = eps(x, s)
        t1, t2 = s + h_now / 3, s + 2 * h_now / 3
        e1 = eps(x - at(t1) * math.expm1(h_now / 3) * e0, t1)
        low_x = x - at(t) * math.expm1(h_now) * e0 - at(t) * 1.5 * math.expm1(h_now) * (e1 - e0)
        g = 2 * h_now / 3
        u2 = x - at(t2) * math.expm1(g) * e0 - at(t2) * 2 * (math.expm1(g) / g - 1) * (e1 - e0)
        e2 = eps(u2, t2)
        euler = x - at(t) * math.expm1(h_now) * e0
        high_x = euler - at(t) * 1.5 * (math.expm1(h_now) / h_now - 1) * (e2 - e0)
        delta = torch.clamp(rtol * torch.maximum(low_x.abs(), before.abs()), min=atol)
        wrong = float(torch.linalg.norm((low_x - high_x) / delta)) / x.numel() ** 0.5
        factor = 1 + math.atan((1 / (wrong + 1e-8)) ** (1 / 3) - 1)
        if factor >= 0.81:
            before, x, s = low_x, high_x, t
            told.append(at(t))
        h *= factor
    return x, told


@pytest.mark.parametrize("rtol", [0.2, 0.05, 0.005])
def test_dpm_adaptive(rtol):
    sigmas = torch.tensor(LEVELS, dtype=torch.float64)
    x, told = adaptive(LEVELS[0], LEVELS[-1], rtol)
    solver = SAMPLERS["dpm_adaptive"].solver
    steps = list(
        solver(lambda x, s: Denoised(x0_at(x, s)), LEVELS[0] * NOISES[0][:1], sigmas, None, rtol=rtol)
    )
    assert [step.sigma for step in steps] == pytest.approx(told)
    assert error(steps[-1].x, x) < 1e-9
    reached = [sum(level >= step.sigma * (1 - 1e-6) for level in LEVELS[1:]) for step in steps]
    assert [step.i for step in steps] == [max(k - 1, 0) for k in reached]
    assert steps[-1].i == len(LEVELS) - 2


def test_dpm_adaptive_ends_where_the_state_is_no_number():
    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    x = torch.full((1, 1, 2, 2), math.nan)
    *_, step = SAMPLERS["dpm_adaptive"].solver(lambda x, s: Denoised(x), x, sigmas, None)
    assert step.x.isnan().all()


@pytest.mark.parametrize(("n", "times", "again"), [(20, 1, 9), (30, 1, 9), (40, 2, 10)])
def test_restart_goes_back(n, times, again):
    """AUTOMATIC1111's choice: as many steps, some of them again from 2 to 0.1 by Karras' spacing."""
    sigmas = SCHEDULE.grid(n, "karras", "restart").sigmas.tolist()
    pairs = restart_levels(sigmas)
    assert len(pairs) == n
    assert (pairs[0][0], pairs[-1][1]) == (sigmas[0], 0.0)
    back = [k for k in range(1, n) if pairs[k][0] > pairs[k - 1][1]]
    assert len(back) == times
    top, bottom = pairs[back[0]][0], pairs[back[0] - 1][1]
    assert top == pytest.approx(2.0, rel=0.4)
    assert bottom == pytest.approx(0.1, rel=0.4)
    segment = [top, *(pair[1] for pair in pairs[back[0] : back[0] + again])]
    high, low = top ** (1 / 7), bottom ** (1 / 7)
    ramp = [(high + k / again * (low - high)) ** 7 for k in range(again + 1)]
    assert segment == pytest.approx(ramp)
    x, noise, last = sigmas[0] * NOISES[0], SameNoise(), sigmas[0]
    for s, s_next in pairs:
        if s > last:
            x = x + math.sqrt(s**2 - last**2) * noise()
        d = (x - x0_at(x, s)) / s
        euler = x + (s_next - s) * d
        x = euler if s_next == 0 else x + (s_next - s) * (d + (euler - x0_at(euler, s_next)) / s_next) / 2
        last = s_next
    assert error(ours("restart", sigmas), x) < 1e-12


def test_restart_of_few_steps_is_heun():
    assert torch.equal(ours("restart", [*LEVELS, 0.0]), ours("heun", [*LEVELS, 0.0]))
