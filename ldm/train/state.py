"""A training run's states on disk: safetensors and JSON under a manifest of hashes, never half there.

`run_dir/state-<step>/` holds

    weights.safetensors    what is trained, and buffers, by name
    ema.safetensors        the moving averages, by name
    optimiser.safetensors  <number of the parameter>.<name of the moment>
    run.json               the position, and what else a run needs to go on that is no tensor
    recipe.json            the recipe, flat: {"optimiser.learning_rate": 0.001, ...}
    manifest.json          size and SHA-256 of each of these

Where tensors are sharded (`ldm.train.sharding`), each process writes its own rows of them, all at once:
`weights-00002-of-00004.safetensors`. A tensor is what the files have of it, one below the other, so any
number of processes goes on from it.

It is written aside, flushed, and renamed; older ones go only after that. No file of it is a pickle.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.checkpoint.io import read_json, read_tensors, write_json, write_tensors
from ldm.errors import UserError
from ldm.files import read_sha256, whole_folder
from ldm.train.changes import digest
from ldm.train.processes import ONE_PROCESS, Processes, alone, together
from ldm.train.sharding import is_sharded, like, own_rows, rows


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps made, samples seen, seconds trained, steps skipped and how many just now."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class State:
    """The tensors that a run needs to go on, by name: its own, not copies."""

    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimiser: torch.optim.Optimizer


# --- writing ---------------------------------------------------------------------------------------------


def save_state(
    run_dir: Path,
    position: Position,
    state: State,
    recipe: Mapping[str, Any],
    extra: Mapping[str, Any],
    keep: int = 1,
    processes: Processes = ONE_PROCESS,
) -> Path:
    """Write run_dir/state-<step>; then remove all but the `keep` newest, and any of a later step.

    Args:
        recipe: flat, as `flat` gives it. extra: plain values for run.json.
        processes: those of the run, which are all to call it.

    Raises:
        UserError: if it cannot be written, or would hold NaN or Inf. What was there before is as it was.
    """
    final = run_dir / f"state-{position.step:08d}"
    moments, numbers = _moments(state.optimiser)
    run = {"position": asdict(position), "optimiser": numbers, "groups": _groups(state.optimiser)}
    run |= {"extra": dict(extra)}
    with ExitStack() as stack:  # of the main process
        aside = alone(processes, lambda: stack.enter_context(whole_folder(final)))
        files: dict[str, Any] = {}
        for own in together(processes, lambda: _write_own(aside, state, moments, processes)):
            files |= own

        def finish() -> None:
            _write_rest(aside, files, run, recipe)
            stack.close()  # the folder has its name
            _remove_others(run_dir, final, position.step, keep)

        alone(processes, finish)
    return final


def _write_own(
    aside: Path, state: State, moments: Mapping[str, Tensor], processes: Processes
) -> dict[str, Any]:
    """Write this process's rows, and in the main one all that is whole. What the manifest says of it."""
    if not aside.is_dir():
        raise UserError(
            f"{aside.parent} is not the folder of process 0: it must be one that all processes share"
        )
    rank, count, main = processes.process_index, processes.num_processes, processes.is_main_process
    sharded = any(is_sharded(tensor) for tensor in state.weights.values())
    if not (sharded or main):
        return {}
    ending, written = f"-{rank + 1:05d}-of-{count:05d}" if sharded else "", {}
    for kind, tensors in (("weights", state.weights), ("ema", state.ema), ("optimiser", moments)):
        own = {name: own_rows(tensor) for name, tensor in tensors.items() if main or is_sharded(tensor)}
        path = aside / f"{kind}{ending}.safetensors"
        _write_finite(path, kind, own)
        _flush(path)
        written[path.name] = _described(path)
    return written


def _write_rest(aside: Path, files: dict[str, Any], run: dict[str, Any], recipe: Mapping[str, Any]) -> None:
    """Write what is no tensor, and the manifest of everything."""
    for name, value in (("run.json", run), ("recipe.json", recipe)):
        write_json(aside / name, value)
        files[name] = _described(aside / name)
    write_json(aside / "manifest.json", {"recipe": digest(recipe), "files": dict(sorted(files.items()))})
    _sync(aside)


