"""Rows of a table completed by a fitted model: in the units of X outside, standardised inside."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from skebm._threads import limit_threads
from skebm._typing import FloatArray
from skebm.models import Completions, Conditioner, LatentConditioner
from skebm.models.conditional import MAX_PROPOSED
from skebm.training import Columns


class Weighted(NamedTuple):
    """Completions of some rows.

    Attributes
    ----------
    rows : ndarray of int of shape (n,)
        Which rows these are.
    found : Completions
        On standardised columns.
    columns : Columns
    """

    rows: NDArray[np.int_]
    found: Completions
    columns: Columns

    @property
    def cells(self) -> FloatArray:
        """Completions in the units of X, (n, m, n_features): numbers, codes of categories, and NaN
        where a cell is missing.
        """
        n, m, d = self.found.x.shape
        return self.columns.restore(self.found.x.view(n * m, d).cpu().numpy()).reshape(n, m, -1)

    @property
    def weights(self) -> FloatArray:
        """Weights of the completions, which add up to one, (n, m)."""
        return self.found.weights.cpu().numpy()


class Marginals(NamedTuple):
    """Densities of known cells of rows.

    Attributes
    ----------
    log_density : ndarray of shape (n,)
        In nats, in the units of X.
    std_error : ndarray of shape (n,)
        But for the errors of log Z.
    shares : ndarray of shape (n, n_members)
        Of the members in it.
    n_effective : ndarray of shape (n,)
        Effective completions; infinite where none was drawn.
    """

    log_density: FloatArray
    std_error: FloatArray
    shares: FloatArray
    n_effective: FloatArray


class Completer:
    """Completes rows of X, of which some cells are known.

    Parameters
    ----------
    conditioner : Conditioner or LatentConditioner
    columns : Columns
    log_partition_std_error : ndarray of shape (n_members,)
    seed : int
    device : torch.device

    Attributes
    ----------
    groups : list of list of int, or None
        Columns that say the same, once they are known.
    """

    columns: Columns
    device: torch.device
    groups: list[list[int]] | None

    def __init__(
        self,
        conditioner: Conditioner | LatentConditioner,
        columns: Columns,
        log_partition_std_error: FloatArray,
        seed: int,
        device: torch.device,
    ):
        self.columns, self._conditioner = columns, conditioner
        self._std_error, self._seed, self.device = log_partition_std_error, seed, device
        self.groups = None

    @property
    def is_mixture(self) -> bool:
        """Whether the model is a mixture with marginals in closed form."""
        return self._conditioner.is_mixture

    def rng(self) -> torch.Generator:
        """A random stream that is the same for a fit."""
        return torch.Generator(self.device).manual_seed(self._seed)

    def _encoded(self, rows, known):
        """Rows as the model sees them, and which of their columns are known.

        Cells that fit has never met are as good as open.
        """
        x = torch.as_tensor(self.columns.encode(rows), device=self.device)
        of_states = [known[:, s.column] for s in self.columns.states]
        both = np.column_stack([*of_states, known[:, self.columns.varying]])
        return x, torch.as_tensor(both, device=self.device) & ~self.columns.layout.unknown(x)

    def complete(
        self,
        rows: FloatArray,
        known: NDArray[np.bool_],
        *,
        n_draws: int,
    ) -> Iterator[Weighted]:
        """Completions of rows, with their weights, some rows at a time.

        Parameters
        ----------
        rows : ndarray of shape (n, n_features)
            In the units of X; what open cells hold does not matter.
        known : ndarray of bool of shape (n, n_features)
        n_draws : int
            Of rows with several open cells.

        Yields
        ------
        Weighted
        """
        yield from self._completions(rows, known, n_draws)

    def _completions(self, rows, known, n_draws, integrate=True):
        """The same; cells that are open alone are drawn, too, if they are not integrated."""
        x, known_columns = self._encoded(rows, known)
        with torch.no_grad(), limit_threads(1):
            for some, found in self._conditioner.complete(
                x, known_columns, self.columns.cells, n_draws=n_draws, seed=self._seed,
                integrate=integrate,
            ):  # fmt: skip
                yield Weighted(some.cpu().numpy(), found, self.columns)

    def marginals(
        self, rows: FloatArray, known: NDArray[np.bool_], weighted: Iterable[Weighted]
    ) -> Marginals:
        """Densities of the known cells, from all completions of the rows."""
        value, error, effective = (np.empty(len(rows)) for _ in range(3))
        order, parts = [], []
        for some, found, _ in weighted:
            value[some] = found.log_marginal.cpu().numpy()
            error[some] = found.std_error.cpu().numpy()
            effective[some] = found.n_effective.cpu().numpy()
            order.append(some)
            parts.append(found.shares.cpu().numpy())
        shares = np.concatenate(parts)[np.argsort(np.concatenate(order))]
        return Marginals(value + self.log_factors(rows, known), error, shares, effective)

    def log_factors(self, rows: FloatArray, known: NDArray[np.bool_]) -> FloatArray:
        """What the known cells have beside a log-density of states and standardised values."""
        x, factors = self.columns.encode(rows), np.empty(len(rows))
        for pattern in np.unique(known, axis=0):
            some = (known == pattern).all(1)
            factors[some] = self.columns.log_factors_of(x[some], pattern)
        return factors

    def log_units(self, rows: FloatArray, columns: NDArray[np.bool_]) -> Any:
        """What the units of columns put on -log p of rows, by a mask of cells, (n,).

        That is the logarithm of the scale of every value that is there.
        """
        there = ~np.isnan(self.columns.encode(rows)[:, len(self.columns.states) :])
        return (there & columns[:, self.columns.varying]) @ np.log(self.columns.scale)

    def discrete(self, j: int) -> tuple[float, ...]:
        """Cells of a column that are states of their own: codes of categories, and atoms."""
        for s in self.columns.states:
            if s.column == j:
                return (*map(float, range(s.n_categories)), *s.atoms)
        return ()

    def shares(self, rows: FloatArray) -> FloatArray:
        """Shares of the members in the density of complete rows, (n, n_members); NaN of others."""
        x = torch.as_tensor(self.columns.encode(rows), device=self.device)
        known = ~self.columns.layout.unknown(x).any(1)
        shares = torch.full((len(x), len(self._std_error)), torch.nan, dtype=torch.float64)
        with torch.no_grad(), limit_threads(1):
            if known.any():
                shares[known.cpu()] = self._conditioner.evaluate(x[known])[0].softmax(0).mT.cpu()
        return shares.numpy()

    def error_of_log_z(self, shares: FloatArray) -> FloatArray:
        """Standard error from those of log Z, of what depends on them by these shares, (n,)."""
        return np.sqrt(np.nan_to_num(np.square(shares)) @ np.square(self._std_error))

    def draw(
        self,
        rows: FloatArray,
        known: NDArray[np.bool_],
        n: int,
        rng: torch.Generator,
        *,
        complete: bool = False,
    ) -> tuple[torch.Tensor, FloatArray]:
        """Draw n completions of every row, on standardised columns; only complete ones if asked.

        Returns
        -------
        x : Tensor of shape (n_rows, n, d)
        n_effective : ndarray of shape (n_rows,)
            Effective sample sizes of the proposals; infinite where nothing had to be proposed.
        """
        allows = self._allows(complete)
        drawn, n_effective = self._draws(rows, known, n, rng, allows)
        if np.isnan(n_effective).any():
            raise ValueError(
                f"complete=True: of {MAX_PROPOSED} completions of a row none is without a missing "
                "cell. Draw rows with missing cells."
            )
        return drawn, n_effective

    def _draws(self, rows, known, n, rng, allows, integrate=True):
        """The same, of rows that are allowed."""
        x, known_columns = self._encoded(rows, known)
        with torch.no_grad(), limit_threads(1):
            drawn, n_effective = self._conditioner.draw(
                x, known_columns, self.columns.cells, n, rng, allows, integrate
            )
        return drawn, n_effective.cpu().numpy()

    def _allows(self, complete):
        """Which encoded rows may be drawn, (m, d) -> (m,) of bool; None for all."""
        if not complete:
            return None
        return lambda x: torch.as_tensor(self.columns.is_complete(x.cpu().numpy()), device=x.device)
