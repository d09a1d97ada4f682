"""Fine-tuning on a folder of pictures, from the recipe to the report.

    recipe -> examine the folder -> load the model -> say what will be done -> fill caches -> train -> report

The loop, exact resume and states are those of training from scratch (`ldm.train.loop`); what a step is, is in
`ldm.finetune.task`, and what of a model is trained in `ldm.finetune.modes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.checkpoint import Parts, embedded, load_parts
from ldm.checkpoint.io import read_json
from ldm.dataset.buckets import Batches, Variation, make_buckets
from ldm.dataset.cache import LatentCache, TextCache
from ldm.dataset.controls import Controls
from ldm.dataset.feed import Feed
from ldm.dataset.findings import Example
from ldm.dataset.shards import find_shards
from ldm.dataset.weights import Weights
from ldm.errors import UserError, abbreviate
from ldm.finetune.control import ControlTask, controls_of
from ldm.finetune.image_prompt import ImagePromptTask
from ldm.finetune.inpainting import widen
from ldm.finetune.modes import PARTS, Mode, make_mode
from ldm.finetune.pictures import Log, Splits, find_pictures, find_weights, make_splits
from ldm.finetune.prior import class_examples, draw_class
from ldm.finetune.quantise import check_quantising
from ldm.finetune.recipe import BESIDE, FinetuneRecipe
from ldm.finetune.report import write_report
from ldm.finetune.task import DTYPES, FinetuneTask
from ldm.finetune.variance import widen_output
from ldm.models.kind import Kind
from ldm.pipeline import Pipeline
from ldm.pipeline.deciding.resolve import native_size
from ldm.runtime import Runtime, choose
from ldm.train.changes import BATCHES, batches_a_step, compare, flat
from ldm.train.loop import check_precision, check_sharding, check_tracker, train
from ldm.train.memory import checkpoint_blocks
from ldm.train.optimiser import check_optimiser
from ldm.train.processes import alone, partial_state
from ldm.train.state import damage, newest_state

if TYPE_CHECKING:
    from accelerate import PartialState

MOST_PROMPTS = 4  # captions that are drawn where the recipe has no prompts
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def finetune(recipe: FinetuneRecipe, precompute: bool = False) -> None:
    """Fine-tune as `recipe` says; the same call again goes on where it stopped, bit for bit.

    Args:
        precompute: fill the caches, put them into shards, and end.

    Raises:
        UserError: for a folder, model or recipe that cannot be trained with: what, where, what to do.
    """
    processes = partial_state()
    log = print if processes.is_main_process else _silent
    _check(recipe, processes.device, precompute)
    trained, held_out = find_pictures(recipe, processes, log)
    controls = controls_of(recipe, [*trained, *held_out]) if recipe.mode == "controlnet" else None
    weights = find_weights(recipe, [*trained, *held_out])
    mode = make_mode(recipe, [example.caption or "" for example in trained])
    parts = _load(recipe)
    before = _before(recipe)
    a_step = batches_a_step(before, recipe.gradient_accumulation_steps, processes.num_processes)
    recipe = _complete(recipe, parts, trained, held_out, processes.device, a_step)
    _check_state(recipe, before, a_step)
    if recipe.early_stop_patience and not held_out:
        raise UserError("early_stop_patience: no picture is held out: raise held_out, or leave it out")
    splits = make_splits(recipe, trained, held_out)
    runtime = Runtime(processes.device, DTYPES[recipe.mixed_precision or "no"])
    parts = mode.prepare(parts, runtime)
    for line in _plan(recipe, parts, mode, splits, runtime, a_step):
        log(line)
    if recipe.dry_run:
        return
    if recipe.class_prompt:
        splits = replace(splits, prior=_prior(recipe, runtime, processes, log))
    if recipe.gradient_checkpointing:
        for module in (parts.unet, *mode.beside):
            checkpoint_blocks(module)
    feed = _feed(recipe, parts, controls, weights)
    _fill(feed, splits, processes, log)
    if precompute:
        alone(processes, lambda: _pack(feed, log))
        return
    kinds: dict[str, type[FinetuneTask]] = {"controlnet": ControlTask, "image_prompt": ImagePromptTask}
    kind = kinds.get(recipe.mode, FinetuneTask)
    train(kind(parts, mode, recipe, feed, splits), recipe, recipe.output_dir)
    if processes.is_main_process:
        log(f"report: {_report(recipe, mode, splits)}")


def _silent(*_: object, **__: object) -> None:
    """What processes but the main one say."""


def _check(recipe: FinetuneRecipe, device: torch.device, precompute: bool) -> None:
    """Raise UserError for what can be told before any file is read."""
    data = recipe.train_data_dir
    for name in ("output_dir", "cache_dir", "class_data_dir", "control_data_dir", "mask_data_dir"):
        place = getattr(recipe, name)
        if place is not None and isinstance(data, Path) and place.resolve().is_relative_to(data.resolve()):
            raise UserError(f"{name} {place} lies in the folder of pictures, and would be trained on")
    if recipe.control_data_dir is not None and find_shards(data):
        raise UserError("control_data_dir goes with a folder of pictures, not with shards: give preprocess")
    if recipe.masks_loss and find_shards(data):
        raise UserError("masks of the loss go with a folder of pictures, not with shards")
    if recipe.output_dir.exists() and not recipe.output_dir.is_dir():
        raise UserError(f"output_dir {recipe.output_dir} is a file: name a folder")
    if precompute and not recipe.center_crop:
        raise UserError("no-center_crop encodes each picture anew: there is nothing to precompute")
    check_precision(recipe.mixed_precision or "no", device)
    check_tracker(recipe.report_to)
    check_sharding(recipe)
    check_optimiser(recipe)
    if recipe.base_model_precision != "no_change":
        check_quantising(device)


def _before(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The flat recipe of the state in the output folder; {} where there is none that is whole."""
    state = newest_state(recipe.output_dir)
    whole = state is not None and damage(state) is None
    return dict(read_json(state / "recipe.json")) if state is not None and whole else {}


