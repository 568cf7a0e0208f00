"""Rows with their open cells filled in and weighted: their nodes, states, and draws of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from skebm._layout import Cell
from skebm._random import sobol_points
from skebm.partition import systematic_resampling

N_NODES = 64
"""Points at which a number that is open alone is integrated."""

LEADING, OTHERS = 32, 16
"""Components of a conditional that decide where these points are: the likeliest, and some that
stand for all the rest."""

LEVELS = torch.linspace(-3.6, 3.6, 9, dtype=torch.float64)
"""Quantiles of each of these components, between which those of all are interpolated."""

N_REPLICATES = 16
"""Independent randomisations of the points of an estimate, which tell its error."""


class Completions(NamedTuple):
    """Rows with their open cells filled in, and weights that make p(a) and p(b | a) of them.

    Attributes
    ----------
    x : Tensor of shape (n, m, d)
    log_weights : Tensor of shape (n, m)
        The weights add up to p(a).
    log_density : Tensor of shape (n, m)
        log p(a, b); NaN where a model does not know it.
    shares : Tensor of shape (n, K)
        Share of every member in p(a).
    std_error : Tensor of shape (n,)
        Of log p(a), but for the errors of log Z.
    n_effective : Tensor of shape (n,)
        Effective sample size of what was drawn; infinite where nothing was.
    n_nodes : int
        How many of the completions, the last ones, are nodes of an integral.

    See Also
    --------
    Conditioner : Makes them.

    Examples
    --------
    >>> import torch
    >>> from skebm.models import Completions
    >>> log_weights = torch.tensor([[0.3, 0.1]]).log()
    >>> found = Completions(
    ...     torch.zeros(1, 2, 3), log_weights, log_weights, torch.ones(1, 1), torch.zeros(1),
    ...     torch.full((1,), torch.inf),
    ... )
    >>> found.log_marginal.exp(), found.weights
    (tensor([0.4000]), tensor([[0.7500, 0.2500]]))
    """

    x: Tensor
    log_weights: Tensor
    log_density: Tensor
    shares: Tensor
    std_error: Tensor
    n_effective: Tensor
    n_nodes: int = 0

    def of_rows(self, rows: Tensor) -> "Completions":
        """Those of some rows."""
        tensors = {name: part[rows] for name, part in self._asdict().items() if name != "n_nodes"}
        return self._replace(**tensors)

    @property
    def log_marginal(self) -> Tensor:
        """log p(a), (n,)."""
        return self.log_weights.logsumexp(1)

    @property
    def weights(self) -> Tensor:
        """Weights that add up to one, (n, m)."""
        return self.log_weights.softmax(1)

    @property
    def mean_surprise(self) -> Tensor:
        """Mean of -log p(b | a) over p(b | a), (n,)."""
        surprise = self.log_marginal[:, None] - self.log_density
        return torch.where(self.weights > 0, self.weights * surprise, 0.0).sum(1)


def restricted(completions: Completions, allows: Callable[[Tensor], Tensor] | None) -> Completions:
    """Completions under the condition that they are allowed, (m, d) -> (m,) of bool."""
    if allows is None:
        return completions
    x, log_weights = completions.x, completions.log_weights
    allowed = allows(x.flatten(0, 1)).view(log_weights.shape)
    return completions._replace(log_weights=log_weights.masked_fill(~allowed, -math.inf))


def by_open_cells(
    known: Tensor, cells: Sequence[Cell]
) -> Iterator[tuple[Tensor, Tensor, Cell | None]]:
    """Rows with the same open columns, together.

    Parameters
    ----------
    known : Tensor of bool of shape (n, d)
    cells : sequence of Cell
        Where the cells of the table are.

    Yields
    ------
    rows : Tensor of int
        Which rows these are.
    known : Tensor of bool of shape (d,)
    cell : Cell or None
        The one that is open alone.
    """
    for pattern in known.unique(dim=0):
        rows = (known == pattern).all(1).nonzero().squeeze(1)
        open = (~pattern).nonzero().squeeze(1).tolist()
        alone: Cell | None = None
        for cell in cells:
            if open == cell.columns and open:
                alone = cell
            elif open == [cell.value]:  # its state is known: a number
                alone = Cell(value=cell.value)
        yield rows, pattern, alone


def quantile_nodes(
    points: Tensor, distribution: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantiles of distributions, at which integrals are sums.

    Parameters
    ----------
    points : Tensor of shape (n, m)
        In any order; quantiles of the components of these distributions.
    distribution : callable
        Points (n, k) -> distribution functions and log-densities there, (n, k) each.

    Returns
    -------
    nodes : Tensor of shape (n, N_NODES)
    log_widths : Tensor of shape (n, N_NODES)
        Log of the share of the distribution around each, over its density: what a density at the
        node is multiplied by.
    log_coarse : Tensor of shape (n, N_NODES / 2)
        The same for every second node alone.
    """
    points = points.sort(1).values
    angle = (torch.arange(N_NODES).to(points) + 0.5) / N_NODES
    wanted = (0.5 * math.pi * angle).sin().square()  # more of them towards both ends
    nodes = interpolated(wanted.expand(len(points), -1), distribution(points)[0], points)
    share, log_density = distribution(nodes)
    log_fine = _widths(share).log() - log_density
    return nodes, log_fine, _widths(share[:, ::2]).log() - log_density[:, ::2]


