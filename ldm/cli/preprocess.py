"""`ldm preprocess canny photo.png -o edges.png`: control pictures made of pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.drawing.beginnings import pictures_in
from ldm.cli.flags import add_common_flags
from ldm.cli.parser import count
from ldm.cli.terminal import bar, echo
from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.preprocess.catalogue import Preprocessor
    from ldm.preprocess.networks import Estimator


def add_flags(parser: argparse.ArgumentParser) -> None:
    from ldm.preprocess import PREPROCESSORS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [f"  {name:15}{each.purpose}" for name, each in PREPROCESSORS.items()]
    parser.epilog = "\n".join(["preprocessors:", *lines])
    add = parser.add_argument
    add("name", metavar="PREPROCESSOR", help="one of those below")
    add("pictures", nargs="+", type=Path, metavar="PICTURE", help="pictures, or folders of some")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        metavar="FILE",
        help="a .png, or a folder for PICTURE_PREPROCESSOR.png of each (default: this one)",
    )
    add("--resolution", type=count, metavar="PIXELS", help="of the shorter side, made so first")
    add("--mask", type=Path, metavar="FILE", help="inpaint: white where the picture is drawn anew")
    add("--depth-model", type=Path, metavar="FOLDER", help="depth, normal: transformers' folder of a network")
    add("--segmentation-model", type=Path, metavar="FOLDER", help="seg: the same, of ADE20K's classes")
    group = parser.add_argument_group("options of preprocessors")
    for name, text, is_switch in _options():
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if is_switch else {"metavar": "X"}
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **kind)
    add_common_flags(parser)


def _options() -> Iterator[tuple[str, str, bool]]:
    """(name, help, whether it is on or off) of all options of all preprocessors."""
    from ldm.preprocess import PREPROCESSORS

    found: dict[str, list[str]] = {}
    switches = set()
    for name, each in PREPROCESSORS.items():
        for option, declared in each.options.items():
            within, is_switch = declared.within, isinstance(declared.default, bool)
            bounds = "" if is_switch else f", {within.low:g} to {within.high:g}"
            default = "off" if is_switch else f"{declared.default:g}"
            text = f"{name}: {within.what}{bounds} (default: {default})"
            found.setdefault(option, []).append(text)
            if is_switch:
                switches.add(option)
    for option, texts in found.items():
        yield option, "; ".join(texts), option in switches


def preprocess(args: argparse.Namespace) -> int:
    """Make the control picture of each picture, and print where it is."""
    from ldm.preprocess import PREPROCESSORS, find, read_options

    found = find(args.name)
    known = {option for each in PREPROCESSORS.values() for option in each.options}
    options = read_options(found.name, {key: value for key, value in vars(args).items() if key in known})
    given = [path for place in args.pictures for path in (pictures_in(place) if place.is_dir() else [place])]
    targets = _targets(args.output, given, found.name)
    estimator = _estimator(args, found)
    if found.masked != (args.mask is not None):
        why = "needs one: what is drawn anew" if found.masked else "takes none: leave --mask out"
        raise UserError(f"{found.name} and its mask: it {why}")
    with bar(found.name, "images/s", args.quiet or len(given) < 2, len(given)) as on_progress:
        for done, (path, target) in enumerate(zip(given, targets, strict=True), 1):
            _make(args, found, path, target, estimator, options)
            on_progress(done, len(given))
            echo(args, str(target))
    return 0


def _make(
    args: argparse.Namespace,
    found: Preprocessor,
    path: Path,
    target: Path,
    estimator: Estimator | None,
    options: dict[str, float | bool],
) -> None:
    import numpy as np
    from PIL import Image

    from ldm.images.opening import open_picture, to_mask
    from ldm.images.png import save_png
    from ldm.images.provenance import Marks
    from ldm.preprocess import preprocess, source_of
    from ldm.preprocess.pictures import to_levels

    image = _sized(open_picture(path, None, to_levels if found.map and estimator is None else None), args)
    mask = None
    if args.mask is not None:
        opened = open_picture(args.mask, None, to_mask)
        mask = np.asarray(opened.resize(image.size), dtype=np.float32) / np.float32(255)
    picture = preprocess(source_of(image), found.name, mask=mask, estimator=estimator, **options)
    # What shows edges of a photo is no work of a model.
    save_png(Image.fromarray(picture), target, marks=Marks(on=False))


def _sized(image: Image, args: argparse.Namespace) -> Image:
    """The picture with --resolution pixels on its shorter side."""
    if args.resolution is None:
        return image
    from PIL.Image import Resampling

    scale = args.resolution / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Resampling.BILINEAR if image.mode == "F" else Resampling.LANCZOS)


def _targets(output: Path, pictures: list[Path], name: str) -> list[Path]:
    """Where the control picture of each goes. Raises UserError before any is made."""
    from ldm.cli.drawing.output import check_file
    from ldm.files import check_writable

    if output.suffix and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise UserError(f"-o {output}: control pictures are .png, since others would add edges")
        if len(pictures) > 1:
            raise UserError(f"-o {output} names one file, but {len(pictures)} pictures were given: a folder")
        check_file(output)
        targets = [output]
    else:
        check_writable(output)
        targets = [output / f"{path.stem}_{name}.png" for path in pictures]
    if len({*targets}) < len(targets):
        twice = next(target.name for i, target in enumerate(targets) if target in targets[:i])
        raise UserError(f"two pictures would both be {twice}: give them in turn, each with -o")
    for path, target in zip(pictures, targets, strict=True):
        if target.exists() and path.exists() and target.samefile(path):
            raise UserError(f"{target} would be written over itself: name another file")
    return targets


def _estimator(args: argparse.Namespace, found: Preprocessor) -> Estimator | None:
    """The network that makes the map, where one was given. Raises UserError for one that nothing asks for."""
    for kind in ("depth", "segmentation"):
        folder = getattr(args, f"{kind}_model")
        if folder is None:
            continue
        if found.model != kind:
            raise UserError(f"--{kind}-model is not for {found.name}: leave it out")
        from ldm.preprocess.networks import load_estimator

        return load_estimator(kind, folder)
    return None
