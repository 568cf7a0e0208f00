"""Missing cells filled from the density that the table itself is given."""

import warnings
from numbers import Integral
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import gaussian_kde
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data

from skebm._containers import as_table, container_of
from skebm._random import seed_of
from skebm._sklearn_compat import Interval, StrOptions, _fit_context
from skebm._tensors import results_like, without_tensors
from skebm._typing import FloatArray, RandomState
from skebm.estimators import NCEDensity
from skebm.estimators._asking import Asking
from skebm.estimators._schema import filled

ROWS_AT_ONCE = 2_048
"""Rows with holes, times draws, that are completed at once, so that memory does not grow."""


class DensityImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Fill missing cells from a density of the table.

    A density of categories, numbers and missing cells is fitted to the table as it is, holes and
    all. A hole is then filled by what the density says of it, given all other cells of the row,
    and given that it is not missing. The cells that a row lacks are filled together, so that they
    fit each other.

    Parameters
    ----------
    estimator : estimator of skebm, default=None
        An unfitted density that takes missing cells and can be conditioned, such as
        :class:`~skebm.NCEDensity`, which is the default. A copy of it is fitted.
    strategy : {"draw", "mean", "mode"}, default="draw"
        "draw": a draw of the conditional distribution, which keeps spreads, correlations and
        shares. "mean": the mean of a number, on the grid of its column, and the likeliest category,
        which keep the error of single cells small; what lies beyond all numbers that `fit` has seen
        counts as the last of them. "mode": the likeliest category, and the
        number at which its conditional density is highest.
    n_draws : int, default=1
        Tables that `impute` returns; more than one only of draws.
    random_state : int, RandomState instance or None, default=None
        Of draws, and of the estimator if it has none of its own. What a fitted imputer makes of a
        table is the same at every call.

    Attributes
    ----------
    estimator_ : estimator of skebm
        The fitted density.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    sklearn.impute.IterativeImputer : A regression of every column on the others.

    Notes
    -----
    The table keeps its columns, dtypes and labels of rows, and cells that are there stay as they
    are. Holes in columns in which `fit` has met none are filled as well. A row without any cell is
    drawn from the density itself. A category that `fit` has not met says nothing of other cells.

    What is conditioned on are states and values: that another cell of the row was missing in
    `fit` as well is known of the density, and is no cause of bias in itself. But values that decide
    about their own absence, such as incomes that the rich do not tell, are not recovered: nothing
    in the table says what they are (:ref:`imputation`).

    A cell that a row lacks alone is drawn from its states, and from 64 quantiles of its numbers,
    which also give its mean; "mode" is the likeliest state (a category, an atom, or "a number"),
    and of numbers the densest of the quantiles. Several cells are drawn by Gibbs sampling, one
    after the other given all others, in six sweeps; mean and mode are made of what the last three
    sweeps of four chains propose, weighted, and the densest number is that at which a kernel
    density of these (Scott's bandwidth) is highest. So means of several cells have an error of
    chance, of about 0.3 standard deviations where the cells depend on each other strongly.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import DensityImputer, NCEDensity
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=400)
    >>> X = np.column_stack([x, x + 0.3 * rng.normal(size=400)])
    >>> X[rng.random(X.shape) < 0.1] = np.nan
    >>> imputer = DensityImputer(NCEDensity(energy_model=None), strategy="mean", random_state=0)
    >>> filled = imputer.fit_transform(X)
    >>> bool(np.isnan(filled).any())
    False
    >>> bool(abs(imputer.transform([[1.0, np.nan]])[0, 1] - 1.0) < 0.2)
    True

    Five tables, each with other draws, of which the spread says how little is known:

    >>> imputer = DensityImputer(NCEDensity(energy_model=None), n_draws=5, random_state=0)
    >>> tables = imputer.fit(X).impute(X)
    >>> len(tables)
    5
    """

    # what a fit sets
    estimator_: Any
    n_features_in_: int
    _seed: int
    _range: tuple[FloatArray, FloatArray]

    _parameter_constraints = {
        "estimator": "no_validation",  # `fit` says what is wrong
        "strategy": [StrOptions({"draw", "mean", "mode"})],
        "n_draws": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        strategy: Literal["draw", "mean", "mode"] = "draw",
        n_draws: int = 1,
        random_state: RandomState = None,
    ):
        self.estimator = estimator
        self.strategy = strategy
        self.n_draws = n_draws
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.categorical = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # ------------------------------------------------------------------ fit

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Learn the density of the rows of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            A table as the estimator takes it, with or without missing cells. Every column has a
            cell at least.
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the rows.
        groups : array-like of shape (n_samples,), default=None
            Labels of rows that belong together, as of :meth:`skebm.NCEDensity.fit`.

        Returns
        -------
        self : DensityImputer

        Raises
        ------
        ValueError
            For a column without a single cell, an estimator that cannot fill one, and
            ``n_draws > 1`` with a strategy that draws nothing.
        """
        if self.n_draws > 1 and self.strategy != "draw":
            raise ValueError(
                f"n_draws={self.n_draws} with strategy={self.strategy!r}: all tables would be the "
                'same. Take strategy="draw", or n_draws=1.'
            )
        estimator = self._unfitted()
        seed = seed_of(self.random_state)
        if estimator.random_state is None:
            estimator.set_params(random_state=seed)
        estimator.fit(X, sample_weight=sample_weight, groups=groups)
        columns = estimator._columns
        empty = np.flatnonzero(columns.constant & np.isnan(columns.constants))
        if len(empty):
            raise ValueError(
                f"column {columns.names[empty[0]]!r} has no cell that is not missing, so that "
                "nothing can be filled in: leave it out."
            )
        for name in ("n_features_in_", "feature_names_in_"):
            vars(self).pop(name, None)
            if hasattr(estimator, name):
                setattr(self, name, getattr(estimator, name))
        self.estimator_, self._seed = estimator, seed
        _, rows = self._read(X)
        self._range = np.nanmin(rows, axis=0), np.nanmax(rows, axis=0)
        return self

    def _unfitted(self) -> Any:
        """A copy of the estimator, or an error that says why it fills no cells."""
        if self.estimator is None:
            return NCEDensity()
        remedy = "take NCEDensity(...), or leave it out."
        if not isinstance(self.estimator, Asking):
            raise ValueError(f"estimator={self.estimator!r} cannot be conditioned: {remedy}")
        if not getattr(self.estimator, "_takes_missing", False):
            raise ValueError(f"estimator={self.estimator!r} takes no missing cells: {remedy}")
        return clone(self.estimator)

    # ------------------------------------------------------------------ transform

    def transform(self, X: ArrayLike) -> Any:
        """Fill the missing cells of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            With the columns of `fit`. Any of them may have missing cells.

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            A copy of X without holes: a frame of the same dtypes and labels, or an array. The first
            table of `impute`.
        """
        return self.impute(X)[0]

    def impute(self, X: ArrayLike) -> list[Any]:
        """Fill the missing cells of X several times: multiple imputations.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As of `transform`.

        Returns
        -------
        list of `n_draws` tables
            Each as of `transform`, with draws of its own.
        """
        table, rows = self._read(X)
        missing = np.isnan(rows)
        columns = self.estimator_._columns
        rows = np.where(missing & columns.constant, columns.constants, columns.snap(rows, 0.0))
        rng = torch.Generator(self.estimator_._device).manual_seed(self._seed)
        completed = np.repeat(rows[None], self.n_draws, axis=0)
        holes = np.flatnonzero(np.isnan(rows).any(axis=1))
        size = max(1, ROWS_AT_ONCE // self.n_draws)
        for start in range(0, len(holes), size):
            some = holes[start : start + size]
            completed[:, some] = self._completed(rows[some], rng)
        own = np.random.RandomState(self._seed) if self.strategy == "draw" else None
        schema, like = self.estimator_._schema, results_like(X)
        return [like(filled(table, schema.columns, missing, cells, own)) for cells in completed]

    def _read(self, X):
        """X as a table whose cells can be filled in, and as numbers and codes."""
        check_is_fitted(self)
        table, schema = as_table(without_tensors(X)), self.estimator_._schema
        if container_of(table) == "none":
            table = check_array(table, dtype=np.float64, ensure_all_finite="allow-nan",  # pyright: ignore
                                estimator=self)  # fmt: skip
        validate_data(self, table, reset=False, skip_check_array=True)
        with warnings.catch_warnings():  # of names, which have been checked
            warnings.filterwarnings("ignore", "X does not have valid feature names")
            rows = self.estimator_._checked(table, schema, reset=False)
        if isinstance(X, list | tuple) and not schema.has_categories:
            table = rows
        return table, rows

    def _completed(self, rows, rng):
        """Rows with their holes filled, (n_draws, n, n_features)."""
        completer, known = self.estimator_._completer(), ~np.isnan(rows)
        if self.strategy == "draw":
            return np.where(known, rows, completer.fill(rows, known, self.n_draws, rng))
        rows = rows.copy()
        for possible in completer.possible(rows, known, rng):
            rows[possible.rows, possible.column] = self._single(possible, completer.columns)
        return rows[None]

    def _single(self, possible, columns):
        """One of what cells of a column may be, (n,)."""
        weights = possible.weights
        cells = np.where(weights > 0, possible.cells, np.nan)
        if not columns.varying[possible.column]:  # categories, or one number
            return _likeliest(cells, weights)
        if self.strategy == "mean":
            # tails of a density may have no mean
            inside = np.clip(cells, *(ends[possible.column] for ends in self._range))
            mean = np.nansum(weights * inside, axis=1)
            return columns.rounded(possible.column, mean)
        atoms = [a for s in columns.states if s.column == possible.column for a in s.atoms]
        is_atom = np.isin(cells, atoms)
        densest = _densest(possible, np.where(is_atom, 0.0, weights), columns)
        # a number is one state, whatever it is
        return _likeliest(np.where(is_atom, cells, densest[:, None]), weights)


def _likeliest(cells, weights):
    """Of every row the cell with the largest weight, (n, m) -> (n,)."""
    values = np.unique(cells[~np.isnan(cells)])
    masses = np.stack([(weights * (cells == value)).sum(1) for value in values], axis=1)
    return values[masses.argmax(1)]


def _densest(possible, weights, columns):
    """Of every row the number of highest density, (n,); NaN for a row without numbers."""
    cells, found = possible.cells, np.full(len(weights), np.nan)
    for i, own in enumerate(weights):
        there = own > 0
        if possible.log_density is not None:
            score = np.where(there, possible.log_density[i], -np.inf)
        elif there.any() and np.ptp(cells[i, there]) > 0:
            score = np.full(len(own), -np.inf)
            density = gaussian_kde(cells[i, there], weights=own[there])
            score[there] = density(cells[i, there])
        else:
            score = own
        if there.any():
            found[i] = cells[i, score.argmax()]
    return columns.rounded(possible.column, found)
