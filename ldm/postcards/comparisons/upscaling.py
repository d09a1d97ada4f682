"""How near an upscaler comes to the large render of a scene whose small one it sees: nearer than bicubic?"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.errors import UserError, reported
from ldm.evaluate.distances import psnr

if TYPE_CHECKING:
    from ldm.evaluate.reconstruction import Images
    from ldm.pipeline import Pipeline
    from ldm.postcards.scoring.prompts import Prompt


@dataclass(frozen=True)
class Fidelity:
    """Of large pictures to the renders, means over the pictures.

    psnr: dB. gain: dB above bicubic. edges: difference of neighbouring pixels, of all together, as a share
    of the renders': below 1 is blurred, above 1 restless. seconds: for a picture.
    """

    psnr: float
    gain: float
    edges: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} dB ({self.gain:+.2f}), edges {self.edges:.2f}, {self.seconds:.2f} s"


Table = dict[str, dict[str, Fidelity]]  # what was upscaled -> how -> how near


def bicubic(images: Images, side: int) -> Images:
    """uint8 [N, h, w, 3] -> [N, side, side, 3], as Pillow resizes."""
    size, method = (side, side), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(each).resize(size, method)) for each in images])


def edges(images: Images) -> NDArray[np.float64]:
    """Mean absolute difference of neighbouring pixels, both ways, of each picture: float64 [N], of 255."""
    x = images.astype(np.float64)
    across, down = (np.abs(np.diff(x, axis=axis)).mean((1, 2, 3)) for axis in (1, 2))
    return np.asarray((across + down) / 2)


def measure_upscaler(
    pipe: Pipeline, base: Pipeline, prompts: Sequence[Prompt], steps: Sequence[int]
) -> tuple[Table, Images]:
    """How near bicubic, `pipe` and its autoencoder alone come; and bicubic, drawn, rendered pictures in turn.

    Upscaled are the prompts' small renders, and what the autoencoder of `base` makes of them. The pictures
    are drawn in the last of `steps`.

    Raises:
        UserError: if `pipe` is no upscaler.
    """
    from ldm.checkpoint.parts import check_upscaler
    from ldm.evaluate.reconstruction import reconstructed
    from ldm.postcards.scoring.sources import picture_size, rendered

    check_upscaler(pipe.parts, pipe.name)
    side = picture_size(base)
    far = side * pipe.vae.downscale
    small, large = rendered(prompts, side), rendered(prompts, far)
    upscaled(pipe, small[:1], prompts[:1], steps[0])  # the first is slower
    limit = _timed(partial(reconstructed, pipe, large), large)
    found, shown = Table(), []
    for name, images in (("renders", small), ("through the VAE", reconstructed(base, small))):
        plain = _timed(partial(bicubic, images, far), large)
        made = {
            f"{count} step{'s' * (count > 1)}": _timed(partial(upscaled, pipe, images, prompts, count), large)
            for count in steps
        }
        rows = {"bicubic": plain, **made, "its autoencoder alone": limit}
        found[name] = {how: _fidelity(*each, plain[0], large) for how, each in rows.items()}
        (*_, (drawn, _)) = made.values()
        shown.append(np.stack([plain[0], drawn, large], 1).reshape(-1, *large.shape[1:]))
    return found, np.concatenate(shown)


def _timed(make: Callable[[], Images], like: Images) -> tuple[Images, float]:
    """Pictures, and the seconds for one."""
    began = time.perf_counter()
    return make(), (time.perf_counter() - began) / len(like)


def _fidelity(pictures: Images, seconds: float, plain: Images, large: Images) -> Fidelity:
    level = psnr(pictures, large)
    gain, sharpness = level - psnr(plain, large), edges(pictures).mean() / edges(large).mean()
    return Fidelity(float(level.mean()), float(gain.mean()), float(sharpness), seconds)


def upscaled(pipe: Pipeline, images: Images, prompts: Sequence[Prompt], steps: int) -> Images:
    """Each picture drawn larger, picture i with seed i."""
    made = [
        pipe(prompt.text, image=Image.fromarray(small), num_inference_steps=steps, seed=i).images[0]
        for i, (small, prompt) in enumerate(zip(images, prompts, strict=True))
    ]
    return np.stack([np.asarray(each) for each in made])


# --- the command -------------------------------------------------------------------------------------------


def main() -> None:
    """Parse the command line, measure, report; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description="An upscaler of postcards against bicubic interpolation.")
    parser.add_argument("--model", default="postcard-upscaler", help="the upscaler (default: %(default)s)")
    parser.add_argument("--base", help="the model that draws what is upscaled (default: the embedded one)")
    parser.add_argument("--n", type=int, default=100, help="scenes, at most 500")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--pictures", type=Path, help="a PNG of bicubic, drawn, rendered pictures")
    args = parser.parse_args()
    with reported():
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    from ldm.files import check_writable
    from ldm.images.pixels import contact_sheet
    from ldm.images.png import save_png
    from ldm.pipeline import load
    from ldm.postcards.scoring.prompts import evaluation_prompts

    prompts = evaluation_prompts(held_out=True)
    if not 1 <= args.n <= len(prompts):
        raise UserError(f"--n must be from 1 to {len(prompts)} (got {args.n})")
    for file in (args.out, args.pictures):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            check_writable(file.parent)
    if args.pictures and args.pictures.suffix.lower() != ".png":
        raise UserError(f"--pictures {args.pictures} must name a .png file")
    pipe, base = (load(each, device=args.device, dtype=args.dtype) for each in (args.model, args.base))
    found, pictures = measure_upscaler(pipe, base, prompts[: args.n], args.steps)
    for name, rows in found.items():
        print(f"{name}, {args.n} scenes", *(f"  {how}: {near}" for how, near in rows.items()), sep="\n")
    if args.out:
        figures = {name: {how: asdict(near) for how, near in rows.items()} for name, rows in found.items()}
        args.out.write_text(json.dumps({"n": args.n, **figures}, indent=2) + "\n", encoding="utf-8")
    if args.pictures:
        halves = np.split(pictures, 2)  # of renders and of what went through the VAE
        save_png(
            contact_sheet([Image.fromarray(each) for half in halves for each in half[:12]], 6), args.pictures
        )
