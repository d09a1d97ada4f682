"""Control pictures made of pictures: edges, lines, colours, surfaces.

    PREPROCESSORS["canny"] -> a function of a uint8 picture [H, W, 3] to another

`preprocess` is the one door, for `ldm preprocess`, `--control` and training. No torch, unless a network of a
folder makes the map.
"""

from ldm.preprocess.catalogue import PREPROCESSORS, find, preprocess, read_options
from ldm.preprocess.pictures import Levels, Picture, control_values, source_of

__all__ = [
    "PREPROCESSORS",
    "Levels",
    "Picture",
    "control_values",
    "find",
    "preprocess",
    "read_options",
    "source_of",
]
