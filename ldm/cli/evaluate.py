"""`ldm evaluate`: pictures measured against a reference, their captions and the model's own VAE."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.drawing.draw import draw_images, prepare_jobs
from ldm.cli.drawing.requests import Asked, read_prompts
from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.models import load
from ldm.cli.parser import count
from ldm.cli.terminal import bar, echo
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.evaluate.bias import Judge
    from ldm.evaluate.evaluate import Tools
    from ldm.evaluate.pictures import Pictures
    from ldm.pipeline import Pipeline

MOST_LINES = 5  # about files that are left out
EACH = 50  # pictures of a prompt of --bias
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
    group = parser.add_argument_group("what a model draws where a prompt leaves it open, and nothing else")
    add = group.add_argument
    add(
        "--bias",
        metavar="FILE",
        help=f"one prompt per line: each is drawn --count times (default: {EACH}), and shares are told of "
        "what the pictures show; by default as the embedded world's scorer sees it",
    )
    add(
        "--bias-classifier",
        type=Path,
        metavar="FOLDER",
        help="that says it instead: one of pictures, in transformers' layout",
    )
    add(
        "--bias-texts",
        type=Path,
        metavar="FILE",
        help="or --clip does: of each line, `hair: dark hair | fair hair`, the text that is nearest",
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
    if args.bias is not None:
        return bias(args)
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

    if [args.pictures, args.prompts, args.bias].count(None) != 2:
        raise UserError(
            "give PICTURES, a folder that is measured, or else --prompts, to draw it first, or --bias"
        )
    drawing = {"--count": args.count, "--steps": args.steps, "--sampler": args.sampler, "--scale": args.scale}
    check_bias(args)
    if (
        args.prompts is None
        and args.bias is None
        and (said := [flag for flag, value in drawing.items() if value is not None])
    ):
        raise UserError(f"{said[0]} is for drawing: give --prompts")
    if args.reference in WORLD and args.prompts is None:
        raise UserError(f"--reference {args.reference} is for pictures that --prompts draws: give a folder")
    for name in ("drawn", "renders") if args.prompts or args.bias else ():
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


def draw(
    pipe: Pipeline, prompts: Sequence[str], args: argparse.Namespace, each: int = 1
) -> dict[str, object]:
    """Write --out/drawn, PNGs with their requests in them, or nothing at all. Returns how.

    Seeds rise from prompt to prompt; of several pictures of `each`, all prompts have the same.
    """
    from ldm.files import whole_folder
    from ldm.images.png import save_png
    from ldm.request import Request

    how = {"num_inference_steps": args.steps, "sampler": args.sampler, "guidance_scale": args.scale}
    requests = [
        Request(prompt=prompt, seeds=(args.seed + (k if each == 1 else k % each),), **how)
        for k, prompt in enumerate(prompts)
    ]
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
    return {"prompts": args.prompts or args.bias, "first_seed": args.seed, **told, "dtype": str(pipe.dtype)}


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


# --- what is left open -----------------------------------------------------------------------------------


def check_bias(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go with --bias, or not without it."""
    if args.bias is None:
        if args.bias_classifier or args.bias_texts:
            raise UserError("--bias-classifier and --bias-texts are for --bias: give a file of prompts by it")
        return
    if args.reference or args.features:
        raise UserError("--bias measures against nothing: leave --reference and --features out")
    if args.bias_classifier and args.bias_texts:
        raise UserError("give --bias-classifier or --bias-texts: one of them says what pictures show")
    if (args.bias_texts is None) != (args.clip is None):
        raise UserError(
            "--bias-texts needs --clip, which compares them with pictures, and with --bias the converse"
        )


def bias(args: argparse.Namespace) -> int:
    """Draw each prompt many times, and tell shares of what the pictures show."""
    from ldm.evaluate.bias import probe, table, write_bias

    prompts, each = read_prompts(args.bias), args.count or EACH
    judge = make_judge(args)
    how = draw(load(args), [prompt for prompt in prompts for _ in range(each)], args, each)
    paths = sorted((args.out / "drawn").iterdir())
    found = probe(judge, [(prompt, paths[k * each : (k + 1) * each]) for k, prompt in enumerate(prompts)])
    protocol = {"command": " ".join(["ldm", *sys.argv[1:]]), "drawn": how, "judge": judge.protocol}
    write_bias(args.out / "bias.json", found, protocol)
    for line in (*table(found), str(args.out / "bias.json")):
        echo(args, line)
    return 0


def make_judge(args: argparse.Namespace) -> Judge:
    """What says what pictures show. Raises UserError."""
    from ldm.evaluate.bias import by_classifier, by_clip, read_texts
    from ldm.evaluate.features import ImageTower
    from ldm.postcards.scoring.captioned import world_judge
    from ldm.runtime import choose

    device = choose(args.device, None).device
    if args.bias_classifier is not None:
        return by_classifier(args.bias_classifier, device)
    if args.bias_texts is None:
        return world_judge()
    texts, tower = read_texts(args.bias_texts), ImageTower.load(args.clip, device)
    if not tower.text:
        raise UserError(f"--clip {args.clip} has an image tower only, and reads no --bias-texts")
    return by_clip(tower, texts)
