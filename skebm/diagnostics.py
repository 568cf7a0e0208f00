"""Whether draws of Markov chains, or of anything, can be believed.

The measures of chains are those of Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021),
"Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of
MCMC", Bayesian Analysis 16. They take draws as :func:`skebm.samplers.run` keeps them, of shape
(n_draws, n_chains, d), as arrays or tensors, and compute in float64 on the CPU.

The effective sample size of importance *weights* is in `skebm.partition`.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.fft import irfft, next_fast_len, rfft
from scipy.spatial.distance import pdist
from scipy.special import ndtri
from scipy.stats import beta, norm, rankdata
from sklearn.utils import check_random_state

from skebm.samplers import Run

__all__ = [
    "RankCounts",
    "RunSummary",
    "SteinTest",
    "effective_sample_size",
    "kernel_stein_discrepancy",
    "mcse",
    "rank_data",
    "split_r_hat",
    "summarize",
    "to_inference_data",
]

MIN_DRAWS = 4
"""Halves of fewer draws have no variance."""

BLOCK = 1 << 22
"""Numbers worked on at a time: a few dozen MB for each intermediate array."""

MAX_STEIN_ROWS = 50_000
"""The discrepancy takes time that grows as n^2: minutes at this n."""


def effective_sample_size(samples, kind="bulk"):
    """Number of independent draws that would tell as much as these correlated ones.

    Chains are split in halves, so that a drift counts as disagreement; the autocorrelation is
    summed up to where Geyer's initial monotone sequence ends. It can exceed the number of draws
    where they are negatively correlated.

    Parameters
    ----------
    samples : array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws.
    kind : {"bulk", "tail", "mean"}, default="bulk"
        "bulk": of the rank-normalised draws, for whatever concerns the centre of the law; it
        exists for laws without variance too. "tail": the smaller one of the indicators of the
        5 % and 95 % quantiles. "mean": of the draws as they are, for the error of their mean.

    Returns
    -------
    float or ndarray of shape (d,), float64
        nan where all draws are the same number: a chain that never moves has shown nothing.
        (ArviZ returns the number of draws there.)

    Raises
    ------
    ValueError
        For draws that are too few, of another shape or not finite, and for an unknown `kind`.

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
    if kind not in _ESS:
        raise ValueError(f"kind must be one of {sorted(_ESS)}, got {kind!r}.")
    return _by_columns(_ESS[kind], samples)


def split_r_hat(samples):
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
        inf where no chain moves and they differ, nan where all draws are the same number.

    Raises
    ------
    ValueError
        For draws that are too few, of another shape or not finite.

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
    return _by_columns(_split_r_hat, samples)


def mcse(samples, *, quantile=None):
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
    ValueError
        For draws that are too few, of another shape or not finite, and for a `quantile` outside
        of (0, 1).

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
        return _by_columns(_mcse_of_mean, samples)
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile!r}.")
    return _by_columns(lambda x: _mcse_of_quantile(x, quantile), samples)


class RankCounts(NamedTuple):
    """What a rank plot draws.

    Attributes
    ----------
    counts : int64 ndarray of shape (n_chains, n_bins) or (n_chains, n_bins, d)
        How many draws of each chain have a rank, among the draws of all chains, in each of equal
        ranges.
    expected : float
        Their expectation where all chains have one law.
    """

    counts: np.ndarray
    expected: float


def rank_data(samples, n_bins=20):
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
    x, single = _check(samples)
    n, m, d = x.shape
    counts = np.empty((m, n_bins, d), dtype=np.int64)
    for column in range(d):
        ranks = rankdata(x[:, :, column]).reshape(n, m)
        # rank r covers the interval from r - 1 to r
        cell = np.floor((ranks - 0.5) * n_bins / (n * m)).astype(np.int64) + n_bins * np.arange(m)
        counts[:, :, column] = np.bincount(cell.ravel(), minlength=m * n_bins).reshape(m, n_bins)
    return RankCounts(counts[:, :, 0] if single else counts, n / n_bins)


