import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture

from skebm.bases import GaussianMixtureBase, fit_gaussian_mixture


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(n=1500, d=3, seed=0):
    """Three Gaussians that overlap a little."""
    rng = np.random.default_rng(seed)
    means = 4 * rng.normal(size=(3, d))
    factors = rng.normal(size=(3, d, d)) / 2 + np.eye(d)
    which = rng.choice(3, n, p=[0.2, 0.3, 0.5])
    noise = rng.normal(size=(n, d))
    return torch.as_tensor(means[which] + np.einsum("nij,nj->ni", factors[which], noise))


def start(x, k, seed=1):
    rng = np.random.default_rng(seed)
    means = x[rng.choice(len(x), k, replace=False)]
    # all different: what is equal in all components cancels from their responsibilities
    factors = torch.as_tensor(rng.normal(size=(k, x.shape[1], x.shape[1])))
    covariances = torch.eye(x.shape[1]) + 0.3 * factors @ factors.mT
    return GaussianMixtureBase(rng.dirichlet(5 * np.ones(k)), means, covariances)


def covariances(base):
    return base.scale_tril @ base.scale_tril.mT


def one_step(base, x, **options):
    options = dict(prior_strength=0.0, reg_covar=0.0) | options
    return fit_gaussian_mixture(x, base.n_components, rng(), start=base, max_iter=1, **options)


