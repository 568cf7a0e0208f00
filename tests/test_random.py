"""Random streams: what a seed depends on, and global generators that are put back."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from skebm._random import Seeds, draw_seed, seeded_global_rng, spawn

STAGES = ("folds", "jitter", "energy", "energy, trees", "log Z")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(g, n=1000):
    return torch.rand(n, generator=g, dtype=torch.float64)


# ---------------------------------------------------------------- seeds of stages and members


def test_seeds_are_stable():
    # a fit of today is the fit of tomorrow, on any machine: numbers that never change
    assert Seeds(0).of("folds") == 874_998_525
    assert Seeds(7).of("energy, trees", 3) == 2_041_321_848
    assert [Seeds(7).of(stage, k) for stage in STAGES for k in range(3)] == [
        Seeds(7).of(stage, k) for stage in STAGES for k in range(3)
    ]


def test_seeds_differ_by_seed_stage_and_member():
    keys = itertools.product((0, 1, 2**31 - 2), STAGES, range(8))
    found = [Seeds(seed).of(stage, member) for seed, stage, member in keys]
    assert len(set(found)) == len(found) == 3 * len(STAGES) * 8
    assert all(isinstance(seed, int) and 0 <= seed < 2**31 for seed in found)


def test_seeds_are_spread_evenly():
    found = [Seeds(s).of(stage, k) for s in range(20) for stage in STAGES for k in range(20)]
    assert stats.kstest(np.array(found) / 2**31, "uniform").pvalue > 1e-3
    # of neighbours, too: members, and seeds
    table = np.array(found).reshape(20, len(STAGES), 20) / 2**31
    for axis in (0, 2):
        a, b = np.delete(table, 0, axis).ravel(), np.delete(table, -1, axis).ravel()
        assert stats.pearsonr(a, b).pvalue > 1e-3


def test_streams_are_independent_of_each_other():
    streams = [uniform(Seeds(5).rng(stage, k)) for stage in STAGES for k in range(4)]
    streams.append(uniform(Seeds(6).rng(STAGES[0])))
    # 210 correlations of 1,000 pairs: normal, of deviation .0316
    correlations = np.corrcoef(np.stack(streams))[np.triu_indices(len(streams), 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(1000)
    assert correlations.std() == pytest.approx(1 / np.sqrt(1000), rel=0.2)


def test_what_a_stage_draws_depends_on_no_other_stage():
    seeds, alone = Seeds(3), {s: uniform(Seeds(3).rng(s)) for s in STAGES}
    for order in (STAGES, STAGES[::-1], STAGES[2:3]):
        for stage in order:
            assert torch.equal(uniform(seeds.rng(stage)), alone[stage])
    # nor a member on how many there are
    many = seeds.rngs("pool", 5)
    for k, g in enumerate(seeds.rngs("pool", 3)):
        expected = uniform(seeds.rng("pool", k))
        assert torch.equal(uniform(g), expected)
        assert torch.equal(uniform(many[k]), expected)


def test_every_generator_is_a_fresh_one():
    first, second = (Seeds(0).rng("folds") for _ in range(2))
    assert torch.equal(uniform(first), uniform(second))
    assert not torch.equal(uniform(first), uniform(Seeds(0).rng("folds")))


# ---------------------------------------------------------------- spawn


def test_spawned_number_k_depends_on_the_generator_and_k_alone():
    few, many = spawn(rng(1), 2), spawn(rng(1), 6)
    consumed = uniform(many[0], 50)
    assert torch.equal(uniform(few[0], 50), consumed)
    assert torch.equal(uniform(few[1]), uniform(many[1]))  # whatever the first has drawn
    assert len({g.initial_seed() for g in spawn(rng(1), 200)}) == 200
    assert spawn(rng(2), 1)[0].initial_seed() != few[0].initial_seed()


def test_drawn_seeds_fit_every_generator():
    g = rng()
    seeds = [draw_seed(g) for _ in range(1000)]
    assert all(isinstance(s, int) and 0 <= s < 2**31 for s in seeds)
    assert stats.kstest(np.array(seeds) / 2**31, "uniform").pvalue > 1e-3


# ---------------------------------------------------------------- global generators


def state():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest


def draw():
    return torch.randn(3).tolist(), np.random.normal(size=3).tolist()  # noqa: NPY002


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_global_generators_are_seeded_and_put_back(seed):
    # an odd number of normal numbers, so that numpy holds one back: part of its state
    before = np.random.normal(), state()  # noqa: NPY002
    with seeded_global_rng(seed):
        inside = draw()
    assert state() == before[1]
    with seeded_global_rng(seed):
        assert draw() == inside
    assert draw() != inside
    expected = torch.randn(3, generator=rng(seed)), np.random.RandomState(seed).normal(size=3)
    assert inside == tuple(e.tolist() for e in expected)


def test_global_generators_are_put_back_when_the_block_raises():
    def interrupted():
        with seeded_global_rng(3):
            draw()
            raise KeyboardInterrupt

    before = state()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert state() == before
    with seeded_global_rng(3):  # and the lock is free again, for other threads, too
        expected = draw()

    def other():
        with seeded_global_rng(3):
            return draw()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result(timeout=60) == expected


def test_blocks_may_be_nested():
    before = state()
    with seeded_global_rng(1):
        first = draw()
        with seeded_global_rng(2):
            inner = draw()
        second = draw()
    assert state() == before
    with seeded_global_rng(1):
        assert [draw(), draw()] == [first, second]  # as if there were nothing between
    with seeded_global_rng(2):
        assert draw() == inner


def test_threads_wait_for_each_other():
    def work(seed):
        with seeded_global_rng(seed):
            return [draw() for _ in range(50)]

    before, alone = state(), [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == alone
    assert state() == before
