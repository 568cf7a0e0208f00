"""Cells that a user gives: some of a row, or of several rows."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skebm._containers import as_table, container_of, labels, values_of
from skebm._tensors import without_tensors
from skebm._typing import FloatArray

from ._schema import Schema, numbers_of


class _Unknown:
    """The type of `UNKNOWN`, of which there is one."""

    def __repr__(self) -> str:
        return "skebm.UNKNOWN"

    def __reduce__(self) -> str:
        return "UNKNOWN"


UNKNOWN = _Unknown()
"""Marks a cell that is not given, in a table of conditions. NaN and None are missing cells, which
a density may know as a state."""


class Given(NamedTuple):
    """Given cells.

    Attributes
    ----------
    rows : ndarray of shape (n_rows, n_features)
        Numbers, and codes of categories; NaN in cells that are missing, or not given.
    known : ndarray of bool of shape (n_rows, n_features)
        Which cells are given.
    index : Any
        Labels of the rows, of a pandas frame; None for other tables.
    """

    rows: FloatArray
    known: NDArray[np.bool_]
    index: Any = None


def read_given(given: Any, schema: Schema, names: Any, what: str = "given") -> Given:
    """Cells as numbers, and which ones there are.

    Parameters
    ----------
    given : mapping, frame or array-like
        A mapping from names of columns to cells, or to lists of cells of several rows; a frame with
        some of the columns; or a table with all of them.
    schema : Schema
        Of the table of the fit.
    names : sequence
        Of the columns.
    what : str, default="given"
        Name of the argument, for messages.

    Returns
    -------
    Given

    Raises
    ------
    ValueError
        For a column that the fit has not seen, cells that are no numbers in a column of numbers,
        infinity, or columns of unequal lengths.
    """
    cells, index = _columns(without_tensors(given), names, what)
    if not cells:
        raise ValueError(f"{what} has no column: name at least one of {list(names)}.")
    lengths = {len(column) for column in cells.values()}
    n_rows = max(lengths)
    if not lengths <= {1, n_rows}:
        raise ValueError(f"the columns of {what} have different lengths, {sorted(lengths)}.")
    places = {name: j for j, name in enumerate(names)}
    rows = np.full((n_rows, len(places)), np.nan)
    known = np.zeros(rows.shape, dtype=bool)
    for name, column in cells.items():
        if name not in places:
            raise ValueError(
                f"{what} has a column {name!r}, which fit has not seen; its columns are "
                f"{list(names)}."
            )
        j = places[name]
        open = np.array([cell is UNKNOWN for cell in column])
        known[:, j] = ~open
        table = np.empty((len(column), 1), dtype=object)
        table[:, 0] = [None if cell is UNKNOWN else cell for cell in column]
        is_category = bool(schema.columns) and schema.columns[j].is_category
        numbers = schema.columns[j].codes(table, 0) if is_category else numbers_of(table, 0, name)
        if np.isinf(numbers).any():
            raise ValueError(f"column {name!r} of {what} contains infinity.")
        rows[:, j] = numbers
    return Given(rows, known, index)


def _columns(given, names, what):
    """Cells of the columns that are given, by name, and the labels of the rows."""
    if hasattr(given, "items") and not hasattr(given, "columns"):  # a mapping, or a Series
        cells = {}
        for name, value in given.items():
            is_one = isinstance(value, str | bytes) or np.ndim(value) == 0
            column = np.empty(1 if is_one else len(value), dtype=object)
            column[:] = [value] if is_one else list(value)
            cells[name] = column
        return cells, None
    table = as_table(given)
    container = container_of(table)
    if container == "none":
        raise ValueError(
            f"{what} must be a mapping from names of columns to cells, a frame, or a table of "
            f"{len(names)} columns, and is a {type(given).__name__}."
        )
    found = labels(table)
    if container == "array":
        if len(found) != len(names):
            raise ValueError(
                f"{what} has {len(found)} columns, and fit has seen {len(names)}; mark cells that "
                "are not given by skebm.UNKNOWN, or name the others in a mapping."
            )
        found = list(names)
    index = getattr(table, "index", None) if container == "pandas" else None
    return {name: values_of(table, j) for j, name in enumerate(found)}, index
