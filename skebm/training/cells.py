"""What the cells of a column can show: categories, values of their own, a grid, bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from skebm._typing import FloatArray

MIN_ATOM_SHARE, MIN_ATOM_ROWS = 0.02, 20
"""A value is a state of its own if it has at least this share of a column, and so many rows, ..."""

ATOM_OVER_OTHERS = 5.0
"""... and so many times the rows of any other value that is none, ..."""

MIN_DISTINCT, MIN_DISTINCT_SHARE = 20, 0.25
"""... where the others are many, and hardly repeat."""

MAX_ATOMS = 3

N_BOOTSTRAPS = 50
"""Resamples of the rows that have to agree on the atoms of a column."""

BOUND_ROWS, BOUND_SHARE = 3, 0.005
"""A lowest or highest value that so many rows, and such a share of them, have is a bound."""

REPEATED, NEARBY = 0.5, 0.01
"""A column with fewer distinct values than the first share of its rows repeats them; a draw is one
of the values within the second share of the rows."""

MAX_STEPS = 1e6
"""A column with more steps than this between its extremes is on no grid."""


@dataclass(frozen=True)
class Kinds:
    """What is known of the columns of X before their values are looked at.

    Attributes
    ----------
    n_categories : ndarray of int of shape (n_features,)
        0 for columns of numbers.
    integers : ndarray of bool of shape (n_features,)
        Columns whose dtype holds whole numbers alone.
    atoms : "auto", None or mapping
        Values that are states of their own: found by a rule, none, or given by column.

    See Also
    --------
    Columns : Reads the values.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.5], [1, 0.5], [2, -1.0], [1, 2.0]])  # codes of categories, numbers
    >>> kinds = Kinds(n_categories=np.array([3, 0]), integers=np.zeros(2, dtype=bool))
    >>> Columns.learn(X, ["colour", "size"], kinds=kinds).layout
    Layout(sizes=(3,), value_of=(-1,), n_values=1)
    """

    n_categories: np.ndarray
    integers: np.ndarray
    atoms: Any = None

    @classmethod
    def numbers(cls, n_features: int) -> Self:
        """Numbers in all columns, and no value that is a state of its own."""
        return cls(np.zeros(n_features, int), np.zeros(n_features, bool))

    def atoms_of(self, j: int, column: FloatArray) -> FloatArray:
        """Atoms of column j, sorted."""
        if self.atoms is None or self.n_categories[j]:
            return np.zeros(0)
        if isinstance(self.atoms, Mapping):
            return np.unique(np.asarray(self.atoms.get(j, ()), dtype=np.float64))
        return find_atoms(column[~np.isnan(column)])


def find_atoms(values: FloatArray) -> FloatArray:
    """Values that many rows share in a column that otherwise hardly repeats one.

    The rule has a wide margin, because samples of one table have to agree: a value counts only if
    it does in all of fifty bootstrap samples of the rows.

    Parameters
    ----------
    values : ndarray of shape (n,)

    Returns
    -------
    ndarray of shape (n_atoms,)
        Sorted; empty for a column on a grid, such as counts.
    """
    distinct, counts = np.unique(values, return_counts=True)
    found = _atoms_of_counts(counts)
    if not found.any():
        return distinct[:0]
    rng = np.random.RandomState(0)
    n = counts.sum()
    for _ in range(N_BOOTSTRAPS):
        drawn = rng.multinomial(n, counts / n)
        if not np.array_equal(found, _atoms_of_counts(drawn)):
            return distinct[:0]
    return distinct[found]


def _atoms_of_counts(counts):
    """Which distinct values are atoms, by how many rows have them."""
    n = counts.sum()
    nothing = np.zeros(len(counts), dtype=bool)
    order = np.argsort(-counts, kind="stable")[: MAX_ATOMS + 1]
    for n_atoms in range(min(MAX_ATOMS, len(counts) - 1), 0, -1):
        least, next_one = counts[order[n_atoms - 1]], counts[order[n_atoms]]
        rest = n - counts[order[:n_atoms]].sum()
        n_distinct = np.count_nonzero(counts) - n_atoms
        if (
            least >= max(MIN_ATOM_SHARE * n, MIN_ATOM_ROWS, ATOM_OVER_OTHERS * next_one)
            and n_distinct >= max(MIN_DISTINCT, MIN_DISTINCT_SHARE * rest)
        ):  # fmt: skip
            nothing[order[:n_atoms]] = True
            return nothing
    return nothing


@dataclass(frozen=True)
class Grid:
    """Values that draws of a column may take.

    Attributes
    ----------
    step, origin : float
        Multiples of the step from the origin; a step of 0 for any number.
    low, high : float
        Bounds at which the rows pile up; infinite where they do not.
    mirrors : (bool, bool)
        Whether these are atoms: numbers beyond them are mirrored, because they are none.
    values : tuple of float
        Sorted, of a column that repeats its values; empty for others.
    shares : tuple of float
        How often these are met.
    """

    step: float = 0.0
    origin: float = 0.0
    low: float = -np.inf
    high: float = np.inf
    mirrors: tuple[bool, bool] = (False, False)
    values: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def learn(
        cls,
        column: FloatArray,
        weight: FloatArray,
        *,
        whole: bool,
        has_ties: bool,
        atoms: FloatArray,
    ) -> Self:
        """Read grid and bounds off the values of a column; NaN is left out.

        An atom that all values are above, or below, is a bound, too.
        """
        there = ~np.isnan(column)
        values, which = np.unique(column[there], return_inverse=True)
        below = len(atoms) > 0 and atoms[0] <= values[0]
        above = len(atoms) > 0 and atoms[-1] >= values[-1]
        ends: dict[str, Any] = {"mirrors": (bool(below), bool(above))}
        if below:
            ends["low"] = float(atoms[0])
        if above:
            ends["high"] = float(atoms[-1])
        if not has_ties:
            return cls(step=1.0 if whole else 0.0, **ends)
        step = grid_step(values) or (1.0 if whole else 0.0)
        mass = np.bincount(which, weight[there])
        mass /= mass.sum()
        least = max(BOUND_ROWS / there.sum(), BOUND_SHARE)
        if mass[0] >= least:
            ends.setdefault("low", float(values[0]))
        if mass[-1] >= least:
            ends.setdefault("high", float(values[-1]))
        if len(values) < REPEATED * there.sum():
            ends |= {"values": tuple(values.tolist()), "shares": tuple(mass.tolist())}
        return cls(step, values[0] if step else 0.0, **ends)

    def rounded(self, numbers: FloatArray) -> FloatArray:
        """The nearest numbers on the grid, within the bounds, (n,) -> (n,)."""
        if self.step:
            # in decimals, as tables are written: not 0.30000000000000004
            decimals = max(0, 9 - int(np.floor(np.log10(self.step))))
            steps = np.round((numbers - self.origin) / self.step)
            numbers = np.round(self.origin + self.step * steps, decimals)
        return np.clip(numbers, self.low, self.high)

    def shown(self, numbers: FloatArray, rng: np.random.RandomState) -> FloatArray:
        """What the column shows for numbers that were drawn from its density, (n,) -> (n,).

        Where it repeats its values, they may be heaped (at whole years, at round prices), and more
        narrowly than a density is. So a number becomes one of the values that are met within a
        per cent of the rows around it, by how often they are met; the rows of a value lie evenly in
        its cell, over which `Columns.perturb` spreads it. Other numbers, and those beyond all
        values, are rounded to the grid, and moved to a bound if they are beyond it.
        """
        if self.mirrors[0]:
            numbers = np.where(numbers < self.low, 2.0 * self.low - numbers, numbers)
        if self.mirrors[1]:
            numbers = np.where(numbers > self.high, 2.0 * self.high - numbers, numbers)
        result = self.rounded(numbers)
        if not self.values:
            return result
        values, shares = np.array(self.values), np.array(self.shares)
        above, half = np.cumsum(shares), half_widths(values)
        inside = (numbers >= values[0] - half[0]) & (numbers <= values[-1] + half[-1])
        numbers = numbers[inside]
        nearest = np.searchsorted(0.5 * (values[1:] + values[:-1]), numbers)
        place = (numbers - values[nearest]) / (2.0 * half[nearest])
        place[np.abs(place) > 0.5] = 0.0  # between two cells
        rank = above[nearest] + shares[nearest] * (place - 0.5)
        rank += NEARBY * rng.uniform(-1.0, 1.0, len(rank))
        at = np.searchsorted(above, rank.clip(0.0, 1.0)).clip(max=len(values) - 1)
        result[inside] = values[at]
        return result


def half_widths(values: FloatArray) -> FloatArray:
    """How far the values of a column with ties are spread to either side, each over its cell.

    Half the gap to the nearest other one, at most half the median gap.

    Parameters
    ----------
    values : ndarray of shape (n,)
        Distinct and sorted, at least two.

    Returns
    -------
    ndarray of shape (n,)
    """
    gaps = np.diff(values)
    padded = np.r_[np.inf, gaps, np.inf]
    return 0.5 * np.minimum(np.minimum(padded[1:], padded[:-1]), np.median(gaps))


def grid_step(values: FloatArray) -> float | None:
    """The step of which all differences of distinct values are multiples, or None.

    Parameters
    ----------
    values : ndarray of shape (n,)

    Returns
    -------
    float or None
    """
    least = np.ptp(values) / MAX_STEPS
    step = 0.0
    for gap in np.unique(np.diff(np.sort(values))):
        while gap > least:  # Euclid's algorithm, up to rounding
            rest = step % gap
            step, gap = gap, rest if rest < 0.999 * gap else 0.0
        if step <= least:
            return None
    return float(step)
