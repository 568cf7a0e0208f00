"""Derivatives in z of any energy that is written with torch functions.

`derivatives` gives value, gradient and Laplacian in one forward and one reverse sweep, for
objectives that train on second derivatives; `value_and_gradient` gives the first two to Markov
chains, without a graph; `smoothed_score` gives gradients of smoothed densities, from values alone.
An energy knows nothing of this room: any function (n, d) -> (n,) will do.
"""

from skebm.derivatives._derivatives import derivatives
from skebm.derivatives._gradient import value_and_gradient
from skebm.derivatives._smoothed import smoothed_score

__all__ = ["derivatives", "smoothed_score", "value_and_gradient"]
