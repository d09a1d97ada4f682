"""Guidance: which branches the network is asked for, and how their outputs become one.

A guidance is any callable ``(predict, to_x0) -> denoise``. It knows neither the network nor the solver.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ldm.diffusion.solvers import Denoise, Denoised

# (x [B, C, H, W], sigma, branches) -> {branch: raw network output [B, C, H, W]}, in one batched call. What a
# branch is called is told in `ldm/diffusion/guidances/__init__.py`.
Predict = Callable[[Tensor, Tensor, tuple[str, ...]], dict[str, Tensor]]
# (output, x, sigma) -> x0
ToX0 = Callable[[Tensor, Tensor, Tensor], Tensor]
Guidance = Callable[[Predict, ToX0], Denoise]
# (x [B, C, H, W], sigma) -> the gradient in x of log p(y | x, sigma), each picture's its own, [B, C, H, W].
Gradient = Callable[[Tensor, Tensor], Tensor]


def text_of(branch: str) -> str:
    """The branch whose text a branch has: "cond:perturbed" is "cond", answered in another way."""
    return branch.partition(":")[0]


class Exchangeable:
    """A denoiser whose `current` one may be exchanged between two steps: a solver keeps what it was given."""

    def __init__(self, denoise: Denoise) -> None:
        self.current = denoise

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return self.current(x, sigma)


def rescale_to(output: Tensor, cond: Tensor, amount: float) -> Tensor:
    """Bring each image's standard deviation `amount` of the way back to that of `cond`.

    ``amount * output * std(cond) / std(output) + (1 - amount) * output``, on raw network outputs;
    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    """
    dims = list(range(1, output.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True)
    return output * (amount * ratio + (1 - amount))


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance, ``uncond + scale * (cond - uncond)``; Ho and Salimans 2022, equation 6.

    In diffusers' convention: scale 1 is the plain conditional model, and asks for that branch only.
    `rescale` is diffusers' ``guidance_rescale``.
    """

    scale: float
    rescale: float = 0.0

    @property
    def branches(self) -> tuple[str, ...]:
        """Those that it asks for."""
        return ("cond",) if self.scale == 1 else ("uncond", "cond")

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            return Denoised(to_x0(self._combine(predict, x, sigma), x, sigma))

        return denoise

    def _combine(self, predict: Predict, x: Tensor, sigma: Tensor) -> Tensor:
        if self.scale == 1:
            return predict(x, sigma, ("cond",))["cond"]
        outputs = predict(x, sigma, ("uncond", "cond"))
        uncond, cond = outputs["uncond"], outputs["cond"]
        guided = uncond + self.scale * (cond - uncond)
        return rescale_to(guided, cond, self.rescale) if self.rescale else guided


@dataclass(frozen=True)
class CFGPlusPlus:
    """CFG++: x0 of a guidance towards the condition, and the noise of the branch without it.

    ``uncond + strength (cond - uncond)``, and the unconditional x0 as the anchor that solvers step along;
    Chung et al. 2024, "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models", algorithm
    2, whose lambda is `strength`. It acts in full in each step, however short: see `cfg_pp_strength`.
    """

    strength: float
    rescale: float = 0.0
    branches: ClassVar = ("uncond", "cond")

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            outputs = predict(x, sigma, ("uncond", "cond"))
            uncond, cond = outputs["uncond"], outputs["cond"]
            guided = uncond + self.strength * (cond - uncond)
            guided = rescale_to(guided, cond, self.rescale) if self.rescale else guided
            return Denoised(to_x0(guided, x, sigma), to_x0(uncond, x, sigma))

        return denoise


def cfg_pp_strength(scale: float, n: int) -> float:
    """CFG++'s lambda that is about as strong in n steps as `scale` of CFG: ``4 scale / n``.

    CFG moves a step's end by ``scale (1 - sigma' / sigma)`` of the difference, CFG++ by lambda of it; the
    paper has 12.5 of the one for 1 of the other in its 50 steps, and longer steps want more.
    """
    return 4 * scale / n


