"""The flags of the commands: CompVis's names and the short modern ones, with dashes or underscores."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

OUTDIR = "outputs/txt2img-samples"
SIZES = tuple(
    negative + size
    for negative in ("", "negative-")
    for size in ("original-size", "crops-coords-top-left", "target-size")
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes whole flags only and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

        self.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
        self.add_flags: list[Callable[[Parser], object]] = []  # called when this command is the one asked for

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Unknown flags are told by the command that does not know them, with the nearest that it knows."""
        while self.add_flags:
            self.add_flags.pop()(self)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(
                dashes(unknown)[0].partition("=")[0], self._option_string_actions, 1
            )
            hint = f"; did you mean {near[0]}?" if near and unknown[0].startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows every flag)\n")


def dashes(argv: Sequence[str]) -> list[str]:
    """--from_file is --from-file: underscores in the name of a long flag become dashes."""
    return [re.sub(r"^--[\w-]+(?==|$)", lambda name: name[0].replace("_", "-"), arg) for arg in argv]


def add_txt2img_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to draw")
    add = group.add_argument
    words = group.add_mutually_exclusive_group(required=True)
    words.add_argument("-p", "--prompt", help="what the picture shows; empty draws anything")
    words.add_argument("--from-file", metavar="FILE", help="one prompt per line; - reads stdin")
    add("-n", "--negative-prompt", metavar="TEXT", help="what the picture should not show")
    add("--prompt-2", metavar="TEXT", help="for a second text encoder, as in SDXL (default: the prompt)")
    add("--negative-prompt-2", metavar="TEXT", help="likewise (default: the negative prompt)")
    add("-W", "--width", "--W", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("-H", "--height", "--H", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's)")
    add("-s", "--seed", type=int, default=42, help="of the first picture; negative: random (default: 42)")
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
    add_image_flags(parser)
    add_sampling_flags(parser)
    add_model_flags(parser)
    add("--C", type=int, metavar="CHANNELS", help="latent channels: checked against the model")
    add("--f", type=int, metavar="FACTOR", help="downsampling factor: checked against the model")
    add = parser.add_argument_group("output").add_argument
    add("--outdir", type=Path, default=Path(OUTDIR), metavar="FOLDER", help=f"(default: {OUTDIR})")
    add("-o", "--output", type=Path, metavar="FILE", help="write the one picture here instead")
    add("--skip-save", action="store_true", help="do not write the single pictures")
    add("--skip-grid", action="store_true", help="do not write a grid of several pictures")
    add("--n-rows", type=count, metavar="N", help="pictures in each row of the grid (default: --n-samples)")
    add_common_flags(parser)


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    add = add_input_flags(parser, "drawing from a picture").add_argument
    add(
        "--strength",
        type=float,
        metavar="SHARE",
        help="0 to 1: how much of the picture is drawn anew (default: 0.8; of SDXL 0.3; with a mask 1)",
    )
    add(
        "--image-guidance-scale",
        type=float,
        metavar="SCALE",
        help="instruct-pix2pix: how closely to keep to the picture (default: 1.5)",
    )
    add(
        "--noise-level",
        type=int,
        metavar="N",
        help="upscalers: noise on the picture (default: the model's)",
    )


def add_input_flags(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(title)
    group.add_argument("-i", "--init-image", dest="image", metavar="FILE", help="the picture to draw from")
    group.add_argument(
        "--mask", dest="mask_image", metavar="FILE", help="white where an inpainting model draws anew"
    )
    return group


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
    add("--clip-skip", type=int, metavar="N", help="skip the last N layers of the text encoder")
    add = parser.add_argument_group(
        "what SDXL is told of the picture (default of sizes: its own)"
    ).add_argument
    for name in SIZES:
        pair = ("TOP", "LEFT") if name.endswith("top-left") else ("HEIGHT", "WIDTH")
        add(f"--{name}", nargs=2, type=int, metavar=pair)
    add("--aesthetic-score", type=float, metavar="SCORE", help="refiners only (default: 6)")
    add("--negative-aesthetic-score", type=float, metavar="SCORE", help="refiners only (default: 2.5)")


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


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="errors only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_info_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a PNG that was drawn by this program")
    add_common_flags(parser)


def add_redraw_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a PNG; give its model and LoRAs as when drawn"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the new picture here")
    add_input_flags(parser, "where the pictures that it was drawn from lie now, if they were moved")
    add_model_flags(parser)
    add_common_flags(parser)


def add_part_flags(add: Callable[..., Any]) -> None:
    for part in ("unet", "vae", "text-encoder", "text-encoder-2"):
        add(f"--{part}", metavar="PLACE", help="take it from another folder, file or hub name")
    add("--prediction-type", metavar="NAME", help="epsilon or v_prediction, where the model does not say it")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of a single file that holds both: the averaged weights, or the plain ones",
    )


def add_convert_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a pipeline folder, a single file or a hub name")
    add("target", type=Path, metavar="TARGET", help="a folder, or one file if it ends in .safetensors")
    add("--dtype", metavar="NAME", help="fp32, bf16, fp16 (default: as stored)")
    add_part_flags(add)
    add("--config", type=Path, metavar="FOLDER", help="a pipeline folder with the configs of a single file")
    add("--max-shard-size", metavar="SIZE", help="5GB, 500MB: cut larger files of a folder")
    add("--force", action="store_true", help="replace a target that is there")
    add_common_flags(parser)


def add_folder_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="pictures, with captions in any of the usual layouts")
    add("--instance-prompt", metavar="TEXT", help="the caption of every picture; those in DIR are not read")
    add(
        "--missing-caption",
        choices=("error", "empty", "skip"),
        default="error",
        help="of a picture without a caption: stop, train it on an empty one, leave it out (default: error)",
    )
    add("--resolution", type=count, default=512, metavar="PIXELS", help="of the training (default: 512)")
    add("--sheet", type=Path, metavar="FILE", help="write a PNG of the crops that training will see")
    add("--json", action="store_true", help="everything, as JSON")
    add("--all", action="store_true", help="every line, not the first 20 of each kind")
    add_common_flags(parser)


def add_finetune_flags(parser: argparse.ArgumentParser) -> None:
    from ldm.train.finetune_recipe import add_recipe_flags

    add_recipe_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def precision(text: str) -> str | None:
    """CompVis's --precision as a --dtype; None is the default."""
    names = {"full": "fp32", "autocast": None}
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(names)}")
    return names[text]


class ShowVersion(argparse.Action):
    """Print the version and exit. An action of its own because finding the version takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from ldm import __version__

        print(f"ldm {__version__}")
        parser.exit()
