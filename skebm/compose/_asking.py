"""Questions about some cells of a row, to a density behind transformers of single columns."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from skebm._containers import labels, like
from skebm._typing import FloatArray, RandomState
from skebm.estimators._asking import Asking
from skebm.estimators._base import BaseDensity
from skebm.estimators._completer import Completer, Weighted
from skebm.estimators._given import Given, read_given
from skebm.estimators._schema import Schema
from skebm.models import Completions
from skebm.models.completions import restricted
from skebm.training import Columns
from skebm.training.precision import Precision

from ._changes import Change, RowTest, as_rows

NEARLY_ALL = 1.0 - 1e-4
"""Share of a conditional inside the image from which on its nodes are good enough."""


class SingleColumns:
    """Transformers of single columns, one after the other, as maps of single cells.

    Parameters
    ----------
    steps : list of (str, object, Change, array-like of shape (0, n_features))
        Names, fitted transformers, the changes of variables that they make, and the containers of
        their rows.
    met : ndarray of shape (n_features,)
        A row in the domain, which takes the place of cells that have no value.

    Raises
    ------
    ValueError
        For a transformer that mixes columns, by the name of its step.
    """

    def __init__(self, steps: list[tuple[str, Any, Change, Any]], met: FloatArray):
        self._steps, self._met = steps, [met[None]]
        for name, transformer, change, seen in steps:
            if change.log_det(self._met[-1]).ndim != 2:
                raise ValueError(
                    f"step {name!r}, {type(transformer).__name__}, mixes columns, or does not say "
                    "the derivatives of single ones, so that what is known of some cells is not "
                    "known of single columns behind it. Leave it out; or ask the density itself, "
                    "pipeline[-1], in the units of its rows. A transformer of yours that maps "
                    "every column for itself needs log-derivatives of shape (n, d)."
                )
            self._met.append(as_rows(transformer.transform(like(seen, self._met[-1]))))

    @property
    def is_bounded(self) -> bool:
        """Whether there may be rows z without an x."""
        return any(change.in_image is not None for _, _, change, _ in self._steps)

    def forward(self, X: FloatArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
        """Cells of X behind the transformers, missing ones as they are.

        Returns
        -------
        z : ndarray of shape (n, n_features)
        log_slopes : ndarray of shape (n, n_features)
            Logarithms of the derivatives.
        outside : ndarray of bool of shape (n, n_features)
            Cells outside of the domain of a transformer, whose z means nothing.
        """
        missing = np.isnan(X)
        z, log_slopes, outside = np.where(missing, self._met[0], X), np.zeros(X.shape), missing
        for (_, transformer, change, seen), met, image in zip(
            self._steps, self._met[:-1], self._met[1:], strict=True
        ):
            if change.in_domain is not None:
                outside = outside | _failing(change.in_domain, z, met)
            x = np.where(outside, met, z)
            with np.errstate(all="ignore"):  # where a function has no value
                z = as_rows(transformer.transform(like(seen, x)))
            outside = outside | ~np.isfinite(z)
            x, z = np.where(outside, met, x), np.where(outside, image, z)
            log_slopes += change.log_det(x)
        return np.where(missing, np.nan, z), log_slopes, outside & ~missing

    def backward(self, z: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Cells z as cells of X, missing ones as they are, and which rows have an x."""
        missing, there = np.isnan(z), np.ones(len(z), dtype=bool)
        x, lost = np.where(missing, self._met[-1], z), missing
        for (_, transformer, change, _), met in zip(
            self._steps[::-1], self._met[-2::-1], strict=True
        ):
            with np.errstate(all="ignore"):
                if change.in_image is not None:
                    there &= change.in_image(x)
                x = as_rows(transformer.inverse_transform(x))
            lost = lost | ~np.isfinite(x)
            x = np.where(lost, met, x)
        return np.where(lost, np.nan, x), there & ~(lost & ~missing).any(axis=1)


def _failing(test: RowTest, x: FloatArray, met: FloatArray) -> NDArray[np.bool_]:
    """Cells because of which rows fail a test, (n, d); a row that passes it lends the others."""
    failing = np.zeros(x.shape, dtype=bool)
    rows = np.flatnonzero(~test(x))
    for j in range(x.shape[1] if len(rows) else 0):
        alone = np.repeat(met, len(rows), axis=0)
        alone[:, j] = x[rows, j]
        failing[rows, j] = ~test(alone)
    return failing


