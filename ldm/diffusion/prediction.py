"""What the network's output means: one place for sampling and for the training target.

Everything is written in sigma space, ``x = x0 + sigma * noise``. With ``alpha = 1 / sqrt(sigma^2 + 1)`` the
variance-preserving state that the network was trained on is ``alpha * x``.
"""

from enum import StrEnum

from torch import Tensor


def c_in(sigma: Tensor) -> Tensor:
    """Input scaling ``1 / sqrt(sigma^2 + 1)``: from sigma space to the network's unit variance.

    The preconditioning of Karras et al. 2022, table 1, column VP.
    """
    return (sigma**2 + 1).rsqrt()


class Prediction(StrEnum):
    """diffusers' ``prediction_type``."""

    EPSILON = "epsilon"
    V = "v_prediction"
    SAMPLE = "sample"

    def x0(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean latents that `output` speaks of.

        - epsilon: ``x - sigma * output``; Ho et al. 2020, equation 11.
        - v_prediction: ``(x - sigma * sqrt(sigma^2 + 1) * output) / (sigma^2 + 1)``, that is
          ``alpha * x_vp - sigma_vp * v``; Salimans and Ho 2022, appendix D.
        - sample: `output` itself.

        Args:
            output: the network's raw output, [B, C, H, W].
            x: the state in sigma space, [B, C, H, W].
            sigma: noise level, a scalar or [B, 1, 1, 1]. A float64 scalar does not widen the result.
        """
        match self:
            case Prediction.EPSILON:
                return x - sigma * output
            case Prediction.V:
                alpha = c_in(sigma)
                return alpha**2 * x - (sigma * alpha) * output
            case _:
                return output

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer at ``x0 + sigma * noise``: the inverse of `x0`.

        - epsilon: ``noise``
        - v_prediction: ``(noise - sigma * x0) / sqrt(sigma^2 + 1)``
        - sample: ``x0``

        Shapes as in `x0`.
        """
        match self:
            case Prediction.EPSILON:
                return noise
            case Prediction.V:
                alpha = c_in(sigma)
                return alpha * noise - (sigma * alpha) * x0
            case _:
                return x0
