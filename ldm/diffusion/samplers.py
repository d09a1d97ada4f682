"""Names of samplers and spacings, in every spelling: the catalogue's, diffusers' and other programs'."""

from ldm.diffusion.catalogue import SAMPLERS, Sampler
from ldm.diffusion.solvers import Solver
from ldm.diffusion.spacings import SPACINGS
from ldm.errors import UserError
from ldm.spelling import squash, unknown

__all__ = ["SAMPLERS", "SPACINGS", "Sampler", "resolve_sampler", "resolve_spacing"]

_ALIASES = {
    "alignyoursteps": "ays",
    "uniform": "linspace",
    "normal": "linspace",
    "discrete": "linspace",
    "sgm": "sgm_uniform",
    "lu": "lu_lambdas",
}
# What else a sampler's name may end in: Karras is "_ka" in A1111's k_dpmpp_2m_ka and "_k" in InvokeAI's.
_ENDINGS = {"ka": "karras", "k": "karras", "exp": "exponential"}

_SPACING_NAMES = {squash(name): name for name in SPACINGS} | _ALIASES  # every spelling, squashed
_SPELLINGS = {
    squash(spelling): sampler
    for sampler in SAMPLERS.values()
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
