r"""Heavy tails of a column: generalised Pareto beyond an outer quantile.

Beyond a point u that a share S(u) of the rows exceeds, the survival function is

.. math:: S(u + y) = S(u) \left(1 + \xi y / \sigma\right)^{-1 / \xi}, \qquad y > 0,

which is what exceedances of any distribution with tails of a power law come to (Pickands 1975).
"""

import math

import numpy as np
import torch
from scipy.special import log_ndtr

from skebm._typing import FloatArray

TAIL_SHARE, MIN_EXCEEDANCES, MAX_EXCEEDANCES, MAX_TAIL_SHARE = 0.05, 30, 500, 0.25
"""The tail begins at the quantile that so many rows exceed: the first, as a share, but no fewer and
no more than the next two, and at most the last."""

MAX_SHAPE = 2.0
PSEUDO_EXCEEDANCES = 5.0
"""Shapes are shrunk towards zero by so many exceedances of an exponential tail."""

_FAR = -600.0  # log-survival below which doubles are near their end
_LOG_2PI = math.log(2.0 * math.pi)


def tail_share(n: float) -> float:
    """Share of n rows that the tail of a column begins with; 0 where they are too few."""
    share = np.clip(TAIL_SHARE * n, MIN_EXCEEDANCES, MAX_EXCEEDANCES) / n
    return float(share) if share <= MAX_TAIL_SHARE else 0.0


def fit_tail(
    exceedances: FloatArray, weight: FloatArray, z_start: float
) -> tuple[float, float] | None:
    """Scale and shape of a generalised Pareto distribution, or None for the tail of a Gaussian.

    The likelihood is maximised along xi / sigma, for which the best xi is known (Grimshaw 1993).

    Parameters
    ----------
    exceedances : ndarray of shape (n,)
        Distances beyond the threshold, positive.
    weight : ndarray of shape (n,)
    z_start : float
        Where the threshold would be in a standard normal distribution, positive.

    Returns
    -------
    (scale, shape) or None
    """
    if len(exceedances) < MIN_EXCEEDANCES / 2:
        return None
    share = weight / weight.sum()
    n = 1.0 / np.square(share).sum()
    mean = share @ exceedances
    # typical distances of the heaviest tail are far below the mean
    typical = np.exp(share @ np.log(np.maximum(exceedances, 1e-300 + 1e-12 * mean)))
    rate = np.geomspace(1e-3 / mean, 1e3 / typical, 200)
    growth = np.log1p(rate[:, None] * exceedances) @ share
    # the shrinkage: some exceedances that follow an exponential distribution of the same scale
    kept = n / (n + PSEUDO_EXCEEDANCES)
    shape = np.minimum(kept * growth, MAX_SHAPE)
    scale = shape / rate
    value = -np.log(scale) - (1.0 + 1.0 / shape) * growth
    best = int(value.argmax())
    if value[best] < _gaussian_tail(exceedances, share, mean, z_start):
        return None
    return float(scale[best]), float(shape[best])


def _gaussian_tail(exceedances, share, mean, z_start):
    """Largest mean log-likelihood of the tail of a Gaussian, along its standard deviation."""
    per_unit = np.geomspace(0.1, 1.0, 100) / mean  # 1 / sigma; 1 / mean where the tail is steep
    second = share @ np.square(exceedances)
    constant = -0.5 * _LOG_2PI - log_ndtr(-z_start) - 0.5 * z_start**2
    quadratic = per_unit * z_start * mean + 0.5 * per_unit**2 * second
    return (constant + np.log(per_unit) - quadratic).max()


def normal_value(log_survival: torch.Tensor) -> torch.Tensor:
    """Return the z that a standard normal variable exceeds with that log-probability, z > 0."""
    with torch.no_grad():
        far = log_survival < _FAR
        z = -torch.special.ndtri(log_survival.clamp(min=_FAR).exp())
        if far.any():
            twice = -2.0 * log_survival.clamp(max=-1.0)
            z = torch.where(far, (twice - _LOG_2PI - twice.log()).sqrt(), z)
            for _ in range(3):
                z = z + (torch.special.log_ndtr(-z) - log_survival) / hazard(z)
    if not log_survival.requires_grad:
        return z
    rate = hazard(z)
    # one more step of Newton's method, which is what autograd sees
    return z + (torch.special.log_ndtr(-z) - log_survival) / rate


def hazard(z: torch.Tensor) -> torch.Tensor:
    """Return minus the derivative of the log-survival function of a standard normal variable."""
    return (-0.5 * z.square() - 0.5 * _LOG_2PI - torch.special.log_ndtr(-z)).exp()


def tail_value(
    y: torch.Tensor, z_start: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map distances beyond the threshold to z, with log dz/dy.

    Parameters
    ----------
    y : Tensor of shape (n,)
        Not negative.
    z_start : Tensor of shape (n,)
        z at the threshold.
    scale, shape : Tensor of shape (n,)
        Positive.
    """
    growth = torch.log1p(shape * y / scale)
    log_survival = torch.special.log_ndtr(-z_start) - growth / shape
    z = normal_value(log_survival)
    log_density = log_survival - growth - scale.log()
    return z, log_density + 0.5 * z.square() + 0.5 * _LOG_2PI


def tail_distance(
    z: torch.Tensor, z_start: torch.Tensor, scale: torch.Tensor, shape: torch.Tensor
) -> torch.Tensor:
    """Return the distance beyond the threshold that `tail_value` maps to z."""
    fallen = torch.special.log_ndtr(-z_start) - torch.special.log_ndtr(-z)
    return scale / shape * torch.expm1(shape * fallen)
