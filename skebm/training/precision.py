"""How precisely the values of a table were given, and which of them are one but for rounding."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from skebm._typing import FloatArray

Precision: TypeAlias = float | FloatArray
"""Relative precision of the values of X, a float or one per column."""

DUST_OF_SPREAD, DUST_OF_LARGEST = 1e-8, 1e-12
"""Values so close, as a share of the spread of a column or of its largest number, may be one."""

DUST_GAP, DUST_FEW = 1e3, 0.05
"""They are one where, for each distance between them, at most so many distances are up to so many
times as large: the second and the first number."""


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
        order = order[: np.count_nonzero(~np.isnan(column))]  # NaN comes last
        values = column[order]
        if not len(values):
            continue
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