Nodes: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""What `quantile_nodes` returns."""


def filled_cells(x: Tensor, cell: Cell, nodes: Nodes | None) -> Tensor:
    """Rows with every state of a cell, and then with the nodes of its value, (n, m, d)."""
    shown = range(int(cell.value >= 0), cell.n_states)
    rows = x[:, None].repeat(1, len(shown) + (N_NODES if nodes else 0), 1)
    for place, state in enumerate(shown):
        rows[:, place, cell.state] = float(state)
    if nodes:
        if cell.state >= 0:
            rows[:, len(shown) :, cell.state] = 0.0
        rows[:, : len(shown), cell.value] = torch.nan
        rows[:, len(shown) :, cell.value] = nodes[0]
    return rows


def weighted_cells(log_density: Tensor, nodes: Nodes | None) -> tuple[Tensor, Tensor]:
    """Log-weights of rows that `filled_cells` has made, (n, m), and the error of their sum, (n,).

    The error is relative.
    """
    if nodes is None:
        return log_density, torch.zeros_like(log_density[:, 0])
    n_shown = log_density.shape[1] - N_NODES
    of_nodes = log_density[:, n_shown:]
    fine = of_nodes + nodes[1]
    log_weights = torch.cat([log_density[:, :n_shown], fine], dim=1)
    total = log_weights.logsumexp(1)
    # a rule of second order errs four times as much with half of the points
    coarse = (of_nodes[:, ::2] + nodes[2]).logsumexp(1)
    error = ((coarse - total).exp() - (fine.logsumexp(1) - total).exp()).abs() / 3.0
    return log_weights, error


def uniform_points(m: int, d: int, seed: int) -> Tensor:
    """Evenly spread points in the unit cube, (m, d): `N_REPLICATES` randomisations of m / 16.

    Parameters
    ----------
    m : int
        A multiple of 16.
    d : int
    seed : int
    """
    parts = [sobol_points(m // N_REPLICATES, d, seed + i) for i in range(N_REPLICATES)]
    return torch.cat(parts).clamp(1e-9, 1.0 - 1e-9)


def drawn_from_cell(completions: Completions, cell: Cell, n: int, rng: torch.Generator) -> Tensor:
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
        values = interpolated(wanted, below, x[:, n_states:, cell.value])
        drawn[..., cell.value] = torch.where(is_number, values, drawn[..., cell.value])
    return drawn


def resampled(completions: Completions, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """n of the completions of every row by their weights, in random order, and the share of those
    that repeat another one.
    """
    x, weights = completions.x, completions.weights
    like = {"generator": rng, "dtype": x.dtype, "device": x.device}
    pick = systematic_resampling(weights, torch.rand(len(x), 1, **like), n)
    repeated = (pick.diff(dim=1) == 0).sum(1) / n
    pick = pick.gather(1, torch.rand(pick.shape, **like).argsort(1))
    return x.gather(1, pick[..., None].expand(-1, -1, x.shape[2])), repeated


def leading_components(shares: Tensor) -> tuple[Tensor, Tensor]:
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


def interpolated(wanted: Tensor, share: Tensor, points: Tensor) -> Tensor:
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
