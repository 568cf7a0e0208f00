import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from skebm._layout import Layout
from skebm.bases import VIEWS, ArcsinhTransform, fit_views
from skebm.bases._views import N_NEIGHBORS

LAYOUT = Layout([3, 2], [-1, 0], 2)  # three categories, and values of which one may be missing


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(n=200, d=2, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, d))
    x[:, 1:] += x[:, :1]
    return torch.as_tensor(x)


def mixed(n=200, seed=0):
    own = np.random.default_rng(seed)
    missing = (own.random(n) < 0.3).astype(float)
    values = own.normal(size=(n, 2)) + 1.0
    values[missing == 1, 0] = np.nan
    return torch.as_tensor(np.c_[own.integers(3, size=n), missing, values])


def fitted(x, layout=None, names=tuple(VIEWS)):
    n = torch.arange(len(x))
    weight = torch.ones(len(x), dtype=torch.float64)
    splits = [(n[n % 2 == k], n[n % 2 != k]) for k in range(2)]
    return fit_views(x, weight, splits, names, rng(), layout=layout)


def line():
    """Points far out, denser around zero, and the length that each stands for."""
    u = torch.linspace(-14.0, 14.0, 801).double()
    return u.sinh(), u.cosh() * (u[1] - u[0])


def plane():
    side, length = line()
    return torch.cartesian_prod(side, side), torch.cartesian_prod(length, length).prod(1)


def test_views_of_numbers_integrate_to_one():
    grid, volume = plane()
    for view in fitted(numbers(n=60))[0]:
        mass = view.log_prob(grid).exp() @ volume
        assert mass.item() == pytest.approx(1.0, abs=0.01)


def test_views_of_states_and_values_sum_and_integrate_to_one():
    side, length = line()
    one = torch.stack([torch.full_like(side, torch.nan), side], dim=1)
    for view in fitted(mixed(n=60), LAYOUT)[0]:
        mass = 0.0
        for category in range(3):
            for missing, (values, volume) in ((0.0, plane()), (1.0, (one, length))):
                codes = torch.tensor([category, missing]).double().expand(len(values), 2)
                mass += view.log_prob(torch.cat([codes, values], dim=1)).exp() @ volume
        assert mass.item() == pytest.approx(1.0, abs=0.01)


def test_every_split_has_the_views_in_order():
    x = numbers()
    views = fitted(x, names=("wide", "sharp"))
    assert [len(of_split) for of_split in views] == [2, 2]
    for (wide, sharp), others in zip(views, views[::-1], strict=True):
        assert sharp.log_prob(x).std() > wide.log_prob(x).std()
        assert not torch.equal(sharp.log_prob(x), others[1].log_prob(x))


def test_local_kernels_are_as_wide_as_neighbours_are_far():
    x = numbers(d=3)
    ((view,), _) = fitted(x, names=("local",))
    distance, _ = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(view.centers).kneighbors()
    np.testing.assert_allclose(view.widths, distance[:, -1] / np.sqrt(3), rtol=1e-9)


def test_local_widths_of_rows_with_holes_and_states():
    x = mixed(n=160)
    ((view,), _) = fitted(x, LAYOUT, names=("local",))
    # literally: values that both rows have, and one for every state that differs
    rows = view.centers.numpy()
    squares = np.full((len(rows), len(rows)), np.inf)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i != j:
                squares[i, j] = (a[:2] != b[:2]).sum() + np.nansum((a[2:] - b[2:]) ** 2)
    expected = np.sqrt(np.sort(squares, axis=1)[:, N_NEIGHBORS - 1] / 4)
    np.testing.assert_allclose(view.bandwidth, expected, rtol=1e-9)


def level(view, rows, x):
    """Share of rows that are odder."""
    return (view.log_prob(x) < view.log_prob(torch.tensor(rows).double())[:, None]).double().mean(1)


def test_each_view_sees_its_own():
    x = torch.cat([numbers(1_000) - 6.0, numbers(1_000, seed=1) + 6.0])
    x = x[torch.randperm(len(x), generator=rng())]
    views = dict(zip(VIEWS, fitted(x)[0], strict=True))
    # in the gap between two clusters; off the correlation; outside of everything
    levels = {
        name: level(q, [[0.0, 0.0], [6.0, -6.0], [25.0, 25.0]], x) for name, q in views.items()
    }
    assert levels["sharp"][0] < 0.005
    assert levels["local"][0] < 0.005
    assert levels["wide"][0] > 0.05
    assert levels["linear"][1] < 0.001
    assert max(found[2] for found in levels.values()) < 0.001


def test_linear_view_whitens():
    # of columns that are nearly equal; the kernel has nearly their covariance
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(4_000, 1))).expand(-1, 2).sinh()
    noise = torch.as_tensor(np.random.default_rng(1).normal(0.0, 0.1, (4_000, 2)))
    ((view,), _) = fitted((x.arcsinh() + noise).sinh(), names=("linear",))
    covariance = view.base.scale_tril @ view.base.scale_tril.mT
    np.testing.assert_allclose(covariance, [[1.01, 1.0], [1.0, 1.01]], atol=0.07)


def test_arcsinh_against_numpy_and_autograd():
    x = torch.linspace(-50.0, 50.0, 11).double().reshape(-1, 1).expand(-1, 2).clone()
    transform = ArcsinhTransform()
    z, log_det = transform(x)
    np.testing.assert_allclose(z, np.arcsinh(x.numpy()), rtol=1e-12)
    np.testing.assert_allclose(transform.inverse(z), x, rtol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: transform(row[None])[0][0]))(x)
    np.testing.assert_allclose(log_det, torch.linalg.slogdet(jacobian)[1], rtol=1e-9)


def test_draws_follow_the_density():
    for view in fitted(numbers(n=100, d=1))[0]:
        drawn = view.sample(4_000, rng(1))[:, 0].numpy()
        side, length = line()
        cdf = (view.log_prob(side[:, None]).exp() * length).cumsum(0)
        below = np.interp(drawn, side, cdf)  # uniform where the draws follow it
        assert stats.kstest(below, "uniform").pvalue > 1e-4
