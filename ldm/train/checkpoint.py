"""A training run's state on disk: safetensors and JSON, written aside and renamed, never half there."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.io import read_json, read_tensors, whole_folder, write_json, write_tensors


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps made, samples seen, seconds trained."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0


def save_state(
    run_dir: Path, position: Position, model: nn.Module, ema: list[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Write run_dir/state-<step>, then remove the older ones and what a killed run left half-written."""
    final = run_dir / f"state-{position.step:08d}"
    moments = {
        f"{i}.{name}": value
        for i, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
    }
    with whole_folder(final) as aside:
        write_tensors(aside / "model.safetensors", model.state_dict())
        write_tensors(aside / "ema.safetensors", {str(i): value for i, value in enumerate(ema)})
        write_tensors(aside / "optimiser.safetensors", moments)
        write_json(aside / "position.json", asdict(position))
    for older in (*run_dir.glob("state-*"), *run_dir.glob(".state-*")):
        if older != final:
            shutil.rmtree(older)


def load_state(
    run_dir: Path, model: nn.Module, ema: list[Tensor], optimiser: torch.optim.Optimizer
) -> Position:
    """Restore the newest state in run_dir in place; a run that has none starts at Position()."""
    states = sorted(run_dir.glob("state-*"))
    if not states:
        return Position()
    folder = states[-1]
    model.load_state_dict(read_tensors(folder / "model.safetensors"))
    for i, value in read_tensors(folder / "ema.safetensors").items():
        ema[int(i)].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in read_tensors(folder / "optimiser.safetensors").items():
        i, key = name.split(".")
        moments.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return Position(**read_json(folder / "position.json"))
