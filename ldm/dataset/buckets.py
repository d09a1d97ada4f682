"""Which pictures make the batch of a step, and which part of each is shown.

Pictures of any shape are trained on without distortion: each goes to the bucket whose aspect ratio is
nearest, is resized until it covers that, and what is over is cut off. A batch is of one bucket.

    make_buckets -> Batches.at(step, rank) -> Sample(example, crop, caption) -> apply_crop

Nothing here keeps state: a batch is a pure function of (seed, step, rank, world size, batch size), so a run
resumes exactly, and any step is at hand at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.images.pixels import to_tensor

if TYPE_CHECKING:
    from ldm.dataset.findings import Example

Size = tuple[int, int]  # (height, width) in pixels

# --- sizes -----------------------------------------------------------------------------------------------


def make_buckets(resolution: int, *, unit: int | None = None, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """The sizes that training is done in, widest first: 1024 gives those of SDXL between 1344 x 768 and back.

    Args:
        resolution: no size has more than resolution^2 pixels, so none needs more memory than the square.
        unit: sides are multiples of it (and it of the VAE's downscaling); by default 64 or,
            for less than 512 pixels, less.
        max_ratio: of the longer side to the shorter.

    Raises:
        UserError: if `resolution` is not a multiple of `unit`, or `max_ratio` is below 1.
    """
    unit = unit or next((u for u in (64, 32, 16) if resolution % u == 0 and resolution >= 8 * u), 8)
    if resolution < unit or resolution % unit:
        near = max(1, round(resolution / unit)) * unit
        raise UserError(f"resolution {resolution} is not a multiple of {unit}: take {near}")
    if max_ratio < 1:
        raise UserError(
            f"a bucket's max_ratio is the longer side over the shorter, not {max_ratio}: 1 or more"
        )
    sizes = set()
    for short in range(unit, resolution + 1, unit):
        long = resolution**2 // short // unit * unit
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size`, as measured by its logarithm."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))))


# --- crops -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """What of a picture is shown: resized, then mirrored if it is, then cut at (top, left)."""

    size: Size  # of the bucket
    resized: Size  # of the whole picture, which covers the bucket
    top: int  # in pixels of the resized (and mirrored) picture
    left: int
    original: Size
    flipped: bool = False

    @property
    def time_ids(self) -> tuple[int, ...]:
        """(original height, width, top, left, target height, width): what SDXL is told of a picture.

        As diffusers' train_text_to_image_sdxl.py counts them, but the target is the bucket. Podell et al.
        2023, "SDXL", section 2.2.
        """
        return (*self.original, self.top, self.left, *self.size)


def make_crop(
    original: Size, size: Size, at: tuple[float, float] | None = None, flipped: bool = False
) -> Crop:
    """The crop of a picture of size `original` for the bucket `size`.

    `at` (down, across), each in [0, 1), is where between the first and the last possible place; None is the
    centre.
    """
    (h, w), (height, width) = original, size
    if height * w >= width * h:  # the picture is the wider one
        resized = height, max(width, round(w * height / h))
    else:
        resized = max(height, round(h * width / w)), width
    room = resized[0] - height, resized[1] - width
    if at is None:
        top, left = round(room[0] / 2), round(room[1] / 2)
    else:
        top, left = (int(where * (free + 1)) for where, free in zip(at, room, strict=True))
    return Crop(size, resized, top, left, original, flipped)


def apply_crop(image: Image.Image, crop: Crop) -> Tensor:
    """A picture -> what `crop` shows of it, float32 [3, H, W] in -1..1, antialiased (Lanczos).

    Only what is shown is computed, so a long strip costs no more than a square. Raises UserError if the
    picture is not of the size that the crop was made for.
    """
    return to_tensor(cut(image, crop, Image.Resampling.LANCZOS))[0] * 2 - 1


def cut(image: Image.Image, crop: Crop, how: Image.Resampling) -> Image.Image:
    """What `crop` shows of a picture, or of a mask of its size. Raises UserError as `apply_crop` does."""
    if (image.height, image.width) != crop.original:
        examined = "{1} x {0}".format(*crop.original)
        raise UserError(
            f"a picture is {image.width} x {image.height} pixels, not {examined} as when it was examined"
        )
    (height, width), (resized_height, resized_width) = crop.size, crop.resized
    left = resized_width - width - crop.left if crop.flipped else crop.left
    x, y = image.width / resized_width, image.height / resized_height
    box = (left * x, crop.top * y, (left + width) * x, (crop.top + height) * y)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # rounding may lead out of it
    shown = image.resize((width, height), how, box)
    return shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flipped else shown


# --- batches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variation:
    """What changes from one showing of a picture to the next. Each is independent of the others."""

    random_crop: bool = False  # else at the centre
    random_flip: bool = False  # every other time
    caption_dropout: float = 0.0  # share of captions replaced by "", for classifier-free guidance
    shuffle_tags: bool = False  # of captions that are tags between commas
    keep_tags: int = 0  # how many stay in front


@dataclass(frozen=True)
class Sample:
    """One picture of a batch, its crop and its caption as the text encoder is to read it."""

    example: Example
    crop: Crop
    caption: str


class Batches:
    """The batches of a run, each of one bucket.

    An epoch is a random order of batches in which every picture is shown `Example.repeats` times, and that at
    each resolution. Where the pictures of a bucket do not fill its last batch, more of the same bucket,
    reshuffled, are shown once more (`filled` of them in each epoch), so none is lost.

    The processes of a run take consecutive batches, so two processes see in one step what one sees in two.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        buckets: Sequence[Sequence[Size]],  # of each resolution
        batch_size: int,
        seed: int,
        variation: Variation | None = None,
    ) -> None:
        if not examples or batch_size < 1:
            raise UserError(
                f"{len(examples)} pictures in batches of {batch_size}: at least 1 is needed of both"
            )
        self.examples, self.batch_size, self.seed = tuple(examples), batch_size, seed
        self.variation = variation or Variation()
        members: dict[Size, list[Example]] = {bucket: [] for sizes in buckets for bucket in sizes}
        for sizes in buckets:  # two of them may have a size in common: it is shown for both
            for example in examples:
                members[nearest_bucket(example.size, sizes)] += [example] * example.repeats
        self.members = {bucket: shown for bucket, shown in members.items() if shown}
        self._starts = [
            (bucket, first)
            for bucket, shown in self.members.items()
            for first in range(0, len(shown), batch_size)
        ]

    def __len__(self) -> int:
        """Batches in an epoch, of all processes together."""
        return len(self._starts)

    @property
    def filled(self) -> int:
        """Samples of an epoch that are there only to complete a batch."""
        return len(self) * self.batch_size - sum(len(shown) for shown in self.members.values())

    def at(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Sample, ...]:
        """The `batch_size` samples that process `rank` of `world_size` is shown in `step`."""
        number = step * world_size + rank
        epoch, place = divmod(number, len(self))
        bucket, first = self._starts[_order(len(self), f"{self.seed} {epoch}")[place]]
        examples = enumerate(self._examples(bucket, first, epoch))
        name = f"{self.seed} {number} row"
        return tuple(self._sample(example, bucket, f"{name} {i}") for i, example in examples)

    def crops(self) -> Iterator[tuple[Example, Crop]]:
        """All that the epochs show, bucket by bucket: what a cache has to hold. Crops at the centre only."""
        if self.variation.random_crop:
            raise ValueError("random crops cannot be listed")
        for bucket, shown in self.members.items():
            for example in dict.fromkeys(shown):
                for flipped in (False, True)[: 1 + self.variation.random_flip]:
                    yield example, make_crop(example.size, bucket, flipped=flipped)

    def _examples(self, bucket: Size, first: int, epoch: int) -> list[Example]:
        shown, name = self.members[bucket], f"{self.seed} {epoch} {bucket}"
        order = _order(len(shown), name)[first : first + self.batch_size]
        batch = [shown[i] for i in order]
        if missing := self.batch_size - len(batch):
            again = [shown[i] for i in _order(len(shown), f"{name} again")]
            others = [example for example in again if example not in batch]
            batch += islice(cycle(others + batch), missing)
        return batch

    def _sample(self, example: Example, bucket: Size, name: str) -> Sample:
        rng, vary = random.Random(name), self.variation
        # All are drawn in any case, so that one choice does not change what another leads to.
        down, across, flip, drop = (rng.random() for _ in range(4))
        at = (down, across) if vary.random_crop else None
        crop = make_crop(example.size, bucket, at, vary.random_flip and flip < 0.5)
        caption = "" if drop < vary.caption_dropout else example.caption or ""
        if vary.shuffle_tags:
            caption = shuffle_tags(caption, rng, vary.keep_tags)
        return Sample(example, crop, caption)


def shuffle_tags(caption: str, rng: random.Random, keep: int = 0) -> str:
    """ "a, b, c" with what lies between its commas in another order, after the first `keep`."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    rest = tags[keep:]
    rng.shuffle(rest)
    return ", ".join(tags[:keep] + rest)


@lru_cache(maxsize=64)  # the buckets of an epoch: shuffling 20,000 pictures anew takes 10 ms
def _order(count: int, name: str) -> tuple[int, ...]:
    """The permutation of range(count) that belongs to `name`, the same everywhere."""
    order = list(range(count))
    random.Random(name).shuffle(order)
    return tuple(order)
