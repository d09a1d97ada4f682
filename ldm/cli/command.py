"""The two commands, `txt2img` and `ldm`: parse, run, and say in one line what went wrong.

Exit codes: 0 done; 1 our fault (`redraw`: the pixels differ); 2 something the user can put right; 130 Ctrl-C.
"""

from __future__ import annotations

import atexit
import io
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ldm.cli import (
    bulk,
    convert,
    diffuse,
    evaluate,
    finetune,
    folder,
    likelihood,
    merge,
    preprocess,
    provenance,
    serve,
)
from ldm.cli.drawing import draw, draw_flags, redraw
from ldm.cli.flags import FLAGS
from ldm.cli.parser import Parser, dashes
from ldm.errors import NEWLINE, UserError, printable

SPELLING = "Flags may be spelt with dashes or underscores."
# name -> (its flags, what runs it, what it does)
COMMANDS = {
    "txt2img": (draw_flags.add_flags, draw.draw, "draw pictures from words"),
    "info": (
        redraw.add_info_flags,
        redraw.info,
        "show how a picture was drawn, or what a model was merged from",
    ),
    "redraw": (
        redraw.add_flags,
        redraw.redraw,
        "draw a picture again from its own metadata and compare the pixels",
    ),
    "provenance": (
        provenance.add_flags,
        provenance.provenance,
        "show what pictures say of their origin, and verify it",
    ),
    "preprocess": (
        preprocess.add_flags,
        preprocess.preprocess,
        "make control pictures: edges, lines, depth and others",
    ),
    "convert": (
        convert.add_flags,
        convert.convert,
        "change a model between folder and single file, or its dtype",
    ),
    "merge": (merge.add_flags, merge.merge, "make one model of several"),
    "diffuse": (diffuse.add_flags, diffuse.diffuse, "show a picture on its way to noise and back"),
    "evaluate": (evaluate.add_flags, evaluate.evaluate, "measure pictures: FID, KID, CLIP score and others"),
    "likelihood": (
        likelihood.add_flags,
        likelihood.likelihood,
        "say how likely a model finds pictures, and which do not fit in",
    ),
    "folder": (folder.add_flags, folder.folder, "examine a folder of pictures before training on it"),
    "finetune": (finetune.add_flags, finetune.finetune, "train a model on a folder of pictures"),
    "precompute": (
        finetune.add_flags,
        finetune.precompute,
        "make the latents and embeddings of a fine-tuning, in shards",
    ),
    "train-control": (
        finetune.add_control_flags,
        finetune.train_control,
        "train a ControlNet on a folder of pictures",
    ),
    "train-image-prompt": (
        finetune.add_image_prompt_flags,
        finetune.train_image_prompt,
        "train an IP-Adapter on a folder of pictures",
    ),
    "bulk": (bulk.add_flags, bulk.bulk, "draw a table of requests, with as many workers as there are"),
    "serve": (
        serve.add_flags,
        serve.serve,
        "draw for others over HTTP, by OpenAI's API, A1111's and our own",
    ),
}


def txt2img(argv: Sequence[str] | None = None) -> int:
    """The `txt2img` command. Returns its exit code; argparse exits by itself with 2 on a bad flag."""
    parser = Parser("txt2img", description=f"Draw pictures from words. {SPELLING}")
    draw_flags.add_flags(parser)
    parser.set_defaults(command=draw.draw)
    return run(parser, argv) if argv is not None else leave(run(parser, argv))


def main(argv: Sequence[str] | None = None) -> int:
    """The `ldm` command: `ldm txt2img`, `ldm redraw`, ...: all of COMMANDS."""
    parser = Parser("ldm", description="Latent diffusion: draw pictures from words.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (add_flags, command, purpose) in COMMANDS.items():
        child = commands.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}. {SPELLING}"
        )
        child.add_flags.append(add_flags)
        child.set_defaults(command=command)
    return run(parser, argv) if argv is not None else leave(run(parser, argv))


def leave(code: int) -> int:
    """End this process, whose whole purpose the command was; or, where threads still work, return the code.

    Python would give back one by one what torch has made, for half a second after the last word is said.
    """
    if any(not each.daemon for each in threading.enumerate() if each is not threading.main_thread()):
        return code
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads on: Python has its own way to end then
        return code
    os._exit(code)


def run(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse and run the command; an exception becomes one line on stderr and an exit code."""
    args = parser.parse_args(dashes(sys.argv[1:] if argv is None else argv))
    show_all_letters()
    try:
        with warnings_in_one_line(parser.prog):
            return int(args.command(args))
    except KeyboardInterrupt:
        left = "finished pictures are kept" if args.command is draw.draw else "nothing half-written is left"
        print(f"stopped; {left}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            print(printable(traceback.format_exc(), keep=NEWLINE), end="", file=sys.stderr)
        line, code = verdict(error)
        if args.command is draw.draw:
            line = in_flags(line)
        print(f"{parser.prog}: {printable(line, keep=NEWLINE)}", file=sys.stderr)
        return code


def show_all_letters() -> None:
    """A name that the terminal's encoding lacks is shown with escapes; it is no error to print it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


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
        case _ if out_of_memory(error):  # where nothing nearer says for what: a model that is loaded, say
            return "not enough memory: a smaller model or picture, fewer at once, or 16 bits take less", 2
        case _:
            what = f"{type(error).__name__}: {first_line}"
            return f"internal error: {what} (please report it, with what --debug shows)", 1


def out_of_memory(error: Exception) -> bool:
    """As `ldm.runtime` has it, without loading torch where that was not needed."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from ldm.runtime import is_out_of_memory

    return is_out_of_memory(error)


def in_flags(line: str) -> str:
    """Of an argument that is not allowed, the flag that was typed: `--mask` for `mask_image`."""
    names = re.compile(r"(?:^|(?<=; ))(\w+)(?= (?:\S+ )?is not allowed)")
    return names.sub(lambda name: FLAGS.get(name[0], f"--{name[0].replace('_', '-')}"), line)


@contextmanager
def warnings_in_one_line(program: str) -> Iterator[None]:
    """Show warnings as `txt2img: warning: ...`, without the line of code that gave them."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            print(f"{program}: warning: {printable(message, keep=NEWLINE)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
