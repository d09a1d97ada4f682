"""The watermark's price, how often it is found after a JPEG and a resize, and how often where there is none.

Measured on postcards, flat colours with sharp edges, which hide little; each is marked by a key of its own.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import ndtri
from scipy.stats import binomtest

from ldm import postcards
from ldm.images.watermark import BOUND, THRESHOLD, detect, mark, scores

LEVELS = (1e-2, 1e-3, 1e-4)  # of false positives, which a few thousand pictures can show


def jpeg(image: Image.Image, quality: int = 75) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "JPEG 75": jpeg,
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "JPEG 75, then half": lambda image: CHANGES["half"](jpeg(image)),
    "half, then JPEG 75": lambda image: jpeg(CHANGES["half"](image)),
    "JPEG 50": lambda image: jpeg(image, 50),
}


def interval(hits: int, count: int) -> str:
    found = binomtest(hits, count).proportion_ci(method="exact")
    return f"{hits} of {count} (95 %: {found.low:.4g} to {found.high:.4g})"


def main() -> None:
    """The command of `scripts/measure_watermark.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="pictures (default: 1000)")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="of a side (default: 128)")
    args = parser.parse_args()
    found, prices, rng = {name: list[float]() for name in CHANGES}, list[float](), np.random.default_rng(0)
    public, chances = list[float](), list[NDArray[np.float64]]()
    for k in range(args.count):
        picture = postcards.render(postcards.sample_scene(random.Random(f"watermark {k}")), args.size)
        pixels, key = np.asarray(picture)[..., :3], f"key {k}".encode()
        public.append(detect(pixels, b"ldm").z)
        g = scores(pixels).ravel()
        chances.append(rng.choice([-1.0, 1.0], (100, g.size)) @ g / np.linalg.norm(g))
        marked = Image.fromarray((mark(pixels / 255, key) * 255).round().astype(np.uint8))
        prices.append(10 * np.log10(255**2 / np.mean((np.asarray(marked) - pixels.astype(float)) ** 2)))
        for name, change in CHANGES.items():
            found[name].append(detect(np.asarray(change(marked)), key).z)
    print(
        f"PSNR {np.mean(prices):.1f} dB, 5 % below {np.quantile(prices, 0.05):.1f}, least {min(prices):.1f}"
    )
    for name, z in found.items():
        hits = sum(each >= THRESHOLD for each in z)
        print(f"{name}: found {interval(hits, len(z))}; z {np.median(z):.1f} (median)")
    hits = sum(z >= THRESHOLD for z in public)
    print(f"unmarked, the key `ldm`: {interval(hits, len(public))}, z to {max(public):.1f}")
    for level in LEVELS:
        hits = int((np.concatenate(chances) >= -ndtri(level / BOUND)).sum())
        print(f"unmarked, other keys, at most {level:g} are expected: {interval(hits, 100 * len(chances))}")
