"""Columns before the model: constant columns, robust scales, ties, smoothing."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from skebm._statistics import weighted_deviation, weighted_quantile
from skebm._typing import FloatArray

Precision: TypeAlias = float | FloatArray
"""Relative precision of the values of X, a float or one per column."""

ROUNDING = 1e-9
"""Values so far outside of the unit interval are taken to be 0 or 1."""

DUST_OF_SPREAD, DUST_OF_LARGEST = 1e-8, 1e-12
"""Values so close, as a share of the spread of a column or of its largest number, may be one."""

DUST_GAP, DUST_FEW = 1e3, 0.05
"""They are one where, for each distance between them, at most so many distances are up to so many
times as large: the second and the first number."""


@dataclass(frozen=True)
class Columns:
    """How columns of X become standardised columns, and back.

    Attributes
    ----------
    varying : ndarray of bool of shape (n_features,)
        Columns that the density is about. The others are constant: a point mass.
    constants : ndarray of shape (n_features,)
        Value of the constant columns (unused for the others).
    precision : ndarray of shape (n_features,)
        Relative precision of the values that `constants` were read from.
    n_rows : int
        How many rows they were read from.
    center, scale : ndarray of shape (n_varying,)
        Median and robust standard deviation (interquartile range / 1.349; where that is 0, the
        standard deviation).
    spread : ndarray of shape (n_varying,)
        Standard deviation of the standardised columns.
    half_steps : tuple of (values, half_widths) or None, one per varying column
        Resolution of a column with ties: each distinct value and how far it is spread.
    unit_interval : bool
        Whether columns lie in [0, 1], and keep their units.
    """

    varying: np.ndarray
    constants: np.ndarray
    precision: np.ndarray
    n_rows: int
    center: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    half_steps: tuple[tuple[np.ndarray, np.ndarray] | None, ...]
    unit_interval: bool = False

    @classmethod
    def learn(
        cls,
        X: np.ndarray,
        names: Any,
        weight: FloatArray | None = None,
        precision: Precision = 2.0**-52,
    ) -> Self:
        """Read center, scale and resolution off the rows of X, of positive weight.

        `precision` is that of :func:`relative_precision`, of X as it was given. Weights are equal
        by default.

        Raises
        ------
        ValueError
            When no column varies, or one varies beyond the range of floating-point numbers.
        """
        varying = X.min(axis=0) < X.max(axis=0)
        if not varying.any():
            raise ValueError(
                f"every column of X is constant ({len(X)} sample(s)): there is no density to learn."
            )
        kept = X[:, varying]
        weight = np.ones(len(X)) if weight is None else weight
        with np.errstate(over="ignore", invalid="ignore"):
            quartiles = [weighted_quantile(column, weight, [0.25, 0.5, 0.75]) for column in kept.T]
            low, center, high = np.transpose(quartiles).copy()
            deviation = weighted_deviation(kept, weight)
            scale = (high - low) / 1.349
        too_wide = ~np.isfinite(deviation + scale)
        if too_wide.any():
            column = names[np.flatnonzero(varying)[too_wide.argmax()]]
            raise ValueError(
                f"column {column!r} spans more than floating-point numbers can square; rescale it."
            )
        tiny = np.finfo(np.float64).tiny
        scale = np.where(scale > tiny, scale, deviation)
        if (scale <= tiny).any():
            column = names[np.flatnonzero(varying)[(scale <= tiny).argmax()]]
            raise ValueError(f"column {column!r} varies by less than {tiny:g}; rescale it.")
        x = (kept - center) / scale
        return cls(
            varying=varying,
            constants=X[0].copy(),
            precision=np.broadcast_to(precision, X.shape[1]).copy(),
            n_rows=len(X),
            center=center,
            scale=scale,
            spread=weighted_deviation(x, weight),
            half_steps=_resolutions(x),
        )

    def in_unit_interval(self) -> "Columns":
        """The same columns in their own units, which have to be the unit interval."""
        n_varying = int(self.varying.sum())
        return replace(
            self, center=np.zeros(n_varying), scale=np.ones(n_varying),
            half_steps=(None,) * n_varying, unit_interval=True,
        )  # fmt: skip

    @property
    def log_det(self) -> float:
        """log |d standardised / d X|, added to a log-density of standardised columns."""
        return -np.log(self.scale).sum()

    @property
    def log_factor(self) -> float:
        """What the rows of `fit` have, in nats, beside the log-density of standardised columns.

        The log-determinant, and the log-probability that constant columns show their constants.
        """
        n_constant = int((~self.varying).sum())
        return self.log_det + n_constant * math.log((self.n_rows + 1) / (self.n_rows + 2))

    def log_factors(self, X: np.ndarray) -> FloatArray:
        """The same for any rows, (n, n_features) -> (n,).

        A column that n rows have shown constant may be elsewhere in the next one: with probability
        1 / (n + 2), Laplace's rule of succession for two states. Where it is then is not modelled.
        """
        return self.log_factor - math.log(self.n_rows + 1) * self.elsewhere(X).sum(axis=1)

    def has_states_of(self, other: Self) -> bool:
        """Whether the same columns vary, and the others have the same constants."""
        return bool(
            np.array_equal(self.varying, other.varying)
            and not self.elsewhere(self.snap(other.constants[None], other.precision)).any()
        )

    def elsewhere(self, X: np.ndarray) -> NDArray[np.bool_]:
        """Where constant columns do not show their constant, of the shape of X."""
        return ~self.varying & (X != self.constants)

    def relearned(self, X: np.ndarray, weight: FloatArray) -> Self:
        """The same columns, in the same units, with what other rows say of ties and spread."""
        x = self.standardize(X)
        return replace(
            self,
            n_rows=len(X),
            spread=weighted_deviation(x, weight),
            half_steps=self.half_steps if self.unit_interval else _resolutions(x),
        )

    def snap(self, X: np.ndarray, precision: Precision) -> FloatArray:
        """X, with the value of a constant column wherever it is met within its precision.

        In the unit interval also 0 and 1 where scaling has left values outside by a rounding error.

        A value counts as met where fit or `precision`, that of these rows as they were given, is
        too coarse to tell it from the constant: .1 of a float32 file and .1 of a float64 service.
        """
        coarser = 4.0 * np.maximum(self.precision, precision)  # a few roundings
        met = ~self.varying & (np.abs(X - self.constants) <= coarser * np.abs(self.constants))
        X = np.where(met, self.constants, X)
        if self.unit_interval:
            near = (X >= -ROUNDING) & (X <= 1.0 + ROUNDING)
            X = np.where(near, X.clip(0.0, 1.0), X)
        return X

    def standardize(self, X: np.ndarray) -> FloatArray:
        """Return the varying columns, standardised."""
        return (X[:, self.varying] - self.center) / self.scale

    def restore(self, x: np.ndarray) -> FloatArray:
        """Rows in the units of X, constant columns put back."""
        X = np.tile(self.constants, (len(x), 1))
        X[:, self.varying] = self.center + self.scale * x
        return X

    def perturb(self, x: np.ndarray, smoothing: float, rng: np.random.RandomState) -> FloatArray:
        """Rows spread over the resolution of their columns, plus `smoothing` standard deviations.

        A value of a column with ties is spread evenly over the cell that it stands for, so that
        the likelihood does not pay for spikes.
        """
        x = x.copy()
        for column, steps in zip(x.T, self.half_steps, strict=True):
            if steps is not None:
                half = steps[1][np.searchsorted(steps[0], column).clip(max=len(steps[0]) - 1)]
                column += half * rng.uniform(-1.0, 1.0, len(column))
        if smoothing:
            x += smoothing * self.spread * rng.standard_normal(x.shape)
        return x

    @property
    def has_ties(self) -> bool:
        """Whether any column repeats a value."""
        return any(steps is not None for steps in self.half_steps)


def relative_precision(X: Any) -> Precision:
    """Relative precision that the columns of X were given with, a float or one per column.

    Parameters
    ----------
    X : array-like
        As a user passes it: an array, tensor or frame; lists count as float64.

    Returns
    -------
    float or ndarray of shape (n_features,)
    """

    def of(dtype):
        name = str(dtype).lower()
        for kind, precision in _PRECISIONS.items():
            if kind in name:
                return precision
        return 2.0**-52

    if hasattr(X, "columns") and hasattr(X, "dtypes"):
        return np.array([of(dtype) for dtype in X.dtypes])
    return of(getattr(X, "dtype", ""))


_PRECISIONS = {
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
    "halffloat": 2.0**-10,
    "float32": 2.0**-23,
    "float[pyarrow]": 2.0**-23,
}


def merge_near_ties(X: np.ndarray, precision: Precision = 2.0**-52) -> FloatArray:
    """X, with one value for values that differ by rounding dust only.

    Values of a column are one if they lie within 1e-8 of its spread (the standard deviation of
    what lies outside of the largest heap of such values), or within a few roundings of its
    largest number, and if hardly any distance between neighbours is up to a thousand times as
    large: zeros with dust of 1e-17, or tenths of which some were divided and some multiplied. They
    would be needles, of which a likelihood cannot get enough. The value in the middle stays.

    Parameters
    ----------
    X : ndarray of shape (n, n_features)
    precision : float or ndarray of shape (n_features,)
        As of :func:`relative_precision`.

    Returns
    -------
    ndarray of shape (n, n_features)
    """
    X = X.copy()
    for column, roundings in zip(X.T, np.broadcast_to(precision, X.shape[1]), strict=True):
        order = np.argsort(column, kind="stable")
        values = column[order]
        heap = _heaps(values, max(DUST_OF_LARGEST, 4.0 * roundings))
        if heap is not None:
            first, count = np.unique(heap, return_index=True, return_counts=True)[1:]
            column[order] = values[first + count // 2][heap]
    return X


def _heaps(values: FloatArray, roundings: float) -> NDArray[np.int_] | None:
    """Labels 0, 1, ... of sorted values, the same within rounding dust; None without any."""
    gaps = np.diff(values)
    positive = np.sort(gaps[gaps > 0])
    allowed = roundings * np.abs(values).max()
    widest = max(DUST_OF_SPREAD * np.ptp(values), allowed)
    candidates = np.arange(np.searchsorted(positive, widest, side="right"))
    larger = np.searchsorted(positive, DUST_GAP * positive[candidates], side="right")
    larger -= candidates + 1
    for i in candidates[larger <= DUST_FEW * (candidates + 1)][::-1]:
        heap = np.r_[0, np.cumsum(gaps > positive[i])]
        first, count = np.unique(heap, return_index=True, return_counts=True)[1:]
        width = (values[first + count - 1] - values[first]).max()
        rest = values[heap != np.argmax(count)]
        spread = rest.std() if len(rest) else 0.0
        if width <= max(DUST_OF_SPREAD * spread, allowed):
            return heap
    return None


def _resolutions(x: np.ndarray) -> tuple:
    return tuple(_half_steps(column) for column in x.T)


def _half_steps(column):
    """Distinct values and half the gap to the nearest one, at most half the median gap."""
    values = np.unique(column)
    if len(values) == len(column):
        return None
    gaps = np.diff(values)
    padded = np.r_[np.inf, gaps, np.inf]
    gap = np.minimum(np.minimum(padded[1:], padded[:-1]), np.median(gaps))
    return values, 0.5 * gap


def scott(x: Any) -> float:
    """Scott's rule, in standard deviations, for rows of shape (n, d)."""
    n, d = x.shape
    return n ** (-1.0 / (d + 4))
