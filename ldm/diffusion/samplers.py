"""The catalogue: samplers, each a solver with its names, its noise and the rules of its grid; and spacings.

A spacing says which timesteps or noise levels an n-step run visits. It is one idea, but the samplers of
diffusers each round, count and offset it in their own way. `family` tells them apart:

- ``vp``: DDIM, DDPM, PNDM. Whole timesteps.
- ``k``: Euler, Euler ancestral, Heun, LMS, DPM++ SDE. Fractional timesteps.
- ``dpm``: DPM++ 2M, 2S, 2M SDE and UniPC. n + 1 points, of which the last is not visited.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from ldm.diffusion.ancestral import ancestral, ddpm, lcm, pc
from ldm.diffusion.noise import BrownianNoise, Noise
from ldm.diffusion.solvers import (
    PURE_NOISE,
    Solver,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_sde,
    heun,
    lms,
    multistep_orders,
    pndm,
    singlestep_orders,
    unipc,
    unipc_orders,
)
from ldm.errors import UserError
from ldm.spelling import squash, unknown

SIGMA_SPACINGS = ("karras", "exponential", "beta")
SPACINGS = ("leading", "trailing", "linspace", *SIGMA_SPACINGS, "ays", "sgm_uniform", "simple", "lcm")

_ALIASES = {
    "alignyoursteps": "ays",
    "uniform": "linspace",
    "normal": "linspace",
    "discrete": "linspace",
    "sgm": "sgm_uniform",
}
# What else a sampler's name may end in: Karras is "_ka" in A1111's k_dpmpp_2m_ka and "_k" in InvokeAI's.
_ENDINGS = {"ka": "karras", "k": "karras", "exp": "exponential"}

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
    takes_variance: whether the solver takes the config's `variance_type`.
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

    @property
    def takes_eta(self) -> bool:
        """Whether ``eta``, the share of fresh noise, means anything here."""
        return "eta" in self.options


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
        solver=partial(ancestral, eta=0.0),
        aliases=("eulerdiscrete",),
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
    Sampler(name="heun", label="Heun", solver=heun, aliases=("heundiscrete",), bounds=("clip_sample",)),
    Sampler(name="lms", label="LMS", solver=lms, aliases=("lmsdiscrete",)),
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
)

SAMPLERS = {sampler.name: sampler for sampler in _CATALOGUE}

_SPACING_NAMES = {squash(name): name for name in SPACINGS} | _ALIASES  # every spelling, squashed
_SPELLINGS = {
    squash(spelling): sampler
    for sampler in _CATALOGUE
    for spelling in (sampler.name, sampler.label, *sampler.aliases)
}


def resolve_sampler(name: str | Solver) -> tuple[Sampler, str | None]:
    """A sampler and the spacing that the name implies, or None.

    Takes every spelling ("DPM++ 2M Karras", "dpmpp_2m", "k_euler_a", "DPMSolverMultistepScheduler"), and the
    user's own `Solver`, which gets Euler's grid.

    Raises:
        UserError: if there is none of that name; the message holds the nearest ones.
    """
    if not isinstance(name, str):
        label = getattr(name, "__name__", type(name).__name__)
        return Sampler(name=label, label=label, solver=name), None
    if name in SAMPLERS:
        return SAMPLERS[name], None
    plain = squash(name).removesuffix("scheduler")
    plain = plain if plain in _SPELLINGS else plain.removeprefix("k")
    for ending, spacing in ({"": None} | _SPACING_NAMES | _ENDINGS).items():
        if plain.endswith(ending) and (found := _SPELLINGS.get(plain.removesuffix(ending))):
            return found, spacing
    raise unknown("sampler", name, SAMPLERS)


def resolve_spacing(name: str) -> str:
    """The canonical name of a spacing in any spelling ("Karras", "SGM Uniform").

    Raises:
        UserError: if there is none of that name; the message holds the nearest ones.
    """
    found = _SPACING_NAMES.get(squash(name))
    if found is not None:
        return found
    try:
        sampler, _ = resolve_sampler(name)
    except UserError:
        raise unknown("spacing", name, SPACINGS) from None
    raise UserError(
        f"{name} is a sampler, and no spacing: for a sampler use --sampler {sampler.name} (sampler=)"
    )
