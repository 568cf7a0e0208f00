"""Measures of Markov chains.

Effective sample size and Monte-Carlo errors are those of arviz-stats. Split R-hat is written here,
because estimators need it and arviz-stats is optional.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri
from scipy.stats import rankdata

from ._draws import as_draws, by_columns

AXES = {"chain_axis": 1, "draw_axis": 0}


def effective_sample_size(samples: ArrayLike, kind: str = "bulk") -> float | np.ndarray:
    """Number of independent draws that would tell as much as these correlated ones.

    Chains are split in halves, so that a drift counts as disagreement; the autocorrelation is
    summed up to where Geyer's initial monotone sequence ends. It can exceed the number of draws
    where they are negatively correlated.

    Parameters
    ----------
    samples : array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws.
    kind : {"bulk", "tail", "mean"}, default="bulk"
        "bulk": of the rank-normalised draws, for whatever concerns the centre of the distribution;
        it exists for distributions without variance too. "tail": the smaller one of the indicators
        of the 5 % and 95 % quantiles. "mean": of the draws as they are, for the error of their
        mean.

    Returns
    -------
    float or ndarray of shape (d,), float64
        NaN where all draws are the same number: a chain that never moves has shown nothing, while
        ArviZ returns the number of draws there.

    Raises
    ------
    ImportError
        Without arviz-stats, an optional dependency: ``pip install "skebm[diagnostics]"``.
    ValueError
        For draws that are too few, of another shape or not finite, and for an unknown `kind`.

    See Also
    --------
    mcse : The error that it leaves.
    split_r_hat : Whether chains agree.

    References
    ----------
    Vehtari et al. (2021); Geyer, C. J. (1992). Practical Markov chain Monte Carlo. *Statistical
    Science* 7.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import effective_sample_size
    >>> x = np.random.default_rng(0).normal(size=(5000, 4))
    >>> for t in range(1, 5000):
    ...     x[t] += 0.5 * x[t - 1]
    >>> ess = effective_sample_size(x)  # about 20,000 (1 - 0.5) / (1 + 0.5)
    >>> bool(abs(ess / 6667 - 1) < 0.1)
    True
    """
    if kind not in ("bulk", "tail", "mean"):
        raise ValueError(f"kind must be 'bulk', 'tail' or 'mean', got {kind!r}.")
    options: dict[str, Any] = {"prob": (0.05, 0.95)} if kind == "tail" else {}
    array_stats = _array_stats("effective_sample_size")

    def measure(x):
        return array_stats.ess(_spread(x)[0], **AXES, method=kind, **options)

    return by_columns(measure, samples)


def split_r_hat(samples: ArrayLike) -> float | np.ndarray:
    """Rank-normalised split R-hat: how much the chains, cut in halves, disagree.

    The square root of (variance of all draws) / (variance within half-chains), of the
    rank-normalised draws, or of their distances from the median if that is larger: the first
    sees other locations, the second other scales. It is 1 where the chains agree; below 1.01 is
    the usual demand.

    Parameters
    ----------
    samples : array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws. One chain is compared with itself only, half against half.

    Returns
    -------
    float or ndarray of shape (d,), float64
        Infinite where no chain moves and they differ, NaN where all draws are the same number.

    Raises
    ------
    ValueError
        For draws that are too few, of another shape or not finite.

    See Also
    --------
    effective_sample_size : How much the draws say.
    rank_data : A picture in place of a number.

    References
    ----------
    Vehtari et al. (2021), as in :func:`effective_sample_size`.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import split_r_hat
    >>> x = np.random.default_rng(0).normal(size=(1000, 4))
    >>> bool(split_r_hat(x) < 1.01)
    True
    >>> bool(split_r_hat(x + [0.0, 0.0, 0.0, 0.5]) > 1.01)  # one chain is elsewhere
    True
    """
    return by_columns(_split_r_hat, samples)


def mcse(samples: ArrayLike, *, quantile: float | None = None) -> float | np.ndarray:
    """Monte-Carlo standard error of the mean of the draws, or of a quantile of them.

    Parameters
    ----------
    samples : array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws.
    quantile : float in (0, 1), optional
        Which quantile; None for the mean.

    Returns
    -------
    float or ndarray of shape (d,), float64
        In the units of `samples`. nan where all draws are the same number.

    Raises
    ------
    ImportError
        Without arviz-stats, an optional dependency: ``pip install "skebm[diagnostics]"``.
    ValueError
        For draws that are too few, of another shape or not finite, and for a `quantile` outside
        of (0, 1).

    See Also
    --------
    effective_sample_size : What it is made of.

    References
    ----------
    Vehtari et al. (2021), as in :func:`effective_sample_size`; section 4.4 for quantiles.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import mcse
    >>> x = np.random.default_rng(0).normal(size=(2500, 4))
    >>> round(mcse(x), 3)
    0.010
    """
    if quantile is None:
        options: dict[str, Any] = {"method": "mean"}
    elif 0 < quantile < 1:
        options = {"method": "quantile", "prob": quantile}
    else:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile!r}.")
    array_stats = _array_stats("mcse")

    def measure(x):
        x, width = _spread(x)
        return width * array_stats.mcse(x, **AXES, **options)

    return by_columns(measure, samples)


class RankCounts(NamedTuple):
    """What a rank plot draws.

    Attributes
    ----------
    counts : int64 ndarray of shape (n_chains, n_bins) or (n_chains, n_bins, d)
        How many draws of each chain have a rank, among the draws of all chains, in each of equal
        ranges.
    expected : float
        Their expectation where all chains have one distribution.

    See Also
    --------
    rank_data : Counts them.
    skebm.plotting.ChainsDisplay : Draws them.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import rank_data
    >>> samples = np.random.default_rng(0).normal(size=(100, 4))
    >>> ranks = rank_data(samples, n_bins=5)
    >>> ranks.counts.shape, ranks.expected
    ((4, 5), 20.0)
    """

    counts: np.ndarray
    expected: float


def rank_data(samples: ArrayLike, n_bins: int = 20) -> RankCounts:
    """Histogram of the ranks of every chain's draws among those of all chains.

    A chain that lies too low has too many low ranks, one that is too wide too many at both ends.
    There is no test of uniformity here: the usual ones take the draws of a chain for
    independent, and reject sound chains.

    Parameters
    ----------
    samples : array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws. Equal draws share their mean rank.
    n_bins : int, default=20
        Number of ranges.

    Returns
    -------
    RankCounts

    Raises
    ------
    ValueError
        For draws that are too few, of another shape or not finite, and for ``n_bins < 1``.

    See Also
    --------
    RankCounts : What is returned.
    skebm.plotting.ChainsDisplay : Draws them.
    split_r_hat : One number in place of a picture.

    References
    ----------
    Vehtari et al. (2021), as in :func:`effective_sample_size`.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import rank_data
    >>> rank_data([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0]], n_bins=2)
    RankCounts(counts=array([[4, 0], [0, 4]]), expected=2.0)
    """
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}.")
    x, single = as_draws(samples)
    n, m, d = x.shape
    counts = np.empty((m, n_bins, d), dtype=np.int64)
    for column in range(d):
        ranks = rankdata(x[:, :, column]).reshape(n, m)
        # rank r covers the interval from r - 1 to r
        cell = np.floor((ranks - 0.5) * n_bins / (n * m)).astype(np.int64) + n_bins * np.arange(m)
        counts[:, :, column] = np.bincount(cell.ravel(), minlength=m * n_bins).reshape(m, n_bins)
    return RankCounts(counts[:, :, 0] if single else counts, n / n_bins)


def _array_stats(name):
    """The functions of arviz-stats for arrays; `name` is that of the function that needs them."""
    try:
        from arviz_stats.base import array_stats  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    except ImportError as error:
        raise ImportError(f'{name} needs arviz-stats: pip install "skebm[diagnostics]"') from error
    return array_stats


def _spread(x):
    """Columns moved and stretched to [0, 1], and how wide they were; nan for constants.

    arviz-stats takes what varies by less than 1e-15 for constant, and all draws of a constant for
    effective.
    """
    width = np.ptp(x, axis=(0, 1))
    return (x - x.min(axis=(0, 1))) / width, width


def _split(x):
    """Halves of chains as chains; of an odd number of draws the one in the middle is left out."""
    half = len(x) // 2
    return np.concatenate([x[:half], x[-half:]], axis=1)


def _normal_scores(x):
    """Ranks among the draws of all chains, as quantiles of the normal distribution (Blom's)."""
    size = x.shape[0] * x.shape[1]
    ranks = rankdata(x.reshape(size, -1), axis=0).reshape(x.shape)
    return ndtri((ranks - 0.375) / (size + 0.25))


def _split_r_hat(x):
    x = _split(x)
    folded = np.abs(x - np.median(x, axis=(0, 1)))
    return np.fmax(_r_hat(_normal_scores(x)), _r_hat(_normal_scores(folded)))


def _r_hat(x):
    n = len(x)
    # exactly zero for a chain that never moved, whatever the rounding of its mean
    within = np.where(np.ptp(x, axis=0) == 0, 0, x.var(0, ddof=1)).mean(0)
    between = x.mean(0).var(0, ddof=1)
    return np.sqrt((n - 1) / n + between / within)