class RunSummary(NamedTuple):
    """What there is to say of a run of chains at a glance; `str` of it is a small table.

    Attributes
    ----------
    n_draws, n_chains, n_columns : int
        Shape of the draws that were kept.
    acceptance_rate : float
        Mean over chains and steps.
    acceptance_range : tuple of two float
        Rates of the chains that accept least and most.
    n_diverged : int
        Diverged proposals of all chains.
    step_size : float, Tensor or None
        As adapted.
    swap_rate : float or None
        Of parallel tempering: the smallest rate of exchange between neighbouring temperatures.
    ess_bulk, ess_tail : float
        Smallest :func:`effective_sample_size` of a column.
    r_hat : float
        Largest :func:`split_r_hat` of a column.
    """

    n_draws: int
    n_chains: int
    n_columns: int
    acceptance_rate: float
    acceptance_range: tuple[float, float]
    n_diverged: int
    step_size: float | torch.Tensor | None
    swap_rate: float | None
    ess_bulk: float
    ess_tail: float
    r_hat: float

    def __str__(self):
        lowest, highest = self.acceptance_range
        lines = [
            f"{self.n_draws:,} draws x {self.n_chains:,} chains x {self.n_columns:,} columns",
            f"acceptance   {self.acceptance_rate:.2f} ({lowest:.2f} to {highest:.2f} over chains)",
            f"divergences  {self.n_diverged:,}",
        ]
        if self.step_size is not None:
            sizes = torch.as_tensor(self.step_size)
            ends = sorted({f"{sizes.min():.3g}", f"{sizes.max():.3g}"}, key=float)
            lines.append(f"step size    {' to '.join(ends)}")
        if self.swap_rate is not None:
            lines.append(f"exchanges    {self.swap_rate:.2f} (worst pair of temperatures)")
        lines += [
            f"ESS          bulk {self.ess_bulk:,.0f}, tail {self.ess_tail:,.0f} (worst column)",
            f"R-hat        {self.r_hat:.3f} (worst column)",
        ]
        return "\n".join(lines)


def summarize(run):
    """Acceptance, divergences, effective sample size and R-hat of a run of chains.

    Parameters
    ----------
    run : Run
        From :func:`skebm.samplers.run`, with ``n_keep`` of at least 4; several hundred for
        figures worth reading.

    Returns
    -------
    RunSummary
        Its `ess_bulk`, `ess_tail` and `r_hat` are nan if a column never changed.

    Raises
    ------
    ValueError
        For a run that kept fewer than 4 draws.

    Examples
    --------
    >>> import torch
    >>> from skebm.diagnostics import summarize
    >>> from skebm.samplers import mala, run
    >>> def log_density(x):
    ...     return -0.5 * (x**2).sum(1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> result = run(
    ...     mala, torch.randn(4, 2, generator=generator), log_density, generator,
    ...     n_steps=1000, n_burn_in=200, n_keep=500, step_size=1.0,
    ... )
    >>> print(summarize(result))
    500 draws x 4 chains x 2 columns
    acceptance   0...
    divergences  0
    step size    1...
    ESS          bulk ..., tail ... (worst column)
    R-hat        1.0... (worst column)
    """
    if len(run.samples) < MIN_DRAWS:
        raise ValueError(
            f"run must hold at least {MIN_DRAWS} draws per chain, got n_keep={len(run.samples)}."
        )
    return RunSummary(
        *run.samples.shape,
        run.acceptance_rate,
        (run.acceptance_rates.min().item(), run.acceptance_rates.max().item()),
        int(run.n_diverged.sum()),
        run.step_size,
        None if run.swap_rates is None else run.swap_rates.min().item(),
        float(effective_sample_size(run.samples).min()),
        float(effective_sample_size(run.samples, "tail").min()),
        float(split_r_hat(run.samples).max()),
    )


class SteinTest(NamedTuple):
    """Result of :func:`kernel_stein_discrepancy`.

    Attributes
    ----------
    statistic : float
        Unbiased estimate of the squared discrepancy; 0 on average under the law, so that it may
        be negative.
    p_value : float
        Of the hypothesis that the rows are draws of the law.
    bootstrap : float64 ndarray of shape (n_bootstrap,)
        Draws of the statistic under the hypothesis.
    """

    statistic: float
    p_value: float
    bootstrap: np.ndarray


