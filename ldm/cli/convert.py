"""`ldm convert`: a model between folder and single file, or its dtype."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.flags import add_common_flags, add_part_flags
from ldm.cli.terminal import echo


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a pipeline folder, a single file or a hub name")
    add("target", type=Path, metavar="TARGET", help="a folder, or one file if it ends in .safetensors")
    add("--dtype", metavar="NAME", help="fp32, bf16, fp16 (default: as stored)")
    add_part_flags(add)
    add("--config", type=Path, metavar="FOLDER", help="a pipeline folder with the configs of a single file")
    add("--max-shard-size", metavar="SIZE", help="5GB, 500MB: cut larger files of a folder")
    add("--force", action="store_true", help="replace a target that is there")
    add_common_flags(parser)


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
        log=lambda line: echo(args, line),
    )
    echo(args, str(args.target))
    return 0
