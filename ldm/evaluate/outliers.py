"""Which of many figures stand apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FAR = 3.5  # from here on a score is called an outlier, as Iglewicz and Hoaglin advise
NORMAL_MAD = 0.6744897501960817  # the median absolute deviation of a standard normal


def robust_scores(values: Sequence[float]) -> NDArray[np.float64]:
    """How many standard deviations from the middle each value lies, which the outliers do not spread.

    ``0.6745 (x - median) / MAD``, MAD the median of ``|x - median|``; Iglewicz and Hoaglin 1993, "How to
    Detect and Handle Outliers", the modified z-score. Where more than half the values are equal, those score
    0 and all others infinity. Of fewer than five values the scores mean little.
    """
    x = np.asarray(values, np.float64)
    gap = x - np.median(x)
    mad = np.median(np.abs(gap))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = NORMAL_MAD * gap / mad
    return np.where(gap == 0, 0.0, scores)
