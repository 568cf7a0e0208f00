"""Folds, the pool, and what is measured on them."""

import numpy as np
import pytest
import torch
from scipy import stats

from skebm._random import Seeds
from skebm.bases import GaussianMixtureBase
from skebm.models import CLIP
from skebm.training import Columns, Trained, make_task
from skebm.training.task import SMOOTHED_ROWS, make_splits
from skebm.training.tilted_task import POOL_SIZE


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean=0.0, std=1.0, d=1):
    return GaussianMixtureBase([1.0], torch.full((1, d), mean), std**2 * torch.eye(d)[None])


def normal(n, mean=0.0, seed=0, d=1):
    return torch.as_tensor(np.random.default_rng(seed).normal(mean, 1.0, (n, d)))


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(("n", "k"), [(100, 4), (101, 4), (7, 3), (5, 5), (3, 8), (2, 4)])
def test_folds(n, k):
    splits = make_splits(n, k, 0.1, rng())
    assert len(splits) == min(n, k)
    held = torch.cat([h for _, h in splits])
    assert sorted(held.tolist()) == list(range(n))  # every row is held out once
    sizes = [len(h) for _, h in splits]
    assert max(sizes) - min(sizes) <= 1
    for train, h in splits:
        assert sorted(torch.cat([train, h]).tolist()) == list(range(n))
        assert (train.diff() > 0).all()
        assert (h.diff() > 0).all()


@pytest.mark.parametrize(
    ("n", "fraction", "n_held"),
    [(100, 0.1, 10), (100, 0.25, 25), (3, 0.1, 1), (2, 0.9, 1), (50, 0.999, 49)],
)
def test_one_member_has_a_validation_split(n, fraction, n_held):
    ((train, held),) = make_splits(n, 1, fraction, rng())
    assert len(held) == n_held
    assert sorted(torch.cat([train, held]).tolist()) == list(range(n))


