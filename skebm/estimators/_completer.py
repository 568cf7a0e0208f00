"""Rows of a table completed by a fitted model: in the units of X outside, standardised inside."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from skebm._threads import limit_threads
from skebm._typing import FloatArray
from skebm.models import (
    N_CANDIDATES,
    N_REPLICATES,
    Completions,
    Conditioner,
    LatentConditioner,
    Sweeps,
    restricted,
)
from skebm.models.conditional import MAX_PROPOSED
from skebm.training import Columns

N_SWEEPS, N_CHAINS, N_KEPT = 6, 4, 3
"""Sweeps of Gibbs sampling, and chains of which the last sweeps make means and masses."""

N_LATENT_DRAWS = 64
"""Draws of a latent-variable model that make the same."""


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


class Possible(NamedTuple):
    """What a cell of some rows may be, given that it is not missing.

    Attributes
    ----------
    rows : ndarray of int of shape (n,)
        Which rows these are.
    column : int
        Of X.
    cells : ndarray of shape (n, m)
        Numbers, or codes of categories.
    weights : ndarray of shape (n, m)
        Add up to one.
    log_density : ndarray of shape (n, m) or None
        Log-densities of the numbers given all else, up to a constant, where they are known.
    """

    rows: NDArray[np.int_]
    column: int
    cells: FloatArray
    weights: FloatArray
    log_density: FloatArray | None = None


class MarginalDensities(NamedTuple):
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
    ) -> MarginalDensities:
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
        return MarginalDensities(value + self.log_factors(rows, known), error, shares, effective)

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
        return self._is_complete if complete else None

    # ------------------------------------------------------------------ holes of many rows

    def fill(
        self, rows: FloatArray, known: NDArray[np.bool_], n: int, rng: torch.Generator
    ) -> FloatArray:
        """Draw all open cells of many rows n times, none of them missing.

        A cell that is open alone is drawn by `draw`, and several by Gibbs sampling.

        Returns
        -------
        ndarray of shape (n, n_rows, n_features)
            In the units of X, as the columns show numbers; codes of categories.
        """
        x, known_columns = self._encoded(rows, known)
        drawn = x[:, None].repeat(1, n, 1)
        alone, several = _one_and_more(self._is_open(known_columns))
        if len(alone):
            drawn[alone] = self.draw(rows[alone], known[alone], n, rng, complete=True)[0]
        if len(several) and isinstance(self._conditioner, LatentConditioner):
            drawn[several] = self._from_latents(rows[several], known[several], n, rng)
        elif len(several):
            own, of = (a[several].repeat_interleave(n, 0) for a in (x, known_columns))
            *_, (chains, _) = self._sweeps(own, of, N_SWEEPS, rng)
            drawn[several] = chains.view(len(several), n, -1)
        seed = int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device))
        tables = drawn.transpose(0, 1).flatten(0, 1).cpu().numpy()
        return self.columns.restore(tables, np.random.RandomState(seed)).reshape(n, len(x), -1)

    def possible(
        self, rows: FloatArray, known: NDArray[np.bool_], rng: torch.Generator
    ) -> Iterator[Possible]:
        """What open cells of many rows may be, column by column, none of them missing.

        Of a cell that is open alone these are all of its states, and nodes; of several, what Gibbs
        sampling has proposed last, in several chains.
        """
        x, known_columns = self._encoded(rows, known)
        is_open = self._is_open(known_columns)
        alone, several = _one_and_more(is_open)
        for weighted in self.complete(rows[alone], known[alone], n_draws=N_REPLICATES):
            found, own = restricted(weighted.found, self._is_complete), alone[weighted.rows]
            column = int(is_open[own[0]].argmax())
            yield Possible(
                own, column, weighted.cells[:, :, column], found.weights.cpu().numpy(),
                found.log_density.cpu().numpy(),
            )  # fmt: skip
        if not len(several):
            return
        if isinstance(self._conditioner, LatentConditioner):
            drawn = self.fill(rows[several], known[several], N_LATENT_DRAWS, rng)
            for j in np.flatnonzero(is_open[several].any(axis=0)):
                cells = drawn[:, is_open[several, j], j].T
                even = np.full(cells.shape, 1.0 / N_LATENT_DRAWS)
                yield Possible(several[is_open[several, j]], int(j), cells, even)
            return
        own, of = (a[several].repeat_interleave(N_CHAINS, 0) for a in (x, known_columns))
        columns = {cell: j for j, cell in enumerate(self.columns.cells)}
        place = is_open[several].cumsum(0) - 1  # of a row among those that lack a cell
        size = (N_KEPT, N_CHAINS, N_CANDIDATES + 1)
        found = {
            int(j): np.zeros((2, is_open[several, j].sum(), *size))
            for j in np.flatnonzero(is_open[several].any(axis=0))
        }
        for sweep, (_, turns) in enumerate(self._sweeps(own, of, N_SWEEPS, rng)):
            kept = sweep - (N_SWEEPS - N_KEPT)
            for turn in turns if kept >= 0 else ():
                j, (n, m, d) = columns[turn.cell], turn.x.shape
                row, chain = np.divmod(turn.rows.cpu().numpy(), N_CHAINS)
                shown = self.columns.restore(turn.x.view(n * m, d).cpu().numpy())[:, j]
                both = shown.reshape(n, m), turn.weights.cpu().numpy() / (N_KEPT * N_CHAINS)
                found[j][:, place[row, j], kept, chain] = both
        for j, (cells, weights) in found.items():
            n = len(cells)
            yield Possible(
                several[is_open[several, j]], j, cells.reshape(n, -1), weights.reshape(n, -1)
            )

    def _from_latents(self, rows, known, n, rng):
        """Draws of rows given weighted latent variables, cells that are missing then drawn anew."""
        drawn = self.draw(rows, known, n, rng, complete=True)[0]
        x = drawn.flatten(0, 1)
        for cell in self.columns.cells:
            missing = (x[:, cell.state] == cell.missing).nonzero().squeeze(1)
            if cell.missing < 0 or not len(missing):
                continue
            others = torch.ones_like(x[missing], dtype=torch.bool)
            others[:, cell.columns] = False
            with torch.no_grad(), limit_threads(1):
                x[missing] = self._conditioner.draw(
                    x[missing], others, [cell], 1, rng,
                    lambda found, cell=cell: found[:, cell.state] != cell.missing,
                )[0][:, 0]  # fmt: skip
        return x.view(drawn.shape)

    def _is_open(self, known_columns):
        """Which cells of X are open; those of constant columns never are."""
        known = known_columns.cpu().numpy()
        return np.column_stack([~known[:, c.columns].all(1) for c in self.columns.cells])

    def _is_complete(self, x):
        return torch.as_tensor(self.columns.is_complete(x.cpu().numpy()), device=x.device)

    def _sweeps(self, x, known, n, rng):
        """States of chains after every sweep, with its turns."""
        conditioner: Any = self._conditioner
        sweeps, cells = Sweeps(conditioner), self.columns.cells
        with torch.no_grad(), limit_threads(1):
            x = sweeps.start(x, known, cells, rng)
            for _ in range(n):
                x, turns = sweeps.sweep(x, known, cells, rng)
                yield x, turns


def _one_and_more(is_open):
    """Rows with one open cell, and with several."""
    n_open = is_open.sum(1)
    return np.flatnonzero(n_open == 1), np.flatnonzero(n_open > 1)
