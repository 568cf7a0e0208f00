"""Statistics of weighted rows."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def weighted_quantile(values: NDArray[np.float64], weight: NDArray[np.float64], level: Any) -> Any:
    """Quantiles of weighted values; with equal weights those of ``np.quantile``.

    Parameters
    ----------
    values, weight : ndarray of shape (n,)
        Weights are positive.
    level : float or array-like

    Returns
    -------
    float or ndarray
    """
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order]
    # each value stands for the middle of its weight; the first is at level 0, the last at 1
    middle = np.cumsum(weight) - 0.5 * weight
    position = (middle - middle[0]) / max(middle[-1] - middle[0], np.finfo(float).tiny)
    with np.errstate(invalid="ignore"):
        quantile = np.interp(level, position, values)
    # there is no value between minus infinity and another one: the lower
    lower = values[np.searchsorted(position, level, side="right").clip(1) - 1]
    return np.where(np.isnan(quantile), lower, quantile)


def weighted_deviation(X: np.ndarray, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted standard deviation of every column."""
    share = weight / weight.sum()
    return np.sqrt(share @ np.square(X - share @ X))


def gaussian_log_likelihood(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Mean log-density of rows like these, weighted, under a Gaussian that is fitted to these.

    It is what they have under the one of highest likelihood, less one number of parameters per row
    for having been fitted to them (Akaike 1974). Variances are raised by a millionth, so that
    columns may be collinear.
    """
    share = weight / weight.sum()
    x = x - share @ x
    covariance = (x * share[:, None]).mT @ x
    variance = covariance.diagonal()
    variance.mul_(1.0 + 1e-6)
    d = x.shape[1]
    constant = d * (1.0 + math.log(2.0 * math.pi))
    n_parameters = d * (d + 3) / 2
    return -0.5 * (constant + torch.logdet(covariance).item()) - n_parameters / len(x)
