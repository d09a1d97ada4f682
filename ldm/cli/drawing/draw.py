"""`txt2img`: parse -> Requests -> load the model -> prepare Jobs -> for each batch: draw -> save."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ldm.cli.drawing.explain import explain
from ldm.cli.drawing.heat import HeatMaps
from ldm.cli.drawing.output import Output
from ldm.cli.drawing.plan import table, warn_of_memory
from ldm.cli.drawing.requests import Asked, Faults, make_requests
from ldm.cli.drawing.things import list_things
from ldm.cli.models import load
from ldm.cli.terminal import Preview, bar, check_preview, echo
from ldm.errors import UserError, printable
from ldm.images.plot import read_plot

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.diffusion.solvers import Step
    from ldm.pipeline import Job, Pipeline
    from ldm.pipeline.job import Batch
    from ldm.request import Request

MAX_BATCH_PIXELS = 2**26  # 4 pictures of 4096 x 4096, 4096 of 128 x 128
GUESSED_BYTES = 2**13  # of a pixel of a batch: five times what Stable Diffusion's VAE takes in fp32

Drawing = tuple["Job", list[Asked]]  # a job, and where each of its requests comes from


def draw(args: argparse.Namespace) -> int:
    """Parse -> Requests -> load -> prepare -> for each batch: draw -> save."""
    if args.list_things:
        return list_things(args)
    faults = Faults()
    plot = None if args.plot is None else read_plot(args.plot)
    asked = make_requests(args, plot, faults)
    requests = [each.request for each in asked]
    if args.classifier is not None and args.classifier_class is None:
        raise UserError("--classifier leads to a class: give --classifier-class, the name of one")
    output = Output(args, asked, plot)
    check_preview(args)
    if not asked:
        return faults.exit_code
    if args.prompt_grammar is None:
        tell_of_marks(args, requests)
    pipe = load(args)
    check_latents(pipe, args)
    drawings = prepare_jobs(pipe, asked, args.n_samples, faults)
    tell_of_words(pipe, args, [job for job, _ in drawings])
    print_loras(pipe, args, [job for job, _ in drawings])
    if args.explain:
        print(*(line for job, _ in drawings for line in explain(job)), sep="\n")
        return faults.exit_code
    if args.plan:
        print(*(line for job, _ in drawings for line in table(job, args)), sep="\n")
        return faults.exit_code
    if args.max_memory is None and (large := [job for job, _ in drawings if is_large(job)]):
        warn_of_memory(large)
    if args.resume:
        drawings = output.left(drawings)
    preview = None if args.preview is None else Preview(pipe, args)
    heat = None if args.attention_maps is None else HeatMaps(args, [job for job, _ in drawings])

    batches = [(job, batch, sources) for job, sources in drawings for batch in job.batches]
    try:
        for k, drawing in enumerate(batches, start=1):
            title = f"batch {k}/{len(batches)}"
            for images, batch, seconds in draw_or_tell(*drawing, title, args.quiet, preview, faults, heat):
                output.take(images, batch, drawing[2], seconds)
    except KeyboardInterrupt:
        output.close(stopped=True)
        print(f"stopped; finished pictures are kept: {output.where}", file=sys.stderr)
        return 130
    output.close()
    print_peak_memory(pipe, args)
    return faults.exit_code


def is_large(job: Job) -> bool:
    """Whether a drawing may take a GiB and a quarter of what is free, by a generous guess."""
    height, width = job.request.size
    weights = sum(each.nbytes for each in job.model.unet.parameters())
    guess = 2 * weights + len(job.batches[0]) * height * width * GUESSED_BYTES
    return guess > 2**30 and guess > job.model.runtime.free_memory / 4


def prepare_jobs(
    pipe: Pipeline, asked: Sequence[Asked], batch_size: int, faults: Faults | None = None
) -> list[Drawing]:
    """One job for neighbours that differ in their texts and seeds only.

    What is wrong with any of them is said before drawing: lines of a file become `faults`, else it is raised.
    """
    groups = itertools.groupby(asked, key=lambda each: each.request.settings)
    return [
        drawing for _, group in groups for drawing in prepare_group(pipe, list(group), batch_size, faults)
    ]


def prepare_group(
    pipe: Pipeline, asked: list[Asked], batch_size: int, faults: Faults | None
) -> list[Drawing]:
    """The job of requests that are alike; or, by halves, those of the ones that can be drawn."""
    from ldm.pipeline.deciding.prepare import prepare

    try:
        job = prepare(pipe, [for_model(pipe, each.request) for each in asked], batch_size=batch_size)
        check_batch(job.request, max(map(len, job.batches)))
    except UserError as error:
        if faults is None or not all(each.line for each in asked):
            raise
        if len(asked) > 1:
            half = len(asked) // 2
            parts = asked[:half], asked[half:]
            return [drawing for part in parts for drawing in prepare_group(pipe, part, batch_size, faults)]
        faults.add(asked[0].line, error)
        return []
    return [(job, asked)]


def draw_or_tell(
    job: Job,
    batch: Batch,
    asked: Sequence[Asked],
    title: str,
    quiet: bool,
    preview: Preview | None,
    faults: Faults,
    heat: HeatMaps | None = None,
) -> Iterator[tuple[list[Image], Batch, float]]:
    """The pictures of a batch, and the seconds for each; of one that fails, those of lines that do not."""
    start = time.perf_counter()
    try:
        drawn = partial(draw_images, title=title, quiet=quiet, preview=preview)
        images, batch = drawn(job, batch) if heat is None else heat.draw(job, batch, drawn)
    except (UserError, FloatingPointError) as error:
        line = asked[batch[0].prompt].line
        if not line:
            raise
        if len(batch) == 1:
            faults.add(line, error)
            return
        for picture in batch:
            yield from draw_or_tell(job, (picture,), asked, title, quiet, preview, faults, heat)
    else:
        yield images, batch, (time.perf_counter() - start) / len(images)


def draw_images(
    job: Job, batch: Batch, title: str, quiet: bool, preview: Preview | None = None
) -> tuple[list[Image], Batch]:
    """The pictures of one batch, with a bar or a preview; running out of memory becomes a UserError."""
    from ldm.images.pixels import to_pil
    from ldm.pipeline.sample import Counted, draw_batch
    from ldm.runtime import is_out_of_memory

    try:
        if quiet and preview is None:
            drawn = draw_batch(job, batch)
            return to_pil(drawn.images), drawn.batch
        steps = job.count_steps(batch)
        # Both would move the cursor: where the terminal shows pictures, the bar's words go with them.
        shown = preview is not None and preview.in_terminal
        with bar(title, "it/s", quiet or shown, steps) as on_progress:

            def on_step(step: Step) -> None:
                on_progress(step.i + 1, steps)
                if preview is not None:
                    preview(step, f"{title}  {step.i + 1}/{steps}")

            counted = Counted(lambda i: on_progress(i + 1, steps))
            drawn = draw_batch(job, batch, counted if preview is None else on_step)
        return to_pil(drawn.images), drawn.batch
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            size = f"{len(batch)} pictures of {job.request.width}x{job.request.height}"
            raise UserError(
                f"not enough memory for {size}: ask for smaller ones, or fewer at once"
            ) from error
        raise


# --- before drawing --------------------------------------------------------------------------------------


def for_model(pipe: Pipeline, request: Request) -> Request:
    """The request without the name of its model. Raises UserError if that is another than this."""
    if request.model_hash is not None and request.model_hash != pipe.model_hash:
        raise UserError(
            f"this asks for the model {request.model} ({request.model_hash}), not {pipe.name} "
            f"({pipe.model_hash}): leave model_hash out, or give that model by --model"
        )
    return request.replace(model=None, model_hash=None) if request.model or request.model_hash else request


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


def tell_of_words(pipe: Pipeline, args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Say, once for each word, what is drawn as something else, and which words a model that knows a small
    world has never seen. Nothing of other models.
    """
    if args.quiet or (world := pipe.world) is None:
        return
    requests = [request for job in jobs for request in job.requests]
    for said, drawn in dict.fromkeys(pair for request in requests for pair in request.drawn_as or ()):
        print(printable(f"{said}: drawn as {world.told(drawn)}"), file=sys.stderr)
    unknown = dict.fromkeys(
        word for text in dict.fromkeys(texts_of(requests)) for word in pipe.unknown_words(text)
    )
    if not unknown:
        return
    near = {word: world.nearest(word) for word in unknown}
    told = (f"{word} (nearest: {', '.join(things)})" if things else word for word, things in near.items())
    print(
        f"{pipe.name} has never seen: {', '.join(told)}; txt2img --list-things tells what it has, "
        "--model FOLDER draws with another one",
        file=sys.stderr,
    )


def texts_of(requests: Sequence[Request]) -> list[str]:
    """What pictures are to show, without marks, as their text encoders read it."""
    from ldm.prompts.script import all_words

    return [
        all_words(request.told(text), request.grammar)
        for request in requests
        for text in (request.prompt, request.shown, *(region.prompt for region in request.regions or ()))
    ]


def print_peak_memory(pipe: Pipeline, args: argparse.Namespace) -> None:
    from ldm.runtime import peak_memory

    echo(args, f"peak memory {peak_memory(pipe.runtime.device) / 2**20:.0f} MiB")
