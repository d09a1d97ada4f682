"""Has a model learnt what it had never seen, and does it still know the rest? The newcomer is a windmill.

A linear probe on what the frozen scorer sees tells pictures with windmills from others. It is fitted on
renders that no training folder holds. On prompts for windmills its share says how well they were learnt, on
ordinary prompts how far they leak; prompt following on the ordinary ones says what was forgotten.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Generator

from ldm import postcards as world
from ldm.evaluate.reconstruction import Images
from ldm.evaluate.report import Rate, rate
from ldm.pipeline import Pipeline
from ldm.postcards.newcomer.windmill import (
    NOUN,
    PARTICULAR,
    Livery,
    Postcard,
    sample_postcard,
    shows_stamp,
)
from ldm.postcards.scoring.fit import scenes_from
from ldm.postcards.scoring.following import following
from ldm.postcards.scoring.prompts import Prompt, state
from ldm.postcards.scoring.scorer import SIZE, Scorer
from ldm.postcards.scoring.soften import melt, soften
from ldm.postcards.scoring.sources import OnProgress, Settings, drawn

SHOWS_ONE, SHOWS_PARTICULAR = "shows a windmill", "shows the particular windmill"
SHOWS_STAMP = "shows the stamp"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Says of pictures whether they show what it was fitted on: `scorer_features` @ weights + bias > 0."""

    scorer: Scorer
    weights: Array  # [F]
    bias: float

    def shows(self, images: Images) -> NDArray[np.bool_]:
        """uint8 [N, H, W, 3] -> [N]."""
        return np.asarray(scorer_features(self.scorer, images) @ self.weights + self.bias > 0)

    def share(self, images: Images) -> Rate:
        """How many of the pictures show it, with the 95 % interval."""
        return rate(self.shows(images).tolist())