@dataclass(frozen=True)
class ColumnsBehind(Columns):
    """Columns of a density behind transformers, read from and shown as rows in front of them.

    Attributes
    ----------
    behind : Columns
        Those of the density.
    maps : SingleColumns
    """

    behind: Any = None
    maps: Any = None

    def encode(self, X: np.ndarray) -> FloatArray:
        """Rows as the density has them: states and standardised values."""
        return self.behind.encode(self.behind.snap(self.maps.forward(X)[0], 0.0))

    def restore(self, x: np.ndarray, rng: np.random.RandomState | None = None) -> FloatArray:
        """Rows in the units of X, constant columns put back; NaN where a cell has no x."""
        X, _ = self.maps.backward(self.behind.restore(x, rng))
        X[:, self.constant] = self.constants[self.constant]
        return self.with_states(X, x)

    def log_slopes(self, X: np.ndarray, among: NDArray[np.bool_]) -> FloatArray:
        """What the transformers add to the log-density of some cells, by a mask, (n,).

        Cells that are missing or atoms have a probability and no unit. Those outside of the domain
        of a transformer are impossible: -inf.
        """
        _, log_slopes, outside = self.maps.forward(X)
        there = ~np.isnan(self.encode(X)[:, len(self.states) :])
        own = np.where(there & among[:, self.varying], log_slopes[:, self.varying], 0.0)
        return np.where((outside & among).any(axis=1), -np.inf, own.sum(axis=1))


class CompleterBehind(Completer):
    """Completes rows in front of transformers, inside their image.

    Parameters
    ----------
    behind : Completer
        Of the density.
    columns : ColumnsBehind
    log_image_mass, std_error : float
        Those of the pipeline.
    """

    columns: ColumnsBehind

    def __init__(
        self, behind: Completer, columns: ColumnsBehind, log_image_mass: float, std_error: float
    ):
        super().__init__(
            behind._conditioner, columns, behind._std_error, behind._seed, behind.device
        )
        self._log_image_mass, self._image_error = log_image_mass, std_error

    @property
    def is_mixture(self) -> bool:
        """Whether the marginals have a closed form, as those of a part of a mixture have not."""
        return super().is_mixture and not self.columns.maps.is_bounded

    def complete(
        self, rows: FloatArray, known: NDArray[np.bool_], *, n_draws: int
    ) -> Iterator[Weighted]:
        """Completions that have an x; see :meth:`Completer.complete`.

        Nodes of an integral do not see where an image ends between two of them, so that cells that
        are open alone are drawn where it ends inside of their conditional.
        """
        for some, found, _ in super().complete(rows, known, n_draws=n_draws):
            inside, share = self._inside(found)
            cut = (share < NEARLY_ALL) & (found.n_nodes > 0)
            if not cut.all():
                kept = torch.as_tensor(~cut, device=self.device)
                yield Weighted(some[~cut], inside.of_rows(kept), self.columns)
            again = some[cut]
            if len(again):
                for part, drawn, _ in self._completions(rows[again], known[again], n_draws, False):
                    yield Weighted(again[part], self._inside(drawn)[0], self.columns)

    def _inside(self, found: Completions) -> tuple[Completions, NDArray[np.float64]]:
        """Completions with the weights of those that have an x, and the share that these have."""
        inside = restricted(found, self._has_x if self.columns.maps.is_bounded else None)
        share = (inside.log_marginal - found.log_marginal).exp().nan_to_num(1.0).clamp_max(1.0)
        n_effective = found.n_effective * share
        # an error like that of a frequency, and where none is outside of an image that has an end,
        # one of them might have been
        beyond = 1.0 - share + (self._log_image_mass < 0.0) / n_effective
        std_error = found.std_error.hypot((beyond / n_effective).nan_to_num(0.0).sqrt())
        one = torch.ones_like(found.shares[:, :1])
        return inside._replace(
            std_error=std_error,
            n_effective=n_effective,
            shares=torch.cat([found.shares, one], dim=1),
        ), share.cpu().numpy()

    def shares(self, rows: FloatArray) -> FloatArray:
        """Shares of the members, and 1 for the mass of the image; see :meth:`Completer.shares`.

        It is like one more log Z, on which all densities depend alike.
        """
        return np.column_stack([super().shares(rows), np.ones(len(rows))])

    def error_of_log_z(self, shares: FloatArray) -> FloatArray:
        """Standard error from those of log Z and of the mass of the image, (n,)."""
        return np.hypot(super().error_of_log_z(shares[:, :-1]), shares[:, -1] * self._image_error)

    def log_factors(self, rows: FloatArray, known: NDArray[np.bool_]) -> FloatArray:
        """What the known cells have beside a log-density of states and standardised values."""
        slopes = self.columns.log_slopes(rows, known)
        return super().log_factors(rows, known) + slopes - self._log_image_mass

    def log_units(self, rows: FloatArray, columns: NDArray[np.bool_]) -> Any:
        """What units put on -log p of rows, the derivatives of the transformers among them."""
        return super().log_units(rows, columns) - self.columns.log_slopes(rows, columns)

    def draw(
        self,
        rows: FloatArray,
        known: NDArray[np.bool_],
        n: int,
        rng: torch.Generator,
        *,
        complete: bool = False,
    ) -> tuple[torch.Tensor, FloatArray]:
        """Draw completions that have an x; see :meth:`Completer.draw`."""
        drawn, n_effective = super().draw(rows, known, n, rng, complete=complete)
        if not self.columns.maps.is_bounded:
            return drawn, n_effective
        is_complete = self._allows(complete)

        def allows(x):
            there = self._has_x(x)
            return there if is_complete is None else there & is_complete(x)

        def failing():
            return ~allows(drawn.flatten(0, 1)).view(len(rows), n).all(1).cpu().numpy()

        again = np.flatnonzero(failing())
        if len(again):
            found, own = self._draws(rows[again], known[again], n, rng, allows, False)
            drawn[again], n_effective[again] = found, own
            if failing().any():
                raise ValueError(
                    f"row {int(failing().argmax())} of given: hardly any completion of it has an x "
                    "that the transformers would take there."
                )
        return drawn, n_effective

    def _has_x(self, x):
        """Which encoded rows are in the image, (m, d) -> (m,) of bool."""
        z = self.columns.behind.restore(x.cpu().numpy())
        return torch.as_tensor(self.columns.maps.backward(z)[1], device=x.device)


