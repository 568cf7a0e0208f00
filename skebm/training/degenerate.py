"""Columns that have no density of their own, or one that means nothing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skebm._typing import FloatArray
from skebm._warnings import warn

from .precision import Precision

MIN_SURPRISE = 10.0
"""n^2 / (2 R): minus the log of the chance that n draws from R values are all different."""

MAX_ROWS = 5_000
"""Rows that show which columns may depend on others; all rows then have to agree."""

RESIDUAL = 1e-9
"""Share of its spread that a column may differ by from a combination of others, in doubles."""


def warn_of_degenerate_columns(
    X: FloatArray, names: Any, precision: Precision, is_number: NDArray[np.bool_]
) -> None:
    """Warn of columns that number the rows, and of exact linear combinations of others.

    Parameters
    ----------
    X : ndarray of shape (n_rows, n_features)
    names : sequence
        Of the columns.
    precision : float or ndarray of shape (n_features,)
        Relative precision of what was given.
    is_number : ndarray of bool of shape (n_features,)
        Columns that are no categories.
    """
    precision = np.broadcast_to(precision, X.shape[1])
    is_number = is_number & ~np.isnan(X).any(axis=0)  # others have a column of states in between
    varying = np.flatnonzero((X.min(axis=0) < X.max(axis=0)) & is_number)
    if not len(varying):
        return
    for j in varying:
        if numbers_rows(X[:, j]):
            warn(
                f"column {names[j]!r} numbers the rows: its values are all different, at equal "
                "steps, and nearly without gaps. Its density means nothing; leave it out."
            )
    spread = X[:, varying].std(axis=0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        z = (X[:, varying] - X[:, varying].mean(axis=0)) / spread
        size = np.abs(X[:, varying]).max(axis=0) / spread
    if not np.isfinite(z).all():
        return
    # a column far from zero is known to fewer digits of its spread
    share = np.maximum(RESIDUAL, 8.0 * precision[varying] * size)
    for j, others in dependent_columns(z, share):
        listed = ", ".join(repr(names[varying[i]]) for i in others[:5])
        listed += ", ..." if len(others) > 5 else ""
        warn(
            f"column {names[varying[j]]!r} is an exact linear combination of {listed}: together "
            "they have no density, and the likelihood has no limit. Leave it out."
        )


def numbers_rows(column: FloatArray) -> bool:
    """Whether values are all different on so small a grid that they cannot be independent draws.

    Parameters
    ----------
    column : ndarray of shape (n_rows,)

    Returns
    -------
    bool
    """
    values = np.sort(column)
    gaps = np.diff(values)
    step = gaps.min()
    if step <= 0:
        return False
    with np.errstate(over="ignore"):
        steps = (values[-1] - values[0]) / step
    if not len(column) ** 2 > 2.0 * MIN_SURPRISE * steps:
        return False
    whole = gaps / step
    return bool(np.abs(whole - np.round(whole)).max() < 1e-3)


def dependent_columns(z: FloatArray, share: FloatArray) -> Iterator[tuple[int, np.ndarray]]:
    """Columns that others determine.

    Parameters
    ----------
    z : ndarray of shape (n_rows, d)
        Standardised columns.
    share : ndarray of shape (d,)
        Standard deviation of what others leave of a column, below which it counts as nothing.

    Yields
    ------
    column : int
    others : ndarray of int
        Those that take part.
    """
    from scipy.linalg import qr

    n, d = z.shape
    if n <= d + 1:  # any column is then a combination of the others
        return
    some = z[np.linspace(0, n - 1, min(n, max(MAX_ROWS, 4 * d))).astype(int)]
    _, r, order = qr(some - some.mean(axis=0), mode="economic", pivoting=True)  # pyright: ignore[reportAssignmentType]
    size = np.abs(np.diag(r)) / np.sqrt(len(some))
    rank = int((size > share.max() * np.sqrt(d)).sum())
    kept = order[:rank]
    for j in order[rank:]:
        weights, *_ = np.linalg.lstsq(some[:, kept], some[:, j], rcond=None)
        if (z[:, j] - z[:, kept] @ weights).std() <= share.max() * np.sqrt(d):
            yield int(j), np.sort(kept[np.abs(weights) > 1e-6])
