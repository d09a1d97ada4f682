"""What scripts that compare ways to draw ask and write alike; nothing heavy, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.postcards.scoring.sources import Settings


def comparison_parser(description: str, n: int, counted: str, sheet: str) -> argparse.ArgumentParser:
    """The flags that all have: the model, its judge, how it draws, and where figures and pictures go.

    Args:
        description: the script's docstring, of which the first line is shown.
        n, counted: the default of --n, and what it counts.
        sheet: what the pictures of a row show.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--model", help="the text-to-image model (default: the embedded one)")
    add("--scorer", type=Path, default=Path("weights/postcard-eval"))
    add("--n", type=int, default=n, help=counted)
    add("--steps", type=int, default=8)
    add("--sampler", default="dpmpp_2m_sde")
    add("--scale", type=float, default=2.5, help="guidance scale")
    add("--out", type=Path, help="write the figures here, as JSON")
    add("--sheet", type=Path, help=f"write pictures here: {sheet}")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    from ldm.postcards.scoring.sources import Settings

    return Settings(args.steps, args.sampler, args.scale)


def write_figures(args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """The figures beside what was asked, to --out where it is given."""
    if args.out:
        text = json.dumps({**vars(args), "found": found}, indent=2, default=str)
        args.out.write_text(text + "\n", encoding="utf-8")
