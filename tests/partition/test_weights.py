"""Weighted draws against closed forms."""

import math

import pytest
import torch

from skebm.partition import _weights, ess, largest_power, rows_by_importance, systematic_resampling


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ effective sample size


def test_ess_of_known_weights():
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    torch.testing.assert_close(ess(weights.log()), torch.tensor([4.0, 1.6, 1.0]))
    assert ess(torch.full((5,), -math.inf)).isnan()


def test_ess_has_any_leading_shape_and_no_unit():
    log_weights = 3 * torch.randn(2, 3, 50, generator=rng(), dtype=torch.float64)
    whole = ess(log_weights)
    assert whole.shape == (2, 3)
    for i, rows in enumerate(log_weights):
        for j, row in enumerate(rows):
            w = row.exp()
            assert whole[i, j].item() == pytest.approx((w.sum() ** 2 / w.square().sum()).item())
    torch.testing.assert_close(ess(log_weights + 1e4), whole)


# ------------------------------------------------------------------ power


def test_largest_power_of_two_values():
    """Half of the weights 1, half e^a: ess / n = (1 + e^ab)^2 / (2 + 2 e^2ab) at the power b."""
    a, share = 4.0, 0.75
    log_weights = torch.tensor([0.0, a], dtype=torch.float64).repeat(50)
    # (1 + u)^2 = 2 share (1 + u^2)
    u = (1 + math.sqrt(1 - (1 - 2 * share) ** 2)) / (2 * share - 1)
    found = largest_power(log_weights, share, n_halvings=50)
    assert found.item() == pytest.approx(math.log(u) / a, rel=1e-10)
    # never too large, and too small by no more than the last halving
    coarse = largest_power(log_weights, share, n_halvings=6)
    assert 0 <= (found - coarse).item() <= 2.0**-6
    assert ess(coarse * log_weights) >= share * 100


def test_largest_power_of_a_normal_law_of_log_weights():
    """Normal log-weights of deviation s: ess / n -> exp(-b^2 s^2)."""
    s = torch.tensor([0.5, 3.0, 10.0], dtype=torch.float64)
    quantiles = torch.special.ndtri((torch.arange(200_000).double() + 0.5) / 200_000)
    found = largest_power(s[:, None] * quantiles, 0.3)
    expected = (math.sqrt(-math.log(0.3)) / s).clamp_max(1.0)
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=0)  # tails of a grid are short
    assert found[0] == 1.0


def test_largest_power_up_to_a_limit():
    log_weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert largest_power(log_weights, 0.9, most=0.3) == 0.3
    far = 1e3 * log_weights
    whole, part = largest_power(far, 0.9, n_halvings=50), largest_power(far, 0.9, most=0.3)
    assert part.item() == pytest.approx(whole.item(), abs=0.3 / 2**20)


def test_largest_power_beside_an_offset():
    """As on a fine grid of powers."""
    log_weights = 6 * torch.randn(4, 100, generator=rng(), dtype=torch.float64)
    offset = torch.randn(4, 100, generator=rng(1), dtype=torch.float64)
    found = largest_power(log_weights, 0.05, offset=offset)
    for row, beside, power in zip(log_weights, offset, found, strict=True):
        at = torch.linspace(0, 1, 2001, dtype=torch.float64)
        holds = ess(at[:, None] * row + beside) >= 5
        assert power.item() == pytest.approx(at[holds].max().item(), abs=1e-3)
        assert 0.01 < power < 0.99
    # an offset that leaves too few of them as it is
    assert (largest_power(log_weights, 0.5, offset=20 * offset) == 0).all()


# ------------------------------------------------------------------ resampling


