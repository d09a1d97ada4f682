"""`ldm evaluate`: pictures measured against a reference, their captions and the model's own VAE."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.draw import draw_images, prepare_jobs
from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.models import load
from ldm.cli.parser import count
from ldm.cli.requests import Asked, read_prompts
from ldm.cli.terminal import bar, echo
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.evaluate.evaluate import Tools
    from ldm.evaluate.pictures import Pictures
    from ldm.pipeline import Pipeline

MOST_LINES = 5  # about files that are left out
OWN_FEATURES = "features of the embedded CLIP, which has seen postcards only: --features FOLDER for others"
TOLD = ("model", "model_hash", "sampler", "spacing", "num_inference_steps", "guidance_scale")  # of a drawing
WORLD = ("postcard", "postcard-held-out")  # in place of a file: the embedded world's evaluation prompts
EPILOG = """
what needs what:
  FID, KID, CMMD, precision, recall     --reference, of real pictures
  CLIP score, own caption is nearest    captions (beside the pictures, or in their metadata), and --clip
  PSNR, SSIM and rFID of the VAE        --model; measured on the reference, or else on PICTURES
  prompt following                      captions that are the embedded world's evaluation prompts
What is not given is left out, and said. Figures are to be compared at equal counts and by one protocol only:
evaluate.json holds both.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("pictures", type=Path, nargs="?", metavar="PICTURES", help="the folder that is measured")
    add(
        "--reference",
        metavar="FOLDER",
        help=f"real pictures; {' or '.join(WORLD)}: renders of scenes like those that --prompts tells",
    )
    add(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="a CLIP's image tower for distances, in transformers' layout (default: --clip, else the "
        "embedded one, which knows postcards only)",
    )
    add("--clip", type=Path, metavar="FOLDER", help="a CLIP with image and text tower, for the CLIP score")
    add(
        "--out",
        type=Path,
        default=Path("outputs/evaluate"),
        metavar="FOLDER",
        help="evaluate.json, evaluate.html, and what is drawn (default: outputs/evaluate)",
    )
    group = parser.add_argument_group("drawing the pictures first, instead of PICTURES")
    add = group.add_argument
    add(
        "--prompts",
        metavar="FILE",
        help=f"one prompt per line; {' or '.join(WORLD)}: the embedded world's evaluation prompts",
    )
    add("-n", "--count", type=count, metavar="N", help="pictures, prompts in turn (default: one a prompt)")
    add("--steps", type=count, metavar="N", help="default of each: the model's")
    add("--sampler", metavar="NAME")
    add("--scale", type=float, metavar="SCALE", help="classifier-free guidance")
    add("--batch-size", type=count, default=8, metavar="N", help="drawn at once (default: 8)")
    add(
        "-s",
        "--seed",
        type=int,
        default=0,
        help="of the first picture, of subsets and bootstraps (default: 0)",
    )
    add_model_flags(parser)
    add_common_flags(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Draw if asked to, read, measure; a table on stdout, JSON and a page in --out."""
    from ldm.evaluate.evaluate import VAE, evaluate
    from ldm.evaluate.figures import Found, merge, table, write_json
    from ldm.evaluate.overview import write_overview
    from ldm.postcards.scoring.captioned import caption_following

    check(args)
    folder = None if args.reference in (None, *WORLD) else Path(args.reference)
    reference = None if folder is None else read(folder, args)
    pictures = None if args.pictures is None else read(args.pictures, args)
    tools = make_tools(args)
    protocol: dict[str, object] = {"command": " ".join(["ldm", *sys.argv[1:]])}
    if tools.vae is not None and args.prompts is not None:
        prompts = drawn_prompts(args)
        if args.reference in WORLD:
            reference = read(render(tools.vae, len(prompts), args), args)
        protocol["drawn"] = draw(tools.vae, prompts, args)
    pictures = pictures or read(args.out / "drawn", args)
    progress = partial(bar, unit="images/s", quiet=args.quiet)
    parts = [evaluate(pictures, reference, tools, progress), caption_following(pictures)]
    found = merge([Found(protocol=protocol), *parts])
    written = [args.out / "evaluate.json", args.out / "evaluate.html"]
    write_json(written[0], found)
    folders = {name: pictures if name not in VAE else reference or pictures for name in found.per_picture}
    where = {name: each.folder for name, each in folders.items()}
    write_overview(written[1], f"Evaluation of {pictures.folder}", found, where)
    for line in (*table(found), *map(str, written)):
        echo(args, line)
    return 0


def check(args: argparse.Namespace) -> None:
    """What can be said to be wrong before anything is read. Raises UserError."""
    from ldm.files import check_writable

    if (args.pictures is None) == (args.prompts is None):
        raise UserError("give PICTURES, a folder that is measured, or else --prompts, to draw it first")
    drawing = {"--count": args.count, "--steps": args.steps, "--sampler": args.sampler, "--scale": args.scale}
    if args.prompts is None and (said := [flag for flag, value in drawing.items() if value is not None]):
        raise UserError(f"{said[0]} is for drawing: give --prompts")
    if args.reference in WORLD and args.prompts is None:
        raise UserError(f"--reference {args.reference} is for pictures that --prompts draws: give a folder")
    for name in ("drawn", "renders") if args.prompts else ():
        if (args.out / name).exists():
            raise UserError(f"{args.out / name} is there already: give another folder by --out")
    check_writable(args.out)


def read(folder: Path, args: argparse.Namespace) -> Pictures:
    """The pictures of a folder; how many were left out is said."""
    from ldm.evaluate.pictures import read_pictures

    with bar(f"reading {folder.name}", "images/s", args.quiet) as on_progress:
        pictures = read_pictures(folder, on_progress)
    for line in pictures.left_out[:MOST_LINES]:
        print(f"left out: {line}", file=sys.stderr)
    if len(pictures.left_out) > MOST_LINES:
        print(
            f"left out: {len(pictures.left_out) - MOST_LINES} more (evaluate.json has all)", file=sys.stderr
        )
    return pictures


def make_tools(args: argparse.Namespace) -> Tools:
    """The towers and the model that flags ask for."""
    from ldm.evaluate.evaluate import Tools
    from ldm.evaluate.features import ImageTower
    from ldm.runtime import choose

    device = choose(args.device, None).device
    clip = None if args.clip is None else ImageTower.load(args.clip, device)
    if clip is not None and not clip.text:
        raise UserError(f"--clip {args.clip} has an image tower only: give it by --features")
    notes: tuple[str, ...] = ()
    if args.features is not None:
        extractor: ImageTower | None = ImageTower.load(args.features, device)
    elif clip is not None:
        extractor = clip
    else:
        extractor, notes = ImageTower.embedded(), (OWN_FEATURES,)
    drawing = args.prompts is not None
    pipe = load(args) if drawing or args.model else None
    return Tools(extractor, clip, pipe, drawing, args.seed, notes)


# --- drawing ---------------------------------------------------------------------------------------------


def drawn_prompts(args: argparse.Namespace) -> list[str]:
    """One for each picture: those of --prompts in turn, --count of them."""
    from ldm.postcards.scoring.captioned import world_prompts

    if args.prompts in WORLD:
        texts = [prompt.text for prompt in world_prompts(args.prompts)]
    else:
        texts = read_prompts(args.prompts)
    return [texts[k % len(texts)] for k in range(args.count or len(texts))]


def draw(pipe: Pipeline, prompts: Sequence[str], args: argparse.Namespace) -> dict[str, object]:
    """Write --out/drawn, a PNG a prompt with its request in it, or nothing at all. Returns how."""
    from ldm.files import whole_folder
    from ldm.images.png import save_png
    from ldm.request import Request

    how = {"num_inference_steps": args.steps, "sampler": args.sampler, "guidance_scale": args.scale}
    requests = [Request(prompt=prompt, seeds=(args.seed + k,), **how) for k, prompt in enumerate(prompts)]
    jobs = [job for job, _ in prepare_jobs(pipe, [Asked(request) for request in requests], args.batch_size)]
    done = 0
    with (
        whole_folder(args.out / "drawn") as aside,
        bar("drawing", "images/s", args.quiet, len(requests)) as on_progress,
    ):
        for job in jobs:
            for batch in job.batches:
                for image, picture in zip(*draw_images(job, batch, "", quiet=True), strict=True):
                    save_png(image, aside / f"{done:05d}.png", picture.request)
                    done += 1
                on_progress(done, len(requests))
    told = {name: getattr(jobs[0].request, name) for name in TOLD}
    return {"prompts": args.prompts, "first_seed": args.seed, **told, "dtype": str(pipe.dtype)}


def render(pipe: Pipeline, total: int, args: argparse.Namespace) -> Path:
    """Write --out/renders: as many scenes of the world as are drawn, other ones, of the model's size."""
    from ldm.postcards.scoring.captioned import write_renders
    from ldm.request import Request

    folder: Path = args.out / "renders"
    try:
        write_renders(folder, args.reference, total, pipe.resolve(Request()).size)
    except ModuleNotFoundError as error:
        raise UserError(f"rendering needs {error.name}: pip install 'ldm[train]'") from None
    return folder
