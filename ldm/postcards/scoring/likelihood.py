"""What likelihoods say of the embedded model, measured on renders it has not seen.

Is a picture likelier under its own caption than under none, and under none than under another's? Can a kind
of thing be told by asking which prompt makes the picture likeliest? Do foreign pictures stand out?
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm import postcards as world
from ldm.diffusion.likelihood import Likelihood
from ldm.evaluate.bound import picture_bounds
from ldm.evaluate.likelihood import content_errors, denoising_bounds, log_likelihoods, posterior
from ldm.evaluate.outliers import FAR, robust_scores
from ldm.evaluate.report import NORMAL_95, rate
from ldm.pipeline import Pipeline
from ldm.postcards.scoring.curves import draw_curves
from ldm.postcards.scoring.prompts import evaluation_prompts
from ldm.postcards.scoring.scorer import Scorer
from ldm.postcards.sprites.labels import AnyScene
from ldm.postcards.sprites.mixture import render as draw
from ldm.postcards.sprites.retrieval import alone
from ldm.postcards.sprites.scene import make_world

Judge = Callable[[Pipeline, Image.Image, Sequence[str], int], list[Likelihood]]
SIDE = 128


def by_ode(pipe: Pipeline, picture: Image.Image, prompts: Sequence[str], seed: int) -> list[Likelihood]:
    """log p by the ODE, two probes."""
    return log_likelihoods(pipe, picture, prompts, seed=seed, probes=2)


def by_error(pipe: Pipeline, picture: Image.Image, prompts: Sequence[str], seed: int) -> list[Likelihood]:
    """The bound by the error of denoising, twice at 16 levels."""
    return denoising_bounds(pipe, picture, prompts, seed=seed, levels=16, noises=2)


# --- captions --------------------------------------------------------------------------------------------


def captions(pipe: Pipeline, judge: Judge, n: int) -> dict[str, Any]:
    """Bits/dim of n renders under their captions, without, and under the caption of the next render.

    Means with 95 % intervals over the pictures; of the differences, which are paired, too.
    """
    prompts = evaluation_prompts(n)
    rows = []
    for i, prompt in enumerate(prompts):
        texts = [prompt.text, "", prompts[(i + 1) % n].text]
        rows.append(judge(pipe, render(prompt.scene), texts, i))
    own, none, other = np.array([[each.bits_per_dim for each in row] for row in rows]).T
    return {
        "n": n,
        "own caption": interval(own),
        "no caption": interval(none),
        "another's caption": interval(other),
        "none - own": interval(none - own),
        "other - none": interval(other - none),
        "own likelier than none": asdict(rate((own < none).tolist())),
        "own likelier than another's": asdict(rate((own < other).tolist())),
        "median standard error of log p, nats": float(np.median([row[0].std_error for row in rows])),
        "of own - none, nats": float(np.median([row[0].gain_over(row[1])[1] for row in rows])),
        "evaluations": float(np.mean([each.evaluations for row in rows for each in row])),
    }


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    return float(values.mean()), float(NORMAL_95 * values.std(ddof=1) / len(values) ** 0.5)


def render(scene: AnyScene) -> Image.Image:
    return Image.fromarray(draw(scene, SIDE))


# --- the bound -------------------------------------------------------------------------------------------


def bounds(pipe: Pipeline, n: int, steps: int, chart: Path | None = None) -> dict[str, Any]:
    """The terms of the bound of n renders, under their captions and without, and its curve over timesteps.

    The decoders' deviations are those of 16 other renders. The chart has both curves, in WebP.
    """
    prompts = evaluation_prompts(n + 16)
    pictures, texts = [render(p.scene) for p in prompts], [p.text for p in prompts]
    fitted = picture_bounds(pipe, pictures[n:], texts[n:], steps=2, seed=n)
    pixel_std, latent_std = fitted.pixel_std, fitted.latent_std
    found = {
        name: picture_bounds(
            pipe, pictures[:n], told, steps=steps, pixel_std=pixel_std, latent_std=latent_std
        )
        for name, told in (("own caption", texts[:n]), ("no caption", [""] * n))
    }
    if chart is not None:
        # Of each step the share of one timestep, so that charts of other numbers of steps compare.
        t = pipe.schedule.t(found["own caption"].sigmas)
        curves = {
            name: each.steps.mean(1) / (each.latent_dims * math.log(2)) / (t[:-1] - t[1:])
            for name, each in found.items()
        }
        draw_curves(t[:-1].tolist(), {name: curve.tolist() for name, curve in curves.items()}, chart)
    gain = found["no caption"].latents - found["own caption"].latents
    figures = {
        name: {
            "latents, bits/dim": interval(each.latents.numpy()),
            "pixels, bits/dim": interval(each.pictures.numpy()),
            "terms, latents and pixels": each.terms(),
        }
        for name, each in found.items()
    }
    stds = {"pixel_std, of 255": pixel_std, "latent_std": latent_std}
    return {"n": n, "steps": steps, **stds, **figures, "no caption - own": interval(gain.numpy())}


# --- what is in a picture? -------------------------------------------------------------------------------


def single_things(n: int) -> Iterator[world.Scene]:
    """n scenes of one thing each, kinds in turn."""
    rng, wanted = random.Random("one thing to be named"), 0
    while wanted < n:
        scene = world.sample_scene(rng)
        if [g.count for g in scene.groups] == [1] and scene.groups[0].kind == world.KINDS[wanted % 14]:
            wanted += 1
            yield scene


def kinds(pipe: Pipeline, scorer: Scorer, n: int) -> dict[str, Any]:
    """Share of n renders of one thing whose kind is named rightly.

    By "a cat", "a car", ..., whichever makes the picture likeliest by the error of denoising: at 8 levels
    over all of training, or at 4 of those that decide content. And by the scorer, which was trained to
    tell.
    """
    scenes = list(single_things(n))
    pictures, prompts = [render(scene) for scene in scenes], [f"a {kind}" for kind in world.KINDS]
    truth = np.array([world.KINDS.index(scene.groups[0].kind) for scene in scenes])
    guesses: dict[str, list[int]] = {"8 levels": [], "4 levels of content": []}
    for i, picture in enumerate(pictures):
        whole = denoising_bounds(pipe, picture, prompts, seed=i, levels=8, noises=1)
        guesses["8 levels"].append(int(np.argmax(posterior(whole))))
        errors = content_errors(pipe, picture, prompts, seed=i, levels=4)
        guesses["4 levels of content"].append(int(np.argmin(errors)))
    read = scorer.read(np.stack([np.asarray(picture) for picture in pictures]))
    guesses["the scorer"] = read.presence.argmax(1).tolist()
    wrong = {
        name: [(world.KINDS[a], world.KINDS[b]) for a, b in zip(truth, said, strict=True) if a != b]
        for name, said in guesses.items()
    }
    rates = {name: asdict(rate((truth == said).tolist())) for name, said in guesses.items()}
    return {"n": n, **rates, "wrong: is, said": wrong}


# --- foreign pictures ------------------------------------------------------------------------------------


def strangers() -> dict[str, Image.Image]:
    """Pictures of other worlds: twelve things of the sprites, noise, grey, and a postcard in pieces.

    None of these sprites was looked at when `ldm.evaluate.likelihood.CONTENT` was chosen.
    """
    rng, sprites = random.Random("strangers of the second draw"), make_world()
    found = {}
    for thing in rng.sample(list(sprites.things), 12):
        scene = alone(thing, next(iter(thing.sprites)), rng)
        found[f"sprite: {thing.noun}"] = Image.fromarray(draw(scene, SIDE))
    values = np.random.default_rng(0)
    found["noise"] = Image.fromarray(values.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    found["grey"] = Image.new("RGB", (SIDE, SIDE), "#808080")
    postcard = np.asarray(render(evaluation_prompts(1)[0].scene))
    blocks = postcard.reshape(4, 32, 4, 32, 3).swapaxes(1, 2).reshape(16, 32, 32, 3)[values.permutation(16)]
    found["a postcard in 16 pieces"] = Image.fromarray(
        blocks.reshape(4, 4, 32, 32, 3).swapaxes(1, 2).reshape(SIDE, SIDE, 3)
    )
    return found


def bits(pipe: Pipeline, picture: Image.Image, seed: int) -> float:
    """Of the whole bound, for each dimension, without a caption."""
    return by_error(pipe, picture, [""], seed)[0].bits_per_dim


def content(pipe: Pipeline, picture: Image.Image, seed: int) -> float:
    """The part that the noise levels make at which content is decided, in nats, without a caption."""
    return content_errors(pipe, picture, [""], seed=seed)[0]


MEASURES = {"bits/dim": bits, "content error": content}


def outliers(
    pipe: Pipeline, n: int, measures: Mapping[str, Callable[..., float]] = MEASURES
) -> dict[str, Any]:
    """Among n renders: ranks and scores of the strangers, by each measure."""
    foreign = strangers()
    scenes = [prompt.scene for prompt in evaluation_prompts(n, held_out=True)]
    pictures = [*map(render, scenes), *foreign.values()]
    found: dict[str, Any] = {"n": n}
    for name, measure in measures.items():
        scores = np.abs(robust_scores([measure(pipe, picture, i) for i, picture in enumerate(pictures)]))
        found[name] = {
            "strangers: rank, score": {
                each: (1 + int((scores > score).sum()), float(score))
                for each, score in zip(foreign, scores[n:], strict=True)
            },
            "renders that stand apart": int((scores[:n] >= FAR).sum()),
            "renders' largest score": float(scores[:n].max()),
        }
    return found
