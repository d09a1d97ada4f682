"""Networks that show a model pictures: read, checked against it, and what they add in a drawing."""

from ldm.control.calling import take_controls
from ldm.control.controls import Control, Controls, controls_of, depth_of, noted
from ldm.control.pictures import Pictures
from ldm.control.reading import ControlFile, Reader, Shelf

__all__ = [
    "Control",
    "ControlFile",
    "Controls",
    "Pictures",
    "Reader",
    "Shelf",
    "controls_of",
    "depth_of",
    "noted",
    "take_controls",
]
