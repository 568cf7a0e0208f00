"""Columns before the model: states, constant columns, robust scales, ties, smoothing."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from skebm._layout import Cell, Layout
from skebm._statistics import weighted_deviation, weighted_quantile
from skebm._typing import FloatArray

from .cells import Grid, Kinds, half_widths
from .precision import Precision

ROUNDING = 1e-9
"""Values so far outside of the unit interval are taken to be 0 or 1."""


@dataclass(frozen=True)
class StateColumn:
    """States of one column of X.

    Attributes
    ----------
    column : int
        Which column of X.
    value : int
        Its place among the columns of values, -1 for one that has none. Where there is one, state 0
        is "a number".
    n_categories : int
        Codes 0, 1, ... of a categorical column; 0 for a column of numbers.
    atoms : tuple of float
        Numbers that are states of their own.
    missing : bool
        Whether a missing cell is a state, the last one.
    """

    column: int
    value: int
    n_categories: int
    atoms: tuple[float, ...]
    missing: bool

    @property
    def size(self) -> int:
        """Number of states."""
        return (self.value >= 0) + self.n_categories + len(self.atoms) + self.missing

    def codes(self, cells: FloatArray) -> FloatArray:
        """Codes of the states of cells, -1 for what was never met, (n,) -> (n,)."""
        codes = np.full(len(cells), 0.0 if self.value >= 0 else -1.0)
        if self.n_categories:
            codes = np.where(cells >= 0, cells, -1.0)
        for i, atom in enumerate(self.atoms):
            codes[cells == atom] = (self.value >= 0) + i
        codes[np.isnan(cells)] = self.size - 1 if self.missing else -1.0
        return codes

    def cells(self, codes: FloatArray) -> FloatArray:
        """Cells that show these states, NaN where they are missing, or a number."""
        shown = np.r_[
            np.full(int(self.value >= 0), np.nan), np.arange(float(self.n_categories)), self.atoms,
            np.full(int(self.missing), np.nan),
        ]  # fmt: skip
        return shown[codes.astype(int)]


@dataclass(frozen=True)
class Columns:
    """How columns of X become the states and standardised values of rows, and back.

    Attributes
    ----------
    varying : ndarray of bool of shape (n_features,)
        Columns of X that have values. Those with neither values nor states are constant: a point
        mass.
    constants : ndarray of shape (n_features,)
        Value of the constant columns (unused for the others).
    precision : ndarray of shape (n_features,)
        Relative precision of the values that `constants` were read from.
    n_rows : int
        How many rows they were read from.
    center, scale : ndarray of shape (n_varying,)
        Median and robust standard deviation (interquartile range / 1.349; where that is 0, the
        standard deviation) of the values.
    spread : ndarray of shape (n_varying,)
        Standard deviation of the standardised values.
    half_steps : tuple of (values, half_widths) or None, one per varying column
        Resolution of a column with ties: each distinct value and how far it is spread.
    grids : tuple of Grid, one per varying column
        Which values its draws may take.
    unit_interval : bool
        Whether columns lie in [0, 1], and keep their units.
    states : tuple of StateColumn
        Columns with more than one state, in the order of X.
    names : tuple
        Of the columns of X, for messages.

    See Also
    --------
    Kinds : What is known of columns before.
    make_task : Takes the columns and the rows.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.training import Columns
    >>> X = np.random.default_rng(0).normal(10.0, 3.0, size=(500, 1))
    >>> columns = Columns.learn(X, names=["length"])
    >>> x = columns.standardize(X)
    >>> np.allclose(X, columns.center + columns.scale * x)
    True
    >>> np.allclose(columns.log_factor, -np.log(columns.scale))  # what log-densities of x lack
    True
    """

    varying: np.ndarray
    constants: np.ndarray
    precision: np.ndarray
    n_rows: int
    center: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    half_steps: tuple[tuple[np.ndarray, np.ndarray] | None, ...]
    grids: tuple[Grid, ...] = ()
    unit_interval: bool = False
    states: tuple[StateColumn, ...] = ()
    names: tuple[Any, ...] = ()

    @classmethod
    def learn(
        cls,
        X: np.ndarray,
        names: Any,
        weight: FloatArray | None = None,
        precision: Precision = 2.0**-52,
        kinds: Kinds | None = None,
    ) -> Self:
        """Read states, center, scale and resolution off the rows of X, of positive weight.

        `precision` is that of :func:`relative_precision`, of X as it was given. Weights are equal
        by default.

        Raises
        ------
        ValueError
            When no column varies, or one varies beyond the range of floating-point numbers.
        """
        kinds = Kinds.numbers(X.shape[1]) if kinds is None else kinds
        numbers = X.copy()
        numbers[:, kinds.n_categories > 0] = np.nan
        atoms = [kinds.atoms_of(j, column) for j, column in enumerate(numbers.T)]
        for column, own in zip(numbers.T, atoms, strict=True):
            column[np.isin(column, own)] = np.nan
        varying = np.array([_varies(column) for column in numbers.T])
        states, value = [], 0
        for j, column in enumerate(X.T):
            own = atoms[j]
            if not varying[j]:  # its only number, if there is one, is a state
                own = np.union1d(own, numbers[~np.isnan(numbers[:, j]), j][:1])
            missing = bool(np.isnan(column).any())
            found = StateColumn(
                j,
                value if varying[j] else -1,
                int(kinds.n_categories[j]),
                tuple(own.tolist()),
                missing,
            )
            value += bool(varying[j])
            if found.size > 1:
                states.append(found)
        if not varying.any() and not states:
            raise ValueError(
                f"every column of X is constant ({len(X)} sample(s)): there is nothing to learn. "
                "Numbers that differ by 1e-12 of their size are taken for one: subtract an offset."
            )
        kept = numbers[:, varying]
        weight = np.ones(len(X)) if weight is None else weight
        with np.errstate(over="ignore", invalid="ignore"):
            quartiles = [_quartiles(column, weight) for column in kept.T]
            low, center, high = np.reshape(quartiles, (-1, 3)).T.copy()
            deviation = _deviations(kept, weight)
            scale = (high - low) / 1.349
        too_wide = ~np.isfinite(deviation + scale)
        if too_wide.any():
            column = names[np.flatnonzero(varying)[too_wide.argmax()]]
            raise ValueError(
                f"column {column!r} spans more than floating-point numbers can square; rescale it."
            )
        tiny = np.finfo(np.float64).tiny
        scale = np.where(scale > tiny, scale, deviation)
        if (scale <= tiny).any():
            column = names[np.flatnonzero(varying)[(scale <= tiny).argmax()]]
            raise ValueError(f"column {column!r} varies by less than {tiny:g}; rescale it.")
        x = (kept - center) / scale
        half_steps = _resolutions(x)
        grids = [
            Grid.learn(
                numbers[:, j], weight, whole=bool(kinds.integers[j]), has_ties=steps is not None,
                atoms=atoms[j],
            )
            for j, steps in zip(np.flatnonzero(varying), half_steps, strict=True)
        ]  # fmt: skip
        return cls(
            varying=varying,
            constants=X[0].copy(),
            precision=np.broadcast_to(precision, X.shape[1]).copy(),
            n_rows=len(X),
            center=center,
            scale=scale,
            spread=_deviations(x, weight),
            half_steps=half_steps,
            grids=tuple(grids),
            states=tuple(states),
            names=tuple(names),
        )

    def in_unit_interval(self) -> "Columns":
        """The same columns in their own units, which have to be the unit interval."""
        n_varying = int(self.varying.sum())
        return replace(
            self, center=np.zeros(n_varying), scale=np.ones(n_varying),
            half_steps=(None,) * n_varying, grids=(Grid(),) * n_varying, unit_interval=True,
        )  # fmt: skip

    @property
    def log_factor(self) -> float:
        """The log-factor of a row that has all values, and shows nothing new."""
        return float(self.log_factors_of(np.zeros((1, self.layout.n_features)))[0])

    @property
    def layout(self) -> Layout:
        """What the columns of an encoded row are."""
        return Layout(
            [s.size for s in self.states], [s.value for s in self.states], int(self.varying.sum())
        )

    @property
    def cells(self) -> list[Cell]:
        """Where the cells of every column of X are in an encoded row."""
        n_states = len(self.states)
        places = np.where(self.varying, n_states + np.cumsum(self.varying) - 1, -1)
        cells = [Cell(value=int(place)) for place in places]
        for i, s in enumerate(self.states):
            missing = s.size - 1 if s.missing else -1
            cells[s.column] = cells[s.column]._replace(state=i, n_states=s.size, missing=missing)
        return cells

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Columns of X that have one state alone, (n_features,)."""
        constant = ~self.varying
        constant[[s.column for s in self.states]] = False
        return constant

    def first_state(self) -> str:
        """What the first column with states is, in words."""
        of = self.states[0]
        if of.n_categories:
            what = "holds categories"
        else:
            what = "has missing cells" if of.missing else "has values that many rows share"
        return f"column {self.names[of.column]!r} {what}"

    def encode(self, X: np.ndarray) -> FloatArray:
        """Rows as states and standardised values, (n, n_features) -> (n, layout.n_features)."""
        values = self.standardize(X)
        if not self.states:
            return values
        codes = np.stack([s.codes(X[:, s.column]) for s in self.states], axis=1)
        for s, code in zip(self.states, codes.T, strict=True):
            if s.value >= 0:
                values[code != 0, s.value] = np.nan
        return np.concatenate([codes, values], axis=1)

    def log_factors(self, X: np.ndarray) -> FloatArray:
        """What rows have, in nats, beside the log-density of states and standardised values.

        The log-determinant of the values that are there, and the log-probability that columns show
        states that have been met: a column with c states in n rows shows another one with
        probability 1 / (n + c + 1), Laplace's rule of succession. What it is then is not modelled.

        Parameters
        ----------
        X : ndarray of shape (n, n_features)

        Returns
        -------
        ndarray of shape (n,)
        """
        factors, constant = self.log_factors_of(self.encode(X)), self.constant
        for other in self.elsewhere(X)[:, constant].T if constant.any() else ():
            factors += _succession(self.n_rows, 1, other) - _succession(self.n_rows, 1, False)
        return factors

    def log_factors_of(self, x: np.ndarray, among: NDArray[np.bool_] | None = None) -> FloatArray:
        """The same for encoded rows, (n, layout.n_features) -> (n,), constant columns as in fit.

        With `among`, a mask of the columns of X, it is the part of these.
        """
        among = np.ones(len(self.varying), dtype=bool) if among is None else among
        log_scale = np.where(among[self.varying], np.log(self.scale), 0.0)
        factors = np.full(len(x), -log_scale.sum())
        factors += int((self.constant & among).sum()) * _succession(self.n_rows, 1, False)
        values = x[:, len(self.states) :]
        absent = np.isnan(values)
        if absent.any():
            factors += absent @ log_scale
        elif not self.states:
            return factors
        never = among[self.varying]  # columns that were never without a value
        for s, codes in zip(self.states, x.T, strict=False):
            if among[s.column]:
                factors += _succession(self.n_rows, s.size, codes < 0)
            if s.value >= 0:
                never[s.value] = False
        for gone in absent.T[never]:
            own = _succession(self.n_rows, 1, gone)
            # of a table of numbers alone the density is one of numbers
            factors += own if self.states else np.where(gone, own, 0.0)
        return factors

    def absent_log_det(self, x: np.ndarray) -> FloatArray:
        """What the values that rows have not would add to their log-determinants, (n,).

        With it scores of rows with different states compare whatever the units of X.
        """
        return -(np.isnan(x[:, len(self.states) :]) @ np.log(self.scale))

    def is_complete(self, x: np.ndarray) -> NDArray[np.bool_]:
        """Which encoded rows have no missing cell in a column that has others, (n,)."""
        complete = np.ones(len(x), dtype=bool)
        for s, codes in zip(self.states, x.T, strict=False):
            complete &= ~(s.missing & (codes == s.size - 1))
        return complete

    def has_states_of(self, other: Self) -> bool:
        """Whether the same columns vary, and have the same states and constants."""
        return bool(
            np.array_equal(self.varying, other.varying)
            and len(self.states) == len(other.states)
            and all(
                a.n_categories == b.n_categories and a.missing == b.missing and a.atoms == b.atoms
                for a, b in zip(self.states, other.states, strict=True)
            )
            and not self.elsewhere(self.snap(other.constants[None], other.precision)).any()
        )

    def elsewhere(self, X: np.ndarray) -> NDArray[np.bool_]:
        """Where constant columns do not show their constant, of the shape of X."""
        same = (X == self.constants) | (np.isnan(X) & np.isnan(self.constants))
        return self.constant & ~same

    def relearned(self, X: np.ndarray, weight: FloatArray) -> Self:
        """The same columns, in the same units, with what other rows say of ties and spread."""
        x = self.encode(X)[:, len(self.states) :]
        return replace(
            self,
            n_rows=len(X),
            spread=_deviations(x, weight),
            half_steps=self.half_steps if self.unit_interval else _resolutions(x),
        )

    def snap(self, X: np.ndarray, precision: Precision) -> FloatArray:
        """X, with the value of a constant column wherever it is met within its precision.

        In the unit interval also 0 and 1 where scaling has left values outside by a rounding error.

        A value counts as met where fit or `precision`, that of these rows as they were given, is
        too coarse to tell it from the constant: 0.1 of a float32 file and 0.1 of a float64 service.
        The same holds for values that are states of their own.
        """
        coarser = 4.0 * np.maximum(self.precision, precision)  # a few roundings
        near_constant = np.abs(X - self.constants) <= coarser * np.abs(self.constants)
        X = np.where(self.constant & near_constant, self.constants, X)
        for s in self.states:
            for atom in s.atoms:
                cells = X[:, s.column]
                cells[np.abs(cells - atom) <= coarser[s.column] * abs(atom)] = atom
        if self.unit_interval:
            near = (X >= -ROUNDING) & (X <= 1.0 + ROUNDING)
            X = np.where(near, X.clip(0.0, 1.0), X)
        return X

    def standardize(self, X: np.ndarray) -> FloatArray:
        """Return the columns with values, standardised."""
        return (X[:, self.varying] - self.center) / self.scale

    def restore(self, x: np.ndarray, rng: np.random.RandomState | None = None) -> FloatArray:
        """Rows in the units of X, constant columns put back.

        With a random stream, numbers are those that the columns can show, see :meth:`Grid.shown`.
        """
        n_states = len(self.states)
        X = np.tile(self.constants, (len(x), 1))
        values = self.center + self.scale * x[:, n_states:]
        if rng is not None:
            for column, grid in zip(values.T, self.grids, strict=True):
                column[:] = grid.shown(column, rng)
        X[:, self.varying] = values
        return self.with_states(X, x)

    def with_states(self, X: FloatArray, x: np.ndarray) -> FloatArray:
        """X, changed so that its cells show the states of encoded rows."""
        for s, codes in zip(self.states, x.T, strict=False):
            shown = s.cells(codes)
            is_number = (codes == 0) if s.value >= 0 else np.zeros(len(x), bool)
            X[:, s.column] = np.where(is_number, X[:, s.column], shown)
        return X

    def rounded(self, column: int, numbers: FloatArray) -> FloatArray:
        """Numbers on the grid of a column of X, within its bounds, in the units of X."""
        if not self.varying[column]:
            return numbers
        return self.grids[int(self.varying[:column].sum())].rounded(numbers)

    def bounded(self, x: np.ndarray) -> FloatArray:
        """Encoded rows whose values lie within the bounds at which the rows pile up."""
        n_states = len(self.states)
        low, high = np.reshape([(grid.low, grid.high) for grid in self.grids], (-1, 2)).T
        values = np.clip(
            x[:, n_states:], (low - self.center) / self.scale, (high - self.center) / self.scale
        )
        return np.concatenate([x[:, :n_states], values], axis=1)

    def perturb(self, x: np.ndarray, smoothing: float, rng: np.random.RandomState) -> FloatArray:
        """Rows spread over the resolution of their columns, plus `smoothing` standard deviations.

        A value of a column with ties is spread evenly over the cell that it stands for, so that
        the likelihood does not pay for spikes. States stay as they are.
        """
        x = x.copy()
        values = x[:, len(self.states) :]
        for column, steps in zip(values.T, self.half_steps, strict=True):
            if steps is not None:
                half = steps[1][np.searchsorted(steps[0], column).clip(max=len(steps[0]) - 1)]
                column += half * rng.uniform(-1.0, 1.0, len(column))
        if smoothing:
            values += smoothing * self.spread * rng.standard_normal(values.shape)
        return x

    @property
    def has_ties(self) -> bool:
        """Whether any column repeats a value."""
        return any(steps is not None for steps in self.half_steps)


