"""Whether a model has its mass where the rows are, column by column."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse

from skebm._statistics import weighted_quantile
from skebm.models import MarginalBin, ModesTogether

from .tilted_task import TiltedTask

N_BINS = 10
"""Bins per column, with equal numbers of rows."""

MIN_SHIFT = 0.01
"""Masses that are less wrong than this are left alone."""

LEVEL, REPLICATES = 0.01, 200
"""The largest deviation of all bins is too large if it is beyond this quantile of what a parametric
bootstrap of so many replicates gives."""

_AT_ONCE = 50


def misplaced_bin(task: TiltedTask, pool_tilt: torch.Tensor) -> MarginalBin | None:
    """Find the bin whose mass under the tilted bases is farthest from its share of the rows.

    Parameters
    ----------
    task : TiltedTask
    pool_tilt : Tensor of shape (K, m)
        t_k at the pool of member k.

    Returns
    -------
    MarginalBin or None
        None where the largest of all deviations could be chance: in a parametric bootstrap rows
        are drawn from the model, and its masses are measured with another draw of the pool.
    """
    rows = task.x[torch.cat(task.held)].numpy()
    weight = task.held_weight.numpy()
    edges = [
        np.unique(weighted_quantile(column, weight, np.arange(1, N_BINS) / N_BINS))
        for column in rows.T
    ]
    weights = (pool_tilt + task.pool_log_ratio).softmax(1).numpy()
    n_members, m = weights.shape
    where = _indicators(task.pool.flatten(0, 1).numpy(), edges)
    deviation = weight / weight.sum() @ _indicators(rows, edges)
    deviation -= weights.flatten() / n_members @ where
    worst = int(np.abs(deviation).argmax())
    if abs(deviation[worst]) < MIN_SHIFT:
        return None
    rng = np.random.RandomState(task.seeds.of("marginals"))
    n_effective = max(1, int(weight.sum() ** 2 / np.square(weight).sum()))
    largest = []
    for _ in range(REPLICATES // _AT_ONCE):
        drawn = rng.multinomial(n_effective, weights.flatten() / n_members, _AT_ONCE) / n_effective
        again = rng.multinomial(m, np.full(m, 1 / m), (_AT_ONCE, n_members)) * weights
        again /= n_members * again.sum(axis=2, keepdims=True)
        difference = (drawn - again.reshape(_AT_ONCE, -1)) @ where
        largest.append(np.abs(difference).max(axis=1))
    if abs(deviation[worst]) <= np.quantile(np.concatenate(largest), 1.0 - LEVEL):
        return None
    starts = np.cumsum([0] + [len(e) + 1 for e in edges])
    column = int(np.searchsorted(starts, worst, side="right")) - 1
    bounds = np.r_[-np.inf, edges[column], np.inf]
    low, high = bounds[worst - starts[column] :][:2]
    return MarginalBin(column, float(low), float(high))


def _indicators(rows, edges):
    """Which bins of all columns rows lie in, a sparse matrix (n, n_bins)."""
    sizes = [len(e) + 1 for e in edges]
    starts = np.cumsum([0, *sizes])
    bins = [
        np.searchsorted(e, column, side="right") + start
        for column, e, start in zip(rows.T, edges, starts, strict=False)
    ]
    n, d = rows.shape
    indices = np.stack(bins, axis=1).flatten()
    return sparse.csr_array((np.ones(n * d), indices, d * np.arange(n + 1)), (n, starts[-1]))


def share_of_bin(
    task: TiltedTask, shares: tuple[list[torch.Tensor], torch.Tensor] | None, one: MarginalBin
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Responsibilities at held-out rows and pool, with the indicator of a bin as the last one."""
    held = [one.responsibilities(task.x[h]) for h in task.held]
    pool = torch.stack([one.responsibilities(x) for x in task.pool])
    if shares is None:
        return held, pool
    held = [torch.cat(pair, dim=1) for pair in zip(shares[0], held, strict=True)]
    return held, torch.cat([shares[1], pool], dim=-1)


def with_bins(task: TiltedTask, bins: Sequence[MarginalBin]) -> list[Any] | None:
    """Modes of every member, and after them these bins."""
    if not bins:
        return task.modes
    modes = [()] * len(task) if task.modes is None else [(q,) for q in task.modes]
    return [ModesTogether([*of, *bins]) for of in modes]
