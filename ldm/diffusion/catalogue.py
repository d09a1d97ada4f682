"""The catalogue: samplers, each a solver with its names, its noise and the rules of its grid.

The samplers of diffusers each round, count and offset a spacing in their own way. `family` tells them apart:

- ``vp``: DDIM, DDPM, PNDM. Whole timesteps.
- ``k``: Euler, Heun, LMS, DPM2, DPM++ SDE and all that come of k-diffusion. Fractional timesteps.
- ``dpm``: DPM++ 2M, 3M, 2S, UniPC, DEIS, SA-Solver. n + 1 points, of which the last is not visited.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from ldm.diffusion.methods.adaptive import dpm_adaptive, dpm_fast
from ldm.diffusion.methods.ancestral import ancestral, ddpm, lcm, pc
from ldm.diffusion.methods.churned import dpm2, euler, heun, restart
from ldm.diffusion.methods.exponential import (
    dpmpp_2s,
    dpmpp_2s_ancestral,
    dpmpp_3m,
    dpmpp_sde,
    res_multistep,
    singlestep_orders,
    third_orders,
    unipc,
    unipc_orders,
)
from ldm.diffusion.methods.multistep import deis, gradient_estimation, ipndm, lms, pndm
from ldm.diffusion.methods.stochastic import er_sde, sa_solver, tcd
from ldm.diffusion.noise import BrownianNoise, Noise
from ldm.diffusion.solvers import PURE_NOISE, Solver, dpmpp_2m, multistep_orders
from ldm.errors import UserError

# diffusers' Euler, DPM++ and UniPC put alphas_cumprod = 2^-24 in the place of 0.
CLAMPED = math.sqrt(2**24 - 1)


@dataclass(frozen=True, kw_only=True)
class GridRules:
    """What of a grid differs from sampler to sampler, as in diffusers.

    family: how timesteps are rounded, counted and offset: "vp", "k", "dpm" or "lcm".
    spacing: used where neither the caller nor the model's scheduler config names one.
    pure_noise: the sigma that stands for infinity, of zero terminal SNR.
    ends_at_zero: where the run ends if the config does not say: at sigma = 0, or at training's lowest level.
    end_key: the key of the config that says it, None if none does: "set_alpha_to_one" or "final_sigmas_type".
    """

    family: str = "k"
    spacing: str = "linspace"
    pure_noise: float = PURE_NOISE
    ends_at_zero: bool = True
    end_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A solver with its names, its grid and its noise.

    options: keyword arguments of the solver that a caller may change, with their defaults. noise: the kind of
    noise that it is given. orders: (steps, whether they end at 0, diffusers' `lower_order_final`, its
    `euler_at_final`) to the order of each step, where the solver takes `orders`. bounds: those of the
    config's "clip_sample" and "thresholding" that act on x0. keeps_noise: not on the noise that x0 tells.
    takes_variance: whether the solver takes the config's `variance_type`; takes_times: a `Grid` as `times`.
    alone: whether its steps depend on the picture, so that pictures are drawn one by one. cfg_pp: whether
    guidance is CFG++'s (`ldm.diffusion.guidance.CFGPlusPlus`).
    """

    name: str
    label: str
    solver: Solver
    aliases: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)
    noise: type[Noise] = Noise
    rules: GridRules = GridRules()
    orders: Callable[[int, bool, bool | None, bool], tuple[int, ...]] | None = None
    bounds: tuple[str, ...] = ()
    keeps_noise: bool = False
    takes_variance: bool = False
    takes_times: bool = False
    alone: bool = False
    cfg_pp: bool = False

    @property
    def takes_eta(self) -> bool:
        """Whether ``eta``, the share of fresh noise, means anything here."""
        return "eta" in self.options

    def chosen(self, options: Mapping[str, float]) -> dict[str, float]:
        """`options` as keyword arguments of the solver.

        Raises:
            UserError: for one that it does not take (eta has a field of its own), or a value that is none.
        """
        known = [name for name in self.options if name != "eta"]
        for name, value in options.items():
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise UserError(f"sampler option {name} is not allowed here: {self.name} has none, {takes}")
            low, high = _RANGES.get(name, (0.0, math.inf))
            whole = isinstance(self.options[name], int)
            if not (math.isfinite(value) and low <= value <= high) or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                upto = f"from {low:g} to {high:g}" if high < math.inf else f"from {low:g} up"
                raise UserError(f"sampler option {name}={value:g} is not allowed: it must be {kind} {upto}")
        return {name: type(self.options[name])(value) for name, value in options.items()}