def _check_state(recipe: FinetuneRecipe, before: dict[str, Any], a_step: int) -> None:
    """Raise UserError at once where the output folder holds the state of another recipe."""
    if before:
        now = before | dict(flat(recipe.model_dump(mode="json"))) | {BATCHES: a_step}
        compare(recipe.output_dir, before, now, recipe.changes(), recipe.force, _silent, recipe.defaults())


def _prior(recipe: FinetuneRecipe, runtime: Runtime, processes: PartialState, log: Log) -> Batches:
    """The pictures of the class, drawn where they are not there."""
    folder, prompts = recipe.class_data_dir or recipe.output_dir / "class", recipe.class_prompt
    size = max(recipe.resolution)

    def load() -> Pipeline:
        place = embedded() if recipe.model is None else recipe.model
        return Pipeline.from_parts(_load(recipe, runtime), runtime, Path(place).name)

    def progress(done: int, total: int) -> None:
        log(f"{done} of {total} drawn")

    log(f"pictures of the class: {recipe.num_class_images} of {abbreviate(prompts)} in {folder}")
    share = (processes.process_index, processes.num_processes)
    draw_class(load, prompts, folder, recipe.num_class_images, size=size, share=share, on_progress=progress)
    processes.wait_for_everyone()
    variation = Variation(random_crop=not recipe.center_crop, random_flip=recipe.random_flip)
    examples = class_examples(folder, prompts)
    buckets = [make_buckets(resolution) for resolution in recipe.resolution]
    return Batches(examples, buckets, recipe.train_batch_size, recipe.seed + 1, variation)


# --- the model -------------------------------------------------------------------------------------------


def _load(recipe: FinetuneRecipe, runtime: Runtime | None = None) -> Parts:
    """The model as it is stored, or on `runtime`. Raises UserError for kinds that cannot be fine-tuned."""
    parts = load_parts(
        embedded() if recipe.model is None else recipe.model,
        runtime,
        revision=recipe.revision,
        variant=recipe.variant,
        vae=recipe.vae,
        prediction_type=recipe.prediction_type,
    )
    kind = parts.kind
    if kind not in (Kind.TEXT, Kind.INPAINT) or parts.requires_aesthetics_score:
        what = (
            "an SDXL refiner" if parts.requires_aesthetics_score else f"a model of kind {kind.name.lower()}"
        )
        raise UserError(f"{recipe.model} is {what}: text-to-image and inpainting models can be fine-tuned")
    if "timestep_cond" in parts.unet.config.conditioning:
        raise UserError(
            f"{recipe.model} is an LCM, which is distilled: fine-tune the model that it was made of"
        )
    if kind is Kind.INPAINT and recipe.mode in BESIDE:
        raise UserError(
            f"{recipe.model} is an inpainting model: train in mode {recipe.mode} beside a text-to-image one"
        )
    if kind is Kind.INPAINT and not recipe.inpainting:
        raise UserError(f"{recipe.model} is an inpainting model: add --inpainting to train it on masks")
    if kind is Kind.TEXT and recipe.inpainting and recipe.mode != "full":
        raise UserError("a LoRA cannot teach a model to inpaint: take an inpainting model, or --mode full")
    if recipe.variance != "none" and not parts.learns_variance and recipe.mode != "full":
        raise UserError("a LoRA cannot teach a model its variance: take one that says it, or --mode full")
    parts = widen(parts) if recipe.inpainting else parts
    return parts if recipe.variance == "none" else widen_output(parts)


