"""The command line: from argv to PNG, top to bottom.

`txt2img`: parse -> Requests -> load the model -> for each batch: draw -> save. `ldm` has the same as a
subcommand, and reads and redraws its PNGs. Heavy modules are imported where they are first needed, so that
`--help` answers at once.

Exit codes: 0 done; 1 our fault (`redraw`: the pixels differ); 2 something the user can put right; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.flags import (
    Parser,
    add_convert_flags,
    add_finetune_flags,
    add_folder_flags,
    add_info_flags,
    add_redraw_flags,
    add_txt2img_flags,
    dashes,
)
from ldm.tags import parse_embedding, parse_lora

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Pipeline
    from ldm.request import Request
    from ldm.solvers import Step

MAX_PICTURES = 100_000  # of one run
MAX_BATCH_PIXELS = 2**26  # 4 pictures of 4096 x 4096, 4096 of 128 x 128
SPELLING = "Flags may be spelt with dashes or underscores."
# Arguments of Python's call that have flags of other names; all others are `--the-name`.
FLAGS = {
    "image": "--init-image",
    "mask_image": "--mask",
    "num_inference_steps": "--steps",
    "spacing": "--scheduler",
    "seeds": "--seed",
}
GRID_LIMIT = 100  # pictures on one grid: a run may be endless, a sheet may not


# --- the two commands ------------------------------------------------------------------------------------


def txt2img(argv: Sequence[str] | None = None) -> int:
    """The `txt2img` command. Returns its exit code; argparse exits by itself with 2 on a bad flag."""
    parser = Parser("txt2img", description=f"Draw pictures from words. {SPELLING}")
    add_txt2img_flags(parser)
    parser.set_defaults(command=draw)
    return run(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The `ldm` command: `ldm txt2img`, `info`, `redraw`, `convert`, `folder`, `finetune`."""
    parser = Parser("ldm", description="Latent diffusion: draw pictures from words.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command, add_flags, purpose in (
        (draw, add_txt2img_flags, "draw pictures from words"),
        (info, add_info_flags, "show how a PNG was drawn"),
        (redraw, add_redraw_flags, "draw a PNG again from its own metadata and compare the pixels"),
        (convert, add_convert_flags, "change a model between folder and single file, or its dtype"),
        (folder, add_folder_flags, "examine a folder of pictures before training on it"),
        (
            finetune,
            add_finetune_flags,
            "train a model on a folder of pictures",
        ),
    ):
        name = "txt2img" if command is draw else command.__name__
        child = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}. {SPELLING}"
        )
        child.add_flags.append(add_flags)
        child.set_defaults(command=command)
    return run(parser, argv)


