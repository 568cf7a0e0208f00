"""How the cells of a table become numbers, and rows of numbers a table like it again."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from skebm._containers import container_of, dtype_of, is_missing, is_number, labels, values_of
from skebm._typing import FloatArray

from ._frames import pandas_of, polars_of

MAX_LEVELS = 255
"""Categories of a column, at most: codes of trees are a byte."""

FEW_LEVELS, MAX_LEVEL_SHARE = 10, 0.1
"""A column with more categories than the first number, and than this share of the rows, is taken
for an identifier."""

UNSEEN = -1.0
"""Code of a category that was not met in `fit`."""


@dataclass(frozen=True)
class CellColumn:
    """One column of a table, as it was fitted.

    Attributes
    ----------
    name : hashable
        Its label in a frame, its number in an array.
    dtype : str
        Name of its dtype.
    is_category : bool
    levels : tuple
        Categories that were met, the state of code 0 first.
    pooled : tuple of (level, share)
        Rare categories that share the last code, and how often each is met there.
    dtype_levels : tuple or None
        All categories of a categorical dtype.
    ordered : bool
        Whether that dtype is ordered.
    """

    name: Any
    dtype: str
    is_category: bool = False
    levels: tuple[Any, ...] = ()
    pooled: tuple[tuple[Any, float], ...] = ()
    dtype_levels: tuple[Any, ...] | None = None
    ordered: bool = False

    @property
    def n_categories(self) -> int:
        """Codes of its categories; 0 for a column of numbers."""
        return len(self.levels) + bool(self.pooled) if self.is_category else 0

    @property
    def is_whole(self) -> bool:
        """Whether its dtype holds whole numbers alone."""
        return not self.is_category and self.dtype.lower().startswith(("int", "uint", "bool"))

    def numbers(self, values: FloatArray) -> FloatArray:
        """Numbers that its dtype can hold: whole ones, none beyond its range."""
        if not self.is_whole:
            return values
        name = self.dtype.lower().partition("[")[0]
        bits = 1 if name.startswith("bool") else int(name.removeprefix("u").removeprefix("int"))
        low = -(2.0 ** (bits - 1)) if name.startswith("int") else 0.0
        high = low + 2.0**bits - 1
        if bits == 64:  # which rounds to a number that is one too large
            high = np.nextafter(high, 0.0)
        return np.round(values).clip(low, high)

    def codes(self, X: Any, j: int) -> FloatArray:
        """Codes of column j of X, NaN where it is missing, -1 where a category was not met."""
        places = {level: i for i, level in enumerate(self.levels)}
        places |= {level: len(self.levels) for level, _ in self.pooled}
        if container_of(X) == "pandas":  # millions of cells take no time there
            column = X.iloc[:, j].astype(object)
            codes = column.map(places).to_numpy(dtype=np.float64)
            return np.where(np.isnan(codes) & column.notna().to_numpy(), UNSEEN, codes)
        values = values_of(X, j)
        unseen = UNSEEN
        return np.array(
            [np.nan if is_missing(v) else places.get(_plain(v), unseen) for v in values],
            dtype=float,
        )

    def cells(self, codes: FloatArray, rng: np.random.RandomState | None) -> np.ndarray:
        """Categories of codes, None where they are missing; one of the rare ones by its share.

        Without a random stream it is the most frequent of them.
        """
        shown = np.empty(len(self.levels) + len(self.pooled) + 1, dtype=object)  # None at the end
        shown[:-1] = [*self.levels, *(level for level, _ in self.pooled)]
        at = np.where(np.isnan(codes), -1.0, codes).astype(int)
        rare = np.flatnonzero(at == len(self.levels)) if self.pooled else []
        if len(rare):
            shares = [share for _, share in self.pooled]
            own = np.argmax(shares) if rng is None else rng.choice(len(shares), len(rare), p=shares)
            at[rare] += own
        return shown[at]


@dataclass(frozen=True)
class Schema:
    """How cells of a table become numbers, and rows of numbers a table again.

    Categories become codes 0, 1, ..., missing cells NaN.

    Attributes
    ----------
    container : {"array", "pandas", "polars"}
        What `fit` was given.
    columns : tuple of CellColumn
    """

    container: str
    columns: tuple[CellColumn, ...] = field(default=())

    @classmethod
    def learn(cls, X: Any, categorical_features: Any, max_categories: int | None) -> Self:
        """Find out which columns of X hold categories, and which.

        Raises
        ------
        ValueError
            That names the column, where there are too many, or `categorical_features`.
        """
        container, names = container_of(X), labels(X)
        asked = _asked(categorical_features, names)
        columns = []
        for j, name in enumerate(names):
            dtype = dtype_of(X, j)
            is_category = _holds_categories(X, j) if asked is None else bool(asked[j])
            if not is_category or container == "none":
                columns.append(CellColumn(name, str(dtype)))
                continue
            levels, counts = _levels(X, j, name, dtype)
            kept, pooled = _pool(levels, counts, max_categories)
            n_codes, n_rows = len(kept) + bool(pooled), len(X)
            allowed = min(MAX_LEVELS, max(FEW_LEVELS, MAX_LEVEL_SHARE * n_rows))
            if n_codes > allowed:
                raise ValueError(
                    f"column {name!r} holds {n_codes} different categories in {n_rows} rows, and "
                    f"at most {int(allowed)} are modelled. If it is an identifier, leave it out; "
                    "max_categories=... pools the rare ones."
                )
            all_levels = _dtype_levels(dtype)
            columns.append(
                CellColumn(
                    name, _dtype_name(dtype), True, tuple(kept), tuple(pooled), all_levels,
                    bool(getattr(dtype, "ordered", False)),
                )
            )  # fmt: skip
        return cls(container, tuple(columns))

    @property
    def has_objects(self) -> bool:
        """Whether a column of a frame holds objects that are numbers, or missing."""
        return self.container == "pandas" and any(c.dtype == "object" for c in self.columns)

    @property
    def has_categories(self) -> bool:
        """Whether any column holds categories."""
        return any(column.is_category for column in self.columns)

    def encode(self, X: Any) -> FloatArray:
        """Cells as numbers, (n, n_features).

        Raises
        ------
        ValueError
            That names the column, for cells that are no numbers in a column of numbers, and for
            infinity.
        """
        parts = []
        for j, column in enumerate(self.columns):
            if column.is_category:
                parts.append(column.codes(X, j))
                continue
            numbers = numbers_of(X, j, column.name)
            if np.isinf(numbers).any():
                row = int(np.isinf(numbers).argmax())
                raise ValueError(
                    f"column {column.name!r} contains infinity, the first in row {row}: leave such "
                    "rows out, or clip them to finite values."
                )
            parts.append(numbers)
        return np.stack(parts, axis=1)

    def refuse_missing(self, rows: FloatArray) -> None:
        """Raise where cells of encoded rows are missing.

        Raises
        ------
        ValueError
            That names the first such column.
        """
        for column, cells in zip(self.columns, rows.T, strict=True):
            gaps = np.flatnonzero(np.isnan(cells))
            if len(gaps):
                raise ValueError(
                    f"column {column.name!r} contains NaN, a missing value, in {len(gaps)} row(s), "
                    f'the first of them row {gaps[0]}, and handle_missing="error": leave such rows '
                    'out, or take handle_missing="state".'
                )

    def decode(self, rows: FloatArray, output: str, rng: np.random.RandomState | None) -> Any:
        """Rows of numbers as cells.

        Parameters
        ----------
        rows : ndarray of shape (n, n_features)
            As of `encode`.
        output : {"auto", "array"}
            A table like the one that was fitted, or an array.
        rng : RandomState or None
            Draws one of the rare categories that share a code; None is the most frequent one.

        Returns
        -------
        DataFrame, or ndarray of shape (n, n_features)
            An array of objects if any column holds categories.
        """
        as_frame = output == "auto" and self.container in ("pandas", "polars")
        if not as_frame and not self.has_categories:
            return rows
        cells = [
            column.cells(values, rng)
            if column.is_category
            else column.numbers(values)
            if as_frame
            else values
            for column, values in zip(self.columns, rows.T, strict=True)
        ]
        if as_frame:
            return (pandas_of if self.container == "pandas" else polars_of)(self.columns, cells)
        array = np.empty(rows.shape, dtype=object)
        for j, values in enumerate(cells):
            array[:, j] = values
        return array


def filled(
    X: Any,
    columns: Sequence[CellColumn],
    where: NDArray[np.bool_],
    rows: FloatArray,
    rng: np.random.RandomState | None,
) -> Any:
    """A copy of a table with other cells in some places, in its dtypes.

    Parameters
    ----------
    X : DataFrame or ndarray of shape (n, n_features)
    columns : sequence of CellColumn
        What codes of categories mean.
    where : ndarray of bool of shape (n, n_features)
    rows : ndarray of shape (n, n_features)
        As of `Schema.encode`.
    rng : RandomState or None
        As of `Schema.decode`.

    Returns
    -------
    DataFrame or ndarray of shape (n, n_features)
    """
    container, table = container_of(X), X.copy() if hasattr(X, "copy") else X.clone()
    for j in np.flatnonzero(where.any(axis=0)).tolist():
        own, places = dtype_of(X, j), np.flatnonzero(where[:, j])
        cells = rows[places, j]
        if columns and columns[j].is_category:
            cells = columns[j].cells(cells, rng)
        else:
            cells = CellColumn(j, str(own)).numbers(cells)
        if container == "array":
            table[places, j] = cells
        elif container == "pandas":
            table.isetitem(j, _with_cells(X.iloc[:, j], places, cells))
        else:
            series, values = X[:, j], values_of(X, j)
            values[places] = type(series)(cells.tolist()).cast(own).to_list()
            table = table.with_columns(type(series)(series.name, values.tolist(), dtype=own))
    return table


def _with_cells(series, places, cells):
    """A series of pandas with other cells in some places."""
    import pandas as pd

    series = series.copy()
    if isinstance(series.dtype, pd.CategoricalDtype):
        new = [c for c in dict.fromkeys(cells) if c not in series.cat.categories]
        series = series.cat.add_categories(new)
    series.iloc[places] = pd.array(cells.tolist(), dtype=series.dtype)
    return series


def numbers_of(X: Any, j: int, name: Any) -> FloatArray:
    """Cells of column j as doubles, NaN where they are missing."""
    column: Any = X.iloc[:, j] if container_of(X) == "pandas" else X[:, j]
    if isinstance(column, np.ndarray) and column.dtype.kind in "fiu":
        return column.astype(np.float64)
    if getattr(column.dtype, "kind", "") in ("f", "i", "u"):  # pandas, with gaps of its own
        return column.to_numpy(dtype=np.float64, na_value=np.nan)  # pyright: ignore
    if hasattr(column.dtype, "is_numeric") and column.dtype.is_numeric():  # pyright: ignore[reportAttributeAccessIssue]
        return column.cast(float).to_numpy().astype(np.float64)  # pyright: ignore[reportAttributeAccessIssue]
    values = values_of(X, j)
    try:
        return np.array([np.nan if is_missing(v) else float(v) for v in values])
    except (TypeError, ValueError) as error:
        bad = next(v for v in values if not is_missing(v) and not is_number(v))
        raise ValueError(
            f"column {name!r} is taken for numbers, and holds {bad!r}: name it in "
            "categorical_features, or leave such rows out."
        ) from error


def _plain(value):
    """A level as Python's own object, the same for equal ones."""
    return value.item() if isinstance(value, np.generic) else value


