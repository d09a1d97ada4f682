"""Where a model comes from: a pipeline folder, a single file or the hub, some parts from elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ldm.checkpoint.folder import embedded, load_folder
from ldm.checkpoint.parts import EMBEDDED, STEMS, Parts
from ldm.checkpoint.weights import find_weights
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.runtime import Runtime

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")  # no hub name ends so: a file that is not there
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


def load_parts(
    model: str | Path,
    runtime: Runtime | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool | None = None,
    log: Callable[[str], object] = _warn,
) -> Parts:
    """All parts of a model, on the runtime's device (None: as stored); those given in place of its own.

    Args:
        model: a pipeline folder, a single file, a hub name ("owner/model"), or one of `EMBEDDED`.
        revision: of a model on the hub: a branch, tag or commit.
        variant: of a folder's weights, such as "fp16".
        unet, vae, text_encoder, text_encoder_2: each a folder of its own, a pipeline that has one, a file, or
            a name on the hub.
        prediction_type: "epsilon" or "v_prediction", in place of what the model says or seems to be.
        ema: of a single file that holds both, the averaged weights (True) or the plain ones (False).
        log: is given a line for each thing that was guessed.

    Raises:
        UserError: naming what is missing, damaged or does not fit, and what to do.
    """
    check_prediction(prediction_type)
    path = find(model, revision, variant)
    given = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    overrides = find_parts(given)
    places: dict[Path, object] = {path: model}
    for part, place in overrides.items():
        inside = place.name == part and (place.parent / "model_index.json").exists()
        places[place] = f"{given[part]}/{part}" if inside else given[part]
    with as_given(places) as in_their_words:

        def say(line: str) -> None:
            log(in_their_words(line))

        return _load(path, runtime, variant, overrides, prediction_type, ema, say)


def _load(
    path: Path,
    runtime: Runtime | None,
    variant: str | None,
    overrides: Mapping[str, Path],
    prediction_type: str | None,
    ema: bool | None,
    log: Callable[[str], object],
) -> Parts:
    if path.is_dir():
        if ema is not None:
            raise UserError(
                f"{path}: ema chooses between the two sets of weights of a single file; leave it out"
            )
        parts = load_folder(path, runtime, variant=variant, overrides=overrides, log=log)
        if prediction_type is not None:
            parts = _predicting(parts, prediction_type)
        return replace(parts, changes=_changes(overrides, prediction_type))
    if variant is not None:
        raise UserError(f"{path}: variants are files of a folder, and this is a single file; leave it out")
    from ldm.checkpoint.original.single import load_single

    parts = load_single(path, runtime, prediction_type=prediction_type, ema=ema, overrides=overrides, log=log)
    return replace(parts, changes=_changes(overrides, prediction_type, ema))


def find(
    what: str | Path, revision: str | None = None, variant: str | None = None, part: str | None = None
) -> Path:
    """The folder or file that is meant: here, in the package, or fetched from the hub. Raises UserError."""
    path = _local(what)
    if path is None and isinstance(what, str) and what in EMBEDDED:
        path = embedded(what)
    if path is not None:
        if revision is not None:
            raise UserError(f"{what}: lies here, and only models on the hub have revisions; leave it out")
        return path
    if isinstance(what, str) and HUB_NAME.fullmatch(what):
        from ldm.checkpoint.hub import fetch

        return fetch(what, revision, variant, part)
    raise UserError(
        f"{what}: no such folder or file; give a pipeline folder, a single file, a hub name (owner/model) or "
        f"one of {', '.join(EMBEDDED)}, which come with ldm"
    )


@contextmanager
def as_given(places: Mapping[Path, object]) -> Iterator[Callable[[str], str]]:
    """Inside the block errors name what the caller gave, and not the folder in a cache where it was found.

    Gives what does the same to a line.
    """
    names = {str(place): str(what) for place, what in places.items()}
    longest_first = sorted((place for place in names if not _lies_here(names[place])), key=len, reverse=True)

    def in_their_words(line: str) -> str:
        for place in longest_first:
            line = line.replace(place, names[place])
        return line

    try:
        yield in_their_words
    except UserError as error:
        raise UserError(in_their_words(str(error))) from None


def _lies_here(name: str) -> bool:
    return _local(name) is not None


def check_prediction(prediction_type: str | None) -> None:
    """Raises UserError for a prediction type that there is not."""
    if prediction_type is not None and prediction_type not in [*Prediction]:
        raise UserError(
            f"prediction_type {prediction_type!r} is not allowed: choose one of {', '.join(Prediction)}"
        )


def find_adapter(what: str | Path, weight_name: str | None = None, encoder: bool = False) -> Path:
    """The file or folder of an adapter or textual inversion: here, or fetched from the hub.

    With `encoder` the image encoder beside it is fetched too. Raises UserError.
    """
    path = _local(what)
    if path is None and isinstance(what, str) and HUB_NAME.fullmatch(what) and not what.endswith(WEIGHTS):
        from ldm.checkpoint.hub import fetch_adapter

        return fetch_adapter(what, weight_name, encoder)
    path = Path(what).expanduser() if path is None else path
    return path / weight_name if weight_name is not None and path.is_dir() else path


def _local(what: str | Path) -> Path | None:
    """What lies here under that name, if anything."""
    try:
        path = Path(what).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long a name, a folder that may not be entered, nobody's home
        return None


def find_parts(given: Mapping[str, str | Path | None]) -> dict[str, Path]:
    """The folders or files of the parts that are given, by part. Raises UserError."""
    return {part: find_part(what, part) for part, what in given.items() if what is not None}


def find_part(what: str | Path, part: str) -> Path:
    """The folder or file of one part; of a pipeline folder the part in it. Raises UserError."""
    path = find(what, part=part)
    if path.is_dir() and not any((path / name).exists() for name in ("model_index.json", "config.json")):
        raise UserError(f"{what}: no {part} in it: neither config.json nor model_index.json lies there")
    if not (path / "model_index.json").exists():
        return path
    if not (path / part / "config.json").exists():
        raise UserError(f"{what}: a pipeline without {part}")
    return path / part


def _changes(
    overrides: Mapping[str, Path], prediction_type: str | None, ema: bool | None = None
) -> tuple[tuple[str, Path | None], ...]:
    """What makes the pictures other than those of the model alone."""
    changes: list[tuple[str, Path | None]] = [
        (part, find_weights(place, STEMS[part]) if place.is_dir() else place)
        for part, place in sorted(overrides.items())
    ]
    if prediction_type is not None:
        changes.append((prediction_type, None))
    return (*changes, ("averaged weights", None)) if ema else tuple(changes)


def _predicting(parts: Parts, prediction_type: str) -> Parts:
    scheduler = {**parts.scheduler, "prediction_type": prediction_type}
    Schedule.from_config(scheduler)
    return replace(parts, scheduler=scheduler)
