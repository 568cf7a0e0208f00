r"""Rows of which some cells are known: their density, and what the other cells may be.

For a model p and a mixture m that covers it, with known cells a and open cells b,

.. math:: p(a) = E_{b \sim m(\cdot \mid a)} \frac{p(a, b)}{m(b \mid a)},

and the same weights make draws of p(b | a) of those of m(b | a), which has a closed form. Where one
cell is open alone nothing is drawn: its states are summed, and a number is integrated at quantiles
of the conditional of the mixture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from skebm._layout import Cell, Layout
from skebm._typing import Distribution
from skebm.bases import (
    StackedBase,
    condition,
    fit_gaussian_mixture,
    fit_mixed_mixture,
    mixture_part,
)
from skebm.partition import ess, systematic_resampling

from .tilted import TiltedMixture

N_NODES = 64
"""Points at which a number that is open alone is integrated."""

LEADING, OTHERS = 32, 16
"""Components of a conditional that decide where these points are: the likeliest, and some that
stand for all the rest."""

LEVELS = torch.linspace(-3.6, 3.6, 9, dtype=torch.float64)
"""Quantiles of each of these components, between which those of all are interpolated."""

N_REPLICATES = 16
"""Independent randomisations of the points of an estimate, which tell its error."""

PROPOSED_PER_DRAW, MIN_PROPOSED, MAX_PROPOSED, MORE = 10, 256, 65_536, 4
"""Completions proposed for one that is drawn, and for a row at least and at most; and how many
times as many where that is not enough."""

MIN_ESS, MAX_REPEATED = 32, 0.05
"""Effective completions of a row, and the share of repeated ones, with which they are enough."""

N_DRAWS, ROWS_PER_COMPONENT, MAX_COMPONENTS = 4_000, 100, 20
"""Draws of a model without a mixture of its own, and the size of the mixture fitted to them."""

_EVALUATED = 8_192  # rows at once
_COMPLETED = 65_536  # completions at once


class Completions(NamedTuple):
    """Rows with their open cells filled in, and weights that make p(a) and p(b | a) of them.

    Attributes
    ----------
    x : Tensor of shape (n, m, d)
    log_weights : Tensor of shape (n, m)
        The weights add up to p(a).
    log_density : Tensor of shape (n, m)
        log p(a, b).
    shares : Tensor of shape (n, K)
        Share of every member in p(a).
    std_error : Tensor of shape (n,)
        Of log p(a), but for the errors of log Z.
    n_nodes : int
        How many of the completions, the last ones, are nodes of an integral.
    is_exact : bool
        Whether nothing is random about them: all states of a cell, and nodes.
    """

    x: Tensor
    log_weights: Tensor
    log_density: Tensor
    shares: Tensor
    std_error: Tensor
    n_nodes: int = 0
    is_exact: bool = True

    @property
    def log_marginal(self) -> Tensor:
        """log p(a), (n,)."""
        return self.log_weights.logsumexp(1)

    @property
    def weights(self) -> Tensor:
        """Weights that add up to one, (n, m)."""
        return self.log_weights.softmax(1)

    @property
    def n_effective(self) -> Tensor:
        """Effective sample size of completions that were drawn, (n,); infinite for nodes and
        states.
        """
        if self.is_exact:
            return torch.full_like(self.log_weights[:, 0], math.inf)
        return ess(self.log_weights)

    def where(self, allowed: Tensor) -> "Completions":
        """Under the condition that the completions are among the allowed ones, (n, m) of bool."""
        return self._replace(log_weights=self.log_weights.masked_fill(~allowed, -math.inf))


class Conditioner:
    """A model whose rows can be completed, and the mixture that proposes how.

    Parameters
    ----------
    evaluate : callable
        Rows (n, d) -> normalised log-densities of the members, (K, n), and of the mixture, (n,).
    mixture : distribution
        With conditionals in closed form.
    """

    def __init__(self, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], mixture: Distribution):
        self._evaluate, self._mixture = evaluate, mixture
        self._conditionals: dict[tuple[bool, ...], Any] = {}

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

        return cls(evaluate, mixture)

    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of members, (K, n), and of the mixture, (n,), at complete rows (n, d)."""
        members, mixture = zip(*map(self._evaluate, x.split(_EVALUATED)), strict=True)
        return torch.cat(members, dim=1), torch.cat(mixture)

    def _given(self, known):
        """Conditionals of the mixture given these columns."""
        key = tuple(known.tolist())
        if key not in self._conditionals:
            self._conditionals[key] = condition(self._mixture, known)
        return self._conditionals[key]

    # ------------------------------------------------------------------ all rows

    def complete(
        self, x: Tensor, known: Tensor, cells: Sequence[Cell], *, n_draws: int, seed: int
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

        Yields
        ------
        rows : Tensor of int
            Which rows these are.
        completions : Completions
        """
        for rows, own, cell in _by_open_cells(known, cells):
            if cell:
                for some in rows.split(max(1, _COMPLETED // (N_NODES + cell.n_states))):
                    yield some, self.of_cell(x[some], cell)
            else:
                u = uniform_points(n_draws, x.shape[1] + 1, seed).to(x)
                for some in rows.split(max(1, _COMPLETED // n_draws)):
                    yield some, self.of_points(x[some], own, u)

    def draw(
        self,
        x: Tensor,
        known: Tensor,
        cells: Sequence[Cell],
        n: int,
        rng: torch.Generator,
        allows: Callable[[Tensor], Tensor] | None = None,
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

        Returns
        -------
        rows : Tensor of shape (n_rows, n, d)
        n_effective : Tensor of shape (n_rows,)
            Effective sample sizes of what was proposed; infinite where nothing had to be.
        """
        drawn = x.new_empty(len(x), n, x.shape[1])
        n_effective = x.new_full((len(x),), math.inf)
        for rows, own, cell in _by_open_cells(known, cells):
            if cell:
                for some in rows.split(max(1, _COMPLETED // (N_NODES + cell.n_states))):
                    found = _allowed(self.of_cell(x[some], cell), allows)
                    drawn[some] = _drawn_from_cell(found, cell, n, rng)
                continue
            m = max(MIN_PROPOSED, PROPOSED_PER_DRAW * n)
            while len(rows):
                short = []
                for some in rows.split(max(1, _COMPLETED // m)):
                    like = {"dtype": x.dtype, "device": x.device}
                    u = torch.rand(len(some), m, x.shape[1] + 1, generator=rng, **like)
                    found = _allowed(self.of_points(x[some], own, u.clamp_min(1e-12)), allows)
                    drawn[some], repeated = _resampled(found, n, rng)
                    n_effective[some] = ess(found.log_weights)
                    short.append(some[(n_effective[some] < MIN_ESS) | (repeated > MAX_REPEATED)])
                m *= MORE
                rows = torch.cat(short) if m <= MAX_PROPOSED else rows[:0]
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
        conditional, n, m = self._given(known), len(x), u.shape[-2]
        joint = conditional.log_joint(x)
        log_known = joint.logsumexp(1, keepdim=True)
        edges = (joint - log_known).exp().cumsum(1)
        u = u.expand(n, m, u.shape[-1])
        which = torch.searchsorted(edges / edges[:, -1:], u[..., 0].contiguous())
        which = which.clamp_max(joint.shape[1] - 1).flatten()
        rows = x.repeat_interleave(m, dim=0)
        rows = conditional.draw(rows, which, u[..., 1:].reshape(n * m, -1))
        members, mixture = self.evaluate(rows)
        log_density = _log_mean(members).view(n, m)
        log_weights = log_density - mixture.view(n, m) + log_known - math.log(m)
        return Completions(
            rows.view(n, m, -1), log_weights, log_density, _shares(members, log_weights),
            _error_of_replicates(log_weights), is_exact=False,
        )  # fmt: skip

    # ------------------------------------------------------------------ one open cell

    def of_cell(self, x: Tensor, cell: Cell) -> Completions:
        """Completions with all states of a cell, and numbers at quantiles of the conditional."""
        shown = range(int(cell.value >= 0), cell.n_states)
        rows = x[:, None].repeat(1, len(shown), 1)
        for place, state in enumerate(shown):
            rows[:, place, cell.state] = float(state)
        log_scale, log_coarse = x.new_zeros(len(x), len(shown)), None
        if cell.value >= 0:
            rows[:, :, cell.value] = torch.nan
            number = x.clone()
            if cell.state >= 0:
                number[:, cell.state] = 0.0
            nodes, log_fine, log_coarse = self._nodes(number, cell.value)
            number = number[:, None].repeat(1, N_NODES, 1)
            number[:, :, cell.value] = nodes
            rows = torch.cat([rows, number], dim=1)
            log_scale = torch.cat([log_scale, log_fine], dim=1)
        members, _ = self.evaluate(rows.flatten(0, 1))
        log_density = _log_mean(members).view(log_scale.shape)
        log_weights = log_density + log_scale
        shares, error = _shares(members, log_weights), x.new_zeros(len(x))
        if log_coarse is None:
            return Completions(rows, log_weights, log_density, shares, error)
        # a rule of second order errs four times as much with half of the points
        coarse = (log_density[:, len(shown) :: 2] + log_coarse).logsumexp(1)
        fine = log_weights[:, len(shown) :].logsumexp(1)
        total = log_weights.logsumexp(1)
        error = ((coarse - total).exp() - (fine - total).exp()).abs() / 3.0
        return Completions(rows, log_weights, log_density, shares, error, N_NODES)

    def _nodes(self, x, column):
        """Quantiles of an open value given all else, and what a density there stands for.

        Returns
        -------
        nodes : Tensor of shape (n, N_NODES)
        log_widths : Tensor of shape (n, N_NODES)
            Log of the share of the conditional around each, over its density.
        log_coarse : Tensor of shape (n, N_NODES / 2)
            The same of every second one.
        """
        known = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        known[column] = False
        conditional = self._given(known)
        which, weight = _leading(conditional.log_joint(x).softmax(1))
        n, n_kept = which.shape
        row = torch.arange(n, device=x.device).repeat_interleave(n_kept)
        which = which.flatten()

        def mixed(at):
            share, log_density = conditional.cdf(x, row, which, at)
            share = (weight[..., None] * share.view(n, n_kept, -1)).sum(1)
            log_density = log_density.view(n, n_kept, -1) + weight.log()[..., None]
            return share, log_density.logsumexp(1)

        points = conditional.quantiles(x, row, which, LEVELS.to(x)).view(n, -1).sort(1).values
        angle = (torch.arange(N_NODES).to(x) + 0.5) / N_NODES
        wanted = (0.5 * math.pi * angle).sin().square()
        nodes = _interpolated(wanted.expand(n, -1), mixed(points)[0], points)
        share, log_density = mixed(nodes)
        log_fine = _widths(share).log() - log_density
        log_coarse = _widths(share[:, ::2]).log() - log_density[:, ::2]
        return nodes, log_fine, log_coarse


def uniform_points(m: int, d: int, seed: int) -> Tensor:
    """Evenly spread points in the unit cube, (m, d): `N_REPLICATES` randomisations of m / 16.

    Parameters
    ----------
    m : int
        A multiple of 16.
    d : int
    seed : int
    """
    parts = [
        SobolEngine(d, scramble=True, seed=seed + i).draw(m // N_REPLICATES, dtype=torch.float64)
        for i in range(N_REPLICATES)
    ]
    return torch.cat(parts).clamp(1e-9, 1.0 - 1e-9)


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


def _by_open_cells(known, cells):
    """Rows with the same open columns: which ones, the columns that are known, and the cell that
    is open alone, if it is one.
    """
    for pattern in known.unique(dim=0):
        rows = (known == pattern).all(1).nonzero().squeeze(1)
        open = (~pattern).nonzero().squeeze(1).tolist()
        alone = None
        for cell in cells:
            if open == cell.columns and open:
                alone = cell
            elif open == [cell.value]:  # its state is known: a number
                alone = Cell(value=cell.value)
        yield rows, pattern, alone


def _allowed(completions, allows):
    if allows is None:
        return completions
    x = completions.x
    return completions.where(allows(x.flatten(0, 1)).view(x.shape[:2]))


def _drawn_from_cell(completions, cell, n, rng):
    """Draws of one cell, (n_rows, n, d): states by their masses, numbers between the nodes."""
    x, weights = completions.x, completions.weights
    n_states = x.shape[1] - completions.n_nodes
    u = torch.rand(len(x), n, generator=rng, dtype=x.dtype, device=x.device)
    edges = weights.cumsum(1)
    pick = torch.searchsorted(edges, u * edges[:, -1:]).clamp_max(x.shape[1] - 1)
    drawn = x.gather(1, pick[..., None].expand(-1, -1, x.shape[2]))
    if completions.n_nodes:
        of_nodes = weights[:, n_states:]
        below = of_nodes.cumsum(1) - 0.5 * of_nodes  # share of a node that lies below it
        is_number = pick >= n_states
        wanted = u * edges[:, -1:] - (edges[:, n_states - 1, None] if n_states else 0.0)
        values = _interpolated(wanted, below, x[:, n_states:, cell.value])
        drawn[..., cell.value] = torch.where(is_number, values, drawn[..., cell.value])
    return drawn


def _resampled(completions, n, rng):
    """n of the completions of every row by their weights, in random order, and the share of those
    that repeat another one.
    """
    x, weights = completions.x, completions.weights
    like = {"generator": rng, "dtype": x.dtype, "device": x.device}
    pick = systematic_resampling(weights, torch.rand(len(x), 1, **like), n)
    repeated = (pick.diff(dim=1) == 0).sum(1) / n
    pick = pick.gather(1, torch.rand(pick.shape, **like).argsort(1))
    return x.gather(1, pick[..., None].expand(-1, -1, x.shape[2])), repeated


def _leading(shares):
    """Components that stand for all of a row, and their weights, (n, m) each.

    The likeliest, as they are, and of the others some that are picked as often as their shares
    say, with equal weights.
    """
    if shares.shape[1] <= LEADING + OTHERS:
        return torch.arange(shares.shape[1], device=shares.device).expand(shares.shape), shares
    weight, which = shares.topk(LEADING, dim=1)
    rest = shares.scatter(1, which, 0.0)
    total = rest.sum(1, keepdim=True)
    points = (torch.arange(OTHERS).to(rest) + 0.5) / OTHERS
    other = torch.searchsorted(rest.cumsum(1), total * points).clamp_max(shares.shape[1] - 1)
    return torch.cat([which, other], 1), torch.cat([weight, (total / OTHERS).expand(-1, OTHERS)], 1)


def _interpolated(wanted, share, points):
    """Points at which rising functions have values: (n, k), (n, m), (n, m) -> (n, k)."""
    above = torch.searchsorted(share.contiguous(), wanted.contiguous())
    above = above.clamp(1, points.shape[1] - 1)
    low, high = share.gather(1, above - 1), share.gather(1, above)
    part = ((wanted - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
    return points.gather(1, above - 1).lerp(points.gather(1, above), part)


def _widths(share):
    """Shares of the intervals around points whose distribution function is given."""
    edges = 0.5 * (share[:, 1:] + share[:, :-1])
    zero, one = torch.zeros_like(share[:, :1]), torch.ones_like(share[:, :1])
    return torch.cat([zero, edges, one], dim=1).diff(dim=1).clamp_min(0.0)


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