def _holds_categories(X, j):
    """Whether the dtype of a column of a frame says so."""
    container, dtype = container_of(X), dtype_of(X, j)
    if container == "polars":
        return str(dtype).startswith(("Categorical", "Enum", "String", "Utf8", "Boolean", "Object"))
    if container != "pandas":
        return False
    name = str(dtype).lower()
    if name == "object":  # which may also be of numbers
        found = (v for v in values_of(X, j) if not is_missing(v))
        return not all(isinstance(v, Real | Decimal) and not isinstance(v, bool) for v in found)
    return name.startswith(("category", "bool", "str", "large_string", "dictionary"))


def _asked(categorical_features, names):
    """Mask of the columns that the user names, or None for "from_dtype"."""
    if isinstance(categorical_features, str):
        return None
    mask = np.zeros(len(names), dtype=bool)
    if categorical_features is None:
        return mask
    given = list(categorical_features)
    if given and all(isinstance(g, bool | np.bool_) for g in given):
        if len(given) != len(names):
            raise ValueError(
                f"categorical_features is a mask of {len(given)} columns, and X has {len(names)}."
            )
        return np.array(given, dtype=bool)
    for one in given:
        if isinstance(one, Integral) and one not in names:
            if not -len(names) <= int(one) < len(names):
                raise ValueError(f"categorical_features has {one}, and X has {len(names)} columns.")
            mask[int(one)] = True
        elif one in names:
            mask[names.index(one)] = True
        else:
            raise ValueError(f"categorical_features has {one!r}, which is no column of X.")
    return mask