def test_systematic_resampling():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]]).double()
    counts = torch.zeros(2, 4).double()
    for seed in range(500):
        offset = torch.rand(2, 1, generator=rng(seed), dtype=torch.float64)
        rows = systematic_resampling(weights, offset)
        assert rows.shape == (2, 4)
        own = torch.stack([torch.bincount(r, minlength=4) for r in rows])
        assert ((own - 4 * weights).abs() < 1).all()  # what "systematic" gives
        counts += own / 500
    torch.testing.assert_close(counts, 4 * weights, atol=0.08, rtol=0)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_systematic_resampling_of_another_number(n):
    weights = torch.rand(30, generator=rng(), dtype=torch.float64)
    rows = systematic_resampling(weights, torch.rand(1, generator=rng(1)), n)
    counts = torch.bincount(rows, minlength=30)
    assert counts.sum() == n
    assert ((counts - n * weights / weights.sum()).abs() < 1).all()
    # weights are relative
    assert torch.equal(
        systematic_resampling(100 * weights, torch.tensor([0.25]), n),
        systematic_resampling(weights, torch.tensor([0.25]), n),
    )


# ------------------------------------------------------------------ rows by importance


def uniform_numbers(g):
    return lambda shape: torch.rand(shape, generator=g, dtype=torch.float64)


def test_rows_by_importance_have_the_weighted_law():
    """Uniform proposals weighted by the densities 2 x and 8 x^7."""
    uniform = uniform_numbers(rng())

    def propose(n):
        x = uniform((2, n))
        return x, torch.stack([2 * x[0], 8 * x[1] ** 7])

    sizes = torch.tensor([20_000, 5_000])
    rows = rows_by_importance(propose, sizes, uniform)
    assert [len(r) for r in rows] == sizes.tolist()
    for x, power in zip(rows, (2, 8), strict=True):  # distribution function x^power
        u = (x**power).sort().values
        steps = (torch.arange(len(u)) + 0.5) / len(u)
        assert (u - steps).abs().max() < 2.5 / math.sqrt(len(u))


def test_rows_by_importance_are_kept_as_often_as_their_weight_says():
    """A weight far above c = 10 is kept w / c times in a row, smaller ones now and then."""

    def propose(n):
        seldom = torch.arange(n)[None] % 4096 == 0
        return seldom.long(), torch.where(seldom, 2048.0, 0.5).double()

    (rows,) = rows_by_importance(propose, torch.tensor([100_000]), uniform_numbers(rng()))
    assert rows.double().mean() == pytest.approx(0.5, abs=0.01)
    values, lengths = rows.unique_consecutive(return_counts=True)
    # the last proposals are cut to the number asked for
    assert ((lengths[values == 1] - 204.8).abs() < 1.0).double().mean() > 0.9


def rare(n, n_members, uniform):
    """Uniform numbers of which one in a hundred stands for half of the mass."""
    x = uniform((n_members, n))
    return x, torch.where(x < 0.01, 50.0, 0.5 / 0.99)


@pytest.mark.parametrize("caps", [_weights.CAPS, (10.0,)], ids=["high cap", "low cap"])
def test_a_single_row_by_importance_has_the_weighted_law(caps, monkeypatch):
    """Also where rows are repeated, those that are repeated do not come too seldom or too often."""
    monkeypatch.setattr(_weights, "CAPS", caps)
    uniform = uniform_numbers(rng())
    rows = rows_by_importance(
        lambda n: rare(n, 1000, uniform), torch.ones(1000, dtype=torch.long), uniform
    )
    assert (torch.cat(rows) < 0.01).double().mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("n", "few"), [(100, 5), (5000, 50)])
def test_few_rows_are_repeated_where_more_proposals_can_help(n, few):
    uniform = uniform_numbers(rng())
    (rows,) = rows_by_importance(lambda n: rare(n, 1, uniform), torch.tensor([n]), uniform)
    assert len(rows) - len(rows.unique()) <= few
    error = 0.5 / math.sqrt(n)
    assert (rows < 0.01).double().mean() == pytest.approx(0.5, abs=4 * error)


def test_rows_by_importance_of_nothing_and_of_rows_with_columns():
    uniform = uniform_numbers(rng())

    def propose(n):
        return torch.zeros(2, n, 3), torch.ones(2, n)

    rows = rows_by_importance(propose, torch.tensor([0, 5]), uniform)
    assert [r.shape for r in rows] == [(0, 3), (5, 3)]
