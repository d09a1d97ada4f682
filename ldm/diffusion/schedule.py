"""The noise schedule a model was trained with, and the grids that samplers walk on it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm.diffusion.bounds import Bounds
from ldm.diffusion.catalogue import CLAMPED, GridRules, Sampler
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.samplers import resolve_sampler, resolve_spacing
from ldm.diffusion.scheduler_config import read_config
from ldm.diffusion.solvers import PURE_NOISE, Denoise, Variance
from ldm.diffusion.spacings import (
    RHO,
    SIGMA_SPACINGS,
    SPACINGS,
    Array,
    beta_quantiles,
    listed_timesteps,
    spaced_sigmas,
)
from ldm.errors import UserError

# Where our grids in sigma go on after one step from pure noise: below the last 2 % of the timesteps.
_AFTER_PURE_NOISE = 0.98


@dataclass(frozen=True, eq=False)
class Grid:
    """Where a sampler goes.

    sigmas: noise levels [n + 1], falling, float64. timesteps: what the network is told at the first n of
    them, float64. schedule: for the levels between. initial_scale: the first state is this times unit noise.
    final_scale: what the last state is multiplied by: ``1 / sqrt(sigma^2 + 1)`` (1 in Euler's family), and so
    1 unless the run stops above sigma = 0. orders: of each step, where the sampler has such; else empty.
    """

    sigmas: Tensor
    timesteps: Tensor
    schedule: "Schedule"
    initial_scale: float
    final_scale: float = 1.0
    orders: tuple[int, ...] = ()

    def last(self, n: int) -> "Grid":
        """Its last n steps, which go on as they would have."""
        return replace(
            self, sigmas=self.sigmas[-n - 1 :], timesteps=self.timesteps[-n:], orders=self.orders[-n:]
        )

    def first(self, n: int, scaled: bool) -> "Grid":
        """Its first n steps; `scaled`: whether the last state is multiplied by ``1 / sqrt(sigma^2 + 1)``."""
        sigmas = self.sigmas[: n + 1]
        final_scale = 1 / math.hypot(float(sigmas[-1]), 1) if scaled else 1.0
        timesteps, orders = self.timesteps[:n], self.orders[:n]
        return replace(self, sigmas=sigmas, timesteps=timesteps, orders=orders, final_scale=final_scale)

    def t(self, sigma: Tensor | float) -> Tensor:
        """The listed timestep of a listed `sigma`, else the schedule's; a float64 scalar."""
        listed = (self.sigmas[:-1] == float(sigma)).nonzero()
        return self.timesteps[listed[0, 0]] if len(listed) else self.schedule.t(sigma)

    def sigma(self, t: Tensor | float) -> Tensor:
        """The schedule's."""
        return self.schedule.sigma(t)


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete-time diffusion schedule.

    alphas_cumprod: signal power at each training timestep, float64 [T]; 0 at the end with zero terminal SNR.
    The fields after `prediction` are what diffusers' scheduler config says about sampling: None where it is
    silent, and each sampler then has its own default, as in diffusers. is_xl: whether the model is a Stable
    Diffusion XL, which has an Align Your Steps of its own. variance: of DDPM's steps; with learned_range the
    network says it in as many output channels again (`ldm.diffusion.variance`).
    """

    alphas_cumprod: Tensor
    prediction: Prediction = Prediction.EPSILON
    default_sampler: str = "ddim"
    timestep_spacing: str | None = None
    sigma_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    final_sigmas_type: str = "zero"
    lower_order_final: bool | None = None
    euler_at_final: bool = False
    bounds: Bounds | None = None
    lcm_steps: int = 50
    is_xl: bool = False
    variance: Variance = "fixed_small"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """From the contents of diffusers' ``scheduler_config.json``.

        Raises:
            UserError: for a scheduler, key or value that would change the picture and is not supported.
        """
        return cls(**read_config(config))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last training timestep is pure noise."""
        return bool(self.alphas_cumprod[-1] == 0)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level ``sqrt((1 - a) / a)`` at timesteps of any shape, float64; linear between whole ones.

        With zero terminal SNR the last is 1e10, which stands for infinity.
        """
        return torch.as_tensor(_sigma_at(_array(t), self._table()))

    def t(self, sigma: Tensor | float) -> Tensor:
        """Timestep of noise levels of any shape, float64: interpolated in log sigma, within [0, T - 1]."""
        return torch.as_tensor(_t_at(_array(sigma), self._table()))

    def between(self, start: float, stop: float) -> tuple[float, float]:
        """The noise levels, from the first to below the second, of a part of the run from t = T to 0.

        `start` and `stop` are shares of the T timesteps, as diffusers' ``denoising_start`` and ComfyUI's
        timestep ranges have them: the part holds those below ``round(T - start T)`` and from
        ``round(T - stop T)`` on. 0 and 1 leave an end open.
        """
        total = len(self.alphas_cumprod)
        top, bottom = round(total - start * total), round(total - stop * total)
        low, high = (float(self.sigma(t)) for t in (bottom, top))
        return low if bottom > 0 else 0.0, high if top < total else math.inf

    def bounded(self, denoise: Denoise, sampler: Sampler) -> Denoise:
        """`denoise` with the bounds on x0 that the config asks for and diffusers heeds with that sampler."""
        if self.bounds is None:
            return denoise
        asked = {name: False for name in ("clip_sample", "thresholding") if name not in sampler.bounds}
        bounds = replace(self.bounds, **asked)
        return bounds.around(denoise, keeps_noise=sampler.keeps_noise)

    def grid(
        self,
        n: int | None,
        spacing: str | None = None,
        sampler: str | Sampler = "ddim",
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float = 1.0,
        rho: float | None = None,
    ) -> Grid:
        """The noise levels and timesteps of an n-step run of `sampler`.

        `timesteps` (falling, n of them) or `sigmas` (falling, n + 1 of them: the last is where the run ends,
        usually 0) replace n and the spacing, as in diffusers. `strength` is the share of its timesteps that
        the lcm spacing spreads the n steps over; `rho` is of the spacings that have one (`RHO`). Warns where
        the grid hardly starts, or leaves out the pure noise that a zero-terminal-SNR model is trained to
        start from.

        Raises:
            UserError: for a number of steps, a spacing or a list that makes no grid.
        """
        chosen = sampler if isinstance(sampler, Sampler) else resolve_sampler(sampler)[0]
        # From pure noise eps says nothing of x0, so an eps model starts a little below it.
        rules, eps = chosen.rules, self.prediction is Prediction.EPSILON
        table = self._table(CLAMPED if eps else rules.pure_noise)
        base = self.timestep_spacing or rules.spacing
        last = self._last_sigma(rules)
        if timesteps is not None and sigmas is not None:
            raise UserError("timesteps and sigmas are both given: give one of them")
        if sigmas is not None:
            levels, last = _array(sigmas[:-1]), float([0.0, *sigmas][-1])
            t = _t_at(levels, table)
        elif timesteps is not None:
            t = _array(timesteps)
            levels = _sigma_at(t, table)
        else:
            name = self.spacing_for(chosen, spacing)
            if rho is not None and name not in RHO:
                raise UserError(f"rho is not allowed here: of the spacings only {', '.join(RHO)} have one")
            base = base if name in SIGMA_SPACINGS else name
            levels, t = self._spaced(self._count(n), name, base, rules.family, table, strength, rho)
        self._check(levels, t, last)
        ends = last == 0, self.lower_order_final, self.euler_at_final
        return Grid(
            sigmas=torch.from_numpy(np.append(levels, min(last, levels[-1]))),
            timesteps=torch.from_numpy(t),
            schedule=self,
            initial_scale=_initial_scale(float(levels[0]), rules.family, base),
            final_scale=1.0 if rules.family == "k" else 1 / math.hypot(last, 1),
            orders=chosen.orders(len(levels), *ends) if chosen.orders else (),
        )

    def _table(self, infinity: float = PURE_NOISE) -> Array:
        """Sigma at every training timestep, [T]; `infinity` where there is no signal."""
        a = self.alphas_cumprod.numpy()
        return np.asarray(np.where(a > 0, np.sqrt((1 - a) / np.where(a > 0, a, 1)), infinity))

    def _last_sigma(self, rules: GridRules) -> float:
        """Where the run ends: 0, or training's lowest level where the config asks and diffusers heeds it."""
        asked = {
            "set_alpha_to_one": self.set_alpha_to_one,
            "final_sigmas_type": self.final_sigmas_type != "sigma_min",
        }.get(rules.end_key or "")
        to_zero = rules.ends_at_zero if asked is None else asked
        return 0.0 if to_zero else float(self._table()[0])

    def spacing_for(self, sampler: Sampler, spacing: str | None = None) -> str:
        """The spacing's own name, or what this model's scheduler config, or else the sampler, uses."""
        if spacing is not None:
            return spacing if spacing in SPACINGS else resolve_spacing(spacing)
        rules = sampler.rules
        if rules.family == "lcm":
            return rules.spacing
        in_sigma = self.sigma_spacing if rules.family in ("k", "dpm") else None
        return in_sigma or self.timestep_spacing or rules.spacing

    def _count(self, n: int | None) -> int:
        if n is None or not 1 <= n <= len(self.alphas_cumprod):
            raise UserError(f"{n} steps: give a number of steps from 1 to {len(self.alphas_cumprod)}")
        return n

    def _spaced(
        self,
        n: int,
        name: str,
        base: str,
        family: str,
        table: Array,
        strength: float,
        rho: float | None,
    ) -> tuple[Array, Array]:
        """(sigmas, timesteps), [n] each, of a named spacing."""
        if name in ("ays", "gits"):
            return self._aligned(n, table, listed_timesteps(name, n, len(table), self.is_xl))
        if name == "lcm":
            t = self._distilled(n, strength)
            return _sigma_at(t, table), t
        t = spaced_timesteps(base, n, family, len(table), self.steps_offset)
        if name not in SIGMA_SPACINGS:
            return _sigma_at(t, table), t
        if self.zero_terminal_snr and name in ("beta", "linear_quadratic"):
            # Over timesteps, as beta's paper has it: over sigmas nearly all steps would go to pure noise.
            t = spaced_sigmas(name, n, float(len(table) - 1), 0.0)
            return _sigma_at(t, table), t
        if self.zero_terminal_snr:
            start = _sigma_at(_array(_AFTER_PURE_NOISE * len(table)), table)
            levels = np.append(table[-1], spaced_sigmas(name, n - 1, float(start), float(table[0]), rho))
            return levels, _t_at(levels, table)
        # Euler's family spans what its timesteps span, the others all of training.
        high, low = _sigma_at(t[[0, -1]], table) if family == "k" else table[[-1, 0]]
        levels = spaced_sigmas(name, n, float(high), float(low), rho)
        if family != "dpm" or name not in ("karras", "lu_lambdas", "exponential", "beta"):
            return levels, _t_at(levels, table)
        # diffusers cuts these to whole numbers, and in fp32 the first falls to one side or the other.
        t = _t_at(levels, table.astype(np.float32))
        return levels, t.round() if name in ("karras", "lu_lambdas") else np.floor(t)

    def _aligned(self, n: int, table: Array, listed: Array) -> tuple[Array, Array]:
        """Even steps along a list of timesteps, in the log of sigma between its entries.

        NVIDIA's ``loglinear_interp`` to n + 1 levels, the last of which is where the run ends.
        """
        places, at = np.arange(len(listed)), np.arange(n) * (len(listed) - 1) / n
        if self.zero_terminal_snr:  # over timesteps: between infinity and 6 is no log of sigma
            t = np.interp(at, places, listed)
            return _sigma_at(t, table), t
        levels = np.exp(np.interp(at, places, np.log(_sigma_at(listed, table))))
        return levels, _t_at(levels, table).round(6)  # the list's own to the last bit

    def _distilled(self, n: int, strength: float) -> Array:
        """The lcm spacing: evenly many of the timesteps that the model was distilled on, or of their last."""
        most = int(self.lcm_steps * strength)
        if n > most:
            of = "" if strength == 1 else f" at strength {strength:g}"
            raise UserError(f"{n} steps: the lcm spacing has at most {most}{of}")
        distilled = np.arange(most, 0.0, -1) * (len(self.alphas_cumprod) // self.lcm_steps) - 1
        t: Array = distilled[np.floor(np.linspace(0, most, n, endpoint=False)).astype(np.int64)]
        return t

    def _check(self, levels: Array, t: Array, last: float) -> None:
        top = len(self.alphas_cumprod) - 1
        if len(levels) == 0 or not np.all(np.isfinite([*levels, last])):
            raise UserError("timesteps or sigmas: give at least one step, in finite numbers")
        if np.any(np.diff(levels) >= 0) or not 0 <= last <= levels[-1] * (1 + 1e-6):
            raise UserError("the noise level does not fall at each step: take fewer steps or another spacing")
        if not 0 <= t[-1] <= t[0] <= top:
            raise UserError(f"timesteps {t[0]:g} to {t[-1]:g}: the model was trained on 0 to {top}")
        if t[0] <= 1:
            problem = "almost without noise"
        elif self.zero_terminal_snr and t[0] < top:
            problem = "but this model was trained to start from pure noise"
        else:
            return
        advice = "the trailing spacing mends that"
        warnings.warn(f"the run starts at timestep {t[0]:g}, {problem}: {advice}", stacklevel=3)


def _array(values: Tensor | Sequence[float] | float) -> Array:
    return np.asarray(torch.as_tensor(values, dtype=torch.float64, device="cpu").numpy())


def spaced_timesteps(spacing: str, n: int, family: str, steps: int, offset: int) -> Array:
    """Timesteps [n], falling, of the spacings that are defined on timesteps.

    `steps` is T, the number of training timesteps; `offset` is diffusers' ``steps_offset`` (leading only).
    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2, names leading,
    linspace and trailing. ddim_uniform is leading of DDIM with an offset of 1, as it is in ComfyUI where n
    divides T. beta_timesteps: at the quantiles of a Beta(0.6, 0.6) distribution, as ComfyUI's "beta"; Lee et
    al. 2024, "Beta Sampling is All You Need".
    """
    if spacing == "ddim_uniform":
        spacing, family, offset = "leading", "vp", 1
    i = np.arange(n, dtype=np.float64)
    t: Array
    match spacing:
        case "leading" if family == "dpm":
            t = (n - i) * (steps // (n + 1))
            t = t + min(offset, steps - 1 - t[0])
        case "leading":
            t = (n - 1 - i) * (steps // n)
            t = t + min(offset, steps - 1 - t[0])
        case "trailing":
            t = np.arange(steps, 0, -steps / n)[:n].round() - 1
        case "linspace" if family == "dpm":
            t = np.linspace(0, steps - 1, n + 1).round()[:0:-1].copy()
        case "linspace":
            t = np.linspace(0, steps - 1, n)[::-1].copy()
            t = t.round() if family == "vp" else t
        case "sgm_uniform":
            t = np.linspace(steps - 1, 0, n + 1)[:-1]
        case "beta_timesteps":
            t = beta_quantiles(np.linspace(0, 1, n, endpoint=False)) * (steps - 1)
            t = t.round() if len(set(t.round())) == n else t
        case _:  # "simple"
            t = steps - 1 - np.floor(i * steps / n)
    return t


def _sigma_at(t: Array, table: Array) -> Array:
    return np.asarray(np.interp(t, np.arange(len(table)), table))


def _t_at(sigma: Array, table: npt.NDArray[np.floating[Any]]) -> Array:
    return np.asarray(np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(table), np.arange(len(table))))


def _initial_scale(sigma: float, family: str, base: str) -> float:
    """``sqrt(sigma^2 + 1)``, which makes the network's first input unit noise.

    diffusers' k family takes sigma itself where its timesteps begin at the top.
    """
    return sigma if family == "k" and base in ("linspace", "trailing") else math.hypot(sigma, 1)
