"""`ldm likelihood`: how likely a model finds pictures, which prompt fits one, which of many do not fit in."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.models import load
from ldm.cli.parser import count
from ldm.cli.terminal import bar, echo
from ldm.errors import UserError, printable

if TYPE_CHECKING:
    from PIL import Image

    from ldm.diffusion.likelihood import Likelihood
    from ldm.evaluate.bound import Bounds
    from ldm.pipeline import Pipeline

Judge = Callable[["Image.Image", Sequence[str]], "list[Likelihood]"]


class Subject(NamedTuple):
    """A picture to judge."""

    path: Path
    caption: str  # "" where it has none
    size: tuple[int, int]  # (height, width) in pixels

    @property
    def prompts(self) -> list[str]:
        """What it is judged under: its caption, if it has one, and none."""
        return [self.caption, ""] if self.caption else [""]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="PICTURE|FOLDER", help="judged in fp32, if --dtype says nothing else")
    add("-p", "--prompt", metavar="TEXT", help="what it is to show (of a folder, instead of its captions)")
    add(
        "--among",
        action="append",
        default=[],
        metavar="TEXT",
        help="which of these prompts fits the picture best? Give it twice or more",
    )
    add(
        "--by",
        choices=("likelihood", "error"),
        default="likelihood",
        help="log p by the probability-flow ODE, or its bound by the error of denoising, which is quicker "
        "(default: likelihood)",
    )
    add(
        "--trace",
        choices=("exact", "rademacher", "gaussian"),
        default="rademacher",
        help="of the Jacobian, for the ODE (default: rademacher; exact is for small latents)",
    )
    add("--probes", type=count, default=2, metavar="K", help="random vectors, or noises a level (default: 2)")
    add("--rtol", type=tolerance, default=1e-3, metavar="X", help="of the ODE's solver (default: 0.001)")
    add("--levels", type=count, default=32, metavar="N", help="noise levels of --by error (default: 32)")
    add(
        "--bound",
        type=count,
        metavar="STEPS",
        help="instead: every term of the bound of the DDPM sampler with so many steps, on latents and pixels",
    )
    add("-s", "--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add_model_flags(parser)
    add_common_flags(parser)


def tolerance(text: str) -> float:
    """A number from 1e-10 to 0.1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-10 <= value <= 0.1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1e-10 to 0.1")
    return value


def likelihood(args: argparse.Namespace) -> int:
    """Read, judge, tell."""
    check_flags(args)
    subjects = subjects_of(args)
    pipe = load(argparse.Namespace(**{**vars(args), "dtype": args.dtype or "fp32"}))
    tell_size(args, pipe, subjects)
    if args.bound is not None:
        lines, figures = of_bound(args, pipe, subjects)
    elif args.among:
        lines, figures = of_prompts(args, judge_of(args, pipe), subjects[0])
    elif args.file.is_dir():
        lines, figures = of_folder(args, pipe, judge_of(args, pipe), subjects)
    else:
        lines, figures = of_picture(args, judge_of(args, pipe), subjects[0])
    for line in lines:
        echo(args, printable(line))
    if args.json is not None:
        write(args.json, {"model": pipe.name, **figures})
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, and for a file that cannot be written."""
    from ldm.files import check_writable

    if args.json is not None:
        if args.json.is_dir():
            raise UserError(f"--json {args.json} is a folder: name a file")
        check_writable(args.json.absolute().parent)
    if args.among and (len(args.among) < 2 or args.file.is_dir() or args.bound or args.prompt is not None):
        raise UserError("--among takes one picture and two prompts or more, and neither --prompt nor --bound")
    if args.bound is None:
        return
    for flag, given in (("--by error", args.by == "error"), ("--trace", args.trace != "rademacher")):
        if given:
            raise UserError(f"--bound has no use for {flag}: leave it out")


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    """The pictures to judge, with their captions. Raises UserError where there is none."""
    from ldm.dataset.examine import examine
    from ldm.images.opening import open_picture

    if not args.file.is_dir():
        return [Subject(args.file, args.prompt or "", open_picture(args.file).size[::-1])]

    with bar("examining", "images/s", args.quiet) as on_progress:
        examined = examine(
            args.file, instance_prompt=args.prompt, missing_caption="empty", on_progress=on_progress
        )
    for finding in examined.findings:
        if finding.effect == "stops":
            raise UserError(printable(f"{finding.path or args.file}: {finding.text}"))
    skipped = sum(finding.effect == "skipped" for finding in examined.findings)
    if skipped:
        echo(args, f"{skipped} left out: ldm folder {printable(args.file)} says why")
    return [Subject(each.path, each.caption or "", each.size) for each in examined.examples]


def tell_size(args: argparse.Namespace, pipe: Pipeline, subjects: Sequence[Subject]) -> None:
    """Say that pictures are fitted, if they are."""
    from ldm.evaluate.likelihood import own_size

    height, width = own_size(pipe)
    if others := sum(each.size != (height, width) for each in subjects):
        size = f"{width} x {height}"
        echo(args, f"{others} of {len(subjects)} fitted to the model's {size}: resized, its middle taken")


def judge_of(args: argparse.Namespace, pipe: Pipeline) -> Judge:
    """What gives a picture's figures under prompts, as the flags say."""
    from ldm.evaluate.likelihood import denoising_bounds, log_likelihoods

    def judge(picture: Image.Image, prompts: Sequence[str]) -> list[Likelihood]:
        shared = {"pipe": pipe, "picture": picture, "prompts": prompts, "seed": args.seed}
        if args.by == "error":
            return denoising_bounds(**shared, levels=args.levels, noises=args.probes)
        return log_likelihoods(**shared, trace=args.trace, probes=args.probes, rtol=args.rtol)

    return judge


