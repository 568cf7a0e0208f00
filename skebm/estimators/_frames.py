"""Frames of pandas and polars, made of columns of cells with their dtypes."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def pandas_of(columns: Sequence[Any], cells: Sequence[np.ndarray]) -> Any:
    """A frame of pandas.

    A column of integers or of bools that had no missing cell in `fit` takes the nullable dtype
    where one is missing, because that was given.

    Parameters
    ----------
    columns : sequence of CellColumn
    cells : sequence of ndarray of shape (n,)
        Categories, or numbers, of every column.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    series = []
    for column, values in zip(columns, cells, strict=True):
        dtype: Any = column.dtype
        if column.is_category:
            if dtype == "category":
                dtype = pd.CategoricalDtype(list(column.dtype_levels or ()), column.ordered)
            if dtype == "bool" and pd.isna(values).any():
                dtype = "boolean"
            series.append(pd.Series(values, dtype=dtype))
        elif column.is_whole:  # by way of integers that may be missing
            whole = pd.Series(values).astype("UInt64" if dtype.startswith("uint") else "Int64")
            series.append(
                whole if whole.hasnans and dtype == dtype.lower() else whole.astype(dtype)
            )
        else:
            series.append(pd.Series(values).astype(dtype))
    frame = pd.concat(series, axis=1)
    frame.columns = [column.name for column in columns]
    return frame


def polars_of(columns: Sequence[Any], cells: Sequence[np.ndarray]) -> Any:
    """The same of polars."""
    import polars as pl

    series = []
    for column, values in zip(columns, cells, strict=True):
        name, _, options = column.dtype.partition("(")
        dtype: Any = getattr(pl, name)
        if name == "Decimal":
            dtype = pl.Decimal(*map(int, re.findall(r"\d+", options)))
        if column.is_category:
            dtype = pl.Enum(list(column.dtype_levels or ())) if column.dtype == "Enum" else dtype
            series.append(pl.Series(column.name, values.tolist(), dtype=dtype))
        else:
            numbers = pl.Series(column.name, values, dtype=pl.Float64, nan_to_null=True)
            series.append(numbers.cast(dtype))
    return pl.DataFrame(series)