def _remove_others(run_dir: Path, final: Path, step: int, keep: int) -> None:
    """All but the `keep` newest, and any of a later step, now that the new one is there."""
    _sync(run_dir)
    before = [folder for folder in _states(run_dir) if step_of(folder) < step]
    for folder in _states(run_dir):
        if folder != final and folder not in before[len(before) - keep + 1 :]:
            # Renamed first: a removal that is cut short leaves nothing that looks like a state.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))


def _write_finite(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{kind} {name} is NaN or Inf, so no state was saved: go on from the last one "
                "with a lower learning rate"
            )
    try:
        write_tensors(path, tensors)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from None


def _moments(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as "<parameter>.<name>": its tensors, and its plain numbers."""
    state = optimiser.state_dict()["state"]
    entries = {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in entries.items() if name not in tensors}


def _described(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": read_sha256(path)}


def _groups(optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What steps have changed of each group's settings: counts, Prodigy's estimate, sums of weights.

    Not learning rates, which follow from the step, nor what the recipe says, which may change on the way.
    """
    fresh, given = optimiser.defaults, ("params", "lr", "muon")
    return [
        {key: value for key, value in group.items() if key not in given and fresh.get(key, ...) != value}
        for group in optimiser.param_groups
    ]


def _sync(folder: Path) -> None:
    """The folder's files and their names are on the disk, or OSError says why not."""
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        _flush(path)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # which has no such thing
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- finding ---------------------------------------------------------------------------------------------


def _states(run_dir: Path) -> list[Path]:
    """The folders that are named as states, by step."""
    named = (path for path in run_dir.glob("state-*") if path.name[6:].isdecimal())
    return sorted(named, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a state's name."""
    return int(folder.name.removeprefix("state-"))


def newest_state(run_dir: Path) -> Path | None:
    """The state of the latest step, as it is."""
    return max(_states(run_dir), key=step_of, default=None)


def damage(folder: Path) -> str | None:
    """What is wrong with a state, in a few words; None if it is whole to the last bit."""
    try:
        files = read_json(folder / "manifest.json")["files"]
        for name, written in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["size"]:
                return f"{name} is cut short or changed"
            if read_sha256(path) != written["sha256"]:
                return f"{name} is changed"
    except UserError:
        return "its manifest is missing or damaged"
    except (KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def find_state(run_dir: Path, resume: str = "latest", force: bool = False) -> Path | None:
    """The state to go on from; None to start anew. Says in one line which ones it passed over.

    Args:
        resume: "latest", the newest whole one; "no", none; or a state's path, or its name in run_dir.
        force: start anew where no state is whole, and leave later states behind (the next save removes them)
            where `resume` asks for less.

    Raises:
        UserError: where that would be needed without `force`, or if the state asked for is not whole.
    """
    states, faults = _states(run_dir), _clear_unfinished(run_dir)
    found = None
    if resume == "latest":
        for folder in reversed(states):
            if (fault := damage(folder)) is None:
                found = folder
                break
            faults.append(f"{folder.name}: {fault}")
    else:
        found = None if resume == "no" else _asked_for(run_dir, resume)
        step = -1 if found is None else read_json(found / "run.json")["position"]["step"]
        later = [folder for folder in states if folder != found and step_of(folder) >= step]
        if later and not force:
            raise UserError(
                f"{run_dir} holds {later[-1].name}: leave out resume_from_checkpoint={resume} to go on from "
                "it, choose another folder, or add --force to leave it behind"
            )
    if resume == "latest" and states and found is None and not force:
        raise UserError(
            f"{run_dir}: no state is whole ({'; '.join(faults)}): choose another folder, or set "
            "add --force to start anew"
        )
    if faults:
        print(f"passed over {'; '.join(faults)}", flush=True)
    return found


def _clear_unfinished(run_dir: Path) -> list[str]:
    """Remove what a killed run was writing or removing. Says what was lost by it."""
    folders = [path for path in sorted(run_dir.glob(".state-*")) if path.is_dir()]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return [f"{path.name[1:15]}: unfinished" for path in folders if not path.name.endswith("old")]


def _asked_for(run_dir: Path, name: str) -> Path:
    folder = next((path for path in (run_dir / name, Path(name)) if path.is_dir()), None)
    if folder is None:
        raise UserError(f"resume_from_checkpoint: {name} is no folder, nor is {run_dir / name}")
    if fault := damage(folder):
        raise UserError(f"{folder} cannot be gone on from: {fault}; set resume_from_checkpoint=latest")
    return run_dir / folder.name if folder.resolve().parent == run_dir.resolve() else folder


# --- reading ---------------------------------------------------------------------------------------------


def load_state(folder: Path, state: State) -> tuple[Position, dict[str, Any]]:
    """Fill `state` in place from a folder that `find_state` has found whole. Returns position and extra.

    Raises UserError naming the tensor if the folder is another model's.
    """
    _fill(folder, "weights", state.weights)
    _fill(folder, "ema", state.ema)
    run = read_json(folder / "run.json")
    params = [p for group in state.optimiser.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Any]] = {}
    for name, value in (_read(folder, "optimiser") | run["optimiser"]).items():
        i, key = name.split(".")
        if isinstance(value, list):
            value = _moment(value, params[int(i)])
        moments.setdefault(int(i), {})[key] = value
    groups = state.optimiser.state_dict()["param_groups"]
    changed = run.get("groups", [{}] * len(groups))  # states of older versions have none
    groups = [group | own for group, own in zip(groups, changed, strict=True)]
    state.optimiser.load_state_dict({"state": moments, "param_groups": groups})
    return Position(**run["position"]), run["extra"]


def _read(folder: Path, kind: str) -> dict[str, list[Tensor]]:
    """The pieces of each tensor of a kind, mapped from its files: rows, and the rows that follow them."""
    pieces: dict[str, list[Tensor]] = {}
    for path in sorted(folder.glob(f"{kind}*.safetensors")):
        for name, tensor in read_tensors(path).items():
            pieces.setdefault(name, []).append(tensor)
    return pieces


def _rows_of(pieces: Sequence[Tensor], wanted: range) -> Tensor:
    """Some rows of the tensor whose pieces these are."""
    found, first = [], 0
    for piece in pieces:
        found.append(piece[max(0, wanted.start - first) : max(0, wanted.stop - first)])
        first += len(piece)
    return torch.cat(found) if len(found) > 1 else found[0]


def _moment(pieces: Sequence[Tensor], p: Tensor) -> Tensor:
    """A moment of a parameter, laid out as it is: a copy, as the mapped file goes with the next save."""
    if not pieces[0].ndim:  # the number of steps
        return pieces[0].clone()
    if pieces[0].shape[1:] != p.shape[1:] or sum(map(len, pieces)) != len(p):  # of 8 bits, in blocks
        return _rows_of(pieces, range(sum(map(len, pieces)))).clone()
    own = torch.empty_like(own_rows(p), dtype=pieces[0].dtype, device="cpu")
    return like(p, own.copy_(_rows_of(pieces, rows(p))).to(p.device))


@torch.no_grad()
def _fill(folder: Path, kind: str, into: Mapping[str, Tensor]) -> None:
    path, found = folder / f"{kind}.safetensors", _read(folder, kind)
    for name in sorted(found.keys() ^ into.keys()):
        where = "is in it, but not in the model" if name in found else "is in the model, but not in it"
        raise UserError(
            f"{path}: {name} {where}: another model's state, or another mode of training: choose another "
            "folder"
        )
    for name, pieces in found.items():
        shape, wanted = list(pieces[0].shape), into[name]
        if shape:
            shape[0] = sum(map(len, pieces))
        if shape != list(wanted.shape):
            raise UserError(
                f"{path}: {name} is {shape}, and {list(wanted.shape)} in the model: choose another folder"
            )
        own_rows(wanted).copy_(_rows_of(pieces, rows(wanted)) if shape else pieces[0])