# --- each question ---------------------------------------------------------------------------------------


def of_picture(args: argparse.Namespace, judge: Judge, subject: Subject) -> tuple[list[str], dict[str, Any]]:
    """log p under the prompt and without, and what the prompt is worth."""
    found = judge(_open(subject), subject.prompts)
    lines = [_line(each, text) for each, text in zip(found, subject.prompts, strict=True)]
    figures: dict[str, Any] = {"figures": _figures(found, subject.prompts)}
    if len(found) == 2:
        gain, error = found[0].gain_over(found[1])
        lines.append(f"the prompt is worth {gain:.1f} nats{_error(error)}")
        figures["gain"] = {"nats": gain, "std_error": error}
    return [f"{subject.path}: {_what(args)}", *lines], figures


def of_prompts(args: argparse.Namespace, judge: Judge, subject: Subject) -> tuple[list[str], dict[str, Any]]:
    """The prompts, the likeliest first, with their probabilities."""
    from ldm.evaluate.likelihood import posterior

    found = judge(_open(subject), args.among)
    chances = posterior(found)
    order = sorted(range(len(found)), key=lambda i: -chances[i])
    lines = [f"{subject.path}: {_what(args)}; probabilities of equally likely prompts"]
    for i in order:
        gain, error = found[i].gain_over(found[order[0]])
        lines.append(f"{chances[i]:8.4f} {gain:10.1f} nats{_error(error)}  {args.among[i]}")
    figures = _figures(found, args.among)
    return lines, {"figures": [one | {"probability": p} for one, p in zip(figures, chances, strict=True)]}


def of_folder(
    args: argparse.Namespace, pipe: Pipeline, judge: Judge, subjects: Sequence[Subject]
) -> tuple[list[str], dict[str, Any]]:
    """Every picture under its caption and without, those that fit in least first."""
    from ldm.evaluate.likelihood import CONTENT, content_errors
    from ldm.evaluate.outliers import FAR, robust_scores

    rows, errors = [], []
    with bar("judging", "pictures/s", args.quiet, len(subjects)) as on_progress:
        for done, subject in enumerate(subjects, 1):
            picture = _open(subject)
            rows.append((subject, judge(picture, subject.prompts)))
            errors += content_errors(pipe, picture, [subject.caption], seed=args.seed)
            on_progress(done, len(subjects))
    scores = robust_scores(errors)
    lines = [
        f"{args.file}: {_what(args)}",
        f"{'score':>7} {'bits/dim':>9} {'without':>9} {'caption is worth':>17}  picture",
    ]
    figures = []
    for i in sorted(range(len(rows)), key=lambda i: -abs(scores[i])):
        subject, found = rows[i]
        own, none = found[0], found[-1]
        gain = f"{own.nats - none.nats:.1f} nats" if len(found) == 2 else "-"
        mark = "  <- stands apart" if abs(scores[i]) >= FAR else ""
        path = subject.path.relative_to(args.file)
        bits = f"{own.bits_per_dim:9.4f} {none.bits_per_dim:9.4f}"
        lines.append(f"{scores[i]:7.2f} {bits} {gain:>17}  {path}{mark}")
        told = {"path": str(subject.path), "score": scores[i], "content_error": errors[i]}
        figures.append({**told, "figures": _figures(found, subject.prompts)})
    low, high = CONTENT
    lines.append(
        f"score: of the error of denoising it under its caption, at noise levels from {low} to {high}: "
        f"so many robust standard deviations from this folder's median. From {FAR} on a picture stands "
        "apart: foreign, damaged, or not what its caption says. A caption worth less than 0 nats makes "
        "its picture less likely"
    )
    return lines, {"pictures": figures}


