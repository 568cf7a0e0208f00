"""What a density has to know of a transformer: where it maps from and to, and how it stretches."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    PowerTransformer,
    RobustScaler,
    StandardScaler,
)

from skebm._containers import like
from skebm._sklearn_compat import _safe_indexing, power_standardization
from skebm._typing import FloatArray
from skebm._warnings import warn

ROUNDING = 1e-9
"""How far beyond a bound, in units of the range, a value is still taken to be in it."""

ROUND_TRIP = 1e-6
"""Largest change of a value, relative to 1 + its size, on the way to X and back."""

LARGEST_EXPONENT = 700.0
"""Powers are finite below exp of it."""

N_CHECKED, SLOPE_STEP, SLOPE_GAP = 25, 1e-5, 0.05
"""Rows at which a given log-determinant is compared with finite differences, their step in
interquartile ranges, and the gap in nats from which on the comparison warns."""

RowTest: TypeAlias = Callable[[FloatArray], NDArray[np.bool_]]
"""Rows to whether something holds for them, (n, d) -> (n,)."""


@dataclass(frozen=True)
class Change:
    """A change of variables x -> z, of rows as arrays.

    Attributes
    ----------
    log_det : callable
        log |det dz / dx|, (n, d) -> (n,), or (n, d) where columns are mapped each for itself.
    in_domain : callable or None
        Which rows x have a z, (n, d) -> (n,); None: all for which z is finite.
    in_image : callable or None
        Which rows z have an x, (n, d) -> (n,); None: all for which x is finite.
    """

    log_det: Callable[[FloatArray], FloatArray]
    in_domain: RowTest | None = None
    in_image: RowTest | None = None


def refuse_unknown(name: str, transformer: Any, n_features: int) -> None:
    """Raise where a step cannot belong to a pipeline of densities, before it is fitted."""
    kind, changes = type(transformer), _changes()
    if changes.get(kind) is _rotated:
        n = transformer.n_components
        if isinstance(n, int | np.integer) and n < n_features:
            raise ValueError(_few_components(name, n, n_features))
        return
    if kind is FunctionTransformer and not _is_identity(transformer):
        raise ValueError(
            f"step {name!r}, {transformer!r}, has no log-determinant. Take "
            "skebm.compose.InvertibleFunctionTransformer(func, inverse_func, log_det)."
        )
    if kind in changes or _is_given(transformer):
        return
    known = ", ".join(sorted(k.__name__ for k in changes))
    raise ValueError(
        f"step {name!r}, {kind.__name__}, is not known to be invertible, so that a log-density "
        f"behind it has no units of X. Take one of {known}; InvertibleFunctionTransformer; a "
        "transformer of yours with inverse_transform and log_abs_det_jacobian; or, without units "
        "of X, sklearn.pipeline.Pipeline."
    )


def change_of(name: str, transformer: Any, seen: Any) -> Change:
    """The change of variables that a fitted transformer makes.

    Parameters
    ----------
    name : str
        Of the step, for messages.
    transformer : object
    seen : array-like of shape (0, n_features)
        The container of the rows that it was fitted on.

    Returns
    -------
    Change
    """
    make = _changes().get(type(transformer))
    return _given(name, transformer, seen) if make is None else make(name, transformer)


def as_rows(X: Any) -> FloatArray:
    """Rows of any container as an array of float64."""
    return np.asarray(X, dtype=np.float64)


def _few_components(name, n, n_features):
    return (
        f"step {name!r}, PCA, keeps {n} of {n_features} components, so that a log-density behind "
        "it is one of fewer columns and has no units of X. Take all of them, or a plain "
        "sklearn.pipeline.Pipeline, whose log-densities compare with no other's."
    )


def _is_identity(transformer):
    return transformer.func is None and transformer.inverse_func is None


def _is_given(transformer):
    return all(
        callable(getattr(transformer, method, None))
        for method in ("log_abs_det_jacobian", "inverse_transform")
    )


# ---------------------------------------------------------------------- column by column


def _scaled_by(factor):
    """Columns multiplied by constants, None for ones."""

    def log_det(x):
        return np.zeros_like(x) if factor is None else np.broadcast_to(np.log(factor), x.shape)

    return log_det


def _within(x, low, high):
    slack = ROUNDING * (high - low)
    return ((x >= low - slack) & (x <= high + slack)).all(axis=1)


def _divides(name, transformer):
    scale = transformer.scale_
    return Change(_scaled_by(None if scale is None else 1.0 / scale))


def _clipped(log_det, domain, image):
    return Change(log_det, lambda x: _within(x, *domain), lambda z: _within(z, *image))


def _min_max(name, transformer):
    log_det = _scaled_by(transformer.scale_)
    if not transformer.clip:
        return Change(log_det)
    ends = transformer.data_min_, transformer.data_max_
    return _clipped(log_det, ends, transformer.feature_range)


def _max_abs(name, transformer):
    change = _divides(name, transformer)
    if not getattr(transformer, "clip", False):  # new in scikit-learn 1.7
        return change
    return _clipped(change.log_det, (-transformer.scale_, transformer.scale_), (-1.0, 1.0))


def _identity(name, transformer):
    return Change(_scaled_by(None))


def _power(name, transformer):
    mean, scale = power_standardization(transformer)
    power = transformer.lambdas_
    if transformer.method == "box-cox":
        # (x^p - 1) / p ends at -1 / p: below for positive powers, above for negative ones
        low, high = _end(power, power > 0, -np.inf), _end(power, power < 0, np.inf)

        def in_domain(x):
            return (x > 0.0).all(axis=1) & _holds(power * np.log(np.where(x > 0.0, x, 1.0)))
    else:
        # the same of 1 + x for x >= 0, and of 1 - x with the power 2 - p, mirrored, for the others
        low, high = -_end(2.0 - power, power > 2.0, np.inf), _end(power, power < 0, np.inf)

        def in_domain(x):
            return _holds(np.where(x < 0.0, 2.0 - power, power) * np.log1p(np.abs(x)))

    def log_det(x):
        if transformer.method == "box-cox":
            slope = (power - 1.0) * np.log(x)
        else:
            slope = np.sign(x) * (power - 1.0) * np.log1p(np.abs(x))
        return slope - np.log(scale)

    def in_image(z):
        raw = mean + scale * z
        return ((raw > low) & (raw < high)).all(axis=1)

    bounded = np.isfinite(low).any() or np.isfinite(high).any()
    return Change(log_det, in_domain, in_image if bounded else None)


def _end(power, there, elsewhere):
    """Where powers end: at -1 / power where `there`."""
    return np.divide(-1.0, power, out=np.full_like(power, elsewhere), where=there)


def _holds(exponent):
    """Rows whose powers do not overflow, at which scikit-learn stops."""
    return (exponent < LARGEST_EXPONENT).all(axis=1)


# ---------------------------------------------------------------------- all columns at once


def _rotated(name, transformer):
    n, d = transformer.n_components_, transformer.n_features_in_
    if n < d:
        raise ValueError(_few_components(name, n, d))
    variances = transformer.explained_variance_
    if variances[-1] <= variances[0] * max(transformer.n_samples_, d) * np.finfo(np.float64).eps:
        raise ValueError(
            f"step {name!r}, PCA: the rows lie in fewer than {d} dimensions, to its precision, and "
            "have no density there. Leave constant and collinear columns out; a StandardScaler "
            "before it evens out the scales of columns."
        )
    shrinking = 0.5 * np.log(variances).sum() if transformer.whiten else 0.0
    return Change(lambda x: np.full(len(x), -shrinking))


def _given(name, transformer, seen):
    """That of a transformer which says its log-determinant; the image is found by going back."""

    def log_det(x):
        values = as_rows(transformer.log_abs_det_jacobian(like(seen, x)))
        if values.shape not in (x.shape, x.shape[:1]) or np.isnan(values).any():
            raise ValueError(
                f"step {name!r}: its log-determinant must be numbers of shape {x.shape[:1]} or "
                f"{x.shape}, not NaN; got shape {values.shape}."
            )
        return values

    def in_image(z):
        there = np.zeros(len(z), dtype=bool)
        x = as_rows(transformer.inverse_transform(z))
        met = np.isfinite(x).all(axis=1)
        if met.any():
            again = as_rows(transformer.transform(like(seen, x[met])))
            near = np.abs(again - z[met]) <= ROUND_TRIP * (1.0 + np.abs(z[met]))  # NaN is not
            there[met] = near.all(axis=1)
        return there

    return Change(log_det, None, in_image)


def check_given(name: str, transformer: Any, X: Any) -> None:
    """Warn where inverse or log-determinant of a transformer of users are not its own.

    Parameters
    ----------
    name : str
    transformer : object
        Fitted.
    X : array-like of shape (n_samples, n_features)
        Rows as the transformer was fitted on.
    """
    if type(transformer) in _changes():
        return
    rows = as_rows(X)
    low, high = np.quantile(rows, [0.25, 0.75], axis=0)
    step = SLOPE_STEP * np.where(high > low, high - low, 1.0)
    x = rows[np.linspace(0, len(rows) - 1, min(N_CHECKED, len(rows))).astype(int)]
    slopes = np.empty((len(x), *rows.shape[1:], *rows.shape[1:]))
    change = change_of(name, transformer, X[:0])
    with np.errstate(all="ignore"):
        back = change.in_image(as_rows(transformer.transform(like(X[:0], x))))
        for j, h in enumerate(step):
            move = h * (np.arange(len(step)) == j)
            ends = [as_rows(transformer.transform(like(X[:0], x + s * move))) for s in (1, -1)]
            slopes[:, :, j] = (ends[0] - ends[1]) / (2.0 * h)
        found = np.linalg.slogdet(slopes)[1]
        gap = change.log_det(x).reshape(len(x), -1).sum(axis=1) - found
    if not back.all():
        warn(
            f"step {name!r}: its inverse does not bring {len(x) - back.sum()} of {len(x)} rows "
            "back, so that the pipeline will take them for impossible."
        )
    gap = gap[np.isfinite(gap)]
    if len(gap) and abs(np.median(gap)) > SLOPE_GAP:
        warn(
            f"step {name!r}: its log-determinant differs by {np.median(gap):.3g} nats (median of "
            f"{len(gap)} rows) from what finite differences find, and the log-densities of the "
            "pipeline will be wrong by as much."
        )


@functools.cache
def _changes():
    """Makers of changes, of exactly these classes: a subclass may transform in another way."""
    from sklearn.decomposition import PCA  # here: few need it, and its import is slow

    return {
        FunctionTransformer: _identity,
        MaxAbsScaler: _max_abs,
        MinMaxScaler: _min_max,
        PCA: _rotated,
        PowerTransformer: _power,
        RobustScaler: _divides,
        StandardScaler: _divides,
    }


def filled(rows: FloatArray, transformer: Any, *, of_image: bool) -> FloatArray:
    """Rows with numbers of the domain, or the image, of a transformer where they are missing."""
    missing = np.isnan(rows)
    if not missing.any():
        return rows
    valid = transformer.inverse_transform(np.zeros((1, rows.shape[1])))
    return np.where(missing, as_rows(transformer.transform(valid) if of_image else valid), rows)


def is_finite(to: FloatArray, of: FloatArray) -> NDArray[np.bool_]:
    """Which rows are finite, or missing only where they were; (n,) of bool."""
    finite: Any = np.isfinite(to)
    if to.shape == of.shape:
        finite = finite | np.isnan(of)
    return finite.all(axis=1)


def kept(inside: NDArray[np.bool_], *tables: Any) -> Sequence[Any]:
    """The rows of every table that are inside."""
    if inside.all():
        return tables
    return [_safe_indexing(table, np.flatnonzero(inside)) for table in tables]
