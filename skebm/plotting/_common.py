"""What the displays share: the import of matplotlib, the colours, the names of columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from skebm._containers import is_missing, values_of

DATA_COLOR = "#3b4a63"
MODEL_COLOR = "#e07b39"
MARK_COLOR = "#b3261e"
# Of kinds of rows, or of columns: told apart from each other, and from the mark.
COLORS = (DATA_COLOR, MODEL_COLOR, "#2a9d8f", "#8a63c9", "#b08900", "#3a86c8", "#c2498f", "0.55")


def import_pyplot(caller: str) -> Any:
    """Return ``matplotlib.pyplot``, or say who needs it and how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which is not installed. "
            "Install it with: pip install 'skebm[plot]'"
        ) from error
    return plt


def to_array(X: ArrayLike) -> np.ndarray:
    """X as a 2-D float array; data frames and tensors included."""
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2:
        raise ValueError(f"Expected a table of shape (n_samples, n_features), got {X.shape}.")
    return X


def coded(*tables: Any) -> tuple[list[np.ndarray], list[list[Any] | None]]:
    """Tables of the same columns as arrays of floats, categories as codes.

    Parameters
    ----------
    *tables : array-like of shape (n_samples, n_features)

    Returns
    -------
    arrays : list of ndarray
        NaN where a cell is missing.
    levels : list of (list or None), one per column
        Categories in the order of their codes; None for columns of numbers.
    """
    parts = [[_cells(table, j) for j in range(np.shape(table)[1])] for table in tables]
    arrays, levels = [np.empty(np.shape(table)) for table in tables], []
    for j, columns in enumerate(zip(*parts, strict=True)):
        try:
            numbers = [np.array(column, dtype=np.float64) for column in columns]
            levels.append(None)
        except (TypeError, ValueError):
            met = {value for column in columns for value in column if value == value}  # noqa: PLR0124
            order = sorted(met - {None}, key=str)
            places = {level: i for i, level in enumerate(order)}
            numbers = [[places.get(value, np.nan) for value in column] for column in columns]
            levels.append(order)
        for array, column in zip(arrays, numbers, strict=True):
            array[:, j] = column
    return arrays, levels


def _cells(table, j):
    """Cells of column j, booleans as text, missing ones as NaN."""
    values = [np.nan if is_missing(value) else value for value in values_of(table, j)]
    if any(isinstance(value, bool | np.bool_) for value in values):
        return [value if is_missing(value) else str(value) for value in values]
    return values


def column_names(estimator: Any, X: Any = None, n_features: int | None = None) -> list:
    """Names of the columns: those of X, else those seen in ``fit``, else x0, x1, ..."""
    names = getattr(X, "columns", None)
    if names is None:
        names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        names = [f"x{j}" for j in range(n_features)]  # pyright: ignore[reportArgumentType]
    return [str(name) for name in names]


def positions(columns: Sequence[Any], names: list) -> list[int]:
    """Positions of columns given by number or by name."""
    unknown = [c for c in columns if isinstance(c, str) and c not in names]
    if unknown:
        raise ValueError(f"No column named {unknown[0]!r}; the columns are {names}.")
    return [names.index(c) if isinstance(c, str) else int(c) for c in columns]


def tidy(ax: Any) -> None:
    """Leave the two spines that carry the scales."""
    ax.spines[["top", "right"]].set_visible(False)


def above(ax: Any, handles: Any, labels: Any) -> None:
    """Put the legend above the axes, where it covers no data."""
    ax.legend(
        handles,
        labels,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=2,
        borderaxespad=0.0,
        handlelength=1.6,
        columnspacing=1.4,
    )