# ---------------------------------------------------------------- one iteration, literally


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_iteration_against_a_literal_transcription(diagonal, weighted):
    x = clusters(400)
    n, d = x.shape
    weight = np.random.default_rng(2).uniform(0.2, 3.0, n) if weighted else np.ones(n)
    first = start(x, 3)
    if diagonal:
        first = GaussianMixtureBase(
            first.weights, first.means, torch.diag_embed(covariances(first).diagonal(0, 1, 2))
        )
    ours = one_step(
        first, x, diagonal=diagonal, sample_weight=torch.as_tensor(weight),
        prior_strength=5.0, reg_covar=1e-3,
    )  # fmt: skip
    rows = x.numpy()
    density = np.stack(
        [
            w * stats.multivariate_normal(m, c).pdf(rows)
            for w, m, c in zip(
                first.weights.numpy(), first.means.numpy(), covariances(first).numpy(), strict=True
            )
        ],
        axis=1,
    )
    share = density / density.sum(1, keepdims=True) * (weight / weight.sum())[:, None]
    mass = share.sum(0)
    means = [share[:, j] @ rows / mass[j] for j in range(3)]
    scatters = [
        (share[:, j, None] * (rows - means[j])).T @ (rows - means[j]) / mass[j] for j in range(3)
    ]
    if diagonal:
        scatters = [np.diag(np.diag(s)) for s in scatters]
    within = sum(m * s for m, s in zip(mass, scatters, strict=True))
    for j in range(3):
        mean, scatter = means[j], scatters[j]
        # five rows with the mean correlations within components; their variances are those of the
        # component, drawn towards the mean ones
        pull = 5 / n / (mass[j] + 5 / n)
        variance = np.diag(scatter) ** (1 - pull) * np.diag(within) ** pull
        size = np.sqrt(variance / np.diag(within))
        prior = within * np.outer(size, size)
        expected = (mass[j] * scatter + 5 / n * prior) / (mass[j] + 5 / n)
        expected += 1e-3 * np.diag(variance)
        if diagonal:
            expected = np.diag(np.diag(expected))
        assert ours.weights[j].item() == pytest.approx(mass[j], rel=1e-9)
        np.testing.assert_allclose(ours.means[j], mean, atol=1e-10)
        np.testing.assert_allclose(covariances(ours)[j], expected, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_likelihood_rises_monotonically(diagonal):
    x = clusters()
    base = one_step(start(x, 5), x, diagonal=diagonal)
    values = []
    for _ in range(40):
        values.append(base.log_prob(x).mean().item())
        base = one_step(base, x, diagonal=diagonal)
    assert np.diff(values).min() > -1e-11
    assert values[-1] - values[0] > 0.05  # there was something to gain


def test_tight_clusters_far_apart_keep_their_size():
    # the covariance of the whole table is a million times as large as those of the clusters
    generator = rng()
    for gap, sizes in ((3000.0, (1.0, 1.0)), (40.0, (1.0, 1e-3)), (1.0, (1e-3, 1e-3))):
        x = torch.randn(600, 2, dtype=torch.float64, generator=generator)
        scale = torch.where(torch.arange(600) % 2 == 0, *(torch.tensor(s) for s in sizes))
        x = x * scale[:, None] + gap * (torch.arange(600) % 2)[:, None]
        base = fit_gaussian_mixture(x, 2, rng(), prior_strength=10.0)
        order = base.means[:, 0].argsort()
        found = covariances(base)[order].diagonal(dim1=1, dim2=2).sqrt()
        # .12: three standard errors of a standard deviation of 300 rows, and two columns
        expected = torch.tensor(sizes, dtype=torch.float64)[:, None].expand(2, 2)
        torch.testing.assert_close(found, expected, rtol=0.15, atol=0.0)


def test_components_of_few_rows_do_not_collapse():
    # four rows by themselves, nearly on a point: without a prior they would be a needle
    x = torch.cat([clusters(300), 20.0 + 1e-4 * clusters(4)])
    base = fit_gaussian_mixture(x, 4, rng(), prior_strength=10.0)
    assert covariances(base).diagonal(dim1=1, dim2=2).sqrt().min() > 1e-2


# ---------------------------------------------------------------- whole fits


def test_easy_data_against_sklearn():
    x = clusters()
    theirs = GaussianMixture(3, random_state=0, tol=1e-8, max_iter=500).fit(x.numpy())
    ours = fit_gaussian_mixture(x, 3, rng(), prior_strength=0.0, tol=1e-10, max_iter=500)
    assert ours.log_prob(x).mean().item() == pytest.approx(theirs.score(x.numpy()), abs=1e-5)
    order, reference = ours.weights.argsort(), theirs.weights_.argsort()
    np.testing.assert_allclose(ours.weights[order], theirs.weights_[reference], atol=1e-3)
    np.testing.assert_allclose(ours.means[order], theirs.means_[reference], atol=1e-2)
    np.testing.assert_allclose(covariances(ours)[order], theirs.covariances_[reference], atol=0.02)


def test_default_stopping_is_near_the_optimum():
    x = clusters()
    theirs = GaussianMixture(3, random_state=0).fit(x.numpy())
    ours = fit_gaussian_mixture(x, 3, rng())
    assert ours.log_prob(x).mean().item() > theirs.score(x.numpy()) - 0.05


def test_one_component_is_mean_and_covariance():
    x = clusters()
    base = fit_gaussian_mixture(x, 1, rng(), prior_strength=3.0, reg_covar=0.0)
    torch.testing.assert_close(base.means[0], x.mean(0))
    torch.testing.assert_close(covariances(base)[0], torch.cov(x.mT, correction=0))


def test_stops_by_tolerance():
    x = clusters()
    base = start(x, 3)
    loose = fit_gaussian_mixture(x, 3, rng(), start=base, tol=math.inf, max_iter=50)
    twice = fit_gaussian_mixture(x, 3, rng(), start=base, tol=-1.0, max_iter=2)
    # the gain of the first iteration, from minus infinity, is infinite
    torch.testing.assert_close(loose.means, twice.means)
    long = fit_gaussian_mixture(x, 3, rng(), start=base, tol=-1.0, max_iter=50)
    assert not torch.allclose(long.means, twice.means)


@pytest.mark.parametrize("diagonal", [False, True])
def test_sample_weight_is_repetition(diagonal):
    x = clusters(300)
    times = torch.as_tensor(np.random.default_rng(3).integers(1, 4, len(x)))
    options = dict(start=start(x, 3), prior_strength=0.0, diagonal=diagonal, tol=-1.0, max_iter=20)
    weighted = fit_gaussian_mixture(x, 3, rng(), sample_weight=times.double(), **options)
    repeated = fit_gaussian_mixture(x.repeat_interleave(times, 0), 3, rng(), **options)
    torch.testing.assert_close(weighted.means, repeated.means, atol=1e-9, rtol=0)
    torch.testing.assert_close(covariances(weighted), covariances(repeated), atol=1e-9, rtol=0)
    plain = fit_gaussian_mixture(x, 3, rng(), **options)
    assert not torch.allclose(weighted.means, plain.means, atol=1e-3)


def test_scale_of_the_weights_does_not_matter():
    x = clusters(300)
    weight = torch.as_tensor(np.random.default_rng(3).uniform(0.5, 2, len(x)))
    a = fit_gaussian_mixture(x, 3, rng(), sample_weight=weight)
    b = fit_gaussian_mixture(x, 3, rng(), sample_weight=1000 * weight)
    torch.testing.assert_close(a.log_prob(x), b.log_prob(x))


def test_start_uses_the_weights():
    x = clusters(400)
    weight = (x[:, 0] > x[:, 0].median()).double() + 1e-12
    base = fit_gaussian_mixture(x, 2, rng(), sample_weight=weight)
    heavy = fit_gaussian_mixture(x[weight > 0.5], 2, rng())
    assert base.log_prob(x) @ weight / weight.sum() == pytest.approx(
        heavy.log_prob(x[weight > 0.5]).mean().item(), abs=0.02
    )


def test_generator_decides():
    x = clusters(400)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a = fit_gaussian_mixture(x, 6, rng(1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    b = fit_gaussian_mixture(x, 6, rng(1))
    c = fit_gaussian_mixture(x, 6, rng(2))
    assert torch.equal(a.means, b.means)
    assert torch.equal(a.scale_tril, b.scale_tril)
    assert not torch.equal(a.means, c.means)


def test_input_is_not_changed():
    x = clusters(100) + 5
    before = x.clone()
    fit_gaussian_mixture(x, 3, rng())
    assert torch.equal(x, before)


# ---------------------------------------------------------------- what could break it


def test_prior_keeps_components_from_collapsing():
    draws = np.random.default_rng(0)
    x = torch.as_tensor(np.vstack([draws.normal(size=(200, 2)), np.tile([0.3, 0.3], (8, 1))]))

    def smallest(**options):
        base = fit_gaussian_mixture(x, 24, rng(), tol=-1.0, max_iter=60, **options)
        return torch.linalg.eigvalsh(covariances(base)).min().item()

    assert smallest(prior_strength=0.0) < 1e-9
    assert smallest(prior_strength=3.0) > 1e-5
    assert smallest(prior_strength=10.0) > 1e-3
    assert smallest(prior_strength=30.0) > smallest(prior_strength=3.0)


RNG = np.random.default_rng(7)
NORMAL = RNG.normal(size=(300, 3))
LINE = RNG.normal(size=(300, 1)) * np.ones(3)
FAR = LINE + 1e-4 * RNG.normal(size=(300, 3))
FAR[:60] += 1e6

HARD = {
    "tiny variance": NORMAL * [1.0, 1e-3, 1.0],
    "tiny deviation": NORMAL * [1.0, 1e-6, 1.0],
    "constant column": NORMAL * [1.0, 0.0, 1.0],
    "collinear": LINE,
    "collinear and far out": FAR,
    "fewer rows than columns": RNG.normal(size=(5, 10)),
    "one dimension": RNG.normal(size=(200, 1)),
    "two rows": RNG.normal(size=(2, 3)),
    "two rows, one dimension": RNG.normal(size=(2, 1)),
    "one row": RNG.normal(size=(1, 2)),
    "heavy tails": RNG.standard_cauchy(size=(1000, 3)),
    "gross outliers": np.vstack([NORMAL, 1e8 * RNG.normal(size=(3, 3))]),
    "offset": NORMAL + 1e5,
}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_hard_data(name, diagonal):
    x = torch.as_tensor(HARD[name])
    for k in {1, min(5, len(x))}:
        base = fit_gaussian_mixture(x, k, rng(), diagonal=diagonal)
        leaf = x.clone().requires_grad_(True)
        log_prob = base.log_prob(leaf)
        (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
        assert log_prob.isfinite().all()
        assert gradient.isfinite().all()
        assert base.sample(10, rng()).isfinite().all()
        assert base.weights.sum().item() == pytest.approx(1.0)
        # no worse than the best single Gaussian of that type, up to the prior
        if k == 1:
            spread = x.var(0, correction=0) + 1e-6
            floor = -0.5 * (spread.log() + math.log(2 * math.pi) + 1).sum()
            assert log_prob.mean().item() > floor - 1e-2 * abs(floor)


def test_one_dimension_is_recovered():
    draws = np.random.default_rng(8)
    x = np.r_[draws.normal(-3, 0.5, 3000), draws.normal(2, 1.0, 7000)]
    base = fit_gaussian_mixture(torch.as_tensor(x)[:, None], 2, rng(), tol=1e-9)
    order = base.means[:, 0].argsort()
    np.testing.assert_allclose(base.weights[order], [0.3, 0.7], atol=0.02)
    np.testing.assert_allclose(base.means[order, 0], [-3, 2], atol=0.05)
    np.testing.assert_allclose(base.scale_tril[order, 0, 0], [0.5, 1.0], atol=0.03)


@pytest.mark.parametrize("n", [2048, 5000])
def test_blocks_of_rows_do_not_matter(n, monkeypatch):
    from skebm.bases import _em

    x = clusters(n)
    first = start(x, 4)
    whole = one_step(first, x)
    monkeypatch.setattr(_em, "_CHUNK", 333)
    blocks = one_step(first, x)
    torch.testing.assert_close(whole.means, blocks.means, atol=1e-11, rtol=0)
    torch.testing.assert_close(covariances(whole), covariances(blocks), atol=1e-10, rtol=0)
