"""Training a ControlNet: the step of fine-tuning, with a network beside a U-Net that stays as it is.

    loss(U-Net(noisy latents, text; what the ControlNet adds, which is told the same and a control picture))

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.checkpoint import Parts
from ldm.dataset.buckets import make_buckets, make_crop, nearest_bucket
from ldm.dataset.cache import open_and_crop
from ldm.dataset.controls import Controls, files_in, made_by
from ldm.dataset.feed import Feed
from ldm.dataset.findings import Example
from ldm.finetune.modes import ControlMode, Mode
from ldm.finetune.pictures import Splits
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.images.pixels import to_pil
from ldm.models.encoder import Residuals
from ldm.train.task import Batch


class ControlTask(FinetuneTask):
    """Trains the ControlNet of `mode`."""

    shows_originals, draws_from_export = True, True

    def __init__(self, parts: Parts, mode: Mode, recipe: FinetuneRecipe, feed: Feed, splits: Splits) -> None:
        super().__init__(parts, mode, recipe, feed, splits)
        assert isinstance(mode, ControlMode)
        assert feed.controls is not None
        self.controlnet, self.controls = mode.network, feed.controls
        self.facts = {**self.facts, "controls": feed.controls.fingerprint}

    def _residuals(
        self, batch: Batch, told: tuple[Tensor, Tensor, Tensor], beside: dict[str, Any]
    ) -> Residuals:
        made: Residuals = self.controlnet(*told, batch["control"].to(told[0].dtype), **beside)
        return made

    def _drawn_from(self, i: int, folder: Path) -> tuple[dict[str, Any], list[Image.Image]]:
        """The control picture of the picture that goes with prompt i."""
        example = self._example(i)
        buckets = make_buckets(max(self.recipe.resolution))
        crop = make_crop(example.size, nearest_bucket(example.size, buckets))
        control = to_pil(self.controls.of(example, crop, open_and_crop(example, crop))[None])
        height, width = crop.size
        use = {"model": str(folder), "image": control[0]}
        return {"control": [use], "height": height, "width": width}, control


def controls_of(recipe: FinetuneRecipe, examples: Sequence[Example]) -> Controls:
    """The recipe's control pictures, all of them found. Raises UserError for what is wrong with them."""
    if recipe.preprocess is not None:
        return made_by(recipe.preprocess, recipe.preprocess_options)
    assert recipe.control_data_dir is not None
    return files_in(recipe.control_data_dir, examples, Path(recipe.train_data_dir))
