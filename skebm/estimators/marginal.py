"""What a fitted density says of some columns, the others integrated out."""

from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from skebm._containers import as_table, container_of, labels
from skebm._tensors import without_tensors
from skebm._typing import FloatArray, RandomState
from skebm._warnings import warn
from skebm.exceptions import LowEffectiveSampleSizeWarning

from ._completer import Completer
from ._given import Given, read_given
from ._schema import Schema

FEW_EFFECTIVE = 32
"""Effective completions below which what they say of a row is not to be trusted."""


class SomeColumns(ABC):
    """What densities of some columns share."""

    columns: list[Any]

    def __init__(self, estimator: Any, completer: Completer, n_draws: int):
        if not isinstance(n_draws, Integral) or n_draws < 16 or n_draws % 16:
            raise ValueError(f"n_draws={n_draws!r} must be a positive multiple of 16.")
        self._estimator, self._completer, self._n_draws = estimator, completer, int(n_draws)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(columns={self.columns}, estimator={self._estimator})"

    @property
    def _schema(self) -> Schema:
        return self._estimator._schema

    @property
    def _names(self) -> list[Any]:
        return list(self._completer.columns.names)

    def _places(self, columns):
        places = {name: j for j, name in enumerate(self._names)}
        return [places[name] for name in columns]

    def _place(self, column):
        """Which column of X a name means."""
        if column not in self.columns:
            raise ValueError(f"column={column!r} is none of {self.columns}.")
        return self._places([column])[0]

    def _read(self, X: Any, what: str = "X") -> Given:
        """Rows of these columns; a frame, or an array of as many columns as there are here."""
        table = as_table(without_tensors(X))
        if container_of(table) == "array" and len(labels(table)) == len(self.columns):
            table = {name: table[:, j] for j, name in enumerate(self.columns)}
        found = read_given(table, self._schema, self._names, what)
        lacking = [c for c, j in zip(self.columns, self._places(self.columns), strict=True)
                   if not found.known[:, j].all()]  # fmt: skip
        if lacking:
            raise ValueError(f"{what} lacks column {lacking[0]!r}, or cells of it are UNKNOWN.")
        return found._replace(rows=self._completer.columns.snap(found.rows, 0.0))

    def _warn_of_few(self, n_effective: FloatArray) -> None:
        few = np.flatnonzero(n_effective < FEW_EFFECTIVE)
        if len(few):
            warn(
                f"{len(few)} of {len(n_effective)} rows have fewer than {FEW_EFFECTIVE} effective "
                f"completions of the {self._n_draws} that were drawn (row {few[0]}: "
                f"{n_effective[few[0]]:.1f}): their numbers, and the stated errors, are rough. "
                f"Take n_draws={16 * self._n_draws}, or more.",
                LowEffectiveSampleSizeWarning,
            )

    @abstractmethod
    def score_samples(self, X: Any, return_std: bool = False) -> Any:
        """Log-density of rows."""

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean of `score_samples`, in nats per row.

        Parameters
        ----------
        X : table
            As of `score_samples`.
        y : Ignored

        Returns
        -------
        float
        """
        return float(self.score_samples(X).mean())


class MarginalDensity(SomeColumns):
    """Density of some columns of a fitted estimator, the others integrated out.

    :meth:`skebm.NCEDensity.marginal` makes it.

    Parameters
    ----------
    estimator : estimator of skebm
        Fitted.
    completer : Completer
    columns : list
        Names of the columns, their numbers for an array.
    n_draws : int
        Completions of a row by which the others are integrated out.

    Attributes
    ----------
    columns : list
        Names of the columns.

    See Also
    --------
    ConditionalDensity : The other columns given.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import NCEDensity
    >>> X = np.random.default_rng(0).normal(size=(300, 3))
    >>> est = NCEDensity(energy_model=None, random_state=0).fit(X)
    >>> est.marginal([0, 2]).score_samples(X[:4, [0, 2]]).shape
    (4,)
    """

    columns: list[Any]

    def __init__(self, estimator: Any, completer: Completer, columns: Any, n_draws: int):
        super().__init__(estimator, completer, n_draws)
        if completer.is_mixture:  # nothing is random about its marginals
            self._n_draws = 16
        asked: list[Any] = [columns] if np.ndim(columns) == 0 else list(columns)
        unknown = [name for name in asked if name not in self._names]
        if unknown or not asked:
            what = repr(unknown[0]) if unknown else "nothing"
            raise ValueError(f"columns has {what}; name at least one of {self._names}.")
        self.columns = [name for name in self._names if name in asked]

    def score_samples(self, X: Any, return_std: bool = False) -> Any:
        """Log-density of these columns.

        Parameters
        ----------
        X : table of shape (n_samples, n_columns)
            A frame that has these columns, in any order, or an array of them, in the order of the
            rows that were fitted.
        return_std : bool, default=False
            Also return the standard error: of log Z, and of the integral.

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, in the units of X.
        std_error : ndarray of shape (n_samples,)
            Only if `return_std`.

        Warns
        -----
        LowEffectiveSampleSizeWarning
            If rows have too few effective completions.
        """
        rows = self._read(X).rows
        if len(self.columns) == len(self._names):
            value, error = self._estimator._log_density_std(rows)
            return (value, error) if return_std else value
        known = np.zeros(rows.shape, dtype=bool)
        known[:, self._places(self.columns)] = True
        completer = self._completer
        weighted = completer.complete(rows, known, n_draws=self._n_draws)
        found = completer.marginals(rows, known, weighted)
        if not completer.is_mixture:
            self._warn_of_few(found.n_effective)
        if not return_std:
            return found.log_density
        return found.log_density, np.hypot(found.std_error, completer.error_of_log_z(found.shares))

    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        output: Literal["auto", "array"] = "auto",
    ) -> Any:
        """Draw rows of these columns: draws of all columns, of which the others are left out.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
        output : {"auto", "array"}, default="auto"

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_columns)
        """
        drawn = self._estimator.sample(n_samples, random_state, output=output)
        return columns_of(drawn, self._places(self.columns))


def columns_of(table: Any, places: list[int]) -> Any:
    """Columns of a frame or an array, by their places."""
    return table.iloc[:, places] if hasattr(table, "iloc") else table[:, places]
