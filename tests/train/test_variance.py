"""The bound as a loss against the bound itself, its gradients, and timesteps drawn by their losses."""

import math

import pytest
import torch
from pydantic import ValidationError

from ldm.diffusion.bound import bits_per_dim, bound
from ldm.diffusion.forward import interpolated_log_variance, sigma_log_variances
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.solvers import Denoised
from ldm.train.loss import noisy_latents, timesteps_at
from ldm.train.loss_recipe import LossSection
from ldm.train.variance import ANY, KEPT, BoundTerms, LossHistory, Objective

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 4, 3, 3)


def schedule(steps=1000, zero=False, prediction="v_prediction"):
    config = {"_class_name": "DDPMScheduler", **SD, "num_train_timesteps": steps}
    return Schedule.from_config(config | {"rescale_betas_zero_snr": zero, "prediction_type": prediction})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(t):
    x0, noise = draw(len(t), *SHAPE[1:]), draw(len(t), *SHAPE[1:], seed=1)
    return {"x0": x0, "noise": noise, "input_noise": noise, "t": torch.tensor(t)}


def output(count, seed=2):
    return draw(count, 2 * SHAPE[1], *SHAPE[2:], seed=seed)


# --- terms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_terms_are_those_of_the_bound(prediction, zero):
    """Of every timestep of a short schedule: the sum of all is the bound without its prior."""
    ours = schedule(12, zero, prediction)
    batch, said = example(list(range(12))), output(12)
    objective = Objective(ours, LossSection(variance="bound"))
    terms, _ = objective(said, batch)
    sigmas = ours.sigma(torch.arange(11, -1, -1))

    def denoise(x, sigma):
        """In float64, of the same outputs."""
        t = int((ours.sigma(torch.arange(12)) == sigma).nonzero())
        mean, v = said[t : t + 1].double().chunk(2, dim=1)
        x0 = ours.prediction.x0(mean, x.double(), sigma)
        return Denoised(
            x0, log_variance=lambda s: interpolated_log_variance(v, *sigma_log_variances(sigma, s))
        )

    for t in range(12):
        own = batch["x0"][t : t + 1].double()

        def noise(like, *_, t=t):
            return batch["noise"][t : t + 1].double()

        _, *steps, decoder = bound(denoise, own, sigmas, noise)
        wanted = decoder if t == 0 else steps[11 - t]
        # Each timestep stands for all twelve.
        assert float(terms[t]) == pytest.approx(12 * float(bits_per_dim(wanted.nats, own.numel())), rel=1e-4)


def test_hybrid_is_both_and_only_the_variance_learns_by_the_bound():
    ours, t = schedule(), [0, 1, 40, 999]
    batch, given = example(t), output(4)
    losses, gradients = {}, {}
    for name, options in {
        "simple": LossSection(snr_gamma=5.0),
        "hybrid": LossSection(variance="hybrid", variance_weight=0.01, snr_gamma=5.0),
        "bound": LossSection(variance="bound"),
    }.items():
        said = given.clone().requires_grad_()
        losses[name], extra = Objective(ours, options)(said if name != "simple" else said[:, :4], batch)
        (gradients[name],) = torch.autograd.grad(losses[name].sum(), said)
        assert extra.keys() == (set() if name == "simple" else {"vlb"})
    assert torch.allclose(losses["hybrid"], losses["simple"] + 0.01 * losses["bound"], rtol=1e-5)
    mean, variance = slice(0, 4), slice(4, 8)
    for channels, wanted in ((mean, gradients["simple"]), (variance, 0.01 * gradients["bound"])):
        gap = (gradients["hybrid"] - wanted)[:, channels].abs().amax((1, 2, 3))
        assert bool((gap <= 1e-5 * wanted[:, channels].abs().amax()).all())
    moved = gradients["bound"].abs().amax((2, 3))
    assert bool((moved[:, mean] > 0).all()), "by the bound alone the mean learns too"
    assert bool((moved[1:, variance] > 0).all())
    assert float(moved[0, variance].max()) == 0, "the decoder's variance is fixed"


def test_at_its_least_the_bound_knows_the_true_variance():
    """v at which a step's gradient is 0, of a guess that is off by a known amount."""
    ours, t = schedule(), 300
    terms = BoundTerms(ours)
    x0 = draw(1, 4, 3, 3)
    guess = x0 + 0.8
    a_t, a_s = ours.alphas_cumprod[t], ours.alphas_cumprod[t - 1]
    share = a_s.sqrt() * (1 - a_t / a_s) / (1 - a_t)
    small = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
    large = 1 - a_t / a_s
    best = 2 * math.log1p(float((share * 0.8) ** 2 / small)) / math.log(float(large / small)) - 1
    v = torch.full_like(x0, best, requires_grad=True)
    (slope,) = torch.autograd.grad(terms(guess, v, x0, torch.tensor([t])).sum(), v)
    (before,) = torch.autograd.grad(terms(guess, v - 0.1, x0, torch.tensor([t])).sum(), v)
    assert float(slope.abs().max()) < 0.02 * float(before.abs().min())


# --- timesteps by their losses ---------------------------------------------------------------------------


