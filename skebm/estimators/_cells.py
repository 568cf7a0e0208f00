"""Cells that are no numbers: dates, text, gaps, infinity; refused by the name of their column."""

import datetime
from typing import Any, NamedTuple

import numpy as np

from skebm._containers import is_number

NUMBERS = "fiub"
"""Kinds of numpy dtypes whose cells are what they seem."""

TIMES = {
    "M": "dates or times; turn it into numbers of a unit of your choice, such as "
    "(column - column.min()).dt.total_seconds()",
    "m": "durations; turn it into numbers of a unit of your choice, such as "
    "column.dt.total_seconds()",
}


def refuse_what_would_be_read_through(X: Any, what: str = "X") -> None:
    """Raise for masked cells, dates and durations, which numpy takes for numbers.

    Parameters
    ----------
    X : array-like
        As a user passes it.
    what : str, default="X"
        Its name.

    Raises
    ------
    ValueError
        That names the column, its name in a frame and its index in an array.
    """
    if np.ma.isMaskedArray(X) and np.ma.is_masked(X):
        where = np.argwhere(np.ma.getmaskarray(X))
        cell = f"column {where[0][1]}, row {where[0][0]}" if X.ndim == 2 else f"row {where[0][0]}"
        raise ValueError(
            f"{what} is a masked array with {len(where)} masked cell(s), the first in {cell}: "
            "masks are not read. Leave out such rows, or fill them in: with NaN for missing cells, "
            "or for example by sklearn.impute.SimpleImputer."
        )
    for name, column in _columns(X):
        if getattr(getattr(column, "dtype", None), "kind", "O") in NUMBERS:
            continue
        kind = _kind_of_time(np.asarray(column))
        if kind is not None:
            raise ValueError(f"column {name!r} of {what} holds {TIMES[kind]}, or leave it out.")


class Remedies(NamedTuple):
    """What an estimator offers for cells that are no numbers, in words."""

    missing: str = "NCEDensity and ImplicitVAE model missing cells"
    category: str = "NCEDensity and ImplicitVAE model the categories of a DataFrame"


def bad_cell(X: Any, remedies: Remedies, *, takes_missing: bool) -> str | None:
    """What is wrong with the first column that cannot be modelled, or None.

    Parameters
    ----------
    X : array-like
        As a user passes it.
    remedies : Remedies
    takes_missing : bool
        Whether a missing cell is nothing wrong.

    Returns
    -------
    str or None
        With the column, a row and what to do.
    """
    for name, column in _columns(X):
        missing = np.zeros(len(column), dtype=bool)
        if hasattr(column, "isna"):  # gaps of pandas have no number
            missing = np.asarray(column.isna(), dtype=bool)
        values = np.asarray(column)
        for row, value in enumerate(values if values.dtype.kind in "OUS" else ()):
            if isinstance(value, str | bytes) and not missing[row] and not is_number(value):
                return (
                    f"column {name!r} holds text ({str(value)!r} in row {row}), and is taken for "
                    f"numbers: {remedies.category}; or leave it out."
                )
        try:
            if missing.any():
                values = values.astype(object)
                values[missing] = np.nan
            numbers = values.astype(np.float64)
        except (TypeError, ValueError):  # an object, of which scikit-learn says what it is
            return None
        for is_bad, found, repair in (
            (np.isnan, "NaN, a missing value", "fill them in, for example by "
             f"sklearn.impute.SimpleImputer ({remedies.missing})"),
            (np.isinf, "infinity", "clip them to finite values"),
        ):  # fmt: skip
            rows = np.flatnonzero(is_bad(numbers))
            if len(rows) and not (takes_missing and is_bad is np.isnan):
                return (
                    f"column {name!r} contains {found}, in {len(rows)} row(s), the first of them "
                    f"row {rows[0]}: leave such rows out, or {repair}."
                )
    return None


def _columns(X):
    """Pairs of the name and the values of every column; none for what is no table of cells."""
    if hasattr(X, "columns") and hasattr(X, "dtypes"):  # pandas, polars
        by_position = X.iloc if hasattr(X, "iloc") else X
        return [(name, by_position[:, j]) for j, name in enumerate(X.columns)]
    try:
        values = np.asarray(X)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor that numpy cannot read
        return []
    return list(enumerate(values.T)) if values.ndim == 2 else []


def _kind_of_time(values):
    if values.dtype.kind in TIMES:
        return values.dtype.kind
    if values.dtype.kind == "O":
        for value in values:
            if isinstance(value, datetime.timedelta | np.timedelta64):
                return "m"
            if isinstance(value, datetime.date | datetime.time | np.datetime64):
                return "M"
            if type(value).__name__ == "Period":
                return "M"
    return None
