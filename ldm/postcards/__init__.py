"""The world the embedded model is trained on: flat-illustration postcards, their captions and their labels.

Everything is procedural and seeded. Drawing needs skia (`pip install ldm[train]`); sampling, telling and
labelling scenes does not, so `render`, `object_mask`, `repaint` and `shade` are loaded at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ldm.postcards.captions import caption, full_caption, words
from ldm.postcards.layout import Box
from ldm.postcards.scene import POSITIONS, Group, Labels, Scene, encode_labels, sample_scene
from ldm.postcards.vocabulary import COLOURS, KINDS, PLACES, RELATIONS, TIMES, WEATHERS, is_held_out
from ldm.postcards.wording import names_colours, reword

if TYPE_CHECKING:
    from ldm.postcards.picture import object_mask, render
    from ldm.postcards.things import repaint, shade

__all__ = [
    "COLOURS",
    "KINDS",
    "PLACES",
    "POSITIONS",
    "RELATIONS",
    "TIMES",
    "WEATHERS",
    "Box",
    "Group",
    "Labels",
    "Scene",
    "caption",
    "encode_labels",
    "full_caption",
    "is_held_out",
    "names_colours",
    "object_mask",
    "render",
    "repaint",
    "reword",
    "sample_scene",
    "shade",
    "words",
]


_DRAWING = {"object_mask": "picture", "render": "picture", "repaint": "things", "shade": "things"}


def __getattr__(name: str) -> Any:
    if name in _DRAWING:
        return getattr(importlib.import_module(f"ldm.postcards.{_DRAWING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
