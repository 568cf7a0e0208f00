"""Questions about some cells of a row, which a fitted density answers without another fit."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from skebm._containers import as_table
from skebm._tensors import without_tensors
from skebm._typing import FloatArray
from skebm._warnings import warn

from ._completer import Completer
from ._given import Given, read_given
from .conditional import ConditionalDensity
from .explanation import Explanation, explain, groups_that_say_the_same
from .marginal import MarginalDensity

N_DRAWS = 1_024
"""Completions of a row with several open cells."""


class Asking(ABC):
    """What can be asked of some cells; an estimator adds `_make_completer`."""

    _columns: Any
    _schema: Any
    _device: Any

    @abstractmethod
    def _make_completer(self) -> Completer:
        """The fitted model, for completing rows."""

    def _completer(self) -> Completer:
        """The same, made once."""
        known = vars(self).get(_COMPLETER)
        if known is None or known.device != self._device:
            known = self._make_completer()
            vars(self)[_COMPLETER] = known
        return known

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != _COMPLETER}

    def _read_given(self, given: Any, what: str = "given") -> Given:
        return read_given(given, self._schema, self._columns.names, what)

    def _warn_of_new(self, given: Given, what: str = "given") -> None:
        """Warn of given cells that say nothing of the others, since `fit` has not met them."""
        columns = self._columns
        rows = columns.snap(given.rows, 0.0)
        new = columns.elsewhere(rows) | (np.isnan(rows) & columns.varying)
        for s, codes in zip(columns.states, columns.encode(rows).T, strict=False):
            new[:, s.column] = codes < 0
        new &= given.known
        for j in np.flatnonzero(new.any(axis=0)):
            warn(
                f"column {columns.names[j]!r} of {what} has {new[:, j].sum()} cell(s) that fit has "
                "not met (a new category, a missing cell, not the constant): they say nothing of "
                "the others, and draws show a new category as missing."
            )

    def condition(self, given: Any, *, n_draws: int = N_DRAWS) -> ConditionalDensity:
        """Density of the other cells, given some.

        Parameters
        ----------
        given : mapping, frame or array-like
            Cells by the names of their columns (the numbers of an array), as ``{"age": 40}``; or
            several rows, as lists of cells in a mapping, as a frame with some of the columns, or as
            a table of all columns in which :data:`skebm.UNKNOWN` marks open cells. NaN and None
            mean, as everywhere, that a cell is missing.
        n_draws : int, default=1024
            Completions of every row that has several open cells; a multiple of 16. Errors fall with
            its root, or faster.

        Returns
        -------
        ConditionalDensity
            With `score_samples`, `sample`, and what is known of single columns.

        Raises
        ------
        ValueError
            For a column that `fit` has not seen, and for a row without an open cell.

        Warns
        -----
        LowEffectiveSampleSizeWarning
            If rows have too few effective completions.
        UserWarning
            For cells that `fit` has not met.
        """
        check_is_fitted(self)
        cells = self._read_given(given)
        self._warn_of_new(cells)
        return ConditionalDensity(self, self._completer(), cells, n_draws)

    def marginal(self, columns: Any, *, n_draws: int = N_DRAWS) -> MarginalDensity:
        """Density of some columns, the others integrated out.

        Parameters
        ----------
        columns : hashable or list
            Names of columns, or their numbers in an array.
        n_draws : int, default=1024
            Completions of every row by which the others are integrated out, if there are several;
            a multiple of 16.

        Returns
        -------
        MarginalDensity
            With `score_samples` and `sample`.

        Raises
        ------
        ValueError
            For a column that `fit` has not seen.
        """
        check_is_fitted(self)
        return MarginalDensity(self, self._completer(), columns, n_draws)

    def category_probabilities(self, X: ArrayLike, column: Any) -> FloatArray:
        """Probabilities of the categories of a column, given the other cells of every row.

        A density of categories and numbers together is a classifier of any of its categories, too.

        Parameters
        ----------
        X : table of shape (n_samples, n_features)
            As in `fit`; cells of the column do not matter, and a frame may lack it.
        column : hashable
            Its name, or its number in an array.

        Returns
        -------
        ndarray of shape (n_samples, n_categories)
            In the order of ``columns_``, those that were pooled as the last one. Rows add up to
            one: it is given that the cell is not missing.

        Warns
        -----
        UserWarning
            For cells that `fit` has not met.
        """
        check_is_fitted(self)
        names = self._columns.names
        cells = self._read_given(X, "X")
        if column not in names:
            raise ValueError(f"column={column!r} is none of {list(names)}.")
        known = cells.known.copy()
        known[:, list(names).index(column)] = False
        given = cells._replace(known=known)
        self._warn_of_new(given, "X")
        return ConditionalDensity(self, self._completer(), given, N_DRAWS).probabilities(column)

    def explain(self, X: ArrayLike, *, n_draws: int = N_DRAWS) -> Explanation:
        """Say which cells make rows odd: how surprising each is, given the others of its row.

        Parameters
        ----------
        X : table of shape (n_samples, n_features)
            As in `fit`.
        n_draws : int, default=1024
            Completions of a row where columns are judged together; a multiple of 16.

        Returns
        -------
        Explanation
        """
        rows = self._validate(X)  # pyright: ignore[reportAttributeAccessIssue]
        completer = self._completer()
        if completer.groups is None:
            completer.groups = groups_that_say_the_same(completer, self._schema)
        values = _in_order(as_table(without_tensors(X)), self._columns.names)
        return explain(self, completer, rows, values, completer.groups, n_draws)


def _in_order(table, names):
    """A table with its columns as in `fit`, which may have others in another order."""
    has_them = hasattr(table, "columns") and set(names) <= set(table.columns)
    return table[list(names)] if has_them else table


_COMPLETER = "_known_completer_"  # what ends like this is forgotten by the next fit
