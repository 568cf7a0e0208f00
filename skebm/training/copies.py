"""Rows that are copies of one another, which no fold may keep apart.

A bootstrap sample, a joined or an oversampled table holds the same observation more than once. If
one copy is held out the others give it away: bandwidths shrink, energies grow needles, and every
held-out likelihood rises. Rows of categories, counts or coarse grids are equal by chance, and are
observations of their own.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]

from skebm._typing import FloatArray
from skebm._warnings import warn

from .cells import grid_step

HARDLY = 0.2
"""Rows are equal by chance unless they agree where a column repeats at most this share of the
values of distinct rows; or several columns do, with this product of their shares."""

SPIKE = 0.05
"""Values of more than this share of the distinct rows are set apart first: a fine column may be
zero in half of the rows."""

MAX_COUNT, MAX_COUNT_ALONE = 10.0, 3.0
"""Rows per distinct row, on average, above which these are the values of a category; the second in
a single column, where nothing else tells a category from copies."""

BY_CHANCE = 20.0
"""In a single column: how many equal pairs, for each pair of neighbours on its grid, are chance."""

NEAR, EMPTY = 0.003, 10.0
"""Rows are nearly equal if they are closer than the first or a smaller radius, in standard
deviations, and few rows have another one between that radius and so many times it: of independent
rows there are at least as many more at each scale."""

PROBED_ROWS, NEIGHBOURS = 2_000, 9
"""Such a radius is looked for with so many rows and their nearest ones."""

MIN_NEAR_ROWS, FEW = 10, 0.1
"""Fewer near rows are chance; and "few" is such a share of the near ones."""


def merge_copies(
    rows: FloatArray, weight: FloatArray, n_folds: int
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Find the copies of each row.

    Rows are copies if they are equal, and agree in a column that hardly repeats a value from one
    distinct row to another, or if they differ by a jitter far below all other distances.

    Parameters
    ----------
    rows : ndarray of shape (n, n_features)
    weight : ndarray of shape (n,)
        Positive.
    n_folds : int
        A row whose copies weigh more than one of so many folds stays as it is, with a warning.

    Returns
    -------
    kept : ndarray of shape (m,), int
        The first of the copies of each row. With copies the rows are sorted, as ``np.unique`` sorts
        them; without any they stay as they are.
    inverse : ndarray of shape (n,), int
        Which of those stands for each row.
    """
    n = len(rows)
    rows = _without_gaps(rows)
    _, first, inverse, counts = np.unique(
        _hash(rows), return_index=True, return_inverse=True, return_counts=True
    )
    distinct = rows[first]
    near = _nearly_equal(distinct)
    copied = (counts > 1) | (np.bincount(near)[near] > 1)
    if not copied.any():
        return np.arange(n), np.arange(n)
    copied &= _fine(distinct, counts)
    label = np.where(copied[inverse], near[inverse], len(first) + np.arange(n))
    _, label = np.unique(label, return_inverse=True)
    mass = np.bincount(label, weight)
    too_many = (mass > weight.sum() / n_folds) & (np.bincount(label) > 1)
    if too_many.any():
        shares = ", ".join(f"{share:.0%}" for share in mass[too_many] / weight.sum())
        warn(
            f"some rows of X are copies of one row, {shares} of the table: more than a fold, so "
            "that they are taken for independent rows. If they are not, give each row once, and "
            "how often it counts as sample_weight."
        )
        label = np.where(too_many[label], mass.size + np.arange(n), label)
    _, kept, label = np.unique(label, return_index=True, return_inverse=True)
    if len(kept) == n:
        return np.arange(n), np.arange(n)
    order = np.lexsort(rows[kept].T[::-1])
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return kept[order], rank[label]