def _can_be_asked(pipeline):
    return isinstance(pipeline.steps[-1][1], Asking)


class AskingBehind:
    """What can be asked of some cells in front of the transformers of a pipeline."""

    steps: Any
    score_samples: Any
    _changes: Any
    _constants: FloatArray
    _met: FloatArray
    _precision: Precision
    _seen: dict[str, Any]
    log_image_mass_: float
    log_image_mass_std_error_: float

    _warn_of_new = Asking._warn_of_new
    condition = available_if(_can_be_asked)(Asking.condition)
    marginal = available_if(_can_be_asked)(Asking.marginal)
    explain = available_if(_can_be_asked)(Asking.explain)

    @property
    def _density(self) -> Any:
        return self.steps[-1][1]

    @property
    def _front(self) -> Any:
        """The container of the rows that `fit` was given."""
        return next(iter(self._seen.values()))

    @property
    def _schema(self) -> Schema:
        """Rows are numbers, and draws an array."""
        return Schema("array")

    @property
    def _columns(self) -> ColumnsBehind:
        """Those of the density, with names, constants and atoms as they are in X."""
        steps = [(name, t, change, self._seen[name]) for name, t, change in self._changes()]
        maps, behind = SingleColumns(steps, self._met), self._density._columns
        shown, _ = maps.backward(behind.constants[None])

        def in_x(state):
            rows = np.repeat(behind.constants[None], 1 + len(state.atoms), axis=0)
            rows[1:, state.column] = state.atoms
            cells = maps.backward(rows)[0][1:, state.column]
            return replace(state, atoms=tuple(cells.tolist()))

        particular = {
            "behind": behind,
            "maps": maps,
            "constants": np.where(np.isnan(self._constants), shown[0], self._constants),
            "precision": np.broadcast_to(self._precision, len(self._met)),
            "unit_interval": False,
            "states": tuple(map(in_x, behind.states)),
            "names": tuple(labels(self._front)),
        }
        return ColumnsBehind(**vars(behind) | particular)

    def _completer(self) -> CompleterBehind:
        return CompleterBehind(
            self._density._completer(),
            self._columns,
            self.log_image_mass_,
            self.log_image_mass_std_error_,
        )

    def _read_given(self, given: Any, what: str = "given") -> Given:
        """Given cells, all of them inside of the domains of the transformers."""
        columns = self._columns
        cells = read_given(given, self._schema, columns.names, what)
        outside = columns.maps.forward(columns.snap(cells.rows, 0.0))[2] & cells.known
        if outside.any():
            i, j = np.argwhere(outside)[0]
            raise ValueError(
                f"row {i} of {what}: column {columns.names[j]!r} has {cells.rows[i, j]:g}, which "
                "is outside of the domain of a transformer, and impossible for the density."
            )
        return cells

    def _validate(self, X: Any) -> FloatArray:
        check_is_fitted(self)
        cells, columns = self._read_given(X, "X"), self._columns
        if not cells.known.all():
            i, j = np.argwhere(~cells.known)[0]
            raise ValueError(f"row {i} of X lacks a cell in column {columns.names[j]!r}.")
        return columns.snap(cells.rows, 0.0)

    def _log_density(self, rows):
        return self.score_samples(like(self._front, rows))

    def _log_density_std(self, rows):
        return self.score_samples(like(self._front, rows), return_std=True)

    def _sampling_rng(self, random_state: RandomState, *, n_samples: int) -> torch.Generator:
        return self._density._sampling_rng(random_state, n_samples=n_samples)

    _as_table = BaseDensity._as_table
