"""What a fitted density says of some cells, given others."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from skebm._typing import FloatArray, RandomState
from skebm._warnings import warn
from skebm.exceptions import LowEffectiveSampleSizeWarning

from ._completer import Completer, MarginalDensities, Weighted
from ._given import Given
from .marginal import FEW_EFFECTIVE, SomeColumns, columns_of

KEPT_CELLS = 2**24
"""Cells of completions that are kept for further questions; more are made anew."""


class ConditionalDensity(SomeColumns):
    r"""Density of the open cells of rows, given others: p(b | a) = p(a, b) / p(a).

    :meth:`skebm.NCEDensity.condition` makes it.

    Parameters
    ----------
    estimator : estimator of skebm
        Fitted.
    completer : Completer
    given : Given
        Rows with the cells that are known.
    n_draws : int
        Completions of a row with several open cells.

    Attributes
    ----------
    columns : list
        Names of the columns in which any row has an open cell, their numbers for an array.

    See Also
    --------
    MarginalDensity : The other columns integrated out.
    Explanation : Every cell given all others.
    skebm.DensityImputer : Missing cells filled by draws of it.

    Notes
    -----
    Given a, all that is asked here comes from completions of the rows, drawn from the conditional
    of a mixture, which has a closed form, and weighted by p(a, b) / m(b \| a). The points that they
    are made from are the same at every call. Where one cell is open alone its states are summed,
    and a number is integrated at 64 quantiles of the conditional of the mixture. Cells of
    categories, or missing ones, that `fit` has not met say nothing, and are as good as open.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import NCEDensity
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=500)
    >>> X = np.column_stack([x, x + 0.5 * rng.normal(size=500)])
    >>> est = NCEDensity(energy_model=None, random_state=0).fit(X)
    >>> given = est.condition({0: 1.0})
    >>> bool(abs(given.mean(1)[0] - 1.0) < 0.2)
    True
    >>> given.sample(3, random_state=0).shape
    (3, 1)
    """

    columns: list[Any]

    def __init__(self, estimator: Any, completer: Completer, given: Given, n_draws: int):
        super().__init__(estimator, completer, n_draws)
        closed = np.flatnonzero(given.known.all(1))
        if len(closed):
            raise ValueError(f"row {closed[0]} of given has no open cell.")
        is_open: Any = (~given.known).any(axis=0)
        self.columns = [n for n, some in zip(self._names, is_open, strict=True) if some]
        self._given = given._replace(rows=completer.columns.snap(given.rows, 0.0))
        self._kept: list[Weighted] | None = None

    def _completions(self) -> Iterable[Weighted]:
        """Completions of the given rows; kept where they are few enough."""
        if self._kept is not None:
            return self._kept
        rows, known, _ = self._given
        found = self._completer.complete(rows, known, n_draws=self._n_draws)
        if len(rows) * self._n_draws * rows.shape[1] > KEPT_CELLS:
            return found
        self._kept = list(found)
        return self._kept

    @property
    def n_given(self) -> int:
        """Number of given rows."""
        return len(self._given.rows)

    @cached_property
    def _marginals(self) -> MarginalDensities:
        """Of the given cells."""
        rows, known, _ = self._given
        found = self._completer.marginals(rows, known, self._completions())
        self._warn_of_few(found.n_effective)
        return found

    @property
    def log_density_given(self) -> FloatArray:
        """log p(a) of the given cells, (n_given,), in nats, in the units of X."""
        return self._marginals.log_density

    @property
    def std_error_given(self) -> FloatArray:
        """Its standard error, (n_given,)."""
        error_of_log_z = self._completer.error_of_log_z(self._marginals.shares)
        return np.hypot(self._marginals.std_error, error_of_log_z)

    @property
    def effective_sample_size(self) -> FloatArray:
        """How many completions of equal weights would say as much, (n_given,); infinite where a
        single cell is open, which is integrated and not sampled.
        """
        return self._marginals.n_effective

    # ------------------------------------------------------------------ density

    def score_samples(self, X: Any, return_std: bool = False) -> Any:
        """Log-density of open cells, given the others of their rows.

        Parameters
        ----------
        X : table of shape (n_samples, n_columns)
            A frame that has the open columns, or an array of them in the order of `columns`. As
            many rows as were given, each to its own; any number of them where one row was given;
            or one row, for all that were given.
        return_std : bool, default=False
            Also return the standard error. log p(a, b) and log p(a) share the errors of log Z,
            which cancel as far as they weigh the members alike.

        Returns
        -------
        log_density : ndarray of shape (n_samples,)
            In nats, in the units of X. Cells of X that were given do not matter.
        std_error : ndarray of shape (n_samples,)
            Only if `return_std`.
        """
        rows = self._read(X).rows
        n = max(len(rows), self.n_given)
        if not {len(rows), self.n_given} <= {1, n}:
            raise ValueError(
                f"X has {len(rows)} rows, and {self.n_given} were given: it must have one, as "
                "many, or any number if one row was given."
            )
        known = np.broadcast_to(self._given.known, (n, rows.shape[1]))
        rows = np.where(known, self._given.rows, rows)
        if not return_std:
            return self._estimator._log_density(rows) - self._marginals.log_density
        joint, error = self._estimator._log_density_std(rows)
        return joint - self._marginals.log_density, self._error(rows, error)

    def _error(self, rows, error_of_joint):
        """Standard error of log p(a, b) - log p(a)."""
        of, marginals = self._completer, self._marginals
        shares = of.shares(rows)
        # what log Z puts on one is also in the other; all else is measured twice
        own = np.square(error_of_joint) - np.square(of.error_of_log_z(shares))
        common = of.error_of_log_z(shares - marginals.shares)
        return np.sqrt(own.clip(0.0) + np.square(common) + np.square(marginals.std_error))

    # ------------------------------------------------------------------ draws

    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        output: Literal["auto", "array"] = "auto",
        complete: bool = False,
    ) -> Any:
        """Draw open cells, given the others.

        Completions are proposed by the conditional of the mixture, ten for one that is asked for,
        and resampled by their weights; forty, and more, where fewer than 32 are effective or 5 % of
        the draws repeat others. A cell that is open alone is drawn from its masses and, between the
        nodes, from its distribution function.

        Parameters
        ----------
        n_samples : int, default=1
            Draws of every given row.
        random_state : int, RandomState instance or None, default=None
            An int gives the same draws at every call.
        output : {"auto", "array"}, default="auto"
            "auto" is a frame where `fit` was given one, with its dtypes. A pandas frame has the
            labels of the given rows as its index; those of other tables follow each other row by
            row.
        complete : bool, default=False
            Draw under the condition that no open cell is missing.

        Returns
        -------
        DataFrame or ndarray of shape (n_given * n_samples, n_columns)
            Of the open columns; cells of them that were given, of some of the rows, are there as
            they were given.

        Warns
        -----
        LowEffectiveSampleSizeWarning
            If rows have too few effective proposals.
        """
        table = self.complete_rows(n_samples, random_state, output=output, complete=complete)
        return columns_of(table, self._places(self.columns))

    def complete_rows(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        output: Literal["auto", "array"] = "auto",
        complete: bool = False,
    ) -> Any:
        """Draw open cells, and return them with the given ones as whole rows.

        Parameters
        ----------
        n_samples, random_state, output, complete
            As of `sample`.

        Returns
        -------
        DataFrame or ndarray of shape (n_given * n_samples, n_features)
        """
        rng = self._estimator._sampling_rng(random_state, n_samples=n_samples)
        rows, known, index = self._given
        x, n_effective = self._completer.draw(rows, known, n_samples, rng, complete=complete)
        few = int((n_effective < FEW_EFFECTIVE).sum())
        if few:
            warn(
                f"of {few} of {len(rows)} given rows fewer than {FEW_EFFECTIVE} proposals are "
                "effective: their draws repeat, and miss some of what there is.",
                LowEffectiveSampleSizeWarning,
            )
        given = np.repeat(known, n_samples, axis=0), np.repeat(rows, n_samples, axis=0)
        table = self._estimator._as_table(x.flatten(0, 1), output, rng, given)
        if index is not None and hasattr(table, "iloc"):
            table.index = index.repeat(n_samples)
        return table

    # ------------------------------------------------------------------ one column

    def mean(self, column: Any) -> FloatArray:
        """Mean of a column of numbers, given the others.

        Where the tails of a column are heavy, a few far completions move it; `quantile` is safer.

        Parameters
        ----------
        column : hashable
            Its name, or its number in an array.

        Returns
        -------
        ndarray of shape (n_given,)
            In the units of X, of cells that are not missing.
        """
        return self._moments(column)[0]

    def std(self, column: Any) -> FloatArray:
        """Standard deviation of a column of numbers, given the others.

        Parameters
        ----------
        column : hashable

        Returns
        -------
        ndarray of shape (n_given,)
            In the units of X, of cells that are not missing.
        """
        return self._moments(column)[1]

    def _moments(self, column):
        mean, deviation = np.empty(self.n_given), np.empty(self.n_given)
        for row, weights, cells, _ in self._of_numbers(column):
            mean[row] = weights @ cells
            deviation[row] = np.sqrt(weights @ np.square(cells - mean[row]))
        return mean, deviation

    def quantile(self, column: Any, q: ArrayLike) -> FloatArray:
        """Quantiles of a column of numbers, given the others.

        Parameters
        ----------
        column : hashable
        q : float or array-like of shape (n_levels,)
            In [0, 1].

        Returns
        -------
        ndarray of shape (n_given,), or (n_given, n_levels)
            In the units of X, of cells that are not missing.
        """
        levels = np.asarray(q, dtype=np.float64)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"q={q!r} must be in [0, 1].")
        found = np.empty((self.n_given, *levels.shape))
        for row, *weighted in self._of_numbers(column):
            points, shares = _distribution(*weighted)
            found[row] = np.interp(levels, shares, points)
        return found

    def probability(self, column: Any, low: float, high: float) -> FloatArray:
        """Probability that a number lies between two others, given the other columns.

        Parameters
        ----------
        column : hashable
        low, high : float
            Neither is in between, which matters where columns have atoms; may be infinite.

        Returns
        -------
        ndarray of shape (n_given,)
            Among cells that are not missing.
        """
        if not low <= high:
            raise ValueError(f"low={low!r} must not be above high={high!r}.")
        inside = np.nextafter(low, np.inf), np.nextafter(high, -np.inf)
        found = np.empty(self.n_given)
        for row, *weighted in self._of_numbers(column):
            points, shares = _distribution(*weighted)
            below, above = np.interp(inside, points, shares, left=0.0, right=1.0)
            found[row] = max(above - below, 0.0)
        return found

    def probabilities(self, column: Any) -> FloatArray:
        """Probabilities of the categories of a column, given the others.

        Parameters
        ----------
        column : hashable

        Returns
        -------
        ndarray of shape (n_given, n_categories)
            In the order of ``columns_`` of the estimator, those that were pooled as the last one;
            among cells that are not missing, so that they add up to one.
        """
        j = self._place(column)
        n_categories = self._schema.columns[j].n_categories if self._schema.columns else 0
        if not n_categories:
            raise ValueError(f"column={column!r} holds numbers: ask for its mean, or a quantile.")
        masses = np.empty((self.n_given, n_categories))
        for weighted in self._completions():
            codes, weights = weighted.cells[:, :, j], weighted.weights
            for code in range(n_categories):
                masses[weighted.rows, code] = (weights * (codes == code)).sum(1)
        return masses / masses.sum(1, keepdims=True)

    def _of_numbers(self, column):
        """Rows, one by one, with their numbers in a column: weights, cells and which are atoms."""
        j = self._place(column)
        if self._schema.columns and self._schema.columns[j].is_category:
            raise ValueError(f"column={column!r} holds categories: ask for its probabilities.")
        states = {s.column: s for s in self._completer.columns.states}
        atoms = states[j].atoms if j in states else ()
        for weighted in self._completions():
            for row, cells, weights in zip(
                weighted.rows, weighted.cells[:, :, j], weighted.weights, strict=True
            ):
                there = ~np.isnan(cells)
                own = weights[there] / weights[there].sum()
                yield row, own, cells[there], np.isin(cells[there], atoms)


def _distribution(weights, cells, is_atom):
    """Points, and the share of a distribution that is below them; twice where it has a step.

    A number stands for what is around it, and has half of its weight below it; an atom has all of
    it at one point.
    """
    order = np.argsort(cells, kind="stable")
    weights, is_atom = weights[order], is_atom[order]
    above = np.cumsum(weights)
    low = above - np.where(is_atom, weights, 0.5 * weights)
    shares = np.stack([low, np.where(is_atom, above, low)], axis=1)
    return np.repeat(cells[order], 2), shares.ravel()
