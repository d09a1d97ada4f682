"""The pictures of a fine-tuning: found, split, put into batches, and how much each place of them counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.dataset.buckets import Batches, Sample, Variation, make_buckets, make_crop, nearest_bucket
from ldm.dataset.captions import clip_counter
from ldm.dataset.examine import examine
from ldm.dataset.findings import Example, report
from ldm.dataset.shards import find_shards, read_index
from ldm.dataset.weights import Weights, weights_beside, weights_in
from ldm.errors import UserError
from ldm.finetune.recipe import FinetuneRecipe
from ldm.train.processes import together

if TYPE_CHECKING:
    from accelerate import PartialState

Log = Callable[[str], object]
MOST_FINDINGS = 5  # of each kind that are listed
MOST_HELD_OUT = 64  # pictures: the held-out loss is steady by then, and each validation takes its time


@dataclass(frozen=True)
class Splits:
    """The pictures of a run: to train on, of the class beside them, and held out."""

    train: Batches
    prior: Batches | None
    held_out: tuple[Sample, ...]  # each at every resolution, the largest first

    @property
    def counts(self) -> tuple[int, int]:
        """How many pictures are trained on, and held out."""
        return len(self.train.examples), len({sample.example for sample in self.held_out})


def find_pictures(
    recipe: FinetuneRecipe, processes: PartialState, log: Log
) -> tuple[list[Example], list[Example]]:
    """To train on, and held out. Raises UserError, after the report, where training could not start."""
    folder, index = recipe.train_data_dir, (recipe.cache_dir or recipe.output_dir / "cache") / "shards"
    if shards := find_shards(folder):
        mine = shards[processes.process_index :: processes.num_processes]
        together(processes, lambda: len(read_index(mine, index)))  # so that each is read once
        log(f"shards: {len(shards)}")
    examined = examine(
        folder,
        instance_prompt=recipe.instance_prompt,
        missing_caption=recipe.missing_caption,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        count_tokens=clip_counter(),
        resolution=max(recipe.resolution, default=0),
        index=index,
    )
    log("\n".join(report(examined, MOST_FINDINGS)))
    if not examined.can_train:
        raise UserError(f"{folder} cannot be trained on as it is: see above, and `ldm folder {folder} --all`")
    return split(examined.examples, recipe.held_out, recipe.seed)


def split(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): `share` of the pictures, rounded down, at most 64; copies stay together.

    Which ones follows from the bytes of each: a picture that is added moves at most one other.
    """
    order = sorted({each.digest for each in examples}, key=lambda digest: _hash(f"{seed} {digest}"))
    chosen = set(order[: min(MOST_HELD_OUT, int(len(order) * share + 1e-9))])
    trained = [each for each in examples if each.digest not in chosen]
    return trained, [replace(each, repeats=1) for each in examples if each.digest in chosen]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_splits(recipe: FinetuneRecipe, trained: Sequence[Example], held_out: Sequence[Example]) -> Splits:
    """The batches of a recipe that knows its resolutions, without those of a class."""
    buckets = [make_buckets(resolution) for resolution in recipe.resolution]
    variation = Variation(
        random_crop=not recipe.center_crop,
        random_flip=recipe.random_flip,
        caption_dropout=recipe.caption_dropout,
        shuffle_tags=recipe.shuffle_tags,
        keep_tags=recipe.keep_tags,
    )
    samples = [
        Sample(each, make_crop(each.size, nearest_bucket(each.size, sizes)), each.caption or "")
        for sizes in reversed(buckets)
        for each in held_out
    ]
    return Splits(
        Batches(trained, buckets, recipe.train_batch_size, recipe.seed, variation), None, tuple(samples)
    )


def find_weights(recipe: FinetuneRecipe, examples: Sequence[Example]) -> Weights | None:
    """How much places of pictures count, all masks found. Raises UserError for what is wrong with them."""
    if not recipe.masks_loss:
        return None
    if recipe.alpha_mask:
        return Weights(recipe.unmasked_weight, alpha=True)
    if recipe.mask_data_dir is None:
        return weights_beside(examples, recipe.unmasked_weight)
    return weights_in(recipe.mask_data_dir, examples, Path(recipe.train_data_dir), recipe.unmasked_weight)