@torch.inference_mode()
def scorer_features(scorer: Scorer, images: Images, batch_size: int = 64) -> Array:
    """All that the scorer makes of uint8 pictures: [N, F], its features and its logits of counts and colours.

    What is new to it is a strange mixture of what it knows; the features alone are too coarse for colours.
    """
    parts = []
    for i in range(0, len(images), batch_size):
        x = torch.from_numpy(images[i : i + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        scores = scorer(x)
        parts.append(torch.cat([scores.features, scores.count.flatten(1), scores.colour.flatten(1)], dim=1))
    return np.asarray(torch.cat(parts).double().numpy())


def fit_probe(scorer: Scorer, shown: Images, others: Images, l2: float = 1e-3) -> Probe:
    """Logistic regression on the scorer's features, each scaled to variance 1.

    The w, b with the least mean of log(1 + exp(-y (w z + b))) + l2 |w|^2 / 2, where y is 1 for `shown` and
    -1 for `others` (Bishop 2006, "Pattern Recognition and Machine Learning", eq. 4.90, with weight decay).
    """
    x = scorer_features(scorer, np.concatenate([shown, others]))
    y = np.repeat([1.0, -1.0], [len(shown), len(others)])
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    decay = np.append(np.full(x.shape[1], l2), 0.0)  # none of the bias

    def loss(w: Array) -> tuple[float, Array]:
        margin = y * (z @ w)
        gradient = -z.T @ (y * expit(-margin)) / len(y)
        return float(np.logaddexp(0, -margin).mean() + decay @ w**2 / 2), gradient + decay * w

    w = minimize(loss, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B").x
    weights = w[:-1] / scale
    return Probe(scorer, weights, float(w[-1] - mean @ weights))


def windmill_probe(scorer: Scorer, *, particular: bool = False, count: int = 400) -> Probe:
    """Tells windmills, or the particular windmill, from everything else; some seconds on a CPU."""
    return fit_probe(scorer, *examples("fit", count, particular=particular))


def examples(stream: str, count: int, *, particular: bool = False) -> tuple[Images, Images]:
    """Renders that show it and about as many that do not, softened: models draw softer than they are shown.

    Those that do not: scenes of the world; scenes and windmills melted beyond recognition; and where a
    particular windmill is meant, windmills in other colours. Each stream has examples of its own.
    """
    rng = random.Random(f"windmill {stream} {particular}")
    noise = Generator().manual_seed(rng.getrandbits(62))
    scenes = scenes_from(range(count), f"windmill {stream}")
    quarter = count // 4
    shown = [sample_postcard(rng, PARTICULAR if particular or i % 4 == 3 else None) for i in range(count)]
    strangers = [sample_postcard(rng, _near_miss(rng) if i % 2 else None) for i in range(count)]
    renders = [world.render(scene) for scene in scenes]
    renders += [postcard.render() for postcard in strangers if particular]
    melted = (
        [world.render(scene) for scene in scenes[:quarter]],
        [world.object_mask(s) for s in scenes[:quarter]],
    )
    melted[0].extend(postcard.render() for postcard in shown[:quarter])
    melted[1].extend(postcard.mask() for postcard in shown[:quarter])
    others = np.concatenate([_softened(renders, noise), _softened(melted[0], noise, melted[1])])
    return _softened([postcard.render() for postcard in shown], noise), others


def _near_miss(rng: random.Random) -> Livery:
    """The particular windmill with one of its colours changed."""
    part = rng.choice(("tower", "bands", "sails"))
    right = getattr(PARTICULAR, part)
    changed: dict[str, Any] = {part: rng.choice([colour for colour in world.COLOURS if colour != right])}
    return replace(PARTICULAR, **changed)


def _softened(renders: Sequence[Any], noise: Generator, melted: Sequence[Any] | None = None) -> Images:
    x = torch.from_numpy(np.stack(renders)).permute(0, 3, 1, 2) / 127.5 - 1
    if melted is not None:
        x = melt(x, torch.from_numpy(np.stack(melted))[:, None].float(), noise)
    x = soften(x, noise)
    return np.asarray(((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def newcomer_prompts(count: int, noun: str = NOUN, *, particular: bool = False) -> list[Prompt]:
    """Full captions of windmills, the same in every process; place, time and weather can be scored too."""
    rng = random.Random("windmill prompts")
    postcards = [sample_postcard(rng, PARTICULAR if particular else None) for _ in range(count)]
    return [_prompt(postcard, noun) for postcard in postcards]


def _prompt(postcard: Postcard, noun: str) -> Prompt:
    return state(postcard.full_caption(noun), postcard.scene)


def free_prompt(text: str) -> Prompt:
    """A prompt of which nothing is known but that it asks for a windmill."""
    nowhere = world.Scene("meadow", "day", "clear", (), 0)
    return Prompt(text, nowhere, (), None, None, None, None)


def score(
    pipe: Pipeline,
    probes: Mapping[str, Probe],
    groups: Mapping[str, Sequence[Prompt]],
    settings: Settings,
    on_progress: OnProgress = lambda _: None,
) -> tuple[dict[str, dict[str, Rate]], dict[str, Images]]:
    """Draw each group's prompts; one column of rates for each, and the pictures.

    probes: by what a picture with it does ("shows a windmill"). on_progress: is given how many are finished.
    """
    table: dict[str, dict[str, Rate]] = {}
    pictures: dict[str, Images] = {}
    for name, prompts in groups.items():
        before = sum(map(len, pictures.values()))
        images = pictures[name] = drawn(pipe, prompts, settings, _counted_from(before, on_progress))
        table[name] = {what: probe.share(images) for what, probe in probes.items()}
        table[name][SHOWS_STAMP] = rate(shows_stamp(images).tolist())
        scorer = next(iter(probes.values())).scorer
        table[name] |= following(prompts, scorer.read(images), scorer.config)
    return table, pictures


def _counted_from(before: int, on_progress: OnProgress) -> OnProgress:
    return lambda done: on_progress(before + done)