def _levels(X, j, name, dtype):
    """Levels that were met, in order, and how often."""
    for row, value in enumerate(values_of(X, j) if str(dtype).lower() == "object" else ()):
        if not isinstance(value, Hashable):
            raise ValueError(
                f"column {name!r} holds a {type(value).__name__}, {value!r} in row {row}, which "
                "is no category: leave it out, or make numbers or text of it."
            )
    if container_of(X) == "pandas":
        found = X.iloc[:, j].astype(object).value_counts()
        counts = {_plain(level): int(n) for level, n in found.items()}
    else:
        counts = Counter(_plain(v) for v in values_of(X, j) if not is_missing(v))
    known = _dtype_levels(dtype)
    if known is not None:
        order: Iterable[Any] = (level for level in known if level in counts)
    else:
        try:
            order = sorted(counts)
        except TypeError:  # levels of several types
            order = sorted(counts, key=lambda level: (type(level).__name__, str(level)))
    levels = list(order)
    return levels, [counts[level] for level in levels]


def _pool(levels, counts, max_categories):
    """Levels with a code of their own, and the rare ones with their shares."""
    if max_categories is None or len(levels) <= max_categories:
        return levels, []
    order = np.argsort(-np.array(counts), kind="stable")
    own = np.sort(order[: max_categories - 1])
    rare = np.sort(order[max_categories - 1 :])
    total = sum(counts[i] for i in rare)
    return [levels[i] for i in own], [(levels[i], counts[i] / total) for i in rare]


def _dtype_levels(dtype):
    """All categories of a categorical dtype, or None."""
    categories = getattr(dtype, "categories", None)
    if categories is None or str(dtype).startswith("Categorical"):
        return None
    return tuple(_plain(level) for level in categories)


def _dtype_name(dtype):
    name = str(dtype)
    return "Enum" if name.startswith("Enum") else "category" if name == "category" else name