def test_splits_are_random_and_reproducible():
    a, b, c = (make_splits(60, 3, 0.1, rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(s[1], t[1]) for s, t in zip(a, b, strict=True))
    assert not all(torch.equal(s[1], t[1]) for s, t in zip(a, c, strict=True))
    assert not torch.equal(a[0][1], torch.arange(20))


@pytest.mark.parametrize("n_members", [1, 3, 8])
def test_groups_are_held_out_together(n_members):
    sizes = [40, 1, 1, 30, 5, 5, 18]
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(7), sizes))
    splits = make_splits(100, n_members, 0.1, rng(), groups)
    assert len(splits) == min(n_members, 7)
    for train, held in splits:
        assert not set(groups[train.numpy()]) & set(groups[held.numpy()])
        assert sorted(torch.cat([train, held]).tolist()) == list(range(100))
    held = [len(h) for _, h in splits]
    if n_members == 3:
        assert sorted(held) == [30, 30, 40]  # the large ones first, then the smallest fold
    if n_members == 1:
        assert 10 <= held[0] < 50
    again = make_splits(100, n_members, 0.1, rng(), groups)
    assert all(torch.equal(s[1], t[1]) for s, t in zip(splits, again, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_copies_of_a_row_stay_in_its_fold(smoothing):
    X = np.random.default_rng(0).normal([3.0, -1.0], [2.0, 0.1], size=(300, 2))
    weight = np.random.default_rng(1).uniform(0.5, 1.5, 300)
    task = make_task(
        X, weight, Columns.learn(X, range(2)), n_members=3, validation_fraction=0.1,
        smoothing=smoothing, seeds=Seeds(0), device=torch.device("cpu"),
    )  # fmt: skip
    n_copies = -(-SMOOTHED_ROWS // 300) if smoothing else 1
    row = torch.arange(300).repeat(n_copies)
    assert task.changes is (smoothing > 0)
    assert task.n_rows == 300
    assert task.x.shape == (300 * n_copies, 2)
    np.testing.assert_array_equal(task.weight, np.tile(weight, n_copies))
    for train, held in task.splits:
        assert (held < 300).all()  # of the copies, one is judged
        assert len(train) == 200 * n_copies
        assert not set(row[train].tolist()) & set(held.tolist())
    # the copies are perturbed by so many standard deviations, each by noise of its own
    noise = (task.x - task.given[row]) / task.given.std(0, correction=0)
    assert noise.std().item() == pytest.approx(smoothing, rel=0.03)
    fresh = task.fresh(rng()) - task.x
    assert (fresh != 0).all() if smoothing else (fresh == 0).all()


# ---------------------------------------------------------------- gain


@pytest.fixture(scope="module")
def uneven(tilted):
    """Three members of different bases and proposals, weighted rows."""
    weight = torch.as_tensor(np.random.default_rng(1).uniform(0.2, 2.0, 50))
    bases = [gaussian(0.1 * k, 1.0 + 0.1 * k, 2) for k in range(3)]
    proposals = [gaussian(0.0, 1.5, 2) for _ in range(3)]
    return tilted(normal(50, 0.3, d=2), bases, proposals, weight=weight)


def bump(x):
    return 0.4 * x[:, 0] - 0.2 * x[:, 1].square()


def values(task, f):
    """f at the held-out rows and at the pool."""
    return [f(task.x[held]) for held in task.held], torch.stack([f(rows) for rows in task.pool])


def test_pool_comes_from_the_proposals(uneven, tilted):
    task = uneven
    assert task.pool.shape == (3, POOL_SIZE, 2)
    assert task.n_judged == 17 + POOL_SIZE
    for rows, q, p, ratio in zip(
        task.pool, task.bases, task.proposals, task.pool_log_ratio, strict=True
    ):
        assert stats.kstest(rows[:, 0] / 1.5, "norm").pvalue > 1e-3
        torch.testing.assert_close(ratio, q.log_prob(rows) - p.log_prob(rows))
    assert not torch.equal(task.pool[0], task.pool[1])
    assert not task.tilts_its_proposal
    torch.testing.assert_close(task.z, task.x.clamp(-CLIP, CLIP))
    torch.testing.assert_close(task.pool_z, task.pool.clamp(-CLIP, CLIP))
    own = tilted(task.x, task.bases)
    assert own.tilts_its_proposal
    assert (own.pool_log_ratio == 0).all()


def test_gain_against_a_literal_formula(uneven):
    held, pool = values(uneven, bump)
    expected, masses, base = [], [], []
    for k, (_, rows) in enumerate(uneven.splits):
        y, x, q, p = uneven.pool[k], uneven.x[rows], uneven.bases[k], uneven.proposals[k]
        weights = (q.log_prob(y) - p.log_prob(y) + bump(y)).exp()
        expected.append((bump(x) - weights.mean().log()).numpy())
        masses.append(uneven.weight[rows].numpy())
        base.append(q.log_prob(x).numpy())
    expected, masses, base = map(np.concatenate, (expected, masses, base))
    np.testing.assert_allclose(uneven.gain(held, pool), expected)
    mean = uneven.mean_gain(held, pool).item()
    assert mean == pytest.approx(np.average(expected, weights=masses))
    np.testing.assert_allclose(uneven.held_weight, masses)
    np.testing.assert_allclose(uneven.held_log_prob(uneven.bases), base)


def test_gain_of_several_candidates_at_once(uneven):
    held, pool = values(uneven, bump)
    factors = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    many = uneven.mean_gain([h * factors[:, None] for h in held], pool * factors[:, None, None])
    single = [uneven.mean_gain([a * h for h in held], a * pool) for a in factors]
    torch.testing.assert_close(many, torch.stack(single))


def test_constants_do_not_count(uneven):
    held, pool = values(uneven, bump)
    shift = torch.tensor([3.0, -7.0, 500.0], dtype=torch.float64)
    moved = [h + c for h, c in zip(held, shift, strict=True)]
    torch.testing.assert_close(
        uneven.gain(moved, pool + shift[:, None]), uneven.gain(held, pool)
    )  # fmt: skip


def test_log_partition_of_a_known_tilt(tilted):
    # q = N(0, 1), f = a x: log Z = a^2 / 2
    task = tilted(normal(40), [gaussian()] * 2)
    _, pool = values(task, lambda x: 0.7 * x[:, 0])
    np.testing.assert_allclose(task.log_partition(pool), 0.7**2 / 2, atol=0.03)


def test_nothing_trained(tilted):
    own = tilted(normal(50, d=2), [gaussian(0.1 * k, d=2) for k in range(3)])
    trained = Trained.nothing(own)
    assert own.mean_gain(trained.held, trained.pool).item() == pytest.approx(0.0, abs=1e-12)
    assert (trained.n_iter, trained.energy) == (0, None)
