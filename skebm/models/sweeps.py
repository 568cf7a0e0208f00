"""Many rows completed at once, cell by cell: every open cell in turn, given all others of its row.

Rows of a table with holes have almost as many sets of open cells as there are rows. What each asks
of a mixture costs more than its share, and completions that are proposed whole are wasted where
many cells are open. One cell at a time asks the same of all rows that lack it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skebm._layout import Cell

from .conditional import Conditioner

N_STARTS = 16
"""Completions proposed for a row, of which it starts at one."""

N_CANDIDATES = 16
"""Values proposed for a cell, beside the one that it has."""

_EVALUATED = 65_536  # rows with another cell at once


class Turn(NamedTuple):
    """One cell of some rows, drawn anew.

    Attributes
    ----------
    rows : Tensor of int of shape (n,)
        Which rows these are.
    cell : Cell
    x : Tensor of shape (n, m, d)
        The rows with what the cell may be.
    weights : Tensor of shape (n, m)
        Add up to one, and weigh these as the conditional of the cell does.
    """

    rows: Tensor
    cell: Cell
    x: Tensor
    weights: Tensor


class Sweeps:
    r"""Draws of open cells, none of which is missing, by Gibbs sampling.

    The state of a row is its open cells b and a member k, so that a turn asks one member alone:
    p(b, k | a) is proportional to p_k(a, b). A cell is proposed by the conditional of the mixture
    that member k tilts, given all others, several times; one of these or the value that the cell
    has is then drawn by p_k / m_k. That leaves the conditional of the cell as it is, however few
    are proposed [1]_.

    Parameters
    ----------
    conditioner : Conditioner

    References
    ----------
    .. [1] Andrieu, C., Doucet, A. and Holenstein, R. (2010). Particle Markov chain Monte Carlo
           methods. JRSS B.
    """

    def __init__(self, conditioner: Conditioner):
        self._model, self._members = conditioner, conditioner.members

    def start(
        self, x: Tensor, known: Tensor, cells: Sequence[Cell], rng: torch.Generator
    ) -> Tensor:
        """Rows whose open cells are missing yet, and where they cannot be, those of a draw.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        known : Tensor of bool of shape (n, d)
        cells : sequence of Cell
        rng : torch.Generator

        Returns
        -------
        Tensor of shape (n, d)
        """
        x = x.clone()
        for cell in cells:
            if cell.missing >= 0:
                rows = ~known[:, cell.state]
                x[rows, cell.state] = float(cell.missing)
                if cell.value >= 0:
                    x[rows, cell.value] = torch.nan
                known = known.clone()
                known[:, cell.columns] = True
        rows = (~known).any(1).nonzero().squeeze(1)
        for some in rows.split(_EVALUATED // N_STARTS) if len(rows) else ():
            drawn = self._model.sample(N_STARTS * len(some), rng).view(len(some), N_STARTS, -1)
            drawn = torch.where(known[some, None], x[some, None], drawn)
            members, _ = self._model.evaluate(drawn.flatten(0, 1))
            weights = members.logsumexp(0).view(drawn.shape[:2]).softmax(1)
            x[some] = drawn[torch.arange(len(some)), _drawn(weights, rng)]
        return x

    def sweep(
        self, x: Tensor, known: Tensor, cells: Sequence[Cell], rng: torch.Generator
    ) -> tuple[Tensor, list[Turn]]:
        """Draw all open cells anew, one after the other.

        Parameters
        ----------
        x : Tensor of shape (n, d)
            All cells filled.
        known, cells, rng
            As of `start`.

        Returns
        -------
        x : Tensor of shape (n, d)
            No open cell is missing.
        turns : list of Turn
        """
        x, turns = x.clone(), []
        missing = [c.missing for c in sorted(cells, key=lambda c: c.state) if c.state >= 0]
        member = _drawn(self._model.evaluate(x)[0].softmax(0).mT, rng)
        for k, conditioner in enumerate(self._members):
            for cell in cells:
                if not cell.columns:
                    continue
                rows = ((member == k) & ~known[:, cell.columns].all(1)).nonzero().squeeze(1)
                for some in rows.split(_EVALUATED // N_CANDIDATES) if len(rows) else ():
                    found = _turn(conditioner, x[some], cell, missing, rng)
                    x[some] = found.x[torch.arange(len(some)), _drawn(found.weights, rng)]
                    turns.append(found._replace(rows=some))
        return x, turns


def _turn(conditioner, x, cell, missing, rng):
    """What a cell may be, the value that it has first, and their weights."""
    known = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    known[cell.columns] = False
    u = torch.rand(len(x), N_CANDIDATES, x.shape[1] + 1, generator=rng, dtype=x.dtype,
                   device=x.device)  # fmt: skip
    proposed, _ = conditioner.propose(x, known, u.clamp_min(1e-12), missing)
    found = torch.cat([x[:, None], proposed], dim=1)
    log_weights = conditioner.log_weight(found.flatten(0, 1)).view(found.shape[:2])
    if cell.missing >= 0:
        log_weights.masked_fill_(found[..., cell.state] == cell.missing, -torch.inf)
    return Turn(torch.arange(len(x)), cell, found, log_weights.softmax(1))


def _drawn(weights, rng):
    """A place of every row, by its weights, (n, m) -> (n,)."""
    return torch.multinomial(weights, 1, generator=rng).squeeze(1)