def composed(predict: Predict, shares: Tensor) -> Predict:
    """`predict` with a branch "cond" that is composed: of "cond", "cond_1", ..., shares [B, K].

    ``base + sum_k share_k (cond_k - base)``, base the branch without any of them: Liu et al. 2022,
    "Compositional Visual Generation with Composable Diffusion Models", equation 11. A guidance takes it for
    the condition's answer, so that its scale multiplies the sum, as in AUTOMATIC1111.
    """
    parts = ("cond", *(f"cond_{k}" for k in range(1, shares.shape[1])))

    def call(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        endings = {name: name.removeprefix("cond") for name in names if text_of(name) == "cond"}
        if not endings:
            return predict(x, sigma, names)
        without = "image" if "image" in names else "uncond"
        asked = [f"{part}{ending}" for ending in endings.values() for part in parts]
        outputs = predict(x, sigma, tuple(dict.fromkeys((*names, without, *asked))))
        base, answers = outputs[without], {name: outputs[name] for name in names}
        for whole, ending in endings.items():
            answers[whole] = base
            for part, share in zip(parts, shares.to(base).unbind(1), strict=True):
                answers[whole] = answers[whole] + share[:, None, None, None] * (
                    outputs[f"{part}{ending}"] - base
                )
        return answers

    return call


def divided(predict: Predict, others: Mapping[str, Predict]) -> Predict:
    """`predict`, where each of the others answers the branches with its name after the colon."""

    def way(name: str) -> str:
        ending = name.partition(":")[2]
        return ending if ending in others else ""

    def call(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        answers = dict[str, Tensor]()
        for each, answer in {"": predict, **others}.items():
            if own := tuple(name for name in names if way(name) == each):
                answers |= answer(x, sigma, own)
        return {name: answers[name] for name in names}

    return call


@dataclass(frozen=True)
class InstructPix2Pix:
    """Guidance towards a text and towards an image, each with its own scale.

    ``uncond + scale * (cond - image) + image_scale * (image - uncond)``, where the branch "image" has the
    image without the text, and "uncond" neither; Brooks et al. 2023, "InstructPix2Pix", equation 3.
    """

    scale: float
    image_scale: float
    rescale: float = 0.0
    branches: ClassVar = ("cond", "image", "uncond")

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            outputs = predict(x, sigma, ("cond", "image", "uncond"))
            cond, image, uncond = outputs["cond"], outputs["image"], outputs["uncond"]
            guided = uncond + self.scale * (cond - image) + self.image_scale * (image - uncond)
            guided = rescale_to(guided, cond, self.rescale) if self.rescale else guided
            return Denoised(to_x0(guided, x, sigma))

        return denoise


@dataclass(frozen=True)
class Limited:
    """Any guidance at noise levels from `low` to below `high`, and the plain conditional model at the others.

    There no branch but "cond" is asked for, which is half of the network's work. Kynkaanniemi et al. 2024,
    "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models",
    equation 5: the scale is 1 outside of the interval.
    """

    base: Guidance
    low: float
    high: float

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        within, outside = self.base(predict, to_x0), CFG(1.0)(predict, to_x0)

        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            return within(x, sigma) if self.low <= float(sigma) < self.high else outside(x, sigma)

        return denoise


@dataclass(frozen=True)
class ClassifierGuidance:
    """Any guidance, and a classifier's gradient beside it: ``x0 + scale * sigma^2 * grad_x log p(y | x)``.

    By Bayes' rule the score of ``p(x | y)`` is that of ``p(x)`` with the gradient added, and by Tweedie's
    formula (`ldm.diffusion.forward.score`) x0 moves by sigma^2 times it. Scale 1 is that; a larger one leads
    to ``p(x) p(y | x)^scale``. The noise estimate ``(x - x0) / sigma`` becomes ``eps - sigma grad_x``, in the
    variance-preserving space ``eps - sqrt(1 - a) grad``: Dhariwal and Nichol 2021 (arXiv 2105.05233),
    equation 14 and algorithm 2. On an unconditional model it is all the guidance there is.
    """

    base: Guidance
    gradient: Gradient
    scale: float

    def __call__(self, predict: Predict, to_x0: ToX0) -> Denoise:
        plain = self.base(predict, to_x0)

        def denoise(x: Tensor, sigma: Tensor) -> Denoised:
            d = plain(x, sigma)
            shift = self.scale * sigma**2 * self.gradient(x, sigma)
            x0 = d.x0 + shift
            return Denoised(x0, x0 if d.anchor is d.x0 else d.anchor + shift, d.log_variance)

        return denoise
