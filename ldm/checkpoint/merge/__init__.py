"""`ldm merge`: one model of several.

`merging.py` from top to bottom; `mixing.py` has the arithmetic, `alike.py` says whether models go together,
and `origin.py` writes and reads what a model was made of.
"""

from ldm.checkpoint.merge.merging import merge

__all__ = ["merge"]
