"""A recipe, flat, and what it means that a run goes on with another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm.checkpoint.io import read_json
from ldm.errors import UserError
from ldm.train.recipe import Change

ACCUMULATION = "gradient_accumulation_steps"
NONE: Mapping[str, Any] = MappingProxyType({})
PROCESSES, BATCHES = "run.processes", "run.batches_a_step"  # kept with a recipe


def batches_a_step(before: Mapping[str, Any], accumulation: int, processes: int) -> int:
    """How many batches, of all processes together, make one step of the optimiser.

    A run that goes on in another number of processes keeps them: each takes more or fewer, so that every step
    sees the same pictures. One whose recipe asks for another accumulation has what that comes to.

    Args:
        before: the flat recipe of the state that it goes on from; {} where it begins.

    Raises:
        UserError: if the processes cannot share them evenly.
    """
    had = next((value for key, value in before.items() if key.rpartition(".")[2] == ACCUMULATION), None)
    if had != accumulation:
        return accumulation * processes
    batches: int = before.get(BATCHES, accumulation * before.get(PROCESSES, 1))
    if batches % processes:
        raise UserError(
            f"a step of this run is of {batches} batches, which {processes} processes cannot share evenly: "
            f"take a number of processes that divides {batches}"
        )
    return batches


def check_recipe(
    folder: Path,
    recipe: Mapping[str, Any],
    changes: Mapping[str, Change],
    force: bool = False,
    log: Callable[[str], object] = print,
    defaults: Mapping[str, Any] = NONE,
) -> None:
    """`compare` with the recipe of the state in `folder`."""
    compare(folder, read_json(folder / "recipe.json"), recipe, changes, force, log, defaults)


def compare(
    folder: Path,
    before: Mapping[str, Any],
    recipe: Mapping[str, Any],
    changes: Mapping[str, Change],
    force: bool = False,
    log: Callable[[str], object] = print,
    defaults: Mapping[str, Any] = NONE,
) -> None:
    """Compare a state's recipe with the one to go on with, and say in one line what has changed.

    Other processes and another accumulation are told, where a step is of as many batches as before.

    Args:
        folder: the state's, for messages.
        before, recipe: flat, and with them what is so of the run without being in a recipe, such as its
            processes.
        changes: what a change of each key of a recipe means; of what is in no recipe, FIXED.
        defaults: what a key is that the state's recipe does not have, as it is of an older version.

    Raises:
        UserError: naming the key if one that is SHAPE has changed, or one that is FIXED without `force`.
    """
    if before.get(BATCHES) == recipe.get(BATCHES) is not None:
        shared = {key: Change.TOLD for key in recipe if key.rpartition(".")[2] == ACCUMULATION}
        changes = {**changes, **shared, PROCESSES: Change.TOLD}
    changes = {**changes, BATCHES: Change.FREE}  # it follows from the two
    before = {key: defaults[key] for key in recipe if key in defaults} | dict(before)
    kinds = {
        key: kind
        for key in sorted(before.keys() | recipe.keys())
        if before.get(key) != recipe.get(key) and (kind := _kind(key, changes)) is not Change.FREE
    }
    changed = {key: f"{key} {before.get(key, 'unset')} -> {recipe.get(key, 'unset')}" for key in kinds}
    shapes = [changed[key] for key, kind in kinds.items() if kind is Change.SHAPE]
    shapes = [changed["mode"]] if "mode" in changed else shapes  # others follow from it
    fixed = [changed[key] for key, kind in kinds.items() if kind is Change.FIXED]
    if shapes or (fixed and not force):
        advice = "or choose another folder" if shapes else "choose another folder, or add --force"
        raise UserError(
            f"{folder} was trained with another recipe: {', '.join(shapes + fixed)}; take the old values, "
            f"{advice}"
        )
    if changed:
        log(f"the recipe has changed since {folder.name}: {', '.join(changed.values())}")


def _kind(key: str, changes: Mapping[str, Change]) -> Change:
    """Of a dotted key, or of the mapping that it lies in."""
    while key not in changes and "." in key:
        key = key.rpartition(".")[0]
    return changes.get(key, Change.FIXED)


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A recipe's plain values by dotted names: {"run": {"seed": 1}} gives ("run.seed", 1)."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a flat recipe, as 64 hex digits."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