def test_uniform_until_all_are_known_then_by_the_root_mean_square():
    """Nichol and Dhariwal 2021, equation 18, with improved-diffusion's share of uniform draws."""
    trained = torch.tensor([0.0, 0.25, 0.25, 0.5])
    history = LossHistory(trained)
    uniform = torch.tensor([0, 1, 1, 1]) / 3
    losses = {1: [float(k) for k in range(12)], 2: [5.0] * 10, 3: [0.5] * 11}
    for t, values in losses.items():
        assert torch.equal(history.probabilities(), uniform)
        for value in values:
            history.add(torch.tensor([t]), torch.tensor([value]))
    rms = torch.tensor([0.0] + [math.sqrt(sum(x**2 for x in losses[t][-KEPT:]) / KEPT) for t in (1, 2, 3)])
    wanted = (1 - ANY) * rms / rms.sum() + ANY * uniform
    assert torch.allclose(history.probabilities(), wanted, rtol=1e-6)
    history.add(torch.tensor([1, 1, 2]), torch.tensor([math.nan, 7.0, math.inf]))
    assert float(history.losses[1].max()) == 11.0
    assert history.count.tolist() == [0, 13, 10, 11], "what is not finite is not kept"


def test_timesteps_are_drawn_when_the_losses_are_known():
    """A batch made ahead holds no timesteps, so that when it was made does not matter."""
    ours = schedule(4)
    objective = Objective(ours, LossSection(variance="bound", timestep_sampling="loss_second_moment"))
    batch = objective.draw(20_000, torch.Generator().manual_seed(0))
    assert batch.keys() == {"u"}
    assert objective.timesteps(batch).bincount(minlength=4).tolist() == pytest.approx([5000] * 4, rel=0.1)
    for t, loss in enumerate((1.0, 2.0, 3.0, 4.0)):
        objective.history.add(torch.tensor([t] * KEPT), torch.tensor([loss] * KEPT))
    counts = objective.timesteps(batch).bincount(minlength=4)
    assert counts.tolist() == pytest.approx([2000, 4000, 6000, 8000], rel=0.1)


def test_the_estimate_of_the_bound_is_the_same_and_varies_less():
    """Equation 18: sum of L_t = E[L_t / p(t)] for any p, of least variance where p goes as L_t."""
    ours, count, rest = (
        schedule(50),
        4000,
        torch.arange(1, 50),
    )  # all but the decoder: its density has any sign
    x0, noise, said = draw(1, *SHAPE[1:]), draw(1, *SHAPE[1:], seed=1), output(1)
    estimates = {}
    for sampling in ("uniform", "loss_second_moment"):
        options = LossSection(variance="bound", timestep_sampling=sampling, min_timestep=1)
        objective = Objective(ours, options)
        each = [{"x0": x0, "noise": noise, "t": torch.tensor([t])} for t in rest]
        terms = torch.cat([torch.zeros(1), *(objective(said, batch)[0].detach() / 49 for batch in each)])
        for _ in range(KEPT if objective.history else 0):
            objective.history.add(rest, terms[1:])
        batch = objective.draw(count, torch.Generator().manual_seed(3))
        t = objective.timesteps(batch)
        p = objective.probabilities if objective.history is None else objective.history.probabilities()
        estimates[sampling] = terms[t] / p.float()[t]
        assert float(estimates[sampling].mean()) == pytest.approx(float(terms.sum()), rel=0.1)
    assert estimates["loss_second_moment"].std() < 0.05 * estimates["uniform"].std()


def test_looking_does_not_count_and_training_does():
    objective = Objective(schedule(4), LossSection(variance="bound", timestep_sampling="loss_second_moment"))
    objective.eval()(output(2), example([1, 2]))
    assert int(objective.history.count.sum()) == 0
    losses, said = objective.train()(output(2), example([1, 2]))
    assert objective.history.count.tolist() == [0, 1, 1, 0]
    assert torch.allclose(objective.history.losses[1:3, 0], losses.detach() / 4)
    assert float(said["vlb"]) == pytest.approx(float(losses.detach().mean()))
    assert objective.state_dict().keys() == {"history.losses", "history.count"}, "what a state must hold"


def test_the_outermost_u_stays_in_the_range():
    p = LossHistory(torch.tensor([0.0, 0.5, 0.5, 0.0])).probabilities()
    assert timesteps_at(p, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_half_precision_outputs_are_measured_in_fp32():
    objective = Objective(schedule(zero=True), LossSection(variance="hybrid"))
    batch, said = example([0, 500, 999]), output(3)
    assert noisy_latents(batch["x0"], batch["noise"], batch["t"], objective.levels).isfinite().all()
    fine, coarse = (objective(each, batch)[0] for each in (said, said.bfloat16()))
    assert coarse.dtype == torch.float32
    assert torch.allclose(fine, coarse, rtol=0.05)


# --- options ---------------------------------------------------------------------------------------------

WRONG = [
    ({"timestep_sampling": "loss_second_moment"}, "loss_second_moment is for variance: bound"),
    ({"variance": "hybrid", "timestep_sampling": "loss_second_moment"}, "is for variance: bound"),
    ({"variance": "hybrid", "timestep_sampling": "logit_normal"}, "does not go with logit_normal"),
    ({"variance": "hybrid", "noise_offset": 0.1}, "hybrid does not go with noise_offset"),
    ({"variance": "bound", "input_perturbation": 0.1}, "bound does not go with input_perturbation"),
    ({"variance": "bound", "multires_noise_discount": 0.3}, "does not go with multires_noise_discount"),
    ({"variance": "bound", "snr_gamma": 5}, "bound does not go with snr_gamma"),
    ({"variance": "bound", "loss_type": "huber"}, "bound does not go with loss_type"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValidationError, match=message):
        LossSection(**options)
    LossSection(variance="hybrid", snr_gamma=5, loss_type="huber")
