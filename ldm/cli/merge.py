"""`ldm merge`: one model of several."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

from ldm.cli.flags import add_common_flags
from ldm.cli.terminal import echo

PARTS = ("unet", "vae", "text-encoder", "text-encoder-2")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="A, B, ...: folders, single files or hub names")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="TARGET",
        help="a folder, or one file if it ends in .safetensors",
    )
    add(
        "--weights",
        type=number,
        nargs="+",
        metavar="W",
        help="of each model, with a sum of 1; or of two models that of B alone: A (1 - W) + B W "
        "(default: equal shares)",
    )
    add("--add-difference", type=number, metavar="M", help="A + M (B - C), of three models")
    add(
        "--block-weights",
        type=block_weights,
        nargs="+",
        metavar="W",
        help="W or M in each block of the U-Net, as in merge-block-weighted: IN00, ..., M00, OUT00, ..., "
        "with or without BASE, which is all else, in front; or only those that differ: OUT03=0.5 OUT04=0.8",
    )
    add(
        "--parts",
        type=part,
        nargs="+",
        metavar="PART",
        help=f"merge only these, and take the others from A: {', '.join(PARTS)}",
    )
    add("--vae", metavar="PLACE", help="take the VAE from another folder, file or hub name")
    add("--dtype", metavar="NAME", help="fp32, bf16, fp16 (default: as stored in A)")
    add("--max-shard-size", metavar="SIZE", help="5GB, 500MB: cut larger files of a folder")
    add(
        "--prediction-type",
        metavar="NAME",
        help="epsilon or v_prediction, of all models, where one does not say it",
    )
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of single files that hold both: the averaged weights, or the plain ones",
    )
    add("--force", action="store_true", help="replace a target that is there")
    add_common_flags(parser)


def merge(args: argparse.Namespace) -> int:
    """Merge, and print where the model is."""
    from ldm.checkpoint.merge import merge
    from ldm.runtime import choose

    merge(
        args.models,
        args.output,
        weights=args.weights,
        add_difference=args.add_difference,
        block_weights=_joined(args.block_weights),
        parts=args.parts,
        vae=args.vae,
        dtype=None if args.dtype is None else choose("cpu", args.dtype).dtype,
        ema=args.ema,
        prediction_type=args.prediction_type,
        max_shard_size=args.max_shard_size,
        force=args.force,
        log=lambda line: echo(args, line),
    )
    echo(args, str(args.output))
    return 0


def number(text: str) -> float:
    """0.3, -1 or 1/3."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def block_weights(text: str) -> list[tuple[str, float]]:
    """Numbers between commas, named or not: the names of those without are empty."""
    named = [each.rpartition("=") for each in text.split(",") if each.strip()]
    return [(name.strip().upper(), number(value)) for name, _, value in named]


def part(text: str) -> str:
    if text.replace("_", "-") not in PARTS:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(PARTS)}")
    return text.replace("-", "_")


def _joined(given: list[list[tuple[str, float]]] | None) -> list[float] | dict[str, float] | None:
    """Either all by name, or all in order. Raises UserError for a mixture, and for a block twice."""
    from ldm.errors import UserError

    if given is None:
        return None
    pairs = [pair for each in given for pair in each]
    if not any(name for name, _ in pairs):
        return [weight for _, weight in pairs]
    names = [name for name, _ in pairs]
    if "" in names or len({*names}) < len(names):
        raise UserError("--block-weights: name all weights or none, and no block twice")
    return dict(pairs)
