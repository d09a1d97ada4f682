"""A flag for each key of the recipe, and the recipe of a command line; those that come with the package.

No torch here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from ldm.errors import UserError
from ldm.finetune.recipe import (
    ONLY,
    ControlSection,
    FinetuneRecipe,
    FolderSection,
    ImagePromptSection,
    LookSection,
    MaskedSection,
    Mode,
    ModelSection,
    ModeSection,
)
from ldm.train.loss_recipe import LossSection
from ldm.train.recipe import OptimiserSection, RunSection, read_yaml, validate

# Other names of the same options: those of diffusers' scripts for other modes, and short ones.
ALIASES = {
    "model": ("-m", "--pretrained-model-name-or-path"),
    "vae": ("--pretrained-vae-model-name-or-path",),
    "train_data_dir": ("--instance-data-dir",),
    "output_dir": ("-o",),
    "validation_prompts": ("--validation-prompt",),
    "num_vectors": ("--num-vectors-per-token",),
    "control_data_dir": ("--conditioning-data-dir",),
    "rank": ("--lora-rank", "--network-dim"),
    "lora_alpha": ("--network-alpha",),
    "optimizer": ("--optimizer-type",),
}
GROUPS = (
    ModelSection,
    FolderSection,
    ControlSection,
    ImagePromptSection,
    ModeSection,
    MaskedSection,
    LookSection,
    LossSection,
    OptimiserSection,
    RunSection,
)


# --- the command line ------------------------------------------------------------------------------------


def add_recipe_flags(parser: argparse.ArgumentParser, mode: Mode | None = None) -> None:
    """A flag for each key of the recipe but `masks`, in groups; what is not given is not in the namespace.

    With a `mode`, those of it alone.
    """
    parser.usage = "%(prog)s --train-data-dir DIR --output-dir DIR [--config RECIPE] [flags]"
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help=f"a YAML file, or one that comes with the package: {', '.join(shipped_recipes())}",
    )
    own = FinetuneRecipe.model_fields
    groups = [(group.__doc__ or "", list(group.model_fields)) for group in GROUPS]
    listed = {name for _, names in groups for name in names}
    groups.append(("The run.", [name for name in own if name not in listed]))
    for title, names in groups:
        group = parser.add_argument_group(title.partition("\n")[0].rstrip(".").lower())
        for name in names:
            if name != "masks" and (mode is None or (name != "mode" and mode in ONLY.get(name, (mode,)))):
                flags = (f"--{name.replace('_', '-')}", *ALIASES.get(name, ()))
                group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, **_options(own[name]))


def _options(field: FieldInfo) -> dict[str, Any]:
    """How argparse is to read a field. Values stay text: the recipe checks them in one place."""
    kind: Any = field.annotation
    choices = [value for part in (kind, *get_args(kind)) for value in _literals(part)]
    default = (
        ""
        if field.is_required() or field.default in (None, (), "")
        else f" (default: {_spell(field.default)})"
    )
    options: dict[str, Any] = {"help": f"{field.description}{default}".replace("%", "%%")}
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if choices:
        return options | {"choices": choices}
    if isinstance(field.default, tuple):
        return options | {"nargs": "+", "metavar": "TEXT"}
    return options | {"metavar": "VALUE"}


def _literals(kind: Any) -> tuple[str, ...]:
    values = get_args(kind)
    return values if values and all(isinstance(value, str) for value in values) else ()


def _spell(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(str(each) for each in default) if isinstance(default, tuple) else f"{default}"


def read_finetune_recipe(args: argparse.Namespace, mode: Mode | None = None) -> FinetuneRecipe:
    """The recipe of a parsed command line, in `mode` where a command has but one.

    Raises UserError naming the flag or the key.
    """
    raw = {} if args.config is None else read_yaml(find_recipe(args.config))
    if mode is not None and raw.setdefault("mode", mode) != mode:
        raise UserError(f"{args.config} is a recipe of mode {raw['mode']}: give it to `ldm finetune`")
    given = {name: value for name, value in vars(args).items() if name in FinetuneRecipe.model_fields}
    if "num_train_epochs" in given:  # else the recipe's steps would go before it
        raw.pop("max_train_steps", None)
    return validate(FinetuneRecipe, raw | given, str(args.config or "the command line"), given)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package, in order."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped())


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package. Raises UserError."""
    if Path(name).is_file():
        return Path(name)
    for path in _shipped():
        if path.name in (name, f"{name}.yaml", f"finetune_{name}.yaml"):
            return path
    raise UserError(f"--config {name}: no such file, nor one of {', '.join(shipped_recipes())}")


def _shipped() -> Iterator[Path]:
    try:
        folder = Path(str(importlib.resources.files("ldm.configs")))
    except ModuleNotFoundError:  # a checkout that is not installed
        folder = Path(__file__).parents[2] / "configs"
    return folder.glob("finetune_*.yaml")
