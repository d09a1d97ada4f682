"""`txt2img`: parse -> Requests -> load the model -> prepare Jobs -> for each batch: draw -> save."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.models import load
from ldm.cli.terminal import bar, echo
from ldm.errors import UserError, reason

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Job, Pipeline
    from ldm.pipeline.job import Batch
    from ldm.request import Request

MAX_PICTURES = 100_000  # of one run
MAX_BATCH_PIXELS = 2**26  # 4 pictures of 4096 x 4096, 4096 of 128 x 128
GRID_LIMIT = 100  # pictures on one grid: a run may be endless, a sheet may not


def draw(args: argparse.Namespace) -> int:
    """Parse -> Requests -> load -> prepare -> for each batch: draw -> save."""
    requests = make_requests(args)
    if args.classifier is not None and args.classifier_class is None:
        raise UserError("--classifier leads to a class: give --classifier-class, the name of one")
    check_output(args, sum(request.num_images for request in requests))
    if args.prompt_grammar is None:
        tell_of_marks(args, requests)
    pipe = load(args)
    check_latents(pipe, args)
    warn_of_unknown_words(pipe, args, requests)
    jobs = prepare_jobs(pipe, requests, args.n_samples)
    print_loras(pipe, args, jobs)
    check_batch(jobs[0].request, args.n_samples)

    sheet: list[Image] = []
    batches = [(job, batch) for job in jobs for batch in job.batches]
    for k, (job, batch) in enumerate(batches, start=1):
        start = time.perf_counter()
        images = draw_images(job, batch, f"batch {k}/{len(batches)}", args.quiet)
        seconds = (time.perf_counter() - start) / len(images)
        for image, picture in zip(images, batch, strict=True):
            if not args.skip_save:
                path = save(image, args, picture.request)
                echo(args, f"{path}  seed {picture.seed}  {seconds:.2f} s")
        sheet += images
        if k == len(batches) or len(sheet) + args.n_samples > GRID_LIMIT:
            save_grid(sheet, args)
            sheet.clear()
    print_peak_memory(pipe, args)
    return 0


def make_requests(args: argparse.Namespace) -> list[Request]:
    """One request per prompt, with consecutive seeds; --fixed_code gives every batch the same."""
    from ldm.request import Request, consecutive_seeds

    prompts = [args.prompt] if args.from_file is None else read_prompts(args.from_file)
    each = args.n_iter * args.n_samples
    if len(prompts) * each > MAX_PICTURES:
        raise UserError(
            f"{len(prompts) * each} pictures are too many for one run: ask for at most {MAX_PICTURES}"
        )
    (seed,) = consecutive_seeds(args.seed)
    check_edit(args)
    same_name = (Request.model_fields.keys() & vars(args).keys()) - {"prompt", "model"}
    fields = {name: getattr(args, name) for name in same_name} | {"image": args.invert or args.image}
    fields["hires"] = hires_of(args)
    one = Request(
        **fields,
        num_inference_steps=args.steps,
        guidance_scale=args.scale,
        spacing=args.scheduler,
    )
    if args.fixed_code:
        return [
            one.replace(prompt=prompt, seeds=consecutive_seeds(seed, args.n_samples) * args.n_iter)
            for prompt in prompts
        ]
    return [
        one.replace(prompt=prompt, seeds=consecutive_seeds(seed + p * each, each))
        for p, prompt in enumerate(prompts)
    ]


def hires_of(args: argparse.Namespace) -> Request | None:
    """What flags say of a second pass; None if nothing. Its scale and upscaler are fields of their own."""
    from ldm.request import Request

    flags = {"num_inference_steps": "steps", "strength": "strength", "prompt": "prompt", "sampler": "sampler"}
    given = {name: getattr(args, f"hires_{flag}") for name, flag in flags.items()}
    given = {name: value for name, value in given.items() if value is not None}
    return Request(**given) if given else None


def check_edit(args: argparse.Namespace) -> None:
    """Raise UserError for one of --invert and --to without the other, and for two pictures."""
    if args.invert is None and args.target_prompt is not None:
        raise UserError("--to TEXT needs --invert FILE: the picture that becomes what the text says")
    if args.invert is not None and args.target_prompt is None:
        raise UserError("--invert FILE needs --to TEXT: what the picture becomes (-p says what it shows now)")
    if args.invert is not None and args.image is not None:
        raise UserError("--invert and --init-image both name a picture: give --invert alone to edit one")


def prepare_jobs(pipe: Pipeline, requests: Sequence[Request], batch_size: int) -> list[Job]:
    """One job for neighbours with the same LoRAs. What is wrong with any of them is said before drawing."""
    from ldm.pipeline.job import prepare

    groups = itertools.groupby(requests, key=lambda request: request.loras)
    return [prepare(pipe, list(group), batch_size=batch_size) for _, group in groups]


def draw_images(job: Job, batch: Batch, title: str, quiet: bool) -> list[Image]:
    """The pictures of one batch, with a bar; running out of memory becomes a UserError."""
    from ldm.images.pixels import to_pil
    from ldm.pipeline.sample import draw_batch
    from ldm.runtime import is_out_of_memory

    try:
        if quiet:
            return to_pil(draw_batch(job, batch))
        steps = job.count_steps(batch)
        with bar(title, "it/s", quiet, steps) as on_progress:
            return to_pil(draw_batch(job, batch, lambda step: on_progress(step.i + 1, steps)))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            size = f"{len(batch)} pictures of {job.request.width}x{job.request.height}"
            raise UserError(
                f"not enough memory for {size}: ask for smaller ones, or fewer at once"
            ) from error
        raise


# --- before drawing --------------------------------------------------------------------------------------


def read_prompts(source: str) -> list[str]:
    r"""One prompt per line of a file, or of stdin for `-`; blank lines are skipped.

    Lines end at \n and \r\n only: whatever else Unicode ends a line with is part of a prompt.
    """
    try:
        # Python's own reading of text would take a lone \r for the end of a line, too.
        stdin = getattr(sys.stdin, "buffer", sys.stdin)
        data = stdin.read() if source == "-" else Path(source).read_bytes()
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read prompts from {source}: {reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read prompts from {source}: it is not UTF-8 text") from None
    prompts = [line.strip(" \t\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"no prompts in {source}: write one per line")
    return prompts


def check_output(args: argparse.Namespace, count: int) -> None:
    """Find out before drawing, not after, that the pictures could not be written."""
    from ldm.files import check_writable

    if args.output is None:
        check_writable(args.outdir)
    elif count != 1:
        raise UserError(f"--output names one file, but {count} pictures were asked for: use --outdir")
    elif args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise UserError(f"--output {args.output} must name a .png file")
    else:
        check_writable(args.output.parent)


def check_latents(pipe: Pipeline, args: argparse.Namespace) -> None:
    """--C and --f come from the days when the model's shape was a flag: they may only agree with it."""
    for flag, given, real in (("C", args.C, pipe.vae.latent_channels), ("f", args.f, pipe.vae.downscale)):
        if given not in (None, real):
            raise UserError(f"--{flag} {given} does not fit this model, which has {real}; leave --{flag} out")


