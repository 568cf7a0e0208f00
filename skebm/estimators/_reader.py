"""How an estimator reads tables: those that it is fitted to, and new ones."""

from abc import ABC
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from skebm._containers import as_table, is_missing, values_of
from skebm._sklearn_compat import _check_sample_weight
from skebm._tensors import without_tensors
from skebm._typing import FloatArray
from skebm._warnings import warn
from skebm.training import Columns, relative_precision

from ._cells import Remedies, bad_cell, refuse_what_would_be_read_through
from ._schema import Schema

MAX_ROWS = 400_000
"""Rows of a table that a fit looks at, where members learn from few of them anyway: with two
members each is left 200,000 to learn from, and with eight 50,000 to be judged on."""


class TableReader(ABC):
    """Tables of users as doubles, categories as codes, in the units of X.

    A family of estimators may say that it takes missing cells, what may be done about a bad one,
    how it learns a schema, and that a fit needs not look at all rows.
    """

    # what a fit sets
    n_features_in_: int
    _columns: Columns
    _schema: Schema

    _takes_missing = False
    """Whether a missing cell is a state."""

    _remedies = Remedies()

    @property
    def _looks_at_all_rows(self) -> bool:
        """Whether a fit learns from every row, or from a few of many, so that some will do."""
        return True

    def _read_schema(self, X: Any) -> Schema:
        """How the cells of X become numbers; by default they are numbers."""
        return Schema.learn(X, None, None)

    def _checked(self, X: Any, schema: Schema, **options: Any) -> FloatArray:
        """X as doubles, categories as codes; an error names the column that has something else."""
        reset = options.get("reset", True)
        if not reset and not schema.has_categories and self._is_checked(X):
            return X
        refuse_what_would_be_read_through(X)
        if schema.has_categories or (self._takes_missing and schema.has_objects):
            validate_data(self, X, reset=reset, skip_check_array=True)
            least = options.get("ensure_min_samples", 1)
            if len(X) < least:
                raise ValueError(
                    f"Found {len(X)} sample(s), while a minimum of {least} is required."
                )
            rows = schema.encode(X)
            if not self._takes_missing:
                schema.refuse_missing(rows)
            return rows
        try:
            finite = "allow-nan" if self._takes_missing else True
            return validate_data(self, X, dtype=np.float64, ensure_all_finite=finite, **options)  # pyright: ignore[reportReturnType]
        except ValueError as error:
            problem = bad_cell(X, self._remedies, takes_missing=self._takes_missing)
            if problem is None:
                raise
            raise ValueError(problem) from error

    def _is_checked(self, X):
        """Whether X is what scikit-learn would hand on as it is: it would take longer to find out
        than a score of one row takes.
        """
        return (
            type(X) is np.ndarray
            and X.dtype == np.float64
            and X.ndim == 2
            and len(X) > 0
            and X.shape[1] == self.n_features_in_
            and not hasattr(self, "feature_names_in_")
            and bool(np.isfinite(X).all())
        )

    def _names(self, rows: np.ndarray) -> Any:
        """Names of the columns of X, for messages."""
        return getattr(self, "feature_names_in_", range(rows.shape[1]))

    def _read(self, X, sample_weight, groups, rng):
        """What a fit looks at: all rows of positive weight, or some of many, drawn at random.

        Returns
        -------
        rows, weight, groups
            Of those that are looked at.
        looked_at : ndarray of bool
            Which of the rows of positive weight they are.
        precision
            Of X.
        schema : Schema
        """
        table = as_table(without_tensors(X))
        precision, X = relative_precision(X), table
        refuse_what_would_be_read_through(sample_weight, "sample_weight")
        schema = self._read_schema(X)
        X = self._checked(X, schema, ensure_min_samples=2)
        weight = _check_sample_weight(
            without_tensors(sample_weight), X, dtype=np.float64, ensure_non_negative=True
        )
        used = np.flatnonzero(weight)
        if len(used) < 2:
            raise ValueError("sample_weight must be positive for at least 2 samples.")
        looked_at = np.ones(len(used), dtype=bool)
        if len(used) > MAX_ROWS and not self._looks_at_all_rows:
            looked_at[torch.randperm(len(used), generator=rng)[MAX_ROWS:].numpy()] = False
            used = used[looked_at]
        if groups is not None:
            groups = column_or_1d(groups)
            check_consistent_length(X, groups)
            kinds = sorted({type(label).__name__ for label in groups.tolist()})
            if len(kinds) > 1 and "str" in kinds:
                raise ValueError(
                    f"groups holds labels of several types, {', '.join(kinds)}, such as text and "
                    "missing ones: give every row a label, all of one type."
                )
            groups = groups[used]
            if len(np.unique(groups)) < 2:
                which = "of positive weight"
                if not looked_at.all():
                    which = f"that fit looks at ({MAX_ROWS} of {len(looked_at)}, at random)"
                raise ValueError(
                    f"all samples {which} have one label in groups: give at least two, so that "
                    "one can be held out, or groups=None."
                )
        return X[used], weight[used], groups, looked_at, precision, schema

    def _validate(self, X: Any) -> FloatArray:
        check_is_fitted(self)
        table = as_table(without_tensors(X))
        checked = self._checked(table, self._schema, reset=False)
        rows = self._columns.snap(checked, relative_precision(X))
        self._warn_of_other_states(rows, table)
        elsewhere = self._columns.elsewhere(rows)
        if elsewhere.any():
            j = int(elsewhere.any(axis=0).argmax())
            warn(
                f"column {self._names(rows)[j]!r} was constant in fit "
                f"({self._columns.constants[j]:g}), and {elsewhere[:, j].sum()} of these rows have "
                "another value there. Their "
                "log-density has the probability of that, and not the value in it."
            )
        return rows

    def _warn_of_other_states(self, rows, X):
        """Warn of categories, and of missing cells, that `fit` has not met."""
        columns = self._columns
        codes = columns.encode(rows) if columns.states else rows
        for i, s in enumerate(columns.states):
            other = np.flatnonzero(codes[:, i] < 0)
            if not len(other):
                continue
            cell = values_of(X, s.column)[other[0]]
            what = "a missing cell" if is_missing(cell) else repr(cell)
            self._warn_of_other_state(s.column, what, len(other))
        lost = np.isnan(rows) & columns.varying
        lost[:, [s.column for s in columns.states]] = False
        for j in np.flatnonzero(lost.any(axis=0)):
            self._warn_of_other_state(j, "a missing cell", int(lost[:, j].sum()))

    def _warn_of_other_state(self, j, what, n):
        warn(
            f"column {self._columns.names[j]!r} shows {what}, which fit has not met there; what is "
            f"new there is in {n} of these rows. Their log-density has the probability of anything "
            "new in the column, and the density of the other cells."
        )
