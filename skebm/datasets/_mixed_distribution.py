"""What all distributions of mixed tables share: frames, codes of categories, and masses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.special import gammaln, xlogy
from sklearn.utils import check_random_state

from skebm._typing import FloatArray, RandomState

from ._distribution import log_normal

if TYPE_CHECKING:
    import pandas

NO_DENSITY = -np.inf


class MixedDistribution:
    """What distributions of mixed tables share: frames around ``_draw`` and ``_log_conditionals``.

    Both see a column of categories as codes: 0, 1, ... for the categories, their number for a
    missing cell, and -1 for anything else; numbers are float64, with NaN for a missing cell.
    """

    name: ClassVar[str]
    columns: ClassVar[dict[str, Any]]
    """The columns, in order: the categories of a column that has some, else `float` or `int`."""

    _draw: Callable[[int, np.random.RandomState], dict[str, np.ndarray]]
    _log_conditionals: Callable[[dict[str, np.ndarray]], list[FloatArray]]

    @property
    def n_features(self) -> int:
        """Number of columns."""
        return len(self.columns)

    def sample(self, n_samples: int, random_state: RandomState = None) -> pandas.DataFrame:
        """Draw independent rows.

        Parameters
        ----------
        n_samples : int
            Number of rows.
        random_state : int, RandomState instance or None, default=None
            Pass an int for reproducible rows.

        Returns
        -------
        X : DataFrame of n_samples rows
            Columns of dtype category, bool, int64 or float64; missing cells are NaN.

        Raises
        ------
        ImportError
            Without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                f"rows of {self.name} are a DataFrame, which needs pandas: pip install pandas"
            ) from error
        drawn = self._draw(int(n_samples), check_random_state(random_state))
        frame = {}
        for name, levels in self.columns.items():
            values = drawn[name]
            if isinstance(levels, type):
                frame[name] = values.astype(np.dtype(levels))
            elif levels == (False, True):
                frame[name] = values.astype(bool)
            else:
                codes = np.where(values == len(levels), -1, values)  # what pandas calls missing
                frame[name] = pd.Categorical.from_codes(codes, categories=list(levels))
        return pd.DataFrame(frame)

    def log_density(self, X: pandas.DataFrame) -> FloatArray:
        """Exact normalised log-density.

        With respect to counting measure for categories, counts, missing cells and atoms, and
        Lebesgue measure for numbers, in the units of X.

        Parameters
        ----------
        X : DataFrame
            The rows, with the columns of this distribution, in any order.

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats; minus infinity where a cell is impossible.
        """
        total = self.log_conditionals(X).sum(axis=1)
        return np.where(np.isnan(total), NO_DENSITY, total)  # a cell is missing that never is

    def log_conditionals(self, X: pandas.DataFrame) -> FloatArray:
        """Exact log-density of every column given those before it.

        The sum over all columns is the log-density of a row, that over the first few columns the
        log-density of their marginal.

        Parameters
        ----------
        X : DataFrame
            The rows, with the columns of this distribution, in any order.

        Returns
        -------
        log_conditionals : ndarray of shape (n_samples, n_features)
            In nats, in the order of `columns`; NaN given what is impossible.
        """
        columns = self._read(X, list(self.columns))
        return np.column_stack(self._log_conditionals(columns))

    def _read(self, X: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
        given = list(getattr(X, "columns", ()))
        if sorted(map(str, given)) != sorted(names):
            raise ValueError(
                f"{self.name} needs a DataFrame with the columns {list(names)}, but X has {given}."
            )
        return {name: self._codes_or_numbers(X[name], self.columns[name]) for name in names}

    @staticmethod
    def _codes_or_numbers(column: pandas.Series, levels: Any) -> np.ndarray:
        if isinstance(levels, type):
            return column.to_numpy(dtype=np.float64, na_value=np.nan)
        code = {level: k for k, level in enumerate(levels)}
        codes = np.array([code.get(value, -1) for value in column], dtype=int)
        return np.where(column.isna(), len(levels), codes)


def log_masses(probabilities: np.ndarray, n_levels: int) -> FloatArray:
    """Log-masses to be indexed by codes: the levels, missing, and last, so -1, anything else."""
    out = np.full((*probabilities.shape[:-1], n_levels + 2), NO_DENSITY)
    out[..., : probabilities.shape[-1]] = np.log(probabilities)
    return out


def log_poisson(count: np.ndarray, rate: np.ndarray) -> FloatArray:
    possible = (count >= 0) & (count == np.floor(count)) & np.isfinite(count)
    k = np.where(possible, count, 0.0)
    return np.where(possible, xlogy(k, rate) - rate - gammaln(k + 1), NO_DENSITY)


def log_lognormal(x: np.ndarray, log_mean: np.ndarray, log_scale: float) -> FloatArray:
    log_x = np.log(np.where(x > 0, x, 1.0))
    return np.where(x > 0, log_normal(log_x, log_mean, log_scale) - log_x, NO_DENSITY)


def choose(probabilities: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """One code per row of probabilities (n, L)."""
    beyond = rng.uniform(size=(len(probabilities), 1)) > probabilities.cumsum(axis=1)[:, :-1]
    return beyond.sum(axis=1)
