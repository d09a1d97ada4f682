"""`ldm folder DIR`: everything that is wrong with a folder of pictures, before any model loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.flags import add_common_flags
from ldm.cli.parser import count, place
from ldm.cli.terminal import bar
from ldm.errors import UserError

SHOWN = 20  # lines of each kind, without --all


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folder",
        type=place,
        metavar="DIR",
        help="pictures, with captions in any of the usual layouts; or shards",
    )
    add("--instance-prompt", metavar="TEXT", help="the caption of every picture; those in DIR are not read")
    add(
        "--missing-caption",
        choices=("error", "empty", "skip"),
        default="error",
        help="of a picture without a caption: stop, train it on an empty one, leave it out (default: error)",
    )
    add("--image-column", metavar="NAME", help="of a table: the pictures' files (default: file_name)")
    add("--caption-column", metavar="NAME", help="of a table: the captions (default: text)")
    add("--resolution", type=count, default=512, metavar="PIXELS", help="of the training (default: 512)")
    add("--sheet", type=Path, metavar="FILE", help="write a PNG of the crops that training will see")
    add("--json", action="store_true", help="everything, as JSON")
    add("--all", action="store_true", help="every line, not the first 20 of each kind")
    add_common_flags(parser)


def folder(args: argparse.Namespace) -> int:
    """Examine, report, draw the sheet. 0 where training could start, 2 where something stops it."""
    from ldm.dataset.captions import clip_counter
    from ldm.dataset.examine import examine
    from ldm.dataset.findings import as_json, report

    if args.sheet is not None:
        _check_sheet(args)
    with bar("examining", "images/s", args.quiet) as on_progress:
        examined = examine(
            args.folder,
            instance_prompt=args.instance_prompt,
            missing_caption=args.missing_caption,
            count_tokens=clip_counter(),
            resolution=args.resolution,
            image_column=args.image_column,
            caption_column=args.caption_column,
            on_progress=on_progress,
        )
    if args.json:
        import json

        print(json.dumps(as_json(examined), indent=2))
    elif not args.quiet or not examined.can_train:
        print("\n".join(report(examined, None if args.all else SHOWN)))
    if args.sheet is not None and examined.examples:
        from ldm.dataset.sheet import make_sheet
        from ldm.images.png import save_png

        save_png(make_sheet(examined.examples, args.resolution), args.sheet)
        if not (args.json or args.quiet):
            print(args.sheet)
    return 0 if examined.can_train else 2


def _check_sheet(args: argparse.Namespace) -> None:
    """Find out first that the sheet could not be written, or would change the folder that is examined."""
    from ldm.dataset.buckets import make_buckets
    from ldm.files import check_writable

    make_buckets(args.resolution)
    if args.sheet.suffix.lower() != ".png" or args.sheet.is_dir():
        raise UserError(f"--sheet {args.sheet} must name a .png file")
    if isinstance(args.folder, Path) and args.sheet.resolve().is_relative_to(args.folder.resolve()):
        raise UserError(
            f"--sheet {args.sheet} lies in the folder itself, and would be trained on: move it out"
        )
    check_writable(args.sheet.parent)
