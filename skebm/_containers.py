"""Tables as users pass them, of numpy, pandas and polars: their cells, and new rows like them."""

from typing import Any

import numpy as np


def like(X: Any, rows: np.ndarray) -> Any:
    """New rows in the container of X, so that an estimator fitted on names sees its names."""
    if hasattr(X, "iloc"):  # pandas
        return type(X)(rows, columns=X.columns)
    if hasattr(X, "schema"):  # polars
        return type(X)(rows, schema=list(X.columns))
    return rows


def as_table(X: Any) -> Any:
    """Lists of rows as an array of their cells; any other table as it is.

    Raises
    ------
    TypeError
        For a frame whose rows are not there yet.
    """
    if type(X).__name__ == "LazyFrame":
        raise TypeError("X is a LazyFrame, whose rows are not there yet: pass X.collect().")
    if not isinstance(X, list | tuple):
        return X
    try:
        cells = np.array(X, dtype=object)
    except ValueError:  # ragged, of which scikit-learn says what is wrong
        return X
    return cells if cells.ndim == 2 else X


def container_of(X: Any) -> str:
    """What kind of table X is: "pandas", "polars", "array", or "none" for what is no table."""
    if hasattr(X, "columns") and hasattr(X, "dtypes"):
        module = type(X).__module__.partition(".")[0]
        return module if module in ("pandas", "polars") else "none"
    return "array" if isinstance(X, np.ndarray) and X.ndim == 2 else "none"


def labels(X: Any) -> list[Any]:
    """Labels of the columns of a table, numbers for those of an array."""
    container = container_of(X)
    if container == "array":
        return list(range(np.shape(X)[1]))
    return [] if container == "none" else list(X.columns)


def is_missing(value: Any) -> bool:
    """Whether a cell holds None, NaN, pandas.NA or NaT."""
    return value is None or type(value).__name__ in ("NAType", "NaTType") or value != value  # noqa: PLR0124


def values_of(X: Any, j: int) -> np.ndarray:
    """Cells of column j as objects."""
    container = container_of(X)
    if container == "pandas":
        return np.asarray(X.iloc[:, j], dtype=object)
    if container == "polars":
        values = np.empty(len(X), dtype=object)
        values[:] = X[:, j].to_list()
        return values
    return np.asarray(X[:, j], dtype=object)


def dtype_of(X: Any, j: int) -> Any:
    """Dtype of column j; of lists that of doubles."""
    container = container_of(X)
    if container == "pandas":
        return X.dtypes.iloc[j]
    if container == "polars":
        return X.dtypes[j]
    return getattr(X, "dtype", np.dtype(float))


def is_number(value: Any) -> bool:
    """Whether a cell can be read as a number."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
