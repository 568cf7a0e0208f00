"""Why a row is odd: how surprising each of its cells is, given the others."""

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr
from scipy.stats.contingency import association, crosstab

from skebm._statistics import weighted_quantile
from skebm._typing import FloatArray

from ._completer import Completer
from ._schema import Schema

N_COMPARED = 500
"""Draws of the model by which columns are found that say the same."""

SAME = 0.95
"""Rank correlation, or Cramér's V, from which two columns say the same."""


ROWS_AT_ONCE = 512


class Surprise(NamedTuple):
    """What one column, or a group of columns that say the same, is in a row.

    Attributes
    ----------
    columns : tuple
        Names.
    values : tuple
        Cells of the row.
    expected : tuple
        Cells that would have been expected.
    surprise : float
        -log p of these cells, given the others, in nats, in the units of X.
    excess : float
        How much more that is than the average over what the cells might have been.
    std_error : float
        Of the surprise.

    See Also
    --------
    Explanation : Makes these, by `of_row`.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import NCEDensity
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=300)
    >>> X = np.column_stack([x, x + 0.1 * rng.normal(size=300)])
    >>> est = NCEDensity(base="gaussian", energy_model=None, n_members=1, random_state=0).fit(X)
    >>> (surprise,) = est.explain([[0.0, 2.0]]).of_row(0)[:1]
    >>> surprise.columns, surprise.values  # two columns that say the same
    ((0, 1), (0.0, 2.0))
    >>> surprise.excess > 10
    True
    """

    columns: tuple[Any, ...]
    values: tuple[Any, ...]
    expected: tuple[Any, ...]
    surprise: float
    excess: float
    std_error: float


class Explanation:
    r"""How surprising the cells of rows are, given the other cells of their rows.

    :meth:`skebm.NCEDensity.explain` makes it.

    Attributes
    ----------
    columns : list of tuple
        Columns that are judged together: single ones, and groups that say the same, of which no
        one can tell which is wrong.
    surprise : ndarray of shape (n_samples, n_groups)
        :math:`-\log p(x_j \mid x_{-j})`, in nats, in the units of X: a density of numbers depends
        on their unit.
    excess : ndarray of shape (n_samples, n_groups)
        Surprise minus what it is on average over :math:`p(x_j \mid x_{-j})`, which does not depend
        on units: nats above what a cell of that column, in such a row, has anyway. A number k
        standard deviations from where a normal conditional expects it has :math:`(k^2 - 1) / 2`.
    std_error : ndarray of shape (n_samples, n_groups)
        Of the surprise: what the errors of log Z, and of the integral, put on it.
    values, expected : table of shape (n_samples, n_features)
        The rows as they were given, and the cells that would have been expected given the others:
        the likeliest state and, where that is a number, the median.

    See Also
    --------
    Surprise : What it says of one column of a row.
    ConditionalDensity : What it is made of.
    skebm.plotting.ExplanationDisplay : Draws it.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import NCEDensity
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=500)
    >>> X = np.column_stack([x, x + 0.3 * rng.normal(size=500), rng.normal(size=500)])
    >>> est = NCEDensity(energy_model=None, random_state=0).fit(X)
    >>> explanation = est.explain([[0.0, 0.1, 3.0]])
    >>> explanation.of_row(0)[0].columns
    (2,)
    """

    columns: list[tuple[Any, ...]]
    surprise: FloatArray
    excess: FloatArray
    std_error: FloatArray
    values: Any
    expected: Any

    def __init__(
        self,
        columns: list[tuple[Any, ...]],
        places: list[list[int]],
        surprise: FloatArray,
        excess: FloatArray,
        std_error: FloatArray,
        values: Any,
        expected: Any,
    ):
        self.columns, self._places = columns, places
        self.surprise, self.excess, self.std_error = surprise, excess, std_error
        self.values, self.expected = values, expected

    def of_row(self, i: int) -> list[Surprise]:
        """What is odd about a row, the oddest first.

        Parameters
        ----------
        i : int
            Which row, from 0; negative ones count from the end.

        Returns
        -------
        list of Surprise
            By excess.

        Raises
        ------
        IndexError
            If there is no such row.
        """
        n_rows = len(self.excess)
        if not -n_rows <= i < n_rows:
            raise IndexError(f"i={i!r} is none of the {n_rows} row(s) that were explained.")
        values, expected = _cells_of_row(self.values, i), _cells_of_row(self.expected, i)
        return [
            Surprise(
                self.columns[g],
                tuple(values[j] for j in self._places[g]),
                tuple(expected[j] for j in self._places[g]),
                float(self.surprise[i, g]),
                float(self.excess[i, g]),
                float(self.std_error[i, g]),
            )
            for g in np.argsort(-self.excess[i], kind="stable")
        ]


