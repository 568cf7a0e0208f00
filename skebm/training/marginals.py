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
"""Bins per column of values, with equal numbers of rows; a column of states has one for each."""

MIN_SHIFT = 0.01
"""Masses that are less wrong than this are left alone."""

LEVEL, REPLICATES = 0.01, 2000
"""The largest deviation of all bins is too large if it is beyond this quantile of the largest one
of so many replicates that are drawn by chance."""


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
        None where the largest of all deviations could be chance: deviations are nearly normal, with
        the covariance that they have where the rows are drawn from the model, and its masses are
        measured with another draw of the pool.
    """
    rows = task.x[torch.cat(task.held)].numpy()
    weight = task.held_weight.numpy()
    n_states, levels = task.layout.n_states, np.arange(1, N_BINS) / N_BINS
    edges = [np.arange(1, size) - 0.5 for size in task.layout.sizes]
    for column in rows.T[n_states:]:
        there = ~np.isnan(column)
        edges.append(np.unique(weighted_quantile(column[there], weight[there], levels)))
    weights = (pool_tilt + task.pool_log_ratio).softmax(1).numpy()
    n_members, m = weights.shape
    where = _indicators(task.pool.flatten(0, 1).numpy(), edges)
    deviation = weight / weight.sum() @ _indicators(rows, edges)
    deviation -= weights.flatten() / n_members @ where
    worst = int(np.abs(deviation).argmax())
    if abs(deviation[worst]) < MIN_SHIFT:
        return None
    n_effective = max(1.0, weight.sum() ** 2 / np.square(weight).sum())
    covariance = _covariance_of_masses(where, weights, n_effective)
    rng = np.random.RandomState(task.seeds.of("marginals"))
    chance = rng.standard_normal((REPLICATES, len(covariance))) @ _root(covariance).T
    if abs(deviation[worst]) <= np.quantile(np.abs(chance).max(axis=1), 1.0 - LEVEL):
        return None
    starts = np.cumsum([0] + [len(e) + 1 for e in edges])
    column = int(np.searchsorted(starts, worst, side="right")) - 1
    bounds = np.r_[-np.inf, edges[column], np.inf]
    low, high = bounds[worst - starts[column] :][:2]
    return MarginalBin(column, float(low), float(high))


def _covariance_of_masses(where, weights, n_effective):
    """Covariance of bin masses of rows minus those of the model, if rows are the model's.

    Parameters
    ----------
    where : sparse array of shape (K * m, n_bins)
        Bins of the pool.
    weights : ndarray of shape (K, m)
        Of the pool, summing to one in every member.
    n_effective : float
        Rows.
    """
    n_members, m = weights.shape
    shares = weights.flatten() / n_members
    mass = shares @ where
    covariance = ((where.T * shares) @ where).toarray() / n_effective
    covariance -= np.outer(mass, mass) / n_effective
    # of weights that are normalised: the delta method, member by member
    for k, weight in enumerate(weights):
        own, square = where[k * m : (k + 1) * m], np.square(weight)
        inside, mass = square @ own, weight @ own
        covariance += (
            ((own.T * square) @ own).toarray()
            - np.outer(inside, mass)
            - np.outer(mass, inside)
            + square.sum() * np.outer(mass, mass)
        ) / n_members**2
    return covariance


def _root(covariance):
    """A triangular root, of a matrix that is singular because the masses of a column sum to one."""
    jitter = 1e-9 * np.trace(covariance) / len(covariance)
    return np.linalg.cholesky(covariance + jitter * np.eye(len(covariance)))


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
    there = (~np.isnan(rows)).astype(float).flatten()  # what is absent is in no bin
    return sparse.csr_array((there, indices, d * np.arange(n + 1)), (n, starts[-1]))


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