def kernel_stein_discrepancy(
    x,
    score,
    *,
    kernel="imq",
    bandwidth="median",
    n_bootstrap=1000,
    change_probability=0.5,
    random_state=None,
):
    r"""Test whether rows are draws of a law of which only the score is known.

    With s the gradient of the log-density, the Stein kernel

    .. math:: u(x, y) = s(x)^\top s(y)\, k + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k
       + \nabla_x \cdot \nabla_y k

    has mean zero in either argument under the law; the statistic is the mean of u over pairs of
    different rows. Neither log Z nor draws of the law are needed.

    The discrepancy is *blind to the weights of well-separated modes*: the score inside a mode
    does not know of the others, so that draws with the wrong share in each mode, or from one
    mode only, pass. A shift or a wrong width is seen, the less so the more columns there are.
    The score has to be that of the law itself: `stein_score` of an estimator is a smoothed one
    where its energy is a sum of hard trees.

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
    >>> def score(x):  # of the standard normal law
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
        bandwidth = np.median(pdist(x[np.linspace(0, n - 1, min(n, 1000)).astype(int)]))
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


def to_inference_data(samples, names=None):
    """Draws as an ArviZ ``InferenceData``, for its plots, summaries and files.

    Parameters
    ----------
    samples : Run, array-like or Tensor of shape (n_draws, n_chains) or (n_draws, n_chains, d)
        At least 4 draws.
    names : sequence of d str, optional
        Names of the columns; None takes x0, x1, ...

    Returns
    -------
    arviz.InferenceData
        Its group `posterior` (ArviZ's word for draws of whatever law) holds `x` with dimensions
        (chain, draw, feature), float64. Of a run, `sample_stats` holds `acceptance_rate` and
        `n_diverged` of every chain; what happened in single steps is not kept.

    Raises
    ------
    ImportError
        Without ArviZ, an optional dependency: ``pip install "skebm[arviz]"``.
    ValueError
        For draws that are too few, of another shape or not finite, and for `names` that do not
        fit.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.diagnostics import to_inference_data
    >>> x = np.random.default_rng(0).normal(size=(100, 4, 2))
    >>> data = to_inference_data(x, names=["width", "height"])
    >>> dict(data.posterior.sizes)
    {'chain': 4, 'draw': 100, 'feature': 2}
    """
    try:
        import arviz
        import xarray  # on which arviz depends
    except ImportError as error:
        raise ImportError('to_inference_data needs ArviZ: pip install "skebm[arviz]"') from error
    run = samples if isinstance(samples, Run) else None
    x, _ = _check(samples if run is None else run.samples)
    d = x.shape[2]
    names = [f"x{j}" for j in range(d)] if names is None else list(names)
    if len(names) != d:
        raise ValueError(f"names must hold one name for each of {d} columns, got {len(names)}.")
    data = arviz.from_dict(
        posterior={"x": x.swapaxes(0, 1).astype(np.float64)},
        coords={"feature": names},
        dims={"x": ["feature"]},
    )
    if run is not None:
        stats = {
            "acceptance_rate": ("chain", run.acceptance_rates.double().cpu().numpy()),
            "n_diverged": ("chain", run.n_diverged.cpu().numpy()),
        }
        data.add_groups(sample_stats=xarray.Dataset(stats, {"chain": data.posterior.chain}))
    return data


def _array(values, name):
    """Numbers as an array of their own dtype; all finite."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    values = np.asarray(values)
    astray = np.count_nonzero(~np.isfinite(values))
    if astray:
        raise ValueError(f"{name} must be finite, but {astray} of {values.size} values are not.")
    return values


def _table(values, name):
    values = _array(values, name).astype(np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, d), got {values.shape}.")
    return values


def _check(samples):
    """Draws of shape (n_draws, n_chains, d), and whether the last axis was added."""
    x = _array(samples, "samples")
    if x.ndim not in (2, 3) or 0 in x.shape[1:]:
        raise ValueError(
            f"samples must have shape (n_draws, n_chains) or (n_draws, n_chains, d), got {x.shape}."
        )
    if len(x) < MIN_DRAWS:
        raise ValueError(f"samples must hold at least {MIN_DRAWS} draws per chain, got {len(x)}.")
    return (x[:, :, None], True) if x.ndim == 2 else (x, False)


def _by_columns(statistic, samples):
    """(n_draws, n_chains, k) -> (k,), for as many columns at a time as memory should hold."""
    x, single = _check(samples)
    width = max(1, BLOCK // (x.shape[0] * x.shape[1]))
    blocks = [x[:, :, j : j + width] for j in range(0, x.shape[2], width)]
    # what is not defined comes out as nan or inf, and is documented so
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.concatenate([statistic(block.astype(np.float64)) for block in blocks])
    return float(values[0]) if single else values


def _split(x):
    """Halves of chains as chains; of an odd number of draws the one in the middle is left out."""
    half = len(x) // 2
    return np.concatenate([x[:half], x[-half:]], axis=1)


def _normal_scores(x):
    """Ranks among the draws of all chains, as quantiles of the normal law (Blom's)."""
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


def _ess(x):
    """Effective sample size of split chains; nan for constants."""
    n, m, d = x.shape
    covariance = _mean_autocovariance(x)
    within = covariance[0] * n / (n - 1)
    rho = 1 - (within - covariance) / (covariance[0] + x.mean(0).var(0, ddof=1))
    rho[0] = 1
    # Geyer: sums of an even lag and the next are positive and fall. Summed up to the first sum
    # that is not positive, `last`, of which the even lag is still taken if it is positive.
    n_pairs = max(0, (n - 3) // 2) + 1
    pairs = rho[: 2 * n_pairs].reshape(n_pairs, 2, d).sum(1)
    positive = pairs > 0
    last = np.where(positive.all(0), n_pairs - 1, positive.argmin(0))
    before = np.arange(n_pairs)[:, None] < last
    columns = np.arange(d)
    end = rho[2 * last, columns]
    end = np.where((pairs[last, columns] >= 0) | (end > 0), end, 0)
    tau = 2 * np.where(before, np.minimum.accumulate(pairs), 0).sum(0) - 1 + end
    # antithetic chains: no more than log10 times the number of draws
    tau = np.maximum(tau, 1 / np.log10(n * m))
    return np.where(np.ptp(x, axis=(0, 1)) == 0, np.nan, n * m / tau)


def _mean_autocovariance(x):
    """Of shape (n_draws, d), the mean over chains; by the mean of their power spectra."""
    n, m, d = x.shape
    size = next_fast_len(2 * n, real=True)
    power = np.zeros((size // 2 + 1, d))
    step = max(1, BLOCK // (size * d))
    for i in range(0, m, step):
        chains = x[:, i : i + step]
        spectrum = rfft(chains - chains.mean(0), size, axis=0)
        power += (spectrum.real**2 + spectrum.imag**2).sum(1)
    return irfft(power, size, axis=0)[:n] / (n * m)


def _ess_of_quantile(x, q):
    return _ess(_split((x <= np.quantile(x, q, axis=(0, 1))).astype(np.float64)))


_ESS = {
    "bulk": lambda x: _ess(_normal_scores(_split(x))),
    # with many ties one of the two may not exist
    "tail": lambda x: np.fmin(_ess_of_quantile(x, 0.05), _ess_of_quantile(x, 0.95)),
    "mean": lambda x: _ess(_split(x)),
}


def _mcse_of_mean(x):
    return x.std(axis=(0, 1), ddof=1) / np.sqrt(_ess(_split(x)))


def _mcse_of_quantile(x, q):
    """Half of the distance of the order statistics that are one standard error away."""
    size = x.shape[0] * x.shape[1]
    ess = _ess_of_quantile(x, q)
    level = beta.ppf(norm.cdf([[-1.0], [1.0]]), ess * q + 1, ess * (1 - q) + 1)
    # constants: any of them will do, the result is nan
    low, high = np.nan_to_num(level) * size - 1
    low = np.floor(np.maximum(low, 0)).astype(int)
    high = np.ceil(np.clip(high, 0, size - 1)).astype(int)
    ordered, columns = np.sort(x.reshape(size, -1), axis=0), np.arange(x.shape[2])
    error = (ordered[high, columns] - ordered[low, columns]) / 2
    return np.where(np.isnan(ess), np.nan, error)


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
