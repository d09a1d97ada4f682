"""A training run's state on disk: safetensors and JSON, written aside and renamed, never half there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps made, samples seen, seconds trained."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0


def save_state(
    run_dir: Path, position: Position, model: nn.Module, ema: list[Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Write run_dir/state-<step>, then remove the older ones."""
    final = run_dir / f"state-{position.step:08d}"
    aside = run_dir / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, aside / "model.safetensors")
    save_file({str(i): v.contiguous() for i, v in enumerate(ema)}, aside / "ema.safetensors")
    moments = {
        f"{i}.{name}": value.contiguous()
        for i, entry in optimiser.state_dict()["state"].items()
        for name, value in entry.items()
    }
    save_file(moments, aside / "optimiser.safetensors")
    (aside / "position.json").write_text(json.dumps(asdict(position)))
    for path in aside.iterdir():
        with path.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for older in run_dir.glob("state-*"):
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
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for i, value in load_file(folder / "ema.safetensors").items():
        ema[int(i)].copy_(value)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        i, key = name.split(".")
        moments.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return Position(**json.loads((folder / "position.json").read_text()))
