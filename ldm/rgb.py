"""Pictures of every kind as RGB of 8 bits. No torch here: folders are examined without it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16-bit pictures converted, transparent parts on white.

    Raises ValueError for pixels of 32 bits, which have no agreed white.
    """
    if image.mode.startswith(("I", "F")):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535 or image.mode == "F":
            raise ValueError("it has 32 bits a channel, with no agreed white: save it with 8 or 16")
        # Pillow's own conversion cuts everything above 255 off.
        return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
