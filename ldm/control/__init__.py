"""Networks that show a model pictures: read, checked against it, and what they add in a drawing."""

from ldm.control.calling import take_controls
from ldm.control.pictures import Pictures
from ldm.control.reading import ControlFile, Reader, Shelf
from ldm.control.steering import Control, Steering, controls_of, noted

__all__ = [
    "Control",
    "ControlFile",
    "Pictures",
    "Reader",
    "Shelf",
    "Steering",
    "controls_of",
    "noted",
    "take_controls",
]