def explain(
    estimator: Any,
    completer: Completer,
    rows: FloatArray,
    values: Any,
    groups: list[list[int]],
    n_draws: int,
) -> Explanation:
    """Explain rows.

    Parameters
    ----------
    estimator : estimator of skebm
    completer : Completer
    rows : ndarray of shape (n, n_features)
        As numbers.
    values : table of shape (n, n_features)
        The same rows as they were given.
    groups : list of list of int
        Columns that are judged together.
    n_draws : int
        Completions of a row with several open cells.
    """
    parts = [
        _explained(estimator, completer, rows[start : start + ROWS_AT_ONCE], groups, n_draws)
        for start in range(0, len(rows), ROWS_AT_ONCE)
    ]
    surprise, excess, std_error, expected = (np.concatenate(p) for p in zip(*parts, strict=True))
    names, schema = completer.columns.names, estimator._schema
    return Explanation(
        [tuple(names[j] for j in places) for places in groups], groups, surprise, excess, std_error,
        values, schema.decode(expected, "auto", None),
    )  # fmt: skip


def _explained(estimator, completer, rows, groups, n_draws):
    """Surprise, excess and standard error, (n, n_groups), and expected cells, of some rows."""
    joint, error = estimator._log_density_std(rows)
    shares = completer.shares(rows)
    own = (np.square(error) - np.square(completer.error_of_log_z(shares))).clip(0.0)
    surprise, excess, std_error = (np.empty((len(rows), len(groups))) for _ in range(3))
    expected = rows.copy()
    for g, places in enumerate(groups):
        known = np.ones(rows.shape, dtype=bool)
        known[:, places] = False
        completions = list(completer.complete(rows, known, n_draws=n_draws))
        of_others = completer.marginals(rows, known, completions)
        surprise[:, g] = of_others.log_density - joint
        log_z = completer.error_of_log_z(shares - of_others.shares)
        std_error[:, g] = np.sqrt(own + np.square(log_z) + np.square(of_others.std_error))
        # units make no difference to it, which they would where some cells have values only
        excess[:, g] = surprise[:, g] - completer.log_units(rows, ~known)
        for weighted in completions:
            excess[weighted.rows, g] -= weighted.found.mean_surprise.cpu().numpy()
            cells, weights = weighted.cells, weighted.weights
            for j in places:
                own_cells = _likeliest(cells[:, :, j], weights, completer.discrete(j))
                expected[weighted.rows, j] = own_cells
    return surprise, excess, std_error, expected


def _likeliest(cells, weights, discrete):
    """The likeliest state of every row, the median of numbers where that is a number, (n,).

    `discrete` has the cells that are states of their own; a missing cell is one, too.
    """
    found = np.empty(len(cells))
    for i, (own, weight) in enumerate(zip(cells, weights, strict=True)):
        states = [*discrete, np.nan]
        shown = [own == state for state in discrete] + [np.isnan(own)]
        masses = [weight[is_state].sum() for is_state in shown]
        number = ~np.any(shown, axis=0)
        best = int(np.argmax(masses))
        if number.any() and weight[number].sum() >= masses[best]:
            found[i] = weighted_quantile(own[number], weight[number], 0.5)
        else:
            found[i] = states[best]
    return found


def groups_that_say_the_same(completer: Completer, schema: Schema) -> list[list[int]]:
    """Columns, single or in groups of which each tells the others, as draws of the model show.

    Numbers are compared by their rank correlation, categories by Cramér's V.

    Parameters
    ----------
    completer : Completer
    schema : Schema
        Of the table of the fit.

    Returns
    -------
    list of list of int
        Of all columns that are not constant, in their order.
    """
    columns = completer.columns
    nothing = np.zeros((1, len(columns.names)), dtype=bool)
    x, _ = completer.draw(columns.constants[None], nothing, N_COMPARED, completer.rng())
    drawn = columns.restore(x[0].cpu().numpy())
    varies = np.flatnonzero(~columns.constant).tolist()
    is_category = dict(enumerate(c.is_category for c in schema.columns))
    same = np.eye(len(varies), dtype=bool)
    for a, j in enumerate(varies):
        for b, other in enumerate(varies[:a]):
            if is_category.get(j) == is_category.get(other):
                measure = _cramers_v if is_category.get(j) else _rank_correlation
                same[a, b] = same[b, a] = measure(drawn[:, j], drawn[:, other]) >= SAME
    _, label = connected_components(csr_array(same), directed=False)
    return [[j for j, own in zip(varies, label, strict=True) if own == i] for i in set(label)]


def _rank_correlation(x, y):
    there = ~(np.isnan(x) | np.isnan(y))
    x, y = x[there], y[there]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    found: Any = spearmanr(x, y)
    return abs(found.statistic)


def _cramers_v(x, y):
    there = ~(np.isnan(x) | np.isnan(y))
    found: Any = crosstab(x[there], y[there])
    table = found.count
    return association(table, method="cramer") if min(table.shape) > 1 else 0.0


def _cells_of_row(table, i):
    """Cells of a row of a table, one by one, as Python's own objects."""
    cells = [
        table.iloc[i, j] if hasattr(table, "iloc") else table[i, j] for j in range(table.shape[1])
    ]
    return [cell.item() if isinstance(cell, np.generic) else cell for cell in cells]
