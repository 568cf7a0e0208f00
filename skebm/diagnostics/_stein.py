"""The kernel Stein discrepancy."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import pdist
from sklearn.utils import check_random_state

from skebm._typing import RandomState

from ._draws import as_array

MAX_STEIN_ROWS = 50_000
"""The discrepancy takes time that grows as n^2: minutes at this n."""


class SteinTest(NamedTuple):
    """Result of :func:`kernel_stein_discrepancy`.

    Attributes
    ----------
    statistic : float
        Unbiased estimate of the squared discrepancy; 0 on average under the distribution, so that
        it may be negative.
    p_value : float
        Of the hypothesis that the rows are draws of the distribution.
    bootstrap : float64 ndarray of shape (n_bootstrap,)
        Draws of the statistic under the hypothesis.

    See Also
    --------
    kernel_stein_discrepancy : Returns it.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import kernel_stein_discrepancy
    >>> x = np.random.default_rng(0).normal(size=(200, 2))
    >>> test = kernel_stein_discrepancy(x, -x, random_state=0)  # the score of N(0, I)
    >>> test.p_value > 0.05, test.bootstrap.shape
    (True, (1000,))
    """

    statistic: float
    p_value: float
    bootstrap: np.ndarray


def kernel_stein_discrepancy(
    x: ArrayLike,
    score: Callable | ArrayLike,
    *,
    kernel: str = "imq",
    bandwidth: float | str = "median",
    n_bootstrap: int = 1000,
    change_probability: float = 0.5,
    random_state: RandomState = None,
) -> SteinTest:
    r"""Test whether rows are draws of a distribution of which only the score is known.

    With s the gradient of the log-density, the Stein kernel

    .. math:: u(x, y) = s(x)^\top s(y)\, k + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k
       + \nabla_x \cdot \nabla_y k

    has mean zero in either argument under the distribution; the statistic is the mean of u over
    pairs of different rows. Neither log Z nor draws of the distribution are needed.

    The discrepancy is *blind to the weights of well-separated modes*: the score inside a mode
    does not know of the others, so that draws with the wrong share in each mode, or from one
    mode only, pass. A shift or a wrong width is seen, the less so the more columns there are.
    The score has to be that of the distribution itself: take ``stein_score(X, smoothing=0)`` of an
    estimator. Where its energy is a sum of hard trees, that is the score of softer ones.

    Parameters
    ----------
    x : array-like or Tensor of shape (n, d)
        Rows to test, n at least 2 and at most 50,000: time grows as n^2 (about 3 s for 10,000 on
        one core), memory as n. Columns share one bandwidth; where their scales differ, pass
        ``x / scale`` and the array ``score(x) * scale``.
    score : callable or array-like of shape (n, d)
        Gradient of the log-density at the rows, in nats per unit of x, or a function of x that
        returns it, such as the `stein_score` of an estimator.
    kernel : {"imq", "gaussian"}, default="imq"
        With r the distance of two rows in bandwidths, (1 + r^2)^(-1/2), which detects draws that
        escape to infinity in any dimension, or exp(-r^2 / 2), which may not.
    bandwidth : "median" or float, default="median"
        In the units of x. "median": the median distance of at most 1,000 rows, evenly spaced.
    n_bootstrap : int, default=1000
        Draws of the wild bootstrap; the p-value is at least 1 / (n_bootstrap + 1).
    change_probability : float in (0, 0.5], default=0.5
        The multipliers of the bootstrap are signs that change from a row to the next with this
        probability. 0.5 is for independent rows. For a Markov chain, in its order: a smaller one,
        such that signs keep longer than the chain remembers, 1 / change_probability being several
        times the n / :func:`effective_sample_size` of it, and far below n.
    random_state : int, RandomState instance or None, default=None
        Seed of the bootstrap.

    Returns
    -------
    SteinTest

    Raises
    ------
    ValueError
        For arguments out of range, shapes that do not fit, values that are not finite, and for
        bandwidth="median" where most rows are equal.

    See Also
    --------
    SteinTest : What is returned.

    References
    ----------
    Liu, Q., Lee, J. and Jordan, M. (2016). A kernelized Stein discrepancy for goodness-of-fit
    tests. *ICML*. Chwialkowski, K., Strathmann, H. and Gretton, A. (2016). A kernel test of
    goodness of fit. *ICML* (the wild bootstrap). Gorham, J. and Mackey, L. (2017). Measuring
    sample quality with kernels. *ICML* (the inverse multiquadric kernel).

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import kernel_stein_discrepancy
    >>> x = np.random.default_rng(0).normal(size=(300, 2))
    >>> def score(x):  # of the standard normal distribution
    ...     return -x
    >>> kernel_stein_discrepancy(x, score, random_state=0).p_value > 0.05
    True
    >>> kernel_stein_discrepancy(x + 0.5, score, random_state=0).p_value < 0.01
    True
    """
    s = _table(score(x) if callable(score) else score, "score")
    x = _table(x, "x")
    n = len(x)
    if s.shape != x.shape:
        raise ValueError(f"score must have the shape of x, {x.shape}, got {s.shape}.")
    if not 2 <= n <= MAX_STEIN_ROWS:
        raise ValueError(
            f"x must have 2 to {MAX_STEIN_ROWS:,} rows, got {n:,}; the time grows as the square. "
            "Take every k-th row."
        )
    if kernel not in _KERNELS:
        raise ValueError(f"kernel must be one of {sorted(_KERNELS)}, got {kernel!r}.")
    if n_bootstrap < 1:
        raise ValueError(f"n_bootstrap must be at least 1, got {n_bootstrap}.")
    if not 0 < change_probability <= 0.5:
        raise ValueError(f"change_probability must lie in (0, 0.5], got {change_probability}.")
    if isinstance(bandwidth, str) and bandwidth == "median":
        chosen = x[np.linspace(0, n - 1, min(n, 1000)).astype(int)]
        bandwidth = float(np.median(pdist(chosen)))
        if bandwidth == 0:
            raise ValueError("bandwidth='median' is zero, most rows are equal; give a number.")
    elif isinstance(bandwidth, str) or not 0 < bandwidth < np.inf:
        raise ValueError(f"bandwidth must be 'median' or a positive number, got {bandwidth!r}.")

    signs = _signs(n, n_bootstrap, change_probability, check_random_state(random_state))
    # the statistic is the quadratic form of ones
    signs[:, 0] = 1
    forms = np.zeros(n_bootstrap + 1)
    step = 1024
    for i in range(0, n, step):
        left = signs[i : i + step].astype(np.float64)
        for j in range(i, n, step):
            rows, columns = slice(i, i + step), slice(j, j + step)
            u = _stein_kernel(x[rows], x[columns], s[rows], s[columns], kernel, bandwidth)
            if i == j:
                np.fill_diagonal(u, 0.0)
            form = np.einsum("ib,ib->b", left, u @ signs[columns].astype(np.float64))
            forms += form if i == j else 2 * form
    forms /= n * (n - 1)
    statistic, bootstrap = forms[0], forms[1:]
    p_value = (1 + np.count_nonzero(bootstrap >= statistic)) / (n_bootstrap + 1)
    return SteinTest(float(statistic), float(p_value), bootstrap)


def _table(values, name):
    values = as_array(values, name).astype(np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, d), got {values.shape}.")
    return values


# kernels as functions of the squared distance: value, first and second derivative
_KERNELS = {
    "imq": lambda r2: ((1 + r2) ** -0.5, -0.5 * (1 + r2) ** -1.5, 0.75 * (1 + r2) ** -2.5),
    "gaussian": lambda r2: (k := np.exp(-0.5 * r2), -0.5 * k, 0.25 * k),
}


def _stein_kernel(x, y, score_x, score_y, kernel, bandwidth):
    """u(x, y) of all pairs of rows, (n, m), without any array of shape (n, m, d).

    For k = phi(r^2): u = s's' phi - 2 phi' (s - s')(x - y) - 2 d phi' - 4 r^2 phi'', with lengths
    in bandwidths.
    """
    x, y, s, t = x / bandwidth, y / bandwidth, score_x * bandwidth, score_y * bandwidth
    centre = x.mean(0)  # distances from inner products are exact only near the origin
    x, y = x - centre, y - centre
    r2 = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * (x @ y.T)
    r2 = np.maximum(r2, 0)
    across = (s * x).sum(1)[:, None] + (t * y).sum(1) - s @ y.T - x @ t.T
    value, first, second = _KERNELS[kernel](r2)
    u = (s @ t.T) * value - 2 * first * (across + x.shape[1]) - 4 * r2 * second
    return u / bandwidth**2


def _signs(n, n_bootstrap, change_probability, rng):
    """Columns of signs that change at random, int8, (n, 1 + n_bootstrap)."""
    signs = np.empty((n, 1 + n_bootstrap), dtype=np.int8)
    for i in range(0, 1 + n_bootstrap, 100):
        block = signs[:, i : i + 100]
        change = rng.random_sample(block.shape)
        block[:] = np.where(change < change_probability, -1, 1)
        block[0] = np.where(change[0] < 0.5, -1, 1)
        np.multiply.accumulate(block, axis=0, out=block)
    return signs
