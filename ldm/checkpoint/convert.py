"""`ldm convert`: between a pipeline folder and a single file, and from either to another dtype."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ldm.checkpoint.folder import IGNORED, load_folder
from ldm.checkpoint.io import read_json
from ldm.checkpoint.merge.origin import read_origin
from ldm.checkpoint.original.sections import AVERAGED
from ldm.checkpoint.original.single import Log, read_single
from ldm.checkpoint.save import save_model
from ldm.checkpoint.source import as_given, check_prediction, find
from ldm.errors import UserError


def convert(
    source: str | Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    ema: bool | None = None,
    max_shard_size: str | None = None,
    force: bool = False,
    prediction_type: str | None = None,
    config: Path | None = None,
    overrides: Mapping[str, Path] | None = None,
    log: Log = print,
) -> None:
    """Write the model in `source` to `target`: a single file if that ends in .safetensors, or else a folder.

    Args:
        source: a folder, a file, or a name on the hub.
        dtype: of floating-point tensors; None keeps what is stored.
        ema, prediction_type, config, overrides: as in `load_single`.
        max_shard_size: "5GB", "500MB": larger files of a folder are cut.
        force: replace a target that is there.
        log: is given a line for each thing that was guessed, and for each tensor that is not written.

    Raises:
        UserError: if the source cannot be read, and for a target that is there. Nothing is half-written.
    """
    check_prediction(prediction_type)
    if target.exists() and not force:
        raise UserError(f"{target}: is there already; choose another name, or replace it with --force")
    path = find(source)
    if path.is_dir():
        if ema is not None or config is not None or prediction_type is not None:
            raise UserError(
                f"{path}: --ema, --config and --prediction-type are for single files; leave them out"
            )
        with as_given({path: source}) as in_their_words:
            parts = load_folder(path, None, overrides=overrides, log=lambda line: log(in_their_words(line)))
        unused = _unused_in_folder(path)
    else:
        parts, unused = read_single(
            path,
            prediction_type=prediction_type,
            ema=ema,
            config=config,
            overrides=overrides,
            log=log,
        )
    # What a merge was made of; no longer that, if a part is another's.
    header = {} if overrides else read_origin(path)
    save_model(target, parts, dtype, max_shard_size, header=header)
    averaged = [name for name in unused if name.startswith(AVERAGED)]
    for name in unused:
        if not name.startswith(AVERAGED):
            log(f"not written: {name}")
    if averaged:
        log(f"not written: {AVERAGED}* ({len(averaged)} tensors)")


def _unused_in_folder(folder: Path) -> list[str]:
    """Parts of a pipeline folder that nothing is drawn with."""
    index = read_json(folder / "model_index.json")
    return [part for part in IGNORED if index.get(part) not in (None, [None, None])]
