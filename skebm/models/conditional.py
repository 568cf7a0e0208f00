r"""Rows of which some cells are known: their density, and what the other cells may be.

For a model p and a mixture m that covers it, with known cells a and open cells b,

.. math:: p(a) = E_{b \sim m(\cdot \mid a)} \frac{p(a, b)}{m(b \mid a)},

and the same weights turn draws of the mixture's conditional, which has a closed form, into draws of
p(b | a). Where one cell is open alone nothing is drawn: its states are summed, and a number is
integrated at quantiles of the mixture's conditional.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from skebm._layout import Layout
from skebm._typing import Distribution
from skebm.bases import StackedBase, condition, mixture_part
from skebm.partition import ess

N_NODES = 64
"""Points at which a number that is open alone is integrated."""

LEADING, OTHERS = 32, 16
"""Components of a conditional that decide where these points are: the likeliest, and some that
stand for all the rest."""

LEVELS = torch.linspace(-3.6, 3.6, 9, dtype=torch.float64)
"""Quantiles of each of these components, between which those of all are interpolated."""

N_REPLICATES = 16
"""Independent randomisations of the points of a quasi-Monte Carlo estimate, for its error."""

_CELLS = 1 << 20
_EVALUATED = 8192


class Cell(NamedTuple):
    """Where one cell of a table is in a row: its state, its value, or both.

    Attributes
    ----------
    state : int
        Column of the row, -1 for none.
    value : int
        Column of the row, -1 for none.
    n_states : int
        1 without a column of states.
    """

    state: int
    value: int
    n_states: int

    @property
    def columns(self) -> list[int]:
        """Its columns of the row."""
        return [j for j in (self.state, self.value) if j >= 0]


class Completions(NamedTuple):
    """Rows with their open cells filled in, and weights that make p(a) and p(b | a) of them.

    Attributes
    ----------
    x : Tensor of shape (n, m, d)
    log_weights : Tensor of shape (n, m)
        Their sum is p(a).
    shares : Tensor of shape (n, K)
        Share of every member in p(a).
    relative_error : Tensor of shape (n,)
        Standard error of log p(a), without that of log Z.
    """

    x: Tensor
    log_weights: Tensor
    shares: Tensor
    relative_error: Tensor

    @property
    def log_marginal(self) -> Tensor:
        """log p(a), (n,)."""
        return self.log_weights.logsumexp(1)

    @property
    def weights(self) -> Tensor:
        """Weights that sum to one, (n, m)."""
        return self.log_weights.softmax(1)


class Conditioner:
    """A model whose rows are completed, with the mixture that proposes.

    Parameters
    ----------
    log_members : callable
        (n, d) -> (K, n): normalised log-densities of the members.
    mixture : distribution
        With conditionals of closed form.
    layout : Layout
    """

    def __init__(
        self, log_members: Callable[[Tensor], Tensor], mixture: Distribution, layout: Layout
    ):
        self._log_members, self._mixture, self._layout = log_members, mixture, layout
        self._conditionals: dict[tuple[bool, ...], Any] = {}

    def given(self, known: Tensor) -> Any:
        """Conditionals of the mixture given these columns; made once."""
        key = tuple(known.tolist())
        if key not in self._conditionals:
            self._conditionals[key] = condition(self._mixture, known)
        return self._conditionals[key]

    def log_members(self, x: Tensor) -> Tensor:
        """Normalised log-densities of the members, (n, d) -> (K, n)."""
        return torch.cat([self._log_members(c) for c in x.split(_EVALUATED)], dim=1)

    # ------------------------------------------------------------------ several open cells

    def by_draws(self, x: Tensor, known: Tensor, u: Tensor) -> Completions:
        """Completions from draws of the mixture's conditional.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        known : Tensor of bool of shape (d,)
        u : Tensor of shape (m, d + 1) or (n, m, d + 1)
            Uniform numbers, one for the component and one per cell.
        """
        conditional = self.given(known)
        n, m = len(x), u.shape[-2]
        joint = conditional.log_joint(x)
        log_known = joint.logsumexp(1)
        edges = (joint - log_known[:, None]).exp().cumsum(1)
        edges /= edges[:, -1:]
        u = u.expand(n, m, u.shape[-1])
        which = torch.searchsorted(edges, u[..., 0].contiguous())
        which = which.clamp_max(joint.shape[1] - 1).flatten()
        rows = x.repeat_interleave(m, dim=0)
        filled = conditional.draw(rows, which, u[..., 1:].reshape(n * m, -1))
        members = self.log_members(filled)
        proposal = torch.cat([self._mixture.log_prob(c) for c in filled.split(_EVALUATED)])
        log_ratio = members.logsumexp(0) - math.log(len(members)) - proposal
        log_weights = log_ratio.view(n, m) + log_known[:, None] - math.log(m)
        return Completions(
            filled.view(n, m, -1), log_weights, _shares(members, log_weights),
            _error_of_replicates(log_weights),
        )  # fmt: skip

    # ------------------------------------------------------------------ one open cell

    def of_cell(self, x: Tensor, cell: Cell) -> Completions:
        """Completions with all states of a cell, and numbers at quantiles of the conditional."""
        filled, log_scale = [], []
        for state in range(cell.n_states):
            if cell.value >= 0 and state == 0:
                continue
            row = x.clone()
            row[:, cell.state] = float(state)
            if cell.value >= 0:
                row[:, cell.value] = torch.nan
            filled.append(row[:, None])
            log_scale.append(x.new_zeros(len(x), 1))
        coarse = None
        if cell.value >= 0:
            row = x.clone()
            if cell.state >= 0:
                row[:, cell.state] = 0.0
            nodes, log_fine, coarse = self._nodes(row, cell.value)
            row = row[:, None].repeat(1, nodes.shape[1], 1)
            row[:, :, cell.value] = nodes
            filled.append(row)
            log_scale.append(log_fine)
        rows, scale = torch.cat(filled, dim=1), torch.cat(log_scale, dim=1)
        members = self.log_members(rows.flatten(0, 1))
        log_p = (members.logsumexp(0) - math.log(len(members))).view(scale.shape)
        log_weights = log_p + scale
        error = x.new_zeros(len(x))
        if coarse is not None:
            # the rule is of second order, so that with half of the points it errs four times as much
            own = (log_p[:, -N_NODES:][:, ::2] + coarse).logsumexp(1)
            fine, total = log_weights[:, -N_NODES:].logsumexp(1), log_weights.logsumexp(1)
            error = ((own - total).exp() - (fine - total).exp()).abs() / 3.0
        return Completions(rows, log_weights, _shares(members, log_weights), error)

    def _nodes(self, x, column):
        """Quantiles of an open value given all else, and what a log-density there stands for.

        Returns
        -------
        nodes : Tensor of shape (n, N_NODES)
        log_widths : Tensor of shape (n, N_NODES)
            Log of the share of the conditional around each, over its density.
        log_coarse : Tensor of shape (n, N_NODES / 2)
            The same for every second one.
        """
        known = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        known[column] = False
        conditional = self.given(known)
        which, weight = _leading(conditional.log_joint(x).softmax(1))
        n, n_kept = which.shape
        row = torch.arange(n, device=x.device).repeat_interleave(n_kept)
        which = which.flatten()

        def mixed(at):
            share, log_density = conditional.cdf(x, row, which, at)
            share = (weight[..., None] * share.view(n, n_kept, -1)).sum(1)
            log_density = log_density.view(n, n_kept, -1) + weight.log()[..., None]
            return share, log_density.logsumexp(1)

        levels = LEVELS.to(x.device)
        points = conditional.quantiles(x, row, which, levels).view(n, -1).sort(1).values
        share = mixed(points)[0].contiguous()
        angle = (torch.arange(N_NODES, device=x.device, dtype=x.dtype) + 0.5) / N_NODES
        wanted = (0.5 * math.pi * angle).sin().square().expand(n, -1).contiguous()
        above = torch.searchsorted(share, wanted).clamp(1, points.shape[1] - 1)
        low, high = share.gather(1, above - 1), share.gather(1, above)
        part = ((wanted - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
        nodes = points.gather(1, above - 1).lerp(points.gather(1, above), part)
        share, log_density = mixed(nodes)
        return (
            nodes,
            _widths(share).log() - log_density,
            _widths(share[:, ::2]).log() - log_density[:, ::2],
        )


def _leading(shares):
    """Components that stand for all of a row, with their weights, (n, m) each.

    The likeliest, as they are, and some of the others with equal weights, picked so that each is
    met by its share.
    """
    if shares.shape[1] <= LEADING + OTHERS:
        which = torch.arange(shares.shape[1], device=shares.device)
        return which.expand(shares.shape), shares
    weight, which = shares.topk(LEADING, dim=1)
    rest = shares.scatter(1, which, 0.0)
    total = rest.sum(1, keepdim=True)
    points = (torch.arange(OTHERS, dtype=rest.dtype, device=rest.device) + 0.5) / OTHERS
    edges = rest.cumsum(1)
    other = torch.searchsorted(edges, total * points).clamp_max(shares.shape[1] - 1)
    return torch.cat([which, other], 1), torch.cat([weight, (total / OTHERS).expand(-1, OTHERS)], 1)


def _widths(share):
    """Shares of the cells around points whose distribution function is given."""
    edges = 0.5 * (share[:, 1:] + share[:, :-1])
    one = torch.ones_like(share[:, :1])
    return torch.cat([torch.zeros_like(one), edges, one], dim=1).diff(dim=1).clamp_min(0.0)


def _shares(members, log_weights):
    """Share of every member in weighted rows, (K, n * m) and (n, m) -> (n, K)."""
    own = members.softmax(0).view(len(members), *log_weights.shape)
    return (log_weights.softmax(1) * own).sum(2).mT


def _error_of_replicates(log_weights):
    """Standard error of the log of a sum, from its parts."""
    parts = log_weights.view(len(log_weights), N_REPLICATES, -1).logsumexp(2)
    relative = (parts - log_weights.logsumexp(1, keepdim=True)).exp() * N_REPLICATES
    return relative.std(1) / math.sqrt(N_REPLICATES)


def uniform_points(m: int, d: int, seed: int) -> Tensor:
    """Points in the unit cube that are evenly spread, (m, d), in randomisations one by one.

    Parameters
    ----------
    m : int
        A multiple of `N_REPLICATES`.
    d : int
    seed : int
    """
    parts = [
        SobolEngine(d, scramble=True, seed=seed + i).draw(m // N_REPLICATES, dtype=torch.float64)
        for i in range(N_REPLICATES)
    ]
    return torch.cat(parts).clamp(1e-10, 1.0 - 1e-10)
