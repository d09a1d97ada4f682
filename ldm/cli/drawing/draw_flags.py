"""The flags of `txt2img`: CompVis's names and the short modern ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.drawing.control_flags import add_control_flags
from ldm.cli.drawing.image_prompt_flags import add_image_prompt_flags
from ldm.cli.drawing.picture_flags import add_image_flags, add_mask_flags, add_noise_flags
from ldm.cli.drawing.steer_flags import add_steering_flags
from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.parser import count
from ldm.cli.provenance import add_mark_flags
from ldm.cli.terminal import TERMINAL

OUTDIR = "outputs/txt2img-samples"
SIZES = tuple(
    negative + size
    for negative in ("", "negative-")
    for size in ("original-size", "crops-coords-top-left", "target-size")
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to draw")
    add = group.add_argument
    words = group.add_mutually_exclusive_group()
    words.add_argument("-p", "--prompt", help="what the picture shows; empty draws anything")
    words.add_argument(
        "--from-file", metavar="FILE", help="one prompt, or JSON object of fields, per line; - reads stdin"
    )
    add(
        "--from-png",
        type=Path,
        metavar="FILE",
        help="draw as this picture of ldm or AUTOMATIC1111 was drawn, but for what other flags say",
    )
    add("-n", "--negative-prompt", metavar="TEXT", help="what the picture should not show")
    add(
        "--prompt-grammar",
        choices=("a1111", "comfy", "plain"),
        help="what marks in prompts mean: (word:1.3), [word], BREAK, AND, [from:to:0.5] as in AUTOMATIC1111, "
        "(word:1.3) as in ComfyUI, or nothing (default: a1111)",
    )
    add(
        "--wildcards",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="prompts are templates: {a|b} is one of several, __name__ a line of name.txt in the folder; "
        "each seed chooses",
    )
    add(
        "--as-written",
        dest="drawn_as",
        action="store_const",
        const=(),
        help="draw no word that the model does not know as a thing that it does",
    )
    add("--list-things", action="store_true", help="tell what a small model can draw, and draw nothing")
    add("--explain", action="store_true", help="tell what the text encoders read, and draw nothing")
    add("--plan", action="store_true", help="tell what memory it will take, and how it fits; draw nothing")
    add(
        "--max-memory",
        metavar="SIZE",
        help="e.g. 6GiB: draw in the quickest way that takes no more memory, and refuse what takes more",
    )
    add("--prompt-2", metavar="TEXT", help="for a second text encoder, as in SDXL (default: the prompt)")
    add(
        "--styles",
        nargs="+",
        default=[],
        metavar="NAME",
        help="texts of --styles-file to put around the prompts, the last outermost",
    )
    add(
        "--styles-file",
        type=Path,
        default=Path("styles.csv"),
        metavar="FILE",
        help="name,prompt,negative_prompt as in AUTOMATIC1111; {prompt} is where the prompt goes "
        "(default: styles.csv)",
    )
    add("--negative-prompt-2", metavar="TEXT", help="likewise (default: the negative prompt)")
    add("-W", "--width", "--W", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("-H", "--height", "--H", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("-s", "--seed", type=int, help="of the first picture; negative: random (default: 42)")
    add(
        "-b",
        "--n-iter",
        "--batch-count",
        type=count,
        default=1,
        metavar="N",
        help="batches per prompt (default: 1)",
    )
    add(
        "--n-samples",
        "--batch-size",
        type=count,
        default=1,
        metavar="N",
        help="pictures in a batch (default: 1)",
    )
    add("--fixed-code", action="store_true", help="every batch starts from the same noise")
    add_noise_flags(parser)
    add_image_flags(parser)
    add_mask_flags(parser)
    add_control_flags(parser)
    add_image_prompt_flags(parser)
    add_sampling_flags(parser)
    add_pixel_flags(parser)
    add_fast_flags(parser)
    add_steering_flags(parser)
    add_model_flags(parser)
    add("--C", type=int, metavar="CHANNELS", help="latent channels: checked against the model")
    add("--f", type=int, metavar="FACTOR", help="downsampling factor: checked against the model")
    add_output_flags(parser)
    add_common_flags(parser)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--outdir", type=Path, default=Path(OUTDIR), metavar="FOLDER", help=f"(default: {OUTDIR})")
    add("-o", "--output", type=Path, metavar="FILE", help="write the one picture here instead")
    add(
        "--format",
        choices=("png", "jpeg", "webp", "avif"),
        help="of pictures and sheets (default: by the suffix of --output, or png)",
    )
    add("--quality", type=int, metavar="N", help="1 to 100 (default: JPEG 95, WebP 90, AVIF 80)")
    add("--lossless", action="store_true", help="WebP that keeps every pixel")
    add(
        "--name",
        metavar="PATTERN",
        help='of files in the folder, e.g. "{seed}-{prompt:40}": any field of a request, {counter}, {date}, '
        "{time} (default: {counter})",
    )
    add("--resume", action="store_true", help="leave out pictures that lie in the folder already")
    add("--skip-save", action="store_true", help="do not write the single pictures")
    add("--skip-grid", action="store_true", help="do not write a grid of several pictures")
    add("--n-rows", type=count, metavar="N", help="pictures in each row of the grid (default: --n-samples)")
    add("--grid-labels", action="store_true", help="seeds, and prompts that differ, under pictures of a grid")
    add(
        "--plot",
        action="append",
        metavar="AXES",
        help='a labelled sheet of all values of one to three settings, e.g. "steps=4,8,20; cfg=1-7(+2); '
        'prompt s/r=red,blue"; with a JSON beside it',
    )
    add(
        "--preview",
        nargs="?",
        const=TERMINAL,
        metavar="FILE",
        help="show each step in the terminal (kitty, iTerm2, sixel), or write it to a picture's file",
    )
    add("--no-preview", dest="preview", action="store_const", const=None, help="show none")
    add(
        "--transparent",
        action="store_true",
        default=None,
        help="leave the plain background out: PNG, WebP or AVIF with alpha (ask for one in the prompt)",
    )
    add_mark_flags(add)
    add(
        "--watermark",
        action=argparse.BooleanOptionalAction,
        help="mark the pixels themselves, invisibly, by the key in $LDM_WATERMARK_KEY or everybody's",
    )


def option(text: str) -> tuple[str, float]:
    """A name and a number."""
    name, _, number = text.partition("=")
    try:
        return name.replace("-", "_"), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=NUMBER, such as s_churn=2") from None


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to draw it (default of each: the model's)")
    add = group.add_argument
    add(
        "--steps",
        "--ddim-steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="denoising steps, 1 to 1000",
    )
    add(
        "--cfg-scale",
        "--scale",
        "--guidance-scale",
        dest="scale",
        type=float,
        metavar="SCALE",
        help="classifier-free guidance; 1 is none",
    )
    add("--guidance", metavar="NAME[:OPTIONS]", help="e.g. apg:eta=0+interval:0.2,0.8 (docs/guidance.md)")
    add("--classifier-class", metavar="NAME", help="what the gradient of --classifier leads to")
    add(
        "--classifier-scale",
        type=float,
        metavar="SCALE",
        help="how strongly; 1 is Bayes' rule (default: 4)",
    )
    add(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="0 to 1: less overexposure at high scales",
    )
    sampler = group.add_mutually_exclusive_group()
    sampler.add_argument("--sampler", metavar="NAME", help='e.g. "DPM++ 2M Karras", euler_a, ddim, unipc')
    sampler.add_argument("--plms", dest="sampler", action="store_const", const="pndm", help="--sampler pndm")
    sampler.add_argument(
        "--dpm-solver", dest="sampler", action="store_const", const="dpmpp_2m", help="--sampler dpmpp_2m"
    )
    add("--scheduler", "--spacing", metavar="NAME", help="spacing of the steps, e.g. karras, trailing")
    add(
        "--eta",
        "--ddim-eta",
        type=float,
        metavar="ETA",
        help="0 to 1: fresh noise in each step, where the sampler adds any",
    )
    add(
        "--sampler-option",
        dest="sampler_options",
        action="append",
        type=option,
        metavar="NAME=NUMBER",
        help="of the sampler, repeatable: s_churn=2 (docs/samplers.md has them); rho of the spacing",
    )
    add("--clip-skip", type=int, metavar="N", help="skip the last N layers of the text encoder")
    add = parser.add_argument_group(
        "what SDXL is told of the picture (default of sizes: its own)"
    ).add_argument
    for name in SIZES:
        pair = ("TOP", "LEFT") if name.endswith("top-left") else ("HEIGHT", "WIDTH")
        add(f"--{name}", nargs=2, type=int, metavar=pair)
    add("--aesthetic-score", type=float, metavar="SCORE", help="refiners only (default: 6)")
    add("--negative-aesthetic-score", type=float, metavar="SCORE", help="refiners only (default: 2.5)")


def add_pixel_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "more pixels: a second pass at a larger size, windows, seamless pictures, a refiner"
    ).add_argument
    add(
        "--hires-scale",
        type=float,
        metavar="FACTOR",
        help="draw it, enlarge it so many times, 1 to 8, and draw it again from that (default: 2, with any "
        "other --hires flag)",
    )
    add(
        "--hires-upscaler",
        metavar="NAME",
        help="what enlarges it: latent (bilinear), latent_antialiased, latent_bicubic, "
        "latent_bicubic_antialiased, latent_nearest, latent_nearest_exact, lanczos, nearest, or the "
        ".safetensors file of a network such as ESRGAN (default: latent)",
    )
    add(
        "--hires-strength",
        type=float,
        metavar="SHARE",
        help="0 to 1: how much is drawn anew (default: 0.7)",
    )
    add(
        "--hires-steps",
        type=int,
        metavar="N",
        help="of the second pass, which draws its last --hires-strength of them (default: --steps)",
    )
    add("--hires-prompt", metavar="TEXT", help="what the second pass is told (default: the prompt)")
    add("--hires-sampler", metavar="NAME", help="of the second pass (default: the first's)")
    add(
        "--tile-size",
        type=int,
        metavar="PIXELS",
        help="let the network see windows of this size, and average what it says of each (MultiDiffusion)",
    )
    add("--tile-overlap", type=int, metavar="PIXELS", help="of two windows (default: half of one)")
    add(
        "--tiling",
        choices=("x", "y", "xy"),
        help="seamless: what leaves the picture at one edge comes in at the other",
    )
    add(
        "--refiner-switch-at",
        type=float,
        metavar="SHARE",
        help="0 to 1: where --refiner goes on (default: 0.8)",
    )


def add_fast_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("faster, at a price in the picture (docs/fast.md)").add_argument
    add(
        "--fast",
        action="store_true",
        default=None,
        help="about twice as fast: --steps and the flags below, as far as you leave them out, by the model",
    )
    add(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("START", "STOP"),
        help="0 to 1: the part of the way from noise to picture with guidance (default: 0 1, all of it)",
    )
    add(
        "--cache-interval",
        type=int,
        metavar="N",
        help="DeepCache: compute the network whole in one of N steps, its shallow layers in the others",
    )
    add(
        "--cache-branch-id",
        type=int,
        metavar="N",
        help="how shallow: 0 is the first and last layer (default), 1 two of each, ...",
    )
    add(
        "--token-merging-ratio",
        type=float,
        metavar="SHARE",
        help="0 to 1: merge tokens that are alike in self-attention (ToMe), at most three of four",
    )
