"""Rows of which some cells are known, beside closed forms and sums over all that they may be."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from skebm._layout import Cell, Layout
from skebm.bases import (
    CouplingSplineFlow,
    GaussianMixtureBase,
    MixedMixtureBase,
    StackedBase,
    condition,
    marginal,
)
from skebm.models import Conditioner, TiltedMixture
from skebm.models.completions import uniform_points


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


class Same(nn.Module):
    """Features that are the rows."""

    def __init__(self, layout=None):
        super().__init__()
        self.layout = layout

    def forward(self, x):
        return x


class Quadratic(nn.Module):
    """f(x) = -x A x / 2 + b x, of every member."""

    def __init__(self, a, b):
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, z):
        return -0.5 * ((z @ self.a) * z).sum(-1) + z @ self.b

    def member(self, k):
        return self


A = doubles([[0.6, 0.2, 0.0], [0.2, 0.5, -0.1], [0.0, -0.1, 0.4]])
B = doubles([0.5, -0.7, 0.3])


def mixtures():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        factors = rng.normal(size=(3, 3, 3))
        covariances = factors @ factors.transpose(0, 2, 1) + 0.3 * np.eye(3)
        found.append(
            GaussianMixtureBase(rng.dirichlet([3] * 3), rng.normal(size=(3, 3)), covariances)
        )
    return found


def tilted_gaussians():
    """A mixture of tilted mixtures of Gaussians, and the mixture of Gaussians that it is."""
    bases = mixtures()
    model = TiltedMixture(bases, bases, Same(), Quadratic(A, B))
    weights, means, covariances = [], [], []
    for k, base in enumerate(bases):
        precision = base.whitening @ base.whitening.mT
        linear = (precision @ base.means[..., None])[..., 0]
        new = precision + A
        mean = torch.linalg.solve(new, linear + B)
        log_mass = (
            base.weights.log()
            + 0.5 * (precision.logdet() - new.logdet())
            + 0.5 * ((linear + B) * mean).sum(1) - 0.5 * (linear * base.means).sum(1)
        )  # fmt: skip
        model.log_partition[k] = log_mass.logsumexp(0)
        weights.append(log_mass.softmax(0) / 2)
        means.append(mean)
        covariances.append(torch.linalg.inv(new))
    truth = GaussianMixtureBase(torch.cat(weights), torch.cat(means), torch.cat(covariances))
    return model, truth


NUMBERS = Layout([], [], 3)
CELLS = [Cell(value=j) for j in range(3)]
ROWS = doubles([[0.3, 1.0, 0.7], [-1.4, 0.2, 0.5], [2.0, -1.0, 1.0]])


@pytest.fixture
def tilted():
    with torch.no_grad():
        yield tilted_gaussians()


def completed(model, layout, cells, rows, known, **options):
    conditioner = Conditioner.of(model, layout, seed=0)
    known = torch.tensor(known).expand(len(rows), -1)
    options = {"n_draws": 1024, "seed": 0} | options
    (pair,) = conditioner.complete(rows, known, cells, **options)
    return pair[1]


def test_the_tilted_mixture_is_the_one_that_it_is_said_to_be(tilted):
    model, truth = tilted
    torch.testing.assert_close(model.log_prob(ROWS), truth.log_prob(ROWS))


@pytest.mark.parametrize("kept", [[0, 1], [1, 2], [0, 2]])
def test_a_number_that_is_open_alone_is_integrated(tilted, kept):
    model, truth = tilted
    found = completed(model, NUMBERS, CELLS, ROWS, [j in kept for j in range(3)])
    wanted = marginal(truth, kept).log_prob(ROWS[:, kept])
    torch.testing.assert_close(found.log_marginal, wanted, rtol=0, atol=2e-3)
    assert (found.log_marginal - wanted).abs().max() <= 3 * found.std_error.max() + 1e-6
    assert found.n_effective.isinf().all()


def test_moments_of_a_number_that_is_open_alone(tilted):
    model, truth = tilted
    found = completed(model, NUMBERS, CELLS, ROWS, [True, False, True])
    mean = (found.weights * found.x[..., 1]).sum(1)
    square = (found.weights * found.x[..., 1].square()).sum(1)
    grid = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
    for i, row in enumerate(ROWS):
        x = row.repeat(len(grid), 1)
        x[:, 1] = grid
        density = truth.log_prob(x).softmax(0)
        assert mean[i] == pytest.approx((density @ grid).item(), abs=2e-3)
        assert square[i] == pytest.approx((density @ grid.square()).item(), rel=5e-3)


@pytest.mark.parametrize("kept", [[0], [1], [2]])
def test_several_open_numbers_have_an_honest_error(tilted, kept):
    """Of fifty randomisations, the error that is made over the one that is stated."""
    model, truth = tilted
    known = [j in kept for j in range(3)]
    wanted = marginal(truth, kept).log_prob(ROWS[:, kept])
    scaled = []
    for i in range(50):
        found = completed(model, NUMBERS, CELLS, ROWS, known, seed=100 * i)
        assert (found.std_error < 0.06).all()
        scaled.append((found.log_marginal - wanted) / found.std_error)
    scaled = torch.stack(scaled)
    assert scaled.std() < 1.5
    assert scaled.mean().abs() < 0.3


def test_rows_do_not_depend_on_others(tilted):
    model, _ = tilted
    for known in ([True, False, False], [True, True, False]):
        every = completed(model, NUMBERS, CELLS, ROWS, known)
        alone = completed(model, NUMBERS, CELLS, ROWS[1:2], known)
        torch.testing.assert_close(alone.log_weights[0], every.log_weights[1])


def test_draws_follow_the_conditional(tilted):
    """The first open cell given the known one, and the second given both, by their distribution
    functions."""
    model, truth = tilted
    conditioner, n = Conditioner.of(model, NUMBERS, seed=0), 4000
    rng = torch.Generator().manual_seed(5)
    known = torch.tensor([[True, False, False]])
    drawn, n_effective = conditioner.draw(ROWS[:1], known, CELLS, n, rng)
    assert n_effective > 1000
    assert len(drawn[0].unique(dim=0)) > 0.95 * n
    single, _ = conditioner.draw(
        drawn[0], torch.tensor([[True, True, False]]).expand(n, -1), CELLS, 1, rng
    )
    one = condition(marginal(truth, [0, 1]), torch.tensor([True, False]))
    two = condition(truth, torch.tensor([True, True, False]))
    for rows, conditional, column in (
        (drawn[0], one, 1), (drawn[0], two, 2), (single[:, 0], two, 2)
    ):  # fmt: skip
        joint = conditional.log_joint(rows).softmax(1)
        row = torch.arange(n).repeat_interleave(joint.shape[1])
        every = torch.arange(joint.shape[1]).repeat(n)
        share = conditional.cdf(rows, row, every, rows[:, column : column + 1])[0]
        value = (joint * share.view(joint.shape)).sum(1)
        assert stats.kstest(value.numpy(), "uniform").pvalue > 1e-3


def far_from_its_base():
    """A base that the tilt moves by many of its deviations, along two columns."""
    eye = torch.eye(3, dtype=torch.float64)
    base = GaussianMixtureBase([1.0], [[0.0, 0.0, 0.0]], eye[None])
    a, b = 8.0 * eye, doubles([0.0, 45.0, -45.0])
    model = TiltedMixture([base], [base], Same(), Quadratic(a, b))
    mean = b / 9.0
    model.log_partition[0] = 0.5 * (b @ mean) - 1.5 * math.log(9.0)
    return model, GaussianMixtureBase([1.0], mean[None], eye[None] / 9.0)


def test_where_few_completions_are_effective_rows_are_annealed():
    with torch.no_grad():
        model, truth = far_from_its_base()
        torch.testing.assert_close(model.log_prob(ROWS), truth.log_prob(ROWS))
        wanted = marginal(truth, [0]).log_prob(ROWS[:1, :1])
        scaled = []
        for seed in range(6):
            found = completed(model, NUMBERS, CELLS, ROWS[:1], [True, False, False], seed=seed)
            assert found.n_effective > 100
            assert found.std_error < 0.5
            scaled.append((found.log_marginal - wanted) / found.std_error)
        assert torch.cat(scaled).abs().max() < 4.0
        assert torch.cat(scaled).square().mean() < 4.0
        conditioner = Conditioner.of(model, NUMBERS, seed=0)
        known = torch.tensor([[True, False, False]])
        rng = torch.Generator().manual_seed(0)
        drawn, n_effective = conditioner.draw(ROWS[:1], known, CELLS, 500, rng)
        assert n_effective > 100
        assert drawn[0, :, 1].mean() == pytest.approx(5.0, abs=0.1)
        assert drawn[0, :, 2].mean() == pytest.approx(-5.0, abs=0.1)
        assert drawn[0, :, 1].std() == pytest.approx(1 / 3, rel=0.25)


LAYOUT = Layout([3, 2], [-1, 0], 2)
MIXED_CELLS = [Cell(state=0, n_states=3), Cell(state=1, value=2, n_states=2), Cell(value=3)]


class ByState(nn.Module):
    """f that knows states, and values where they are."""

    def forward(self, z):
        values = z[..., 2:].nan_to_num(0.0)
        moved = values[..., 0] * (0.4 + 0.3 * z[..., 0]) - 0.3 * values[..., 1]
        return moved.tanh() + 0.5 * (z[..., 0] == 2) + 0.4 * z[..., 1] * values[..., 1].tanh()

    def member(self, k):
        return self


def tilted_mixed():
    masses = [doubles([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]), doubles([[0.8, 0.2], [0.4, 0.6]])]
    covariances = doubles([[[1.0, 0.5], [0.5, 1.0]], [[0.5, -0.2], [-0.2, 0.3]]])
    base = MixedMixtureBase(
        LAYOUT, doubles([0.4, 0.6]), masses, doubles([[0.0, 1.0], [3.0, -1.0]]), covariances
    )
    return TiltedMixture([base], [base], Same(LAYOUT), ByState())


def mixed_sums(model, row, open_columns):
    """log of the sum and integral over the open columns, on a grid."""
    grid = torch.linspace(-8.0, 9.0, 171, dtype=torch.float64)
    states = [range(3) if 0 in open_columns else [int(row[0])]]
    states.append(range(2) if 1 in open_columns else [int(row[1])])
    total = []
    for s in states[0]:
        for t in states[1]:
            axes, log_step = [], 0.0
            for j in (2, 3):
                if j == 2 and t:
                    axes.append(doubles([math.nan]))
                elif j in open_columns:
                    axes.append(grid)
                    log_step += math.log(0.1)
                else:
                    axes.append(row[j : j + 1])
            pairs = torch.cartesian_prod(*axes)
            codes = doubles([[s, t]]).expand(len(pairs), -1)
            total.append(model.log_prob(torch.cat([codes, pairs], dim=1)).logsumexp(0) + log_step)
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("known", [[1, 2, 3], [0, 3], [0, 1, 2], [0, 1, 3], [0], [3], []])
def test_states_and_values_beside_sums_over_a_grid(known):
    model = tilted_mixed()
    rows = doubles([[1.0, 0.0, 0.5, 0.2], [2.0, 0.0, 2.5, -0.7]])
    if 1 in known and 2 in known:
        rows = torch.cat([rows, doubles([[0.0, 1.0, math.nan, 0.3]])])
    mask = [j in known for j in range(4)]
    open_columns = [j for j in range(4) if j not in known]
    with torch.no_grad():
        found = completed(model, LAYOUT, MIXED_CELLS, rows, mask, n_draws=4096)
        wanted = torch.stack([mixed_sums(model, row, open_columns) for row in rows])
    error = (found.log_marginal - wanted).abs()
    assert (error < 4 * found.std_error + 2e-3).all()
    assert (found.std_error < 0.03).all()


def test_draws_of_states_and_values_have_the_masses_of_the_model():
    model, n = tilted_mixed(), 5000
    rows = doubles([[1.0, 0.0, 0.5, 0.2]])
    with torch.no_grad():
        conditioner = Conditioner.of(model, LAYOUT, seed=0)
        rng = torch.Generator().manual_seed(0)
        for known in ([False, True, True, True], [True, False, False, True], [False] * 3 + [True]):
            own = torch.tensor([known])
            drawn, _ = conditioner.draw(rows, own, MIXED_CELLS, n + 1, rng)
            drawn = drawn[0]
            assert torch.equal(drawn[:, 2].isnan(), drawn[:, 1] == 1)
            open_columns = [j for j in range(4) if not known[j]]
            for j, size in ((0, 3), (1, 2)):
                if known[j]:
                    continue
                logs = []
                for state in range(size):
                    fixed = rows[0].clone()
                    fixed[j] = state
                    logs.append(mixed_sums(model, fixed, [i for i in open_columns if i != j]))
                wanted = torch.stack(logs).softmax(0)
                shares = torch.stack([(drawn[:, j] == s).double().mean() for s in range(size)])
                torch.testing.assert_close(shares, wanted, rtol=0, atol=0.03)


def test_only_what_is_allowed_is_drawn():
    model = tilted_mixed()
    rows, known = doubles([[1.0, 0.0, 0.5, 0.2]]), torch.tensor([[False, False, False, True]])
    with torch.no_grad():
        conditioner = Conditioner.of(model, LAYOUT, seed=0)
        options = known, MIXED_CELLS, 200, torch.Generator().manual_seed(0)
        drawn, _ = conditioner.draw(rows, *options, lambda x: x[:, 1] == 0)
        assert (drawn[0, :, 1] == 0).all()
        _, n_effective = conditioner.draw(rows, *options, lambda x: x[:, 1] == 7)
        assert n_effective.isnan().all()


def test_a_cell_that_is_open_alone_can_be_drawn_instead():
    """With its state and its number: the density of the others is the same, with a known error."""
    model = tilted_mixed()
    rows, known = doubles([[1.0, 0.0, 0.5, 0.2]]), torch.tensor([[True, False, False, True]])
    with torch.no_grad():
        conditioner = Conditioner.of(model, LAYOUT, seed=0)
        options = {"n_draws": 4096, "seed": 0}
        ((_, exact),) = conditioner.complete(rows, known, MIXED_CELLS, **options)
        ((_, found),) = conditioner.complete(rows, known, MIXED_CELLS, integrate=False, **options)
        rng = torch.Generator().manual_seed(0)
        drawn, n_effective = conditioner.draw(
            rows, known, MIXED_CELLS, 2000, rng, lambda x: x[:, 1] == 0, integrate=False
        )
    assert exact.n_effective.isinf().all()
    assert found.x.shape == (1, 4096, 4)
    assert 0 < found.std_error.item() < 0.05
    assert abs(found.log_marginal - exact.log_marginal).item() < 4 * found.std_error.item()
    assert (drawn[0, :, 1] == 0).all()
    assert 1000 < n_effective.item() < 20_000


def test_a_flow_in_the_stack_is_part_of_the_weight():
    """Two columns, of which one is integrated on a grid."""
    with torch.no_grad():
        flow = CouplingSplineFlow(2, rng=torch.Generator().manual_seed(0)).double().member(0)
        gaussian = GaussianMixtureBase([1.0], [[0.5, 0.0]], [[[1.5, 0.6], [0.6, 1.0]]])
        stack = StackedBase([flow, gaussian], [0.4, 0.6])
        for base in (stack, flow):
            energy = Quadratic(A[:2, :2], B[:2])
            model = TiltedMixture([base], [base], Same(), energy)
            rows = doubles([[0.3, 0.0], [-1.0, 0.0]])
            layout, cells = Layout([], [], 2), [Cell(value=0), Cell(value=1)]
            found = completed(model, layout, cells, rows, [True, False])
            grid = torch.linspace(-9.0, 9.0, 2001, dtype=torch.float64)
            for i, row in enumerate(rows):
                pairs = torch.cartesian_prod(row[:1], grid)
                wanted = model.log_prob(pairs).logsumexp(0) + math.log(18.0 / 2000)
                assert found.log_marginal[i] == pytest.approx(wanted.item(), abs=3e-3)


def test_points_are_even_and_the_same_for_a_seed():
    points = uniform_points(1024, 3, seed=0)
    assert torch.equal(points, uniform_points(1024, 3, seed=0))
    assert not torch.equal(points, uniform_points(1024, 3, seed=1))
    for part in points.view(16, 64, 3):
        counts = (part * 64).long().mT  # one of every 64th of each axis
        assert all(len(axis.unique()) == 64 for axis in counts)
