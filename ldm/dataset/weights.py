"""How much each place of a picture counts in the loss: by a mask beside it, or by its own alpha.

7.png  7.mask.png                   white counts, black does not; OneTrainer's 7-masklabel.png too
7.png  masks/7.png                  a folder of masks, as sd-scripts' `conditioning_data_dir` is
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.dataset.buckets import Crop, cut
from ldm.dataset.controls import find_files, fingerprint, open_beside
from ldm.dataset.picture import MASKS, SUFFIX, masks_beside
from ldm.errors import UserError, abbreviate
from ldm.images.opening import to_alpha, to_mask
from ldm.images.pixels import to_tensor

if TYPE_CHECKING:
    from ldm.dataset.findings import Example


@dataclass(frozen=True)
class Weights:
    """Where the weights of a picture come from: its mask of `files`, or its own alpha.

    A picture that has neither, such as one of the class's, counts as a whole. What is outside of a mask
    counts `unmasked`.
    """

    unmasked: float = 0.0
    files: Mapping[Path, Path] = field(default_factory=dict)  # a picture's file -> its mask's
    alpha: bool = False

    def of(self, example: Example, crop: Crop, downscale: int) -> Tensor:
        """Of the latents of what `crop` shows, fp32 [h, w]: ``u + (1 - u) m``, m the mask's mean in 0..1.

        The mean is over the `downscale` x `downscale` pixels of a latent one. Raises UserError where the mask
        cannot be read, or has another shape than the picture.
        """
        path = example.path if self.alpha else self.files.get(example.path)
        if path is None:
            return torch.ones([side // downscale for side in crop.size])
        return self.unmasked + (1 - self.unmasked) * _means(path, self.alpha, example, crop, downscale)

    @property
    def fingerprint(self) -> str:
        """Of all masks' bytes: a run goes on with the same ones only."""
        return "alpha" if self.alpha else fingerprint(self.files)


@lru_cache(maxsize=4096)  # of 512 x 512 pixels 64 MB: a mask is not read again in each step
def _means(path: Path, alpha: bool, example: Example, crop: Crop, downscale: int) -> Tensor:
    mask = open_beside(path, example, to_alpha if alpha else to_mask)
    shown = to_tensor(cut(mask, crop, Image.Resampling.BOX))[0, :1]
    return F.avg_pool2d(shown, downscale)[0]


def weights_beside(examples: Sequence[Example], unmasked: float) -> Weights:
    """By the masks that lie beside the pictures. Raises UserError where one is missing."""
    folders = {example.path.parent for example in examples}
    pictures = (path for folder in sorted(folders) for path in sorted(folder.iterdir()))
    found = masks_beside(path for path in pictures if SUFFIX.fullmatch(path.suffix))
    missing = [example.path for example in examples if example.path not in found]
    if missing:
        wanted = missing[0].with_suffix(f"{MASKS[0]}.png").name
        raise UserError(
            f"masked_loss: no mask of {abbreviate([str(path) for path in missing])}: write {wanted}, white "
            "where it counts, or give a folder of masks (mask_data_dir)"
        )
    return Weights(unmasked, {example.path: found[example.path] for example in examples})


def weights_in(folder: Path, examples: Sequence[Example], root: Path, unmasked: float) -> Weights:
    """By the masks of a folder, each found by the place of its picture below `root`, and its name.

    Raises UserError where one is missing; a white one lets its picture count as a whole.
    """
    files = find_files(folder, examples, root, ("", *MASKS), "mask_data_dir", "mask")
    return Weights(unmasked, files)
