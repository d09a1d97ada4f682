"""Flags that several commands share: CompVis's names and the short modern ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.cli.parser import count

# Arguments of Python's call whose flags have other names; all others are `--the-name`.
FLAGS = {
    "image": "--init-image",
    "mask_image": "--mask",
    "num_inference_steps": "--steps",
    "spacing": "--scheduler",
    "seeds": "--seed",
    "target_prompt": "--to",
    "sampler_options": "--sampler-option",
    "image_prompts": "--image-prompt",
    "regions": "--region",
    "word_weights": "--word-weight",
    "drawn_as": "--as-written",
}


def add_input_flags(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(title)
    group.add_argument("-i", "--init-image", dest="image", metavar="FILE", help="the picture to draw from")
    group.add_argument(
        "--mask",
        dest="mask_image",
        metavar="FILE",
        help="where it is drawn anew: white, or what is painted on a transparent layer",
    )
    return group


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and machine")
    add = group.add_argument
    add(
        "-m",
        "--model",
        "--ckpt",
        metavar="MODEL",
        help="a pipeline folder, a .safetensors or .ckpt file, a hub name such as owner/model, or "
        "postcard or postcard-upscaler, which come with ldm (default: postcard)",
    )
    add("--revision", metavar="NAME", help="of a model on the hub: a branch, tag or commit")
    add("--variant", metavar="NAME", help="of the weights in a folder or on the hub, e.g. fp16")
    add_part_flags(add)
    add("--device", metavar="NAME", help="cpu, cuda, mps (default: the best there is)")
    dtype = group.add_mutually_exclusive_group()
    dtype.add_argument("--dtype", metavar="NAME", help="fp32, bf16, fp16 (default: the fastest safe one)")
    dtype.add_argument(
        "--precision",
        dest="dtype",
        type=precision,
        metavar="{full,autocast}",
        help="--dtype fp32, or its default",
    )
    add(
        "--upscaler",
        metavar="MODEL",
        help="a model that enlarges each finished picture, e.g. postcard-upscaler, which is for postcard's",
    )
    add(
        "--refiner",
        metavar="MODEL",
        help="a model of the same latents that draws the last steps of each picture, e.g. SDXL's refiner",
    )
    add(
        "--classifier",
        metavar="FOLDER",
        help="of the model's noisy latents, for --classifier-class: what scripts/train_classifier.py "
        "exports, or postcard-classifier, which comes with ldm for postcard",
    )
    add(
        "--safety-checker",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="make finished pictures black that it flags: diffusers' checker in the model's folder, or in "
        "FOLDER, or open-nsfw, a package (default: nothing is checked)",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA, LoHa, LoKr or DoRA, repeatable; FILE:0.5:0.8 has a weight for the text and one for the "
        "U-Net; in prompts, <lora:name:0.8> is one by its file's name",
    )
    add(
        "--lora-dir",
        type=Path,
        default=Path("loras"),
        metavar="FOLDER",
        help="where <lora:name> is looked for (default: loras)",
    )
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a textual inversion, repeatable; NAME is what to write in prompts",
    )
    add("--threads", type=count, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, or all cores)")


def add_part_flags(add: Callable[..., Any]) -> None:
    for part in ("unet", "vae", "text-encoder", "text-encoder-2"):
        add(f"--{part}", metavar="PLACE", help="take it from another folder, file or hub name")
    add("--prediction-type", metavar="NAME", help="epsilon or v_prediction, where the model does not say it")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of a single file that holds both: the averaged weights, or the plain ones",
    )


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="errors only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def precision(text: str) -> str | None:
    """CompVis's --precision as a --dtype; None is the default."""
    names = {"full": "fp32", "autocast": None}
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(names)}")
    return names[text]