def _complete(
    recipe: FinetuneRecipe,
    parts: Parts,
    trained: Sequence[Example],
    held_out: Sequence[Example],
    device: torch.device,
    a_step: int,
) -> FinetuneRecipe:
    """The recipe with what follows from the model, the folder and the machine in place of None."""
    native = 8 * round(math.sqrt(math.prod(native_size(parts))) / 8)
    told = (held_out if recipe.mode in BESIDE else ()) or trained  # where a control is new, too
    captions = list(dict.fromkeys(each.caption for each in told if each.caption))
    changes = {
        "resolution": recipe.resolution or (native,),
        "mixed_precision": recipe.mixed_precision or NAMES[choose(device).dtype],
        "validation_prompts": recipe.validation_prompts or tuple(captions[:MOST_PROMPTS]),
        "cache_dir": recipe.cache_dir or recipe.output_dir / "cache",
    }
    recipe = recipe.model_copy(update=changes)
    if recipe.max_train_steps is None and recipe.minutes is None:
        batches = len(make_splits(recipe, trained, ()).train)
        steps = math.ceil(batches / a_step) * recipe.num_train_epochs
        recipe = recipe.model_copy(update={"max_train_steps": steps})
    return recipe


def _feed(recipe: FinetuneRecipe, parts: Parts, controls: Controls | None, weights: Weights | None) -> Feed:
    text, cache = Pipeline.from_parts(parts).text, recipe.cache_dir or Path()
    trains_text = any(p.requires_grad for clip in text.clips for p in clip.model.parameters())
    return Feed(
        parts.vae,
        text,
        frozenset(parts.unet.config.conditioning),
        zeros_for_empty=parts.force_zeros_for_empty_prompt,
        latents=LatentCache(cache / "latents", parts.vae) if recipe.center_crop else None,
        texts=None if trains_text or recipe.shuffle_tags else TextCache(cache / "texts", text),
        trains_text=trains_text,
        masks=recipe.masks if recipe.inpainting else None,
        controls=controls,
        weights=weights,
    )


def _fill(feed: Feed, splits: Splits, processes: PartialState, log: Log) -> None:
    """Make what the caches lack, each process a share."""
    batches = [each for each in (splits.train, splits.prior) if each is not None]
    held_out = [(sample.example, sample.crop) for sample in splits.held_out]
    if feed.latents is not None:
        crops = [each for every in batches for each in every.crops()] + held_out
        made = feed.latents.fill(crops[processes.process_index :: processes.num_processes])
        log(f"latents: {len(crops)}, {made} of them made now")
    if feed.texts is not None:
        texts = ["", *(each.caption or "" for every in batches for each in every.examples)]
        texts += [sample.caption for sample in splits.held_out]
        unique = list(dict.fromkeys(texts))
        made = feed.texts.fill(unique[processes.process_index :: processes.num_processes])
        log(f"captions: {len(unique)}, {made} of them made now")
    processes.wait_for_everyone()


def _pack(feed: Feed, log: Log) -> None:
    """Make shards of what the caches hold in files."""
    for cache in (feed.latents, feed.texts):
        if cache is not None:
            log(f"{cache.store.folder}: {cache.store.pack()} entries put into shards")


# --- what is said ----------------------------------------------------------------------------------------


def _plan(
    recipe: FinetuneRecipe, parts: Parts, mode: Mode, splits: Splits, runtime: Runtime, a_step: int
) -> Iterator[str]:
    batches = splits.train
    yield ""
    modules = [*(module for name in PARTS if (module := getattr(parts, name)) is not None), *mode.beside]
    trained = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    rounded = "" if recipe.base_model_precision == "no_change" else ", linear layers of its U-Net in 4 bits"
    yield f"model: {recipe.model or 'the embedded one'}{rounded}"
    computed = f"computed in {str(runtime.dtype)[6:]} on {runtime.device}"
    yield f"trains: {recipe.mode}, {trained:,} parameters, {computed}"
    sizes = ", ".join(f"{w} x {h} ({len(shown)})" for (h, w), shown in batches.members.items())
    count, held_out = splits.counts
    yield f"pictures: {count} to train on, {held_out} held out; trained as {sizes}"
    if not held_out:
        yield "no held-out loss: too few pictures for the share that is held out (--held-out)"
    if batches.filled:
        yield f"{batches.filled} showings in each epoch only fill a bucket's last batch"
    shown = recipe.train_batch_size * a_step
    if recipe.max_train_steps is None:
        yield f"run: {recipe.minutes:g} minutes, {shown} pictures a step"
    else:
        times = recipe.max_train_steps * shown / (count * len(recipe.resolution))
        each = f"each {times:.0f} times" + (" at each resolution" if len(recipe.resolution) > 1 else "")
        yield f"run: {recipe.max_train_steps} steps of {shown} pictures: {each}"
    yield f"output: {recipe.output_dir}"


def _report(recipe: FinetuneRecipe, mode: Mode, splits: Splits) -> Path:
    given = {name: getattr(recipe, name) for name in sorted(recipe.model_fields_set)}
    facts = {"pictures": "{}, {} held out".format(*splits.counts), **given}
    return write_report(
        recipe.output_dir,
        title=f"{recipe.mode} on {Path(recipe.train_data_dir).name}",
        facts={name: _spell(value) for name, value in facts.items()},
        prompts=recipe.validation_prompts,
        outputs=mode.outputs(recipe.output_dir / "export"),
    )


def _spell(value: object) -> str:
    return " ".join(str(each) for each in value) if isinstance(value, tuple) else str(value)