def _varies(column):
    """Whether there are two different values."""
    there = column[~np.isnan(column)]
    return len(there) > 0 and there.min() < there.max()


def _quartiles(column, weight):
    there = ~np.isnan(column)
    return weighted_quantile(column[there], weight[there], [0.25, 0.5, 0.75])


def _deviations(X, weight):
    """Weighted standard deviation of the values of every column."""
    deviation = weighted_deviation(X, weight)
    for j in np.flatnonzero(np.isnan(X).any(axis=0)):
        there = ~np.isnan(X[:, j])
        deviation[j] = weighted_deviation(X[there, j : j + 1], weight[there])[0]
    return deviation


def _succession(n, n_states, is_other):
    """Log-probabilities of one of the states met in n rows, and of another one."""
    met = math.log((n + n_states) / (n + n_states + 1))
    return np.where(is_other, -math.log(n + n_states + 1), met)


def _resolutions(x: np.ndarray) -> tuple:
    return tuple(_half_steps(column) for column in x.T)


def _half_steps(column):
    """Distinct values, and how far each is spread; None where no value is repeated."""
    column = column[~np.isnan(column)]
    values = np.unique(column)
    return None if len(values) == len(column) else (values, half_widths(values))


def scott(x: Any) -> float:
    """Scott's rule, in standard deviations, for rows of shape (n, d)."""
    n, d = x.shape
    return n ** (-1.0 / (d + 4))