def print_loras(pipe: Pipeline, args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """What the tags in prompts matched, before anything is drawn."""
    reports = dict.fromkeys(str(report) for job in jobs for report in job.model.adapted.reports)
    for report in reports:
        if report not in {str(own) for own in pipe.adapted.reports}:
            echo(args, report)


def check_batch(request: Request, count: int) -> None:
    """A batch's finished pictures are held in memory together."""
    finished = request.upscaling or request.hires or request
    size, most = (finished.width or 0) * (finished.height or 0), MAX_BATCH_PIXELS
    if count * size > most:
        shape = f"{finished.width}x{finished.height}"
        raise UserError(
            f"{count} pictures of {shape} are too many for one batch: "
            f"ask for at most {most // size} at once, and for more batches with --n_iter"
        )


def tell_of_marks(args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Say once what the marks in prompts do, where nobody chose a grammar: in diffusers they are text."""
    from ldm.prompts.script import describe

    prompts = dict.fromkeys(text for request in requests for text in request.texts[0])
    found = next(filter(None, (describe(prompt, "a1111") for prompt in prompts)), None)
    if found is not None:
        echo(args, f"{found}: as in AUTOMATIC1111; --prompt-grammar plain takes marks for text")


def warn_of_unknown_words(pipe: Pipeline, args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """The embedded model knows a small world: say which words lie outside it. Nothing on other models."""
    from ldm.checkpoint.parts import EMBEDDED
    from ldm.prompts.script import all_words

    if args.model not in (None, EMBEDDED[0]) or args.quiet:
        return
    texts = [all_words(text, each.grammar) for each in requests for text in (each.prompt, each.shown)]
    unknown = dict.fromkeys(word for text in dict.fromkeys(texts) for word in pipe.unknown_words(text))
    if unknown:
        print(
            f"the embedded model has never seen: {', '.join(unknown)} "
            "(use --model FOLDER to draw with another one)",
            file=sys.stderr,
        )


# --- after it --------------------------------------------------------------------------------------------


def save(image: Image, args: argparse.Namespace, request: Request) -> Path:
    from ldm.images.png import save_numbered, save_png

    if args.output is not None:
        return save_png(image, args.output, request)
    return save_numbered(image, args.outdir / "samples", "%05d.png", request)


def save_grid(sheet: Sequence[Image], args: argparse.Namespace) -> None:
    from ldm.images.pixels import contact_sheet
    from ldm.images.png import save_numbered

    if len(sheet) > 1 and not args.skip_grid:
        columns = args.n_rows or args.n_samples
        path = save_numbered(contact_sheet(sheet, columns), args.outdir, "grid-%04d.png")
        echo(args, f"{path}  grid of {len(sheet)}")


def print_peak_memory(pipe: Pipeline, args: argparse.Namespace) -> None:
    from ldm.runtime import peak_memory

    echo(args, f"peak memory {peak_memory(pipe.runtime.device) / 2**20:.0f} MiB")
