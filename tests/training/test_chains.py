"""Chains under a tilted mixture in one column, whose distributions are known by quadrature."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from skebm._layout import Layout
from skebm.bases import (
    AffineTransform,
    GaussianMixtureBase,
    MarginalGaussianization,
    MixedMixtureBase,
    ValuesTransform,
)
from skebm.energies import MLPEnergy
from skebm.models import CLIP, FeatureMap, TiltedMixture
from skebm.training.chains import RESERVE, SAMPLERS, Chains, CheapTarget, Moves, fit_stand_in

K = 2


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Ripples(nn.Module):
    """A known energy of two members, (2, n, 1) -> (2, n)."""

    def __init__(self):
        super().__init__()
        self.heights = nn.Parameter(torch.tensor([[1.5], [-1.5]], dtype=torch.float64))

    def forward(self, z):
        return self.heights.to(z) * torch.sin(2.0 * z[..., 0]) + 0.3 * z[..., 0]


def mixture(weights=(0.6, 0.4), means=(-2.0, 1.5), deviations=(0.8, 1.2)):
    means = np.array(means)[:, None]
    return GaussianMixtureBase(weights, means, np.square(deviations)[:, None, None])


@cache
def features():
    """Coordinates that are no affine change of the column, and not those of the bases either."""
    rows = np.random.default_rng(0).gamma(3.0, 1.5, size=(2000, 1)) - 5.0
    return FeatureMap(MarginalGaussianization.fit(rows))


def model(kind="plain"):
    q = [mixture(), mixture(weights=(0.3, 0.7), deviations=(1.0, 1.1))]
    p = q
    if kind == "other proposals":
        p = [mixture((1.0,), (0.0,), (3.0,)), mixture((0.5, 0.5), (-1.0, 1.0), (2.5, 3.0))]
    tilted = TiltedMixture(q, p, features(), Ripples())
    if kind == "recalibrated":
        tilted.calibrate(0.6, torch.tensor([0.8, -1.0], dtype=torch.float64), q)
    return tilted


def chains(
    tilted, seed=0, sampler="mala", dtype=torch.float64, step_size=0.7, adapts=False, n_reserves=0
):
    """Chains with a stand-in that is no good."""
    moves = Moves(sampler, n_steps=3, step_size="auto" if adapts else step_size, reinit_fraction=1)
    return Chains(
        tilted, mixture((1.0,), (0.3,), (1.3,)), moves,
        step_size=torch.full((K,), step_size), dtype=dtype, rng=rng(seed), n_reserves=n_reserves,
    )  # fmt: skip


GRID = torch.linspace(-14.0, 14.0, 5601, dtype=torch.float64)


def distribution_functions(tilted):
    """Of every member on GRID, by the mid-point rule."""
    x = GRID[:, None].expand(K, -1, 1)
    log_density = torch.stack([q.log_prob(GRID[:, None]) for q in tilted.bases]) + tilted.tilt(x)
    mass = log_density.softmax(1)
    return (mass.cumsum(1) - 0.5 * mass).numpy()


def at_exact_draws(tilted, followers, n, seed):
    uniform, cdfs = np.random.default_rng(seed).random((K, n)), distribution_functions(tilted)
    x = [np.interp(u, cdf, GRID) for u, cdf in zip(uniform, cdfs, strict=True)]
    x = torch.as_tensor(np.stack(x))[..., None]
    return followers.at(torch.stack([tilted.features.transform(rows)[0] for rows in x]))


def p_values(tilted, walkers):
    x = [tilted.features.transform.inverse(z.double())[:, 0].numpy() for z in walkers.z]
    return [
        stats.kstest(np.interp(column, GRID, cdf), "uniform").pvalue
        for column, cdf in zip(x, distribution_functions(tilted), strict=True)
    ]


def p_values_after(tilted, advance, sampler="mala", n_seeds=4, n=1000, spoil=None, **options):
    p = []
    for seed in range(n_seeds):
        followers = chains(tilted, seed, sampler, **options)
        if spoil is not None:
            spoil(followers)
        walkers = start = at_exact_draws(tilted, followers, n, seed)
        for _ in range(5):
            walkers = advance(followers, walkers)[0]
        assert (walkers.z != start.z).double().mean() > 0.2
        p += p_values(tilted, walkers)
    return p


every_model = pytest.mark.parametrize("kind", ["plain", "other proposals", "recalibrated"])

# ---------------------------------------------------------------- stationarity


@every_model
@pytest.mark.parametrize(
    ("advance", "sampler"),
    [(Chains.move, "mala"), (Chains.move, "hmc"), (Chains.move, "random_walk"),
     (Chains.jump, None)],
)  # fmt: skip
def test_the_distribution_of_every_member_stays(advance, sampler, kind):
    p = p_values_after(model(kind), advance, sampler or "mala")
    assert min(p) > 1e-4
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@every_model
def test_in_single_precision_too(kind):
    def advance(followers, walkers):
        return followers.move(followers.jump(walkers)[0])

    assert min(p_values_after(model(kind), advance, dtype=torch.float32)) > 1e-4


def test_these_tests_have_power():
    def without_decision(followers):
        followers._log_weights = lambda points: [z.new_zeros(len(z)) for z in points]

    def without_ratio(followers):
        followers._log_ratio = lambda z: z.new_zeros(z.shape[:2])

    options = {"n_seeds": 1, "n": 2000}
    assert min(p_values_after(model(), Chains.move, spoil=without_decision, **options)) < 1e-6
    for kind in ("other proposals", "recalibrated"):
        p = p_values_after(model(kind), Chains.jump, spoil=without_ratio, **options)
        assert min(p) < 1e-6
    assert min(p_values_after(model(), Chains.move, "ula", step_size=1.3, **options)) < 1e-3


def test_chains_from_the_base_find_the_model():
    tilted = model("recalibrated")
    followers = chains(tilted)
    walkers = followers.start(2000)
    assert max(p_values(tilted, walkers)) < 1e-6
    assert min(p_values(tilted, followers.run(walkers, 75))) > 1e-4


def test_chains_follow_the_energy_as_it_is_trained():
    tilted = model()
    followers = chains(tilted)
    walkers = at_exact_draws(tilted, followers, 2000, 0)
    tilted.energy.heights.mul_(-1.0)
    assert max(p_values(tilted, walkers)) < 1e-6
    assert min(p_values(tilted, followers.run(walkers, 75))) > 1e-4


# ---------------------------------------------------------------- what a chain carries


@every_model
def test_weights_and_log_density_by_definition(kind):
    tilted = model(kind)
    followers = chains(tilted)
    x = torch.linspace(-4.0, 4.0, 2 * 31, dtype=torch.float64).view(K, 31, 1)
    z, log_det = zip(*[tilted.features.transform(rows) for rows in x], strict=True)
    z, log_det = torch.stack(z), torch.stack(log_det)
    walkers = followers.at(z)
    torch.testing.assert_close(walkers.z, z)
    # base and modes in the coordinates z, over the stand-in
    log_base = torch.stack([q.log_prob(points) for q, points in zip(tilted.bases, x, strict=True)])
    cheap = stats.norm(0.3, 1.3).logpdf(z[..., 0])
    expected = log_base + tilted.mode_tilt(x) - log_det - torch.as_tensor(cheap)
    torch.testing.assert_close(walkers.log_weight, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(
        followers.log_density(walkers), log_base + tilted.tilt(x) - log_det, atol=1e-8, rtol=1e-8
    )


@every_model
def test_weights_are_those_of_where_the_chains_went(kind):
    followers = chains(model(kind))
    walkers = followers.start(300)
    for advance in (followers.move, followers.jump, followers.move):
        before, (walkers, *_) = walkers, advance(walkers)
        changed = (walkers.z != before.z).any(-1)
        assert 0.1 < changed.double().mean() < 1.0
        for now, then in zip(walkers, before, strict=True):
            assert torch.equal(now[~changed], then[~changed])
        expected = followers.at(walkers.z).log_weight
        torch.testing.assert_close(walkers.log_weight, expected, atol=1e-8, rtol=1e-8)


@every_model
def test_start_draws_the_proposals_and_never_the_same_point_twice(kind):
    tilted = model(kind)
    followers = chains(tilted)
    z = torch.cat([followers.start(n).z for n in (700, 800, 1000)], dim=1)
    for points, proposal in zip(z, tilted.proposals, strict=True):
        assert len(points.unique()) == 2500
        x = tilted.features.transform.inverse(points)
        white = (x - proposal.means.T) / proposal.scale_tril[:, 0, 0]
        u = torch.special.ndtr(white) @ proposal.weights
        assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_rates_count_what_happened():
    followers = chains(model())
    walkers = followers.start(400)

    def changed(after):
        return (after.z != walkers.z)[..., 0].double().mean(1)

    moved, steps, moves = followers.move(walkers)
    assert ((steps > 0.2) & (steps < 1.0)).all()
    # a move of which every step was rejected counts as accepted
    assert ((changed(moved) <= moves) & (moves < changed(moved) + 0.05)).all()
    jumped, jumps = followers.jump(walkers)
    np.testing.assert_allclose(jumps, changed(jumped), atol=1e-6)


def test_some_of_the_chains_are_moved_in_place():
    followers = chains(model())
    buffer = followers.start(200)
    before = buffer.z.clone()
    moved = followers.advance_some(buffer, 50)
    assert moved.z.shape == (K, 50, 1)
    changed = (buffer.z != before)[..., 0]
    assert ((changed.sum(1) > 30) & (changed.sum(1) <= 50)).all()
    for points, all_points in zip(moved.z, buffer.z, strict=True):
        assert torch.isin(points, all_points).all()
    expected = followers.at(buffer.z).log_weight
    torch.testing.assert_close(buffer.log_weight, expected, atol=1e-8, rtol=1e-8)
    assert [rates is not None for rates in followers.record[-1]] == [True] * 3


def test_chains_that_do_not_move_only_jump():
    followers = chains(model())
    walkers = followers.start(100)
    drawn = followers._reserve.z[:, :100]
    after = followers.advance(walkers, moves=False)
    for points, before, offered in zip(after.z, walkers.z, drawn, strict=True):
        stayed, jumped = (points == before)[:, 0], (points == offered)[:, 0]
        assert (stayed | jumped).all()
        assert 0 < jumped.sum() < 100
    followers.advance(after)
    assert [[rate is not None for rate in rates] for rates in followers.record] == [
        [False, False, True], [True, True, True],
    ]  # fmt: skip
    assert 0 < followers.rates()["move_acceptance_rate"] <= 1


@pytest.mark.parametrize(("n_reserves", "again"), [(0, False), (2, True)])
def test_draws_are_offered_again_where_that_is_asked_for(n_reserves, again):
    followers = chains(model(), n_reserves=n_reserves)
    first, second, third = (followers.start(RESERVE) for _ in range(3))
    assert not torch.isin(first.z, second.z).any()
    assert torch.equal(first.z, third.z) == again
    assert torch.equal(first.log_weight, third.log_weight) == again


def test_only_the_generator_decides():
    def end(seed):
        followers = chains(model("other proposals"), seed)
        return followers.run(followers.start(50), 3).z

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = end(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(end(0), first)
    assert not torch.equal(end(1), first)


# ---------------------------------------------------------------- step sizes


@pytest.mark.parametrize("step_size", [0.02, 20.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_adapt_to_the_acceptance_that_the_sampler_aims_at(sampler, step_size):
    followers = chains(model(), sampler=sampler, step_size=step_size, adapts=True)
    target, walkers = SAMPLERS[sampler].TARGET_ACCEPTANCE, followers.start(100)
    assert abs(followers.move(walkers)[1] - target).min() > (0.01 if sampler == "ula" else 0.1)
    followers.warm_up()
    assert (followers.move(walkers)[1] > target - 0.3).all()
    for _ in range(80):
        walkers = followers.advance(walkers)
    assert followers.rates(last=0.5)["acceptance_rate"] == pytest.approx([target] * K, abs=0.05)


def test_every_member_has_a_step_of_its_own():
    tilted = model()
    tilted.energy.heights.copy_(torch.tensor([[0.0], [12.0]]))
    followers = chains(tilted)
    followers.warm_up()
    assert followers.step_size[0] > 2 * followers.step_size[1]


# ---------------------------------------------------------------- the cheap target


@torch.enable_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["network", "callable"])
def test_gradient_of_the_cheap_target_is_that_of_autograd_also_beyond_the_clip(kind, dtype):
    d = 3 if kind == "network" else 1
    normal = GaussianMixtureBase(
        [0.4, 0.6], torch.randn(2, d, generator=rng()), 2.0 * torch.eye(d).expand(2, d, d)
    )
    if kind == "network":
        energy = MLPEnergy(d, K, hidden_layer_sizes=(8,), rng=rng())
        for p in energy.parameters():  # f starts at zero
            p.data = torch.randn(p.shape, generator=rng(1))
    else:
        energy = Ripples()
    identity = FeatureMap(AffineTransform(torch.zeros(d), torch.ones(d)))
    tilted = TiltedMixture([normal] * K, [normal] * K, identity, energy.to(dtype))
    tilted.calibrate(0.6, torch.zeros(0), [])
    target = CheapTarget(tilted, normal.to(dtype))
    z = (3.0 * torch.randn(K * 40, d, generator=rng(2), dtype=torch.float64)).to(dtype)
    assert (z.abs() > CLIP).any()
    leaf = z.clone().requires_grad_()
    expected = target(leaf)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    value, gradient = target.value_and_gradient(z)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(value, expected.detach(), **tolerance)
    torch.testing.assert_close(gradient, slope, **tolerance)
    # by formula: the stand-in everywhere, and .6 f of the member at the clipped point
    f = energy(z.clamp(-CLIP, CLIP).view(K, 40, d)).flatten().detach()
    torch.testing.assert_close(value, normal.log_prob(z) + 0.6 * f, **tolerance)
    torch.testing.assert_close(target.scaled_energy(z).detach(), 0.6 * f, **tolerance)


@pytest.mark.parametrize("d", [2, 60])
def test_stand_in_is_near_the_rows(d):
    law = GaussianMixtureBase(
        [0.3, 0.7], np.stack([np.full(d, -1.0), np.full(d, 1.0)]), np.stack([np.eye(d)] * 2)
    )
    x = law.sample(4000, rng())
    feature_map = FeatureMap(MarginalGaussianization.fit(x.numpy()))
    stand_in = fit_stand_in(x, feature_map, rng())
    new = law.sample(2000, rng(1))
    z, log_det = feature_map.transform(new)
    gap = law.log_prob(new) - log_det - stand_in.log_prob(z)
    assert 0.0 < gap.mean() < 0.03 * d


# ---------------------------------------------------------------- rows with states

LAYOUT = Layout([3, 2], [-1, 0], 2)
"""A category, a number that may be missing, and one that may not."""


def classes(weight, mass, means):
    """Two latent classes: given the class, all columns are independent."""
    weights, of_category, of_missing, means, variances = (
        torch.tensor(numbers, dtype=torch.float64)
        for numbers in (
            [weight, 1.0 - weight], [[mass, 0.9 - mass, 0.1], [0.1, 0.3, 0.6]],
            [[0.8, 0.2], [0.4, 0.6]], means, [[0.5, 0.3], [0.2, 0.6]],
        )
    )  # fmt: skip
    covariances = torch.diag_embed(variances)
    return MixedMixtureBase(LAYOUT, weights, [of_category, of_missing], means, covariances)


class LogRatio(nn.Module):
    """log p - log q of two distributions, the same for all members."""

    def __init__(self, p, q):
        super().__init__()
        self.p, self.q = p, q

    def forward(self, z):
        ratio = [self.p.log_prob(rows) - self.q.log_prob(rows) for rows in z.double()]
        return torch.stack(ratio).to(z)


class ColumnsAsTheyAre(AffineTransform):
    def columns(self, x):
        return x, torch.zeros_like(x)


def mixed_chains(sampler="mala", n_steps=3):
    truth = classes(0.3, 0.6, [[0.0, 1.0], [1.5, -0.5]])
    base = classes(0.6, 0.3, [[0.5, 0.5], [1.0, 0.0]])
    columns = ColumnsAsTheyAre(torch.zeros(2), torch.ones(2))
    features = FeatureMap(ValuesTransform(LAYOUT, columns))
    tilted = TiltedMixture([base] * K, [base] * K, features, LogRatio(truth, base))
    stand_in = classes(0.5, 0.5, [[0.0, 0.0], [1.0, 0.3]])  # that is no good
    moves = Moves(sampler, n_steps=n_steps, step_size=0.6, reinit_fraction=0.0)
    step_size = torch.full((K,), 0.6)
    options = {"step_size": step_size, "dtype": torch.float64, "rng": rng(1)}
    followers = Chains(tilted, stand_in, moves, **options)
    return truth, followers


def p_values_of_rows(truth, z):
    """That rows have the masses of the truth, and its values given what is there."""
    known = truth.sample(100_000, rng(7))
    found, p = z.flatten(0, 1), []
    patterns = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    masses = truth.marginal([0, 1]).log_prob(patterns.double()).exp()
    counts = [(found[:, :2] == pattern).all(1).sum().item() for pattern in patterns]
    p.append(stats.chisquare(counts, masses.numpy() * len(found)).pvalue)
    for category in range(3):
        for column in (2, 3):
            own, other = (rows[rows[:, 0] == category, column] for rows in (found, known))
            own, other = (values[~values.isnan()].numpy() for values in (own, other))
            p.append(stats.ks_2samp(own, other).pvalue)
    return p


@pytest.mark.parametrize("sampler", ["mala", "hmc", "random_walk"])
@pytest.mark.parametrize("moves", ["jumps", "steps", "both"])
def test_the_distribution_of_states_and_values_stays(sampler, moves):
    truth, followers = mixed_chains(sampler)
    # not from the streams of the chains themselves
    start = torch.stack([truth.sample(3000, rng(100 + k)) for k in range(K)])
    walkers = followers.at(start)
    for _ in range(4):
        if moves == "jumps":
            walkers, _ = followers.jump(walkers)
        elif moves == "steps":
            walkers = followers.move(walkers)[0]
        else:
            walkers = followers.run(walkers, 3)
    same = (walkers.z == start) | (walkers.z.isnan() & start.isnan())
    assert same[..., :2].all() == (moves == "steps")
    assert same[..., 3].double().mean() < 0.8
    assert (walkers.z[..., 2].isnan() == (walkers.z[..., 1] == 1)).all()
    assert min(p_values_of_rows(truth, walkers.z)) > 1e-3


def test_chains_of_rows_with_states_forget_their_start():
    """One row for all; `reinit_fraction` is 0, but states have no other way to move."""
    truth, followers = mixed_chains()
    walkers = followers.at(truth.sample(1, rng(5)).expand(K, 1500, -1))
    for _ in range(25):
        walkers = followers.advance(walkers)
    assert min(p_values_of_rows(truth, walkers.z)) > 1e-3


def test_stand_in_of_rows_with_states_is_near_them():
    law = classes(0.3, 0.6, [[0.0, 1.0], [1.5, -0.5]])
    features = FeatureMap(ValuesTransform(LAYOUT, ColumnsAsTheyAre(torch.zeros(2), torch.ones(2))))
    stand_in = fit_stand_in(law.sample(4000, rng()), features, rng())
    new = law.sample(2000, rng(1))
    assert 0.0 < (law.log_prob(new) - stand_in.log_prob(new)).mean() < 0.1