# Of the options that are not just 0 or more.
_RANGES = {
    "order": (1, 4),
    "predictor_order": (1, 4),
    "corrector_order": (1, 4),
    "correct_steps": (0, 100),
    "rtol": (1e-6, math.inf),
    "atol": (1e-6, math.inf),
    "h_init": (1e-3, 10.0),
    "accept_safety": (0.0, 0.99),
}
_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


_BOTH = ("clip_sample", "thresholding")
_DDIM = GridRules(family="vp", spacing="leading", end_key="set_alpha_to_one")
_PNDM = GridRules(family="vp", spacing="leading", ends_at_zero=False, end_key="set_alpha_to_one")
_EULER = GridRules(pure_noise=CLAMPED, end_key="final_sigmas_type")
_DPM = GridRules(family="dpm", end_key="final_sigmas_type")
_DPM_CLAMPED = GridRules(family="dpm", end_key="final_sigmas_type", pure_noise=CLAMPED)

_CATALOGUE = (
    Sampler(
        name="ddpm",
        label="DDPM",
        solver=ddpm,
        aliases=("ddpmparallel",),
        takes_variance=True,
        rules=GridRules(family="vp", spacing="leading"),
        bounds=_BOTH,
    ),
    Sampler(
        name="ddim",
        label="DDIM",
        solver=partial(ancestral, eta=0.0),
        aliases=("ddimparallel",),
        options={"eta": 0.0},
        rules=_DDIM,
        bounds=_BOTH,
        keeps_noise=True,
    ),
    Sampler(name="pndm", label="PNDM", solver=pndm, aliases=("plms",), rules=_PNDM),
    Sampler(
        name="euler",
        label="Euler",
        solver=euler,
        aliases=("eulerdiscrete",),
        options=_CHURN,
        rules=_EULER,
    ),
    Sampler(
        name="euler_a",
        label="Euler a",
        solver=ancestral,
        aliases=("eulerancestral", "eulerancestraldiscrete"),
        options={"eta": 1.0},
        rules=GridRules(pure_noise=CLAMPED),
    ),
    Sampler(
        name="heun",
        label="Heun",
        solver=heun,
        aliases=("heundiscrete",),
        options=_CHURN,
        bounds=("clip_sample",),
    ),
    Sampler(
        name="dpm2",
        label="DPM2",
        solver=dpm2,
        aliases=("kdpm2", "kdpm2discrete"),
        options=_CHURN,
    ),
    Sampler(
        name="dpm2_a",
        label="DPM2 a",
        solver=partial(dpm2, eta=1.0),
        aliases=("dpm2ancestral", "kdpm2ancestral", "kdpm2ancestraldiscrete"),
        options={"eta": 1.0},
    ),
    Sampler(name="restart", label="Restart", solver=restart, options={"s_noise": 1.0}),
    Sampler(name="lms", label="LMS", solver=lms, aliases=("lmsdiscrete",), options={"order": 4}),
    Sampler(name="ipndm", label="iPNDM", solver=ipndm, options={"order": 4}),
    Sampler(name="ipndm_v", label="iPNDM_v", solver=partial(lms, ends_in_x0=True), options={"order": 4}),
    Sampler(
        name="deis",
        label="DEIS",
        solver=deis,
        aliases=("deismultistep",),
        options={"order": 2},
        rules=GridRules(family="dpm"),
        bounds=("thresholding",),
    ),
    Sampler(
        name="gradient_estimation",
        label="Gradient estimation",
        solver=gradient_estimation,
        aliases=("eulerge", "ge"),
        options={"gamma": 2.0},
    ),
    Sampler(
        name="dpmpp_2m",
        label="DPM++ 2M",
        solver=dpmpp_2m,
        aliases=("dpmsolvermultistep", "dpmsolver", "dpmsolverpp"),
        rules=_DPM_CLAMPED,
        orders=multistep_orders,
        bounds=("thresholding",),
    ),
    Sampler(
        name="dpmpp_2s",
        label="DPM++ 2S",
        solver=dpmpp_2s,
        aliases=("dpmsolversinglestep",),
        rules=_DPM,
        orders=singlestep_orders,
        bounds=("thresholding",),
    ),
    Sampler(
        name="dpmpp_2s_a",
        label="DPM++ 2S a",
        solver=dpmpp_2s_ancestral,
        aliases=("dpmpp2sancestral",),
        options={"eta": 1.0},
    ),
    Sampler(
        name="dpmpp_3m",
        label="DPM++ 3M",
        solver=partial(dpmpp_3m, midpoint=True),
        rules=_DPM_CLAMPED,
        orders=third_orders,
        bounds=("thresholding",),
    ),
    Sampler(
        name="dpmpp_3m_sde",
        label="DPM++ 3M SDE",
        solver=partial(dpmpp_3m, eta=1.0),
        aliases=("dpmpp3msdegpu",),
        options={"eta": 1.0},
        noise=BrownianNoise,
        rules=_DPM_CLAMPED,
        bounds=("thresholding",),
    ),
    Sampler(
        name="dpmpp_sde",
        label="DPM++ SDE",
        solver=dpmpp_sde,
        aliases=("dpmsolversde", "dpmppsdegpu"),
        options={"eta": 1.0},
        noise=BrownianNoise,
    ),
    Sampler(
        name="dpmpp_2m_sde",
        label="DPM++ 2M SDE",
        solver=partial(dpmpp_2m, eta=1.0),
        aliases=("dpmpp2msdegpu", "dpmpp2msdebt"),
        options={"eta": 1.0},
        noise=BrownianNoise,
        rules=_DPM_CLAMPED,
        orders=multistep_orders,
        bounds=("thresholding",),
    ),
    Sampler(
        name="dpmpp_2m_sde_heun",
        label="DPM++ 2M SDE Heun",
        solver=partial(dpmpp_3m, eta=1.0, order=2),
        aliases=("dpmpp2msdeheungpu",),
        options={"eta": 1.0},
        noise=BrownianNoise,
        rules=_DPM_CLAMPED,
        orders=multistep_orders,
        bounds=("thresholding",),
    ),
    Sampler(
        name="dpm_fast",
        label="DPM fast",
        solver=dpm_fast,
        rules=GridRules(spacing="exponential"),
    ),
    Sampler(
        name="dpm_adaptive",
        label="DPM adaptive",
        solver=dpm_adaptive,
        aliases=("dpmad",),
        options={"rtol": 0.05, "atol": 0.0078, "h_init": 0.05, "accept_safety": 0.81},
        alone=True,
    ),
    Sampler(name="res_multistep", label="RES multistep", solver=res_multistep),
    Sampler(
        name="res_multistep_a",
        label="RES multistep a",
        solver=partial(res_multistep, eta=1.0),
        aliases=("resmultistepancestral",),
        options={"eta": 1.0},
    ),
    Sampler(name="er_sde", label="ER-SDE", solver=er_sde, options={"order": 3, "s_noise": 1.0}),
    Sampler(
        name="sa_solver",
        label="SA-Solver",
        solver=sa_solver,
        options={"eta": 1.0, "predictor_order": 2, "corrector_order": 2},
        rules=GridRules(family="dpm"),
        bounds=("thresholding",),
        takes_times=True,
    ),
    Sampler(
        name="unipc",
        label="UniPC",
        solver=unipc,
        aliases=("unipcmultistep", "unipcbh2"),
        rules=_DPM_CLAMPED,
        orders=unipc_orders,
        bounds=("thresholding",),
    ),
    Sampler(
        name="pc",
        label="PC",
        solver=pc,
        aliases=("predictorcorrector", "langevin"),
        options={"snr": 0.16, "correct_steps": 1},
    ),
    Sampler(name="lcm", label="LCM", solver=lcm, rules=GridRules(family="lcm", spacing="lcm"), bounds=_BOTH),
    Sampler(
        name="tcd",
        label="TCD",
        solver=tcd,
        options={"eta": 0.3},
        rules=GridRules(family="lcm", spacing="lcm"),
        bounds=_BOTH,
        takes_times=True,
    ),
)

# Those that there are with CFG++ too: the same solvers, that see another anchor.
_WITH_CFG_PP = (
    "euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2s_a", "res_multistep", "res_multistep_a",
    "gradient_estimation",
)  # fmt: skip


def _with_cfg_pp(sampler: Sampler) -> Sampler:
    aliases = tuple(f"{each}cfgpp" for each in sampler.aliases)
    name, label = f"{sampler.name}_cfg_pp", f"{sampler.label} CFG++"
    return replace(sampler, name=name, label=label, aliases=aliases, cfg_pp=True)


_PLAIN = {sampler.name: sampler for sampler in _CATALOGUE}
SAMPLERS = _PLAIN | {f"{name}_cfg_pp": _with_cfg_pp(_PLAIN[name]) for name in _WITH_CFG_PP}