def of_bound(
    args: argparse.Namespace, pipe: Pipeline, subjects: Sequence[Subject]
) -> tuple[list[str], dict[str, Any]]:
    """Every term of the bound, means over the pictures."""
    from ldm.evaluate.bound import picture_bounds

    pictures, prompts = [_open(each) for each in subjects], [each.caption for each in subjects]
    found = picture_bounds(pipe, pictures, prompts, steps=args.bound, seed=args.seed)
    lines = [f"{args.file}: the bound of {args.bound} steps, bits per dimension of latents and of pixels"]
    lines += [f"{name:>17} {latents:9.4f} {pixels:9.4f}" for name, (latents, pixels) in found.terms().items()]
    return [
        *lines,
        f"-log p of the latents: at most {float(found.latents.mean()):.4f} (prior, steps, latents' decoder)",
        f"-log P of the pixels: at most {float(found.pictures.mean()):.4f} (prior, steps, encoder, pixels)",
        f"standard deviations of the decoders, fitted here: {found.latent_std:.4g} of latents, "
        f"{found.pixel_std:.4g} of 255 of pixels",
    ], {"bound": _bound_figures(found, pipe), "paths": [str(each.path) for each in subjects]}


# --- told ------------------------------------------------------------------------------------------------


def _open(subject: Subject) -> Image.Image:
    from ldm.images.opening import open_picture

    return open_picture(subject.path)


def _what(args: argparse.Namespace) -> str:
    return "log p of its latents" if args.by == "likelihood" else "log p of its latents is at least"


def _line(found: Likelihood, prompt: str) -> str:
    text = f'"{prompt}"' if prompt else "no prompt"
    return f"{found.nats:12.1f} nats{_error(found.std_error)}, {found.bits_per_dim:.4f} bits/dim, {text}"


def _error(nats: float) -> str:
    """Nothing where there is none, or where one estimate cannot tell."""
    return f" +- {nats:.1f}" if 0 < nats < math.inf else ""


def _figures(found: Sequence[Likelihood], prompts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "nats": each.nats,
            "std_error": each.std_error,
            "bits_per_dim": each.bits_per_dim,
            "evaluations": each.evaluations,
        }
        for each, prompt in zip(found, prompts, strict=True)
    ]


def _bound_figures(found: Bounds, pipe: Pipeline) -> dict[str, Any]:
    steps = found.steps.mean(1) / (found.latent_dims * math.log(2))
    return {
        "latents": float(found.latents.mean()),
        "pixels": float(found.pictures.mean()),
        "terms": found.terms(),
        "latent_std": found.latent_std,
        "pixel_std": found.pixel_std,
        "curve": [
            {
                "timestep": float(pipe.schedule.t(sigma)),
                "sigma": float(sigma),
                "bits_per_latent_dim": float(bits),
            }
            for sigma, bits in zip(found.sigmas, steps, strict=False)
        ],
    }


def write(path: Path, figures: dict[str, Any]) -> None:
    """JSON, where null is what is not finite."""
    from ldm.files import whole_file

    with whole_file(path) as file:
        text = json.dumps(_finite(figures), indent=2, ensure_ascii=False, allow_nan=False)
        file.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float():
            return float(value) if math.isfinite(value) else None
        case _:
            return value
