"""Monotone rational-quadratic splines (Gregory & Delbourgo 1982; Durkan et al. 2019).

A piece goes from (left, bottom) to (left + width, bottom + height) with the slopes d_0 and d_1 at
its ends. With s = height / width and t = (x - left) / width in [0, 1],

    y = bottom + height (s t^2 + d_0 t (1 - t)) / (s + (d_0 + d_1 - 2 s) t (1 - t)).
"""

from typing import NamedTuple

from torch import Tensor

MIN_ROOT = 1e-12  # of squared slopes over s^2: keeps a root that is all rounding positive


class Piece(NamedTuple):
    """For each point the piece that holds it, in tensors of one shape.

    Attributes
    ----------
    left, bottom : Tensor
        Where it begins.
    width, height : Tensor
    first, last : Tensor
        Slopes at its ends.
    """

    left: Tensor
    bottom: Tensor
    width: Tensor
    height: Tensor
    first: Tensor
    last: Tensor

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx at the share t of the width."""
        mean = self.height / self.width
        product = t * (1 - t)
        denominator = mean + (self.first + self.last - 2 * mean) * product
        y = self.bottom + self.height * (mean * t.square() + self.first * product) / denominator
        slope = self.last * t.square() + 2 * mean * product + self.first * (1 - t).square()
        return y, ((mean / denominator).square() * slope).log()

    def share_of_width(self, r: Tensor) -> Tensor:
        """The t at which y is the share r of the height."""
        mean = self.height / self.width
        first, last = self.first / mean, self.last / mean
        b = first - r * (first + last - 2)
        root = b.square() + 4 * r * (1 - b)
        # of the two forms of the solution the one that does not cancel
        return 2 * r / (b + root.clamp_min(MIN_ROOT).sqrt())
