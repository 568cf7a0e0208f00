r"""Rows of which some cells are known: their density, and what the other cells may be.

For a model p and a mixture m that covers it, with known cells a and open cells b,

.. math:: p(a) = E_{b \sim m(\cdot \mid a)} \frac{p(a, b)}{m(b \mid a)},

and the same weights make draws of p(b | a) of those of m(b | a), which has a closed form. Where one
cell is open alone nothing is drawn: its states are summed, and a number is integrated at quantiles
of the conditional of the mixture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skebm._layout import Cell, Layout
from skebm._typing import Distribution
from skebm.bases import (
    StackedBase,
    condition,
    fit_gaussian_mixture,
    fit_mixed_mixture,
    mixture_part,
)
from skebm.partition import (
    MIN_ESS_SHARE,
    ess,
    sequential_monte_carlo,
    systematic_resampling,
)
from skebm.samplers import random_walk

from .completions import (
    LEVELS,
    N_NODES,
    N_REPLICATES,
    Completions,
    by_open_cells,
    drawn_from_cell,
    filled_cells,
    leading_components,
    quantile_nodes,
    resampled,
    restricted,
    uniform_points,
    weighted_cells,
)
from .tilted import TiltedMixture

PROPOSED_PER_DRAW, MIN_PROPOSED, MAX_PROPOSED, MORE = 10, 256, 65_536, 4
"""Completions proposed for one that is drawn, and for a row at least and at most; and how many
times as many where that is not enough."""

MIN_ESS, MAX_REPEATED = 32, 0.05
"""Effective completions of a row, and the share of repeated ones, with which they are enough."""

N_PARTICLES, N_PILOT = 64, 256
"""Of each of the 16 runs that anneal a row whose completions are too uneven, and of their pilot."""

N_DRAWS, ROWS_PER_COMPONENT, MAX_COMPONENTS = 4_000, 100, 20
"""Draws of a model without a mixture of its own, and the size of the mixture fitted to them."""

KEPT_CONDITIONALS = 32
"""Sets of known columns whose conditionals are kept; a table with holes has many."""

_EVALUATED = 8_192  # rows at once
_COMPLETED = 65_536  # completions at once


class Conditioner:
    """A model whose rows can be completed, and the mixture that proposes how.

    Parameters
    ----------
    evaluate : callable
        Rows (n, d) -> normalised log-densities of the members, (K, n), and of the mixture, (n,).
    mixture : distribution
        With conditionals in closed form.
    is_mixture : bool, default=False
        Whether the model is the mixture, so that one completion tells what many do.
    tilt : callable, default=None
        Logarithm of what the model is the mixture times of, up to a constant, (n, d) -> (n,);
        where it is not known it comes of `evaluate`.
    make_members : callable, default=list
        Returns the same of every member.

    See Also
    --------
    Completions : What it returns.
    skebm.estimators.ConditionalDensity : The same for an estimator, in the units of X.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase
    >>> from skebm.models import Conditioner
    >>> mixture = GaussianMixtureBase(
    ...     [0.5, 0.5], [[-2.0, -2.0], [2.0, 2.0]], 0.5 * torch.eye(2).expand(2, 2, 2)
    ... )
    >>> def evaluate(x):  # one member: the mixture itself
    ...     log_prob = mixture.log_prob(x)
    ...     return log_prob[None], log_prob
    >>> conditioner = Conditioner(evaluate, mixture, is_mixture=True)
    >>> members, _ = conditioner.evaluate(torch.zeros(3, 2).double())
    >>> members.shape
    torch.Size([1, 3])
    """

    is_mixture: bool

    def __init__(
        self,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
        mixture: Distribution,
        is_mixture: bool = False,
        tilt: Callable[[Tensor], Tensor] | None = None,
        make_members: Callable[[], list["Conditioner"]] = list,
    ):
        self._evaluate, self._mixture, self.is_mixture = evaluate, mixture, is_mixture
        self._tilt, self._make_members = tilt, make_members
        self._conditionals: dict[tuple[int, ...], Any] = {}

    @classmethod
    def of(cls, model: TiltedMixture, layout: Layout, seed: int) -> "Conditioner":
        """For a mixture of tilted bases.

        What its bases have of mixtures proposes; where that is nothing, a mixture fitted to draws
        of the model.

        Parameters
        ----------
        model : TiltedMixture
        layout : Layout
            Of its rows.
        seed : int
            Of the draws, and of the fit to them.
        """
        parts = [mixture_part(q) for q in model.bases]
        kept = [part for part in parts if part is not None]
        mixture: Any = (
            StackedBase(kept, torch.ones(len(kept))) if kept else _mixture_of(model, layout, seed)
        )
        mixture.to(model.log_partition.device)
        is_base = all(part is q for part, q in zip(parts, model.bases, strict=True))

        def evaluate(x):
            members, log_bases = model.log_members_and_bases(x)
            if is_base:
                return members, log_bases.logsumexp(0) - math.log(len(log_bases))
            return members, mixture.log_prob(x)

        def tilt(x):
            return x.new_zeros(len(x)) if model.is_untilted else model.tilt(x[None])[0]

        def make_members():
            return [cls.of(model.member(k), layout, seed) for k in range(model.n_members)]

        is_tilted = is_base and model.n_members == 1
        return cls(
            evaluate, mixture, is_base and model.is_untilted, tilt if is_tilted else None,
            make_members,
        )  # fmt: skip

    @cached_property
    def members(self) -> list["Conditioner"]:
        """Every member by itself."""
        return self._make_members()

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of members, (K, n), and of the mixture, (n,), at complete rows (n, d)."""
        members, mixture = zip(*map(self._evaluate, x.split(_EVALUATED)), strict=True)
        return torch.cat(members, dim=1), torch.cat(mixture)

    def log_weight(self, x: Tensor) -> Tensor:
        """Log-density over that of the mixture, up to a constant, (n, d) -> (n,)."""
        if self._tilt is not None:
            return torch.cat([self._tilt(rows) for rows in x.split(_EVALUATED)])
        members, mixture = self.evaluate(x)
        return _log_mean(members) - mixture

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw rows of the mixture, (n, d)."""
        return self._mixture.sample(n, rng)

    def _given(self, known, excluded=()):
        """Conditionals of the mixture given these columns."""
        key = *known.tolist(), *excluded
        if key not in self._conditionals:
            if len(self._conditionals) == KEPT_CONDITIONALS:
                self._conditionals.clear()
            self._conditionals[key] = condition(self._mixture, known, excluded)
        return self._conditionals[key]

    # ------------------------------------------------------------------ all rows

    def complete(
        self,
        x: Tensor,
        known: Tensor,
        cells: Sequence[Cell],
        *,
        n_draws: int,
        seed: int,
        integrate: bool = True,
    ) -> Iterator[tuple[Tensor, Completions]]:
        """Complete rows, those with the same open cells together.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        known : Tensor of bool of shape (n, d)
        cells : sequence of Cell
            Where the cells of the table are.
        n_draws : int
            Completions of a row with several open cells; a multiple of 16.
        seed : int
            Of the points that these are made from, which are the same for all rows, so that a row
            has one result whatever other rows are there.
        integrate : bool, default=True
            Whether a cell that is open alone is summed and integrated, and not drawn.

        Yields
        ------
        rows : Tensor of int
            Which rows these are.
        completions : Completions
        """
        for rows, own, cell in by_open_cells(known, cells if integrate else []):
            if cell:
                for some in rows.split(max(1, _COMPLETED // (N_NODES + cell.n_states))):
                    yield some, self.of_cell(x[some], cell)
            else:
                u = uniform_points(n_draws, x.shape[1] + 1, seed).to(x)
                for some in rows.split(max(1, _COMPLETED // n_draws)):
                    found = self.of_points(x[some], own, u)
                    low = found.n_effective < MIN_ESS_SHARE * n_draws
                    low &= self._can_be_annealed(own, cells)
                    if not low.all():
                        yield some[~low], found.of_rows(~low)
                    for row in some[low]:
                        rng = torch.Generator(x.device).manual_seed(seed)
                        yield row[None], self.annealed(x[row[None]], own, rng)

    def draw(
        self,
        x: Tensor,
        known: Tensor,
        cells: Sequence[Cell],
        n: int,
        rng: torch.Generator,
        allows: Callable[[Tensor], Tensor] | None = None,
        integrate: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Draw n completions of every row.

        Parameters
        ----------
        x, known, cells
            As of `complete`.
        n : int
        rng : torch.Generator
        allows : callable, default=None
            (m, d) -> (m,) of bool: rows that are not allowed are not drawn.
        integrate : bool, default=True
            As of `complete`.

        Returns
        -------
        rows : Tensor of shape (n_rows, n, d)
        n_effective : Tensor of shape (n_rows,)
            Effective sample sizes of what was proposed; infinite where nothing had to be, and NaN
            where nothing of it is allowed, so that what was drawn means nothing.
        """
        drawn = x.new_empty(len(x), n, x.shape[1])
        n_effective = x.new_full((len(x),), math.inf)
        for rows, own, cell in by_open_cells(known, cells if integrate else []):
            if cell:
                for some in rows.split(max(1, _COMPLETED // (N_NODES + cell.n_states))):
                    found = restricted(self.of_cell(x[some], cell), allows)
                    drawn[some] = drawn_from_cell(found, cell, n, rng)
                continue
            m = max(MIN_PROPOSED, N_REPLICATES * math.ceil(PROPOSED_PER_DRAW * n / N_REPLICATES))
            short = rows
            while len(short) and m <= MAX_PROPOSED:
                parts = []
                for some in short.split(max(1, _COMPLETED // m)):
                    like = {"dtype": x.dtype, "device": x.device}
                    u = torch.rand(len(some), m, x.shape[1] + 1, generator=rng, **like)
                    found = restricted(self.of_points(x[some], own, u.clamp_min(1e-12)), allows)
                    drawn[some], repeated = resampled(found, n, rng)
                    n_effective[some] = ess(found.log_weights)
                    parts.append(some[~(n_effective[some] >= MIN_ESS) | (repeated > MAX_REPEATED)])
                m, short = MORE * m, torch.cat(parts)
            enough = MIN_ESS_SHARE * MIN_PROPOSED
            for row in short[n_effective[short] < enough]:
                if self._can_be_annealed(own, cells):
                    found = restricted(self.annealed(x[row[None]], own, rng), allows)
                    drawn[row], n_effective[row] = resampled(found, n, rng)[0][0], found.n_effective
        return drawn, n_effective

    # ------------------------------------------------------------------ several open cells

    def of_points(self, x: Tensor, known: Tensor, u: Tensor) -> Completions:
        """Completions by the conditional of the mixture.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        known : Tensor of bool of shape (d,)
        u : Tensor of shape (m, d + 1) or (n, m, d + 1)
            Uniform numbers in (0, 1), for the component and for every cell.
        """
        rows, log_known = self.propose(x, known, u)
        n, m = rows.shape[:2]
        members, mixture = self.evaluate(rows.flatten(0, 1))
        log_density = _log_mean(members).view(n, m)
        log_weights = log_density - mixture.view(n, m) + log_known - math.log(m)
        return Completions(
            rows, log_weights, log_density, _shares(members, log_weights),
            _error_of_replicates(log_weights), ess(log_weights),
        )  # fmt: skip

    def propose(
        self, x: Tensor, known: Tensor, u: Tensor, excluded: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Draws of the conditional of the mixture, by uniform numbers as of `of_points`.

        With `excluded`, it is given as well that open cells do not show these states, one for every
        column of states, -1 for none.

        Returns
        -------
        rows : Tensor of shape (n, m, d)
        log_known : Tensor of shape (n, 1)
            Log-density of what is given under the mixture.
        """
        conditional, n, m = self._given(known, excluded), len(x), u.shape[-2]
        joint = conditional.log_joint(x)
        log_known = joint.logsumexp(1, keepdim=True)
        edges = (joint - log_known).exp().cumsum(1)
        u = u.expand(n, m, u.shape[-1])
        which = torch.searchsorted(edges / edges[:, -1:], u[..., 0].contiguous())
        which = which.clamp_max(joint.shape[1] - 1).flatten()
        rows = x.repeat_interleave(m, dim=0)
        rows = conditional.draw(rows, which, u[..., 1:].reshape(n * m, -1))
        return rows.view(n, m, -1), log_known

    @staticmethod
    def _can_be_annealed(known, cells):
        """Whether all that is open is numbers, which random walks can move."""
        return not any(cell.state >= 0 and not known[cell.state] for cell in cells)

    def annealed(self, x: Tensor, known: Tensor, rng: torch.Generator) -> Completions:
        """Completions of one row by annealing, from the conditional of the mixture to that of the
        model; where weights alone are too uneven.

        Parameters
        ----------
        x : Tensor of shape (1, d)
        known : Tensor of bool of shape (d,)
            All states among them.
        rng : torch.Generator
        """
        open_cells = _OpenCells(self, x, known)
        run = sequential_monte_carlo(
            open_cells.log_density, open_cells, rng,
            n_particles=N_PARTICLES, n_runs=N_REPLICATES, n_pilot=N_PILOT, kernel=random_walk,
        )  # fmt: skip
        rows = open_cells.filled(run.samples.flatten(0, 1))
        members, _ = self.evaluate(rows)
        log_weights = run.log_z.repeat_interleave(N_PARTICLES)[None] - math.log(len(rows))
        error = x.new_full((1,), run.partition.std_error)
        return Completions(
            rows[None], log_weights, _log_mean(members)[None], _shares(members, log_weights),
            error, N_PARTICLES * ess(run.log_z)[None],
        )  # fmt: skip

    # ------------------------------------------------------------------ one open cell

    def of_cell(self, x: Tensor, cell: Cell) -> Completions:
        """Completions with all states of a cell, and numbers at quantiles of the conditional."""
        nodes = None
        if cell.value >= 0:
            number = x.clone()
            if cell.state >= 0:
                number[:, cell.state] = 0.0
            nodes = self._nodes(number, cell.value)
        rows = filled_cells(x, cell, nodes)
        members, _ = self.evaluate(rows.flatten(0, 1))
        log_density = _log_mean(members).view(rows.shape[:2])
        log_weights, error = weighted_cells(log_density, nodes)
        shares = _shares(members, log_weights)
        exact, n_nodes = torch.full_like(error, math.inf), N_NODES if nodes else 0
        return Completions(rows, log_weights, log_density, shares, error, exact, n_nodes)

    def _nodes(self, x, column):
        """Nodes for an open value given all else, see :func:`quantile_nodes`."""
        known = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        known[column] = False
        conditional = self._given(known)
        which, weight = leading_components(conditional.log_joint(x).softmax(1))
        n, n_kept = which.shape
        row = torch.arange(n, device=x.device).repeat_interleave(n_kept)
        which = which.flatten()

        def mixed(at):
            share, log_density = conditional.cdf(x, row, which, at)
            share = (weight[..., None] * share.view(n, n_kept, -1)).sum(1)
            log_density = log_density.view(n, n_kept, -1) + weight.log()[..., None]
            return share, log_density.logsumexp(1)

        points = conditional.quantiles(x, row, which, LEVELS.to(x))
        return quantile_nodes(points.view(n, -1), mixed)


class _OpenCells:
    """The open cells of one row as a distribution, that of the mixture, to anneal from."""

    def __init__(self, conditioner, x, known):
        self._conditioner, self._x, self._known = conditioner, x, known
        self._open = ~known
        conditional = conditioner._given(known)
        self._log_given = conditional.log_joint(x).logsumexp(1)

    def filled(self, b):
        """Whole rows, (n, n_open) -> (n, d)."""
        rows = self._x.repeat(len(b), 1)
        rows[:, self._open] = b
        return rows

    def log_density(self, b):
        """log p(a, b)."""
        return _log_mean(self._conditioner.evaluate(self.filled(b))[0])

    def log_prob(self, b):
        """log m(b | a)."""
        return self._conditioner.evaluate(self.filled(b))[1] - self._log_given

    def sample(self, n, rng):
        like = {"dtype": self._x.dtype, "device": self._x.device}
        u = torch.rand(n, self._x.shape[1] + 1, generator=rng, **like).clamp_min(1e-12)
        found = self._conditioner.of_points(self._x, self._known, u)
        return found.x[0][:, self._open]


def _mixture_of(model, layout, seed):
    """A mixture that covers a model, fitted to draws of it."""
    rng = torch.Generator(model.log_partition.device).manual_seed(seed)
    x, log_weights = model.draw(N_DRAWS // model.n_members, [rng] * model.n_members)
    weights = (log_weights - model.log_partition[:, None]).exp().flatten()
    offset = torch.rand(1, dtype=weights.dtype, generator=rng, device=weights.device)
    rows = x.flatten(0, 1)[systematic_resampling(weights, offset, N_DRAWS)].cpu()
    own = torch.Generator().manual_seed(seed)
    n_components = min(MAX_COMPONENTS, N_DRAWS // ROWS_PER_COMPONENT)
    if layout.n_states:
        fits = [fit_mixed_mixture(rows, layout, n, own) for n in (n_components, 1)]
    else:
        fits = [fit_gaussian_mixture(rows, n, own) for n in (n_components, 1)]
    return StackedBase(fits, [0.9, 0.1])  # one wide component, for what is beyond


def _log_mean(members):
    return members.logsumexp(0) - math.log(len(members))


def _shares(members, log_weights):
    """Shares of the members in the sum of the weights, (K, n * m) and (n, m) -> (n, K)."""
    own = members.softmax(0).view(len(members), *log_weights.shape)
    return (log_weights.softmax(1) * own).sum(2).mT


def _error_of_replicates(log_weights):
    """Standard error of the log of a sum, from how its parts differ."""
    parts = log_weights.view(len(log_weights), N_REPLICATES, -1).logsumexp(2)
    relative = N_REPLICATES * (parts - log_weights.logsumexp(1, keepdim=True)).exp()
    return relative.std(1) / math.sqrt(N_REPLICATES)
