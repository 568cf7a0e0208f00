"""Two columns of a density of many: the others integrated out, or given."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

N_DRAWS = 128
"""Completions for every point of a picture, of which there are thousands."""


class TwoColumns:
    """Density of two columns, with `score_samples` of arrays of these.

    Parameters
    ----------
    estimator : object
        Fitted, with `marginal` and `condition`.
    features : sequence of two hashables
        Names of columns, or their numbers in an array.
    given : mapping or None
        Cells of other columns.
    """

    def __init__(self, estimator: Any, features: Any, given: Any):
        if len(features) != 2 or features[0] == features[1]:
            raise ValueError(f"features={features!r} must name two columns.")
        self.features, self._given = list(features), dict(given or {})
        both = set(self.features) & set(self._given)
        if both:
            raise ValueError(f"given has {both.pop()!r}, which is one of features.")
        columns = [*self.features, *self._given]
        self._joint = estimator.marginal(columns, n_draws=N_DRAWS)
        self._log_density_given = 0.0
        if self._given:
            self._log_density_given = estimator.condition(self._given).log_density_given[0]

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Log-density of two numbers, given the cells that are given."""
        first, second = np.asarray(X, dtype=np.float64).T
        table = {self.features[0]: first, self.features[1]: second}
        table |= {name: [cell] * len(first) for name, cell in self._given.items()}
        return self._joint.score_samples(table) - self._log_density_given

    def rows(self, X: Any) -> np.ndarray:
        """These two columns of a table, (n, 2); rows that lack a number are left out."""
        table = X if hasattr(X, "columns") else np.asarray(X).T
        both = np.column_stack([_numbers(table[name], name) for name in self.features])
        return both[~np.isnan(both).any(axis=1)]


def _numbers(column, name):
    """A column as doubles, NaN where a cell is missing."""
    values = np.asarray(column)
    try:
        if values.dtype.kind != "b":
            return values.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"features has {name!r}, a column of X that holds something else than numbers, of which no "
        "density can be drawn over a plane. SamplesDisplay shows such columns."
    )
