"""Recipes: what all training runs share, read from YAML and validated in one place.

Each option is declared here once, with its default, its bounds and, in the text below it, what it means: the
command line's help is made of these. Names are those of diffusers' training scripts where they have the
option, else sd-scripts'. No torch here, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import to_jsonable_python

from ldm.errors import UserError

Finite = Annotated[float, Field(allow_inf_nan=False)]
LrScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
]


Optimizer = Literal["adamw", "adamw8bit", "muon", "prodigy", "adafactor", "lion", "schedulefree_adamw"]

Tracker = Literal["none", "tensorboard", "wandb", "mlflow"]

T = TypeVar("T")


class Change(Enum):
    """What it means that a key is another one where a run goes on."""

    TOLD = "the run goes on, and it is said"
    FREE = "nothing"
    FIXED = "refused without force: it would be another run"
    SHAPE = "refused: other tensors, or other names of them"


# `seed: Fixed[int] = 0`. Keys without a mark are told.
Free = Annotated[T, Change.FREE]
Fixed = Annotated[T, Change.FIXED]
Shape = Annotated[T, Change.SHAPE]


class Section(BaseModel):
    """A frozen part of a recipe; an unknown key is an error, not a typo that trains for hours."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    flat: ClassVar[bool] = False  # whether each key is a flag of a command too

    @classmethod
    def changes(cls) -> dict[str, Change]:
        """What a change of each key means, by its dotted name: {"run.seed": Change.FIXED, ...}."""
        return dict(_changes(cls))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What keys are where they are not given, as JSON holds it, by their dotted names."""
        return dict(_defaults(cls))


def _changes(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Change]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _changes(field.annotation, f"{prefix}{name}.")
        else:
            marks = (each for each in field.metadata if isinstance(each, Change))
            yield f"{prefix}{name}", next(marks, Change.TOLD)


def _defaults(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _defaults(field.annotation, f"{prefix}{name}.")
        elif not field.is_required():
            yield f"{prefix}{name}", to_jsonable_python(field.get_default(call_default_factory=True))


class OptimiserSection(Section):
    """How weights follow gradients: an optimiser, its learning rate, and batches.

    In diffusers' scripts `lr_warmup_steps` is 500 and ignored by the default schedule; here it is 0, and no
    schedule ignores it.
    """

    optimizer: Free[Optimizer] = "adamw"  # of a run that goes on, its kind may not change
    """adamw8bit needs bitsandbytes and CUDA; muon: orthogonal momentum for matrices and convolutions from 32
    rows and columns; prodigy finds its learning rate; adafactor keeps less; lion; schedulefree_adamw
    averages, and needs no schedule"""
    optimizer_args: tuple[str, ...] = ()
    """more of its settings, such as d_coef=2 betas=0.9,0.99"""
    learning_rate: float = Field(1e-4, gt=0)
    """of the optimiser; by default 1 of prodigy, which multiplies it"""
    lr_scheduler: LrScheduler = "constant"
    """how the learning rate changes; all begin with the warm-up"""
    lr_warmup_steps: int = Field(0, ge=0)
    """steps in which the learning rate rises from 0"""
    lr_num_cycles: int = Field(1, ge=1)
    """of cosine_with_restarts"""
    lr_power: float = Field(1.0, gt=0)
    """of polynomial"""
    lr_decay_from: float = Field(0.6, ge=0, lt=1)
    """warmup_stable_decay: the part of the run after which the rate falls, by a cosine, to 2 %"""
    use_8bit_adam: bool = False
    """the same as optimizer adamw8bit"""
    use_muon: bool = False
    """the same as optimizer muon"""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """adamw, adamw8bit, muon: decay of the mean of gradients"""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """adamw, adamw8bit, muon: decay of the mean of their squares"""
    adam_weight_decay: float = Field(1e-2, ge=0)
    """adamw, adamw8bit, muon: how fast weights shrink"""
    adam_epsilon: float = Field(1e-8, gt=0)
    """adamw, adamw8bit, muon: added to the root of the squares' mean"""
    max_grad_norm: float = Field(1.0, gt=0)
    """longer gradients are shortened to it"""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """moving averages of the weights are kept and exported, 0.999 or more for long runs; 0: none"""
    train_batch_size: Fixed[int] = Field(1, ge=1)
    """pictures of each process, and of each of the accumulation's parts"""
    gradient_accumulation_steps: Fixed[int] = Field(1, ge=1)
    """batches whose gradients make one step"""

    @property
    def chosen_optimizer(self) -> Optimizer:
        """The optimiser, whichever of its names was given."""
        return "muon" if self.use_muon else "adamw8bit" if self.use_8bit_adam else self.optimizer

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """`optimizer_args` as values: {"betas": (0.9, 0.99)}."""
        return _settings(self.optimizer_args)

    @model_validator(mode="before")
    @classmethod
    def _prodigys_rate(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("optimizer") == "prodigy":
            return {"learning_rate": 1.0} | dict(given)
        return given

    @field_validator("optimizer_args", mode="before")
    @classmethod
    def _one_setting(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("optimizer_args")
    @classmethod
    def _are_settings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "lr" in _settings(value):
            raise ValueError("lr is learning_rate: give it there")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.use_muon and self.use_8bit_adam:
            raise ValueError("use_muon and use_8bit_adam exclude each other: Muon keeps 32 bits")
        if self.optimizer not in ("adamw", self.chosen_optimizer):
            raise ValueError(
                f"optimizer {self.optimizer} and use_{'muon' if self.use_muon else '8bit_adam'}: choose one"
            )
        if self.chosen_optimizer not in ("adamw", "adamw8bit", "muon"):
            for name in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"):
                if getattr(self, name) != OptimiserSection.model_fields[name].default:
                    raise ValueError(
                        f"{name} is not {self.chosen_optimizer}'s: give its own settings as optimizer_args, "
                        "such as weight_decay=0.01"
                    )
        if self.chosen_optimizer == "schedulefree_adamw":
            if not self.lr_scheduler.startswith("constant"):
                raise ValueError(
                    f"schedulefree_adamw goes without {self.lr_scheduler}: take lr_scheduler constant"
                )
            if self.ema_decay:
                raise ValueError("schedulefree_adamw averages the weights itself: leave ema_decay out")
        return self


def _settings(args: Iterable[str]) -> dict[str, Any]:
    """Of sd-scripts' `k=v`, v as Python writes it. Raises ValueError."""
    made: dict[str, Any] = {}
    for each in args:
        name, equals, value = each.partition("=")
        if not (equals and name.isidentifier()) or name in made:
            raise ValueError(f"{each}: write each setting once, as name=value")
        try:
            made[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"{each}: {value} is no number, True, False, None or list of these") from None
    return made


class RunSection(Section):
    """How long, on what, and how often to look."""

    seed: Fixed[int] = 0
    """all randomness of the run follows from it"""
    max_train_steps: int | None = Field(None, ge=1)
    """steps of the optimiser"""
    max_minutes: float | None = Field(None, gt=0)
    """of training, over all resumed parts of the run"""
    max_train_hours: float | None = Field(None, gt=0)
    """or so many hours"""
    early_stop_patience: int = Field(0, ge=0)
    """end after so many looks without a better held-out loss than the best, whose weights are in best/; 0:
    never"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """what networks compute in; what is trained is kept in fp32"""
    compile: bool = False
    """torch.compile"""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """what several processes do: ddp, each has all that is trained; fsdp, its share of it (docs/many.md)"""
    logging_steps: int = Field(50, ge=1)
    """steps between rows of metrics.jsonl"""
    validation_steps: int = Field(500, ge=1)
    """steps between looks at held-out figures and pictures"""
    checkpointing_steps: int = Field(1000, ge=1)
    """steps between states"""
    checkpoints_total_limit: int = Field(1, ge=1)
    """states kept"""
    resume_from_checkpoint: Free[str] = "latest"
    """latest: the newest whole state in the run's folder; no; or a state's path, or its name there"""
    force: Free[bool] = False
    """go on where a changed recipe, damage or states left behind speak against it"""
    on_nan: Literal["stop", "skip"] = "stop"
    """what to do with a batch whose loss is NaN or Inf"""
    report_to: Tracker = "none"
    """a tracker, by accelerate, beside metrics.jsonl, which is always written"""
    provenance: Free[bool] = True
    """pictures that a run draws say that a model drew them (docs/provenance.md)"""

    @field_validator("resume_from_checkpoint", "mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value

    @property
    def minutes(self) -> float | None:
        """After which the run ends, however it was said."""
        return self.max_minutes if self.max_train_hours is None else 60 * self.max_train_hours

    @model_validator(mode="after")
    def _one_time(self) -> Self:
        if self.max_minutes is not None and self.max_train_hours is not None:
            raise ValueError("max_minutes and max_train_hours: give one of them")
        return self

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.max_train_steps is None and self.minutes is None:
            raise ValueError("set max_train_steps or max_minutes, or the run never ends")
        return self


class Trainable(Protocol):
    """What the loop reads of a recipe."""

    @property
    def optimiser(self) -> OptimiserSection: ...

    @property
    def run(self) -> RunSection: ...

    def changes(self) -> dict[str, Change]: ...

    def defaults(self) -> dict[str, Any]: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


R = TypeVar("R", bound=Section)


def loss_settings(
    defaults: dict[str, float], given: dict[str, float], shares: Collection[str] = ()
) -> dict[str, float]:
    """A task's `loss` section over its defaults.

    Raises UserError naming a key that it does not have, or whose value is not finite, negative or, for one of
    `shares`, above 1.
    """
    for key, value in given.items():
        if key not in defaults:
            raise UserError(f"loss.{key} is unknown: this trainer has {', '.join(defaults)}")
        most = 1.0 if key in shares else math.inf
        if not (math.isfinite(value) and 0 <= value <= most):
            raise UserError(
                f"loss.{key} must be {'from 0 to 1' if key in shares else 'at least 0'} (got {value})"
            )
    return defaults | given


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} of an empty one. Raises UserError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a recipe: it should have lines of the form key: value")
    return raw


def validate(kind: type[R], raw: Mapping[str, Any], source: str, flags: Collection[str] = ()) -> R:
    """A recipe of plain values from `source`, some of them from flags of the command line.

    Raises UserError naming the key that is unknown, wrong or missing.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        missing = [f"--{each['loc'][0]}" for each in error.errors() if each["type"] == "missing"]
        if missing and kind.flat:
            raise UserError(f"{' and '.join(missing)}: give a folder") from error
        first = error.errors()[0]
        where = ".".join(part for part in first["loc"] if isinstance(part, str))  # no place in a list
        said, place = first["msg"].removeprefix("Value error, "), f"{source}: {where}: "
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, kind.model_fields, 1)
            said = f"there is no such key{f'; did you mean {near[0]}?' if near else ''}"
        if first["loc"] and first["loc"][0] in flags:
            place = f"--{where}: "
        elif not where:
            raise UserError(f"{source}: {said}") from error
        raise UserError(f"{place}{said} (got {first['input']!r})") from error