def run(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse and run the command; an exception becomes one line on stderr and an exit code."""
    args = parser.parse_args(dashes(sys.argv[1:] if argv is None else argv))
    try:
        with warnings_in_one_line(parser.prog):
            return int(args.command(args))
    except KeyboardInterrupt:
        left = "finished pictures are kept" if args.command is draw else "nothing half-written is left"
        print(f"stopped; {left}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        line, code = verdict(error)
        if args.command is draw:
            line = in_flags(line)
        print(f"{parser.prog}: {line}", file=sys.stderr)
        return code


def verdict(error: Exception) -> tuple[str, int]:
    """What to say about an error, and the exit code: 2 if the user can put it right, 1 if not."""
    first_line = str(error).partition("\n")[0]
    match error:
        case UserError():
            return str(error), 2
        case FloatingPointError():  # NaN or Inf: the message names the network
            return first_line, 1
        case BrokenPipeError():
            return "nobody reads the output any more", 1
        case _ if "No space left on device" in first_line:  # safetensors has an exception of its own for it
            return "no space left on the disk", 2
        case _:
            what = f"{type(error).__name__}: {first_line}"
            return f"internal error: {what} (please report it, with what --debug shows)", 1


def in_flags(line: str) -> str:
    """Of an argument that is not allowed, the flag that was typed: `--mask` for `mask_image`."""
    names = re.compile(r"(?:^|(?<=; ))(\w+)(?= (?:\S+ )?is not allowed)")
    return names.sub(lambda name: FLAGS.get(name[0], f"--{name[0].replace('_', '-')}"), line)


@contextmanager
def warnings_in_one_line(program: str) -> Iterator[None]:
    """Show warnings as `txt2img: warning: ...`, without the line of code that gave them."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            print(f"{program}: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


# --- txt2img ---------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace) -> int:
    """Parse -> Requests -> load -> for each batch: draw -> save."""
    requests = make_requests(args)
    check_output(args, sum(request.num_images for request in requests))
    pipe = load(args)
    check_latents(pipe, args)
    tell_unknown_words(pipe, args, requests)
    requests = [pipe.resolve(request) for request in requests]
    tell_loras(pipe, args, requests)
    check_batch(requests[0])

    sheet: list[Image] = []
    for k, request in enumerate(requests, start=1):
        start = time.perf_counter()
        images = generate(pipe, request, f"batch {k}/{len(requests)}", args.quiet)
        seconds = (time.perf_counter() - start) / len(images)
        for image, seed in zip(images, request.seeds, strict=True):
            if not args.skip_save:
                path = save(image, args, request.replace(seeds=(seed,)))
                say(args, f"{path}  seed {seed}  {seconds:.2f} s")
        sheet += images
        if k == len(requests) or len(sheet) + args.n_samples > GRID_LIMIT:
            save_grid(sheet, args)
            sheet.clear()
    tell_peak_memory(pipe, args)
    return 0


def make_requests(args: argparse.Namespace) -> list[Request]:
    """One request per prompt and batch, with consecutive seeds; --fixed_code gives every batch the same."""
    from ldm.request import Request, consecutive_seeds

    prompts = [args.prompt] if args.from_file is None else read_prompts(args.from_file)
    total = len(prompts) * args.n_iter * args.n_samples
    if total > MAX_PICTURES:
        raise UserError(f"{total} pictures are too many for one run: ask for at most {MAX_PICTURES}")
    (seed,) = consecutive_seeds(args.seed)
    same_name = (Request.model_fields.keys() & vars(args).keys()) - {"prompt", "model"}
    one = Request(
        **{name: getattr(args, name) for name in same_name},
        num_inference_steps=args.steps,
        guidance_scale=args.scale,
        spacing=args.scheduler,
    )
    stride = 0 if args.fixed_code else args.n_samples
    batches = enumerate(itertools.product(prompts, range(args.n_iter)))
    return [
        one.replace(prompt=prompt, seeds=consecutive_seeds(seed + stride * k, args.n_samples))
        for k, (prompt, _) in batches
    ]


def read_prompts(source: str) -> list[str]:
    """One prompt per line of a file, or of stdin for `-`; blank lines are skipped."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read prompts from {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read prompts from {source}: it is not UTF-8 text") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"no prompts in {source}: write one per line")
    return prompts


def check_output(args: argparse.Namespace, count: int) -> None:
    """Find out before drawing, not after, that the pictures could not be written."""
    from ldm.images import check_writable

    if args.output is None:
        check_writable(args.outdir)
    elif count != 1:
        raise UserError(f"--output names one file, but {count} pictures were asked for: use --outdir")
    elif args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise UserError(f"--output {args.output} must name a .png file")
    else:
        check_writable(args.output.parent)


def load(args: argparse.Namespace) -> Pipeline:
    from ldm.runtime import set_threads

    if args.threads is not None:
        set_threads(args.threads)
    return add_adapters(load_model(args), args)


def load_model(args: argparse.Namespace) -> Pipeline:
    """--model, and what replaces its parts."""
    import ldm

    if args.quiet:  # before huggingface_hub is loaded, which reads it then
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return ldm.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        variant=args.variant,
        unet=args.unet,
        vae=args.vae,
        text_encoder=args.text_encoder,
        text_encoder_2=args.text_encoder_2,
        prediction_type=args.prediction_type,
        ema=args.ema,
    )


def add_adapters(pipe: Pipeline, args: argparse.Namespace) -> Pipeline:
    """--embedding, --lora, --lora-dir and --upscaler."""
    for spec in args.embedding:
        name, file = parse_embedding(spec)
        pipe = pipe.with_embedding(file, name)
        say(args, str(pipe.adapted.embeddings[-1]))
    for spec in args.lora:
        pipe = pipe.with_lora(*parse_lora(spec))
        say(args, str(pipe.adapted.reports[-1]))
    if args.upscaler is not None:
        pipe = pipe.with_upscaler(args.upscaler)
    return replace(pipe, lora_dir=args.lora_dir)


def check_latents(pipe: Pipeline, args: argparse.Namespace) -> None:
    """--C and --f come from the days when the model's shape was a flag: they may only agree with it."""
    for flag, given, real in (("C", args.C, pipe.vae.latent_channels), ("f", args.f, pipe.vae.downscale)):
        if given not in (None, real):
            raise UserError(f"--{flag} {given} does not fit this model, which has {real}; leave --{flag} out")


def tell_loras(pipe: Pipeline, args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """What the tags in prompts matched, before anything is drawn."""
    tagged = {request.loras: request for request in requests if request.loras}
    for request in tagged.values():
        for report in pipe.for_request(request).adapted.reports:
            if report not in pipe.adapted.reports:
                say(args, str(report))


def check_batch(request: Request) -> None:
    """A batch's finished pictures are held in memory together."""
    finished = request.upscaling or request
    size, most = (finished.width or 0) * (finished.height or 0), MAX_BATCH_PIXELS
    if request.num_images * size > most:
        shape = f"{finished.width}x{finished.height}"
        raise UserError(
            f"{request.num_images} pictures of {shape} are too many for one batch: "
            f"ask for at most {most // size} at once, and for more batches with --n_iter"
        )


def tell_unknown_words(pipe: Pipeline, args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """The embedded model knows a small world: say which words lie outside it. Nothing on other models."""
    from ldm.checkpoint.folder import EMBEDDED

    if args.model not in (None, EMBEDDED[0]) or args.quiet:
        return
    prompts = dict.fromkeys(request.prompt for request in requests)
    unknown = dict.fromkeys(word for prompt in prompts for word in pipe.unknown_words(prompt))
    if unknown:
        print(
            f"the embedded model has never seen: {', '.join(unknown)} "
            "(use --model FOLDER to draw with another one)",
            file=sys.stderr,
        )


def generate(pipe: Pipeline, request: Request, title: str, quiet: bool) -> list[Image]:
    """The pictures of one request, with a bar; running out of memory becomes a UserError."""
    try:
        with progress(title, request.num_steps, quiet) as on_step:
            images: list[Image] = pipe.generate(request, on_step).images
            return images
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            size = f"{request.num_images} pictures of {request.width}x{request.height}"
            raise UserError(
                f"not enough memory for {size}: ask for smaller ones, or fewer at once"
            ) from error
        raise


@contextmanager
def progress(title: str, steps: int | None, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr that every step moves on, with steps per second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rate = TextColumn("{task.fields[rate]:.2f} it/s")
    # stdout is left alone: it may be a pipe that waits for the paths.
    with Progress(*columns, rate, console=Console(stderr=True), disable=quiet, redirect_stdout=False) as bar:
        task = bar.add_task(title, total=steps, rate=0.0)
        start = time.perf_counter()

        def on_step(step: Step) -> None:
            bar.update(task, completed=step.i + 1, rate=(step.i + 1) / (time.perf_counter() - start))

        yield on_step


def save(image: Image, args: argparse.Namespace, request: Request) -> Path:
    from ldm.images import save_numbered, save_png

    if args.output is not None:
        return save_png(image, args.output, request)
    return save_numbered(image, args.outdir / "samples", "%05d.png", request)


def save_grid(sheet: Sequence[Image], args: argparse.Namespace) -> None:
    from ldm.images import grid, save_numbered

    if len(sheet) > 1 and not args.skip_grid:
        columns = args.n_rows or args.n_samples
        path = save_numbered(grid(sheet, columns), args.outdir, "grid-%04d.png")
        say(args, f"{path}  grid of {len(sheet)}")


def tell_peak_memory(pipe: Pipeline, args: argparse.Namespace) -> None:
    from ldm.runtime import peak_memory

    say(args, f"peak memory {peak_memory(pipe.runtime.device) / 2**20:.0f} MiB")


def say(args: argparse.Namespace, line: str) -> None:
    if not args.quiet:
        print(line, flush=True)


# --- convert ---------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace) -> int:
    """From a folder or file to the other; what is left out is said."""
    from ldm.checkpoint.convert import convert
    from ldm.checkpoint.source import find_parts
    from ldm.runtime import choose

    given = {part: getattr(args, part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    convert(
        args.source,
        args.target,
        dtype=None if args.dtype is None else choose("cpu", args.dtype).dtype,
        ema=args.ema,
        max_shard_size=args.max_shard_size,
        force=args.force,
        prediction_type=args.prediction_type,
        config=args.config,
        overrides=find_parts(given),
        say=lambda line: say(args, line),
    )
    say(args, str(args.target))
    return 0


# --- folder ----------------------------------------------------------------------------------------------


def finetune(args: argparse.Namespace) -> int:
    """Fine-tune; the same command again goes on where it stopped."""
    from ldm.train.finetune_recipe import read_finetune_recipe

    recipe = read_finetune_recipe(args)
    try:
        from ldm.train.finetune import finetune

        finetune(recipe)
    except ModuleNotFoundError as error:
        raise UserError(f"training needs {error.name}: pip install 'ldm[train]'") from None
    return 0


def folder(args: argparse.Namespace) -> int:
    """Say everything that is wrong with a folder of pictures, before any model loads."""
    from ldm.train import examine_cli

    return examine_cli.folder(args)


# --- info and redraw -------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> int:
    """Print the request in a PNG, one field per line."""
    from ldm.images import read_request

    for name, value in read_request(args.file).model_dump(exclude_none=True).items():
        print(f"{name}: {value}")
    return 0


def redraw(args: argparse.Namespace) -> int:
    """Draw a PNG again from its own metadata; say whether the pixels are equal."""
    import numpy as np

    from ldm.images import open_image, read_request, save_png

    request, old = read_request(args.file), open_image(args.file)
    if args.output is not None:
        check_output(args, 1)
    pipe = load(args)
    tell_other_models(pipe, request, args.file)
    inputs = {"image": args.image or request.image, "mask_image": args.mask_image or request.mask_image}
    upscaling = request.upscaling if pipe.upscaler else None
    request = pipe.resolve(request.replace(model=None, model_hash=None, upscaling=upscaling, **inputs))
    (new,) = generate(pipe, request, "redraw", args.quiet)
    if args.output is not None:
        save_png(new, args.output, request)
    if new.size != old.size:
        raise UserError(f"{args.file} has {old.size} pixels, but its request draws {new.size}")
    levels = np.abs(np.asarray(new, dtype=np.int16) - np.asarray(old, dtype=np.int16)).max(axis=2)
    if not levels.any():
        print("equal: every pixel")
        return 0
    changed = np.count_nonzero(levels)
    print(f"different: {changed} of {levels.size} pixels, by up to {levels.max()} of 255 levels")
    return 1


def tell_other_models(pipe: Pipeline, request: Request, file: Path) -> None:
    """Whether a picture was drawn, or enlarged, by another model than it will be drawn by again."""
    again = "give its model by --model (and the same --vae, --unet, --prediction-type, ...)"
    pairs: list[tuple[str, Request, Pipeline | None, str]] = [("drawn", request, pipe, again)]
    if request.upscaling is not None:
        pairs.append(("enlarged", request.upscaling, pipe.upscaler, "give its upscaler by --upscaler"))
    for done, asked, model, advice in pairs:
        if model is None or asked.model_hash not in (None, model.model_hash):
            other = "" if model is None else f", not {model.name} ({model.model_hash})"
            line = f"note: {file} was {done} by {asked.model} ({asked.model_hash}){other}; {advice}"
            print(line, file=sys.stderr)