def join_groups(inverse: NDArray[np.int_], groups: ArrayLike) -> NDArray[np.int_]:
    """Label rows that belong together: rows of one group, and groups that share copies.

    Parameters
    ----------
    inverse : ndarray of shape (n,)
        As of :func:`merge_copies`.
    groups : array-like of shape (n,)
        Labels of any kind.

    Returns
    -------
    ndarray of shape (m,), int
    """
    _, groups = np.unique(groups, return_inverse=True)
    m, k = inverse.max() + 1, groups.max() + 1
    ones = np.ones(len(inverse))
    edges = coo_array((ones, (inverse, m + groups)), shape=(m + k, m + k))
    return connected_components(edges, directed=False)[1][:m]


def _without_gaps(rows):
    """Rows with one number, far from all others, where cells are missing."""
    gaps = np.isnan(rows)
    if not gaps.any():
        return rows
    low, high = (f(np.where(gaps, 0.0, rows), axis=0) for f in (np.min, np.max))
    return np.where(gaps, low - 1.0 - (high - low), rows)


def _hash(rows):
    """One 64-bit number per row, the same for equal rows, (n, d) -> (n,)."""
    value = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        bits = (column + 0.0).view(np.uint64)  # the two zeros are equal
        value = (value ^ bits) * np.uint64(0x9E3779B97F4A7C15)
        value ^= value >> np.uint64(29)
    return value


def _fine(distinct, counts):
    """Where chance would not make other rows equal to a distinct one, (m,) of bool."""
    varying = distinct[:, distinct.min(axis=0) < distinct.max(axis=0)]
    alone = varying.shape[1] == 1
    if counts.mean() > (MAX_COUNT_ALONE if alone else MAX_COUNT):
        return np.zeros(len(distinct), dtype=bool)
    if alone:
        return _fine_alone(varying[:, 0], counts)
    evidence = np.zeros(len(distinct))
    for column in varying.T:
        _, inverse, holders = np.unique(column, return_inverse=True, return_counts=True)
        holders = holders[inverse]
        usual = holders <= max(SPIKE * len(distinct), 2)
        share = (np.sum(holders[usual] > 1) + 1) / (usual.sum() + 1)
        evidence[holders == 1] -= np.log(share)
    return evidence >= -np.log(HARDLY)


def _fine_alone(values, counts):
    """The same for a single column: distinct rows repeat no value, but its grid says something.

    On a grid about as many pairs of rows are equal by chance as are neighbours. A value far more
    frequent than the others is one of its own, such as an amount of zero.
    """
    usual = counts <= 10 * np.median(counts)
    step = grid_step(values)
    if step is not None:
        order = np.argsort(values)
        neighbours = np.diff(values[order]) < 1.5 * step
        rows = counts[order] * usual[order]
        by_chance = (rows[1:] * rows[:-1])[neighbours].sum()
        equal = (rows * (rows - 1) / 2).sum()
        usual &= equal > BY_CHANCE * (1 + by_chance)
    return usual


def _nearly_equal(distinct):
    """Labels of distinct rows, the same for rows that differ by a jitter, (m,) of int."""
    with np.errstate(over="ignore"):  # such a column is refused when columns are learned
        m, scale = len(distinct), distinct.std(axis=0)
    if not (scale > 0).any():
        return np.arange(m)
    x = distinct[:, scale > 0] / scale[scale > 0]
    tree = cKDTree(x, balanced_tree=False, compact_nodes=False)
    probed = x[np.random.RandomState(0).permutation(m)[:PROBED_ROWS]]
    k = min(NEIGHBOURS, m)
    distance, _ = tree.query(probed, k=k, p=np.inf, distance_upper_bound=EMPTY * NEAR)
    for radius in NEAR * 10.0 ** -np.arange(0, 13, 0.5):
        near = distance[:, 1] <= radius
        if near.sum() < MIN_NEAR_ROWS:
            break
        others = ((distance > radius) & (distance <= EMPTY * radius)).any(axis=1)
        others |= distance[:, -1] <= radius
        if others.sum() <= FEW * near.sum():
            distance, other = tree.query(x, k=k, p=np.inf, distance_upper_bound=radius)
            row, rank = np.nonzero(np.isfinite(distance))
            pairs = coo_array((np.ones(len(row)), (row, other[row, rank])), shape=(m, m))
            return connected_components(pairs, directed=False)[1]
    return np.arange(m)
