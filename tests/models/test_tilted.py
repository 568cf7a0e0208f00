"""Mixtures of tilted bases against literal formulas and quadrature."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from skebm.bases import (
    AffineTransform,
    GaussianMixtureBase,
    MarginalGaussianization,
    StackedBase,
    TransformedBase,
)
from skebm.models import (
    CLIP,
    FeatureMap,
    MarginalBin,
    ModesTogether,
    TiltedMixture,
    log_ratio,
)
from skebm.models import tilted as tilted_module

N_MEMBERS = 3


def rngs(seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(N_MEMBERS)]


def gaussian(mean=0.0, std=1.0):
    return GaussianMixtureBase([1.0], [[mean]], [[[std**2]]])


def normal(n, std=1.0, d=1):
    return torch.as_tensor(np.random.default_rng(0).normal(0.0, std, (n, d)))


class Bumps(nn.Module):
    """Member k: (.4 + .1 k) sin(2 z_1) - .1 |z|^2; (K, n, d) -> (K, n)."""

    def forward(self, z):
        k = torch.arange(len(z), dtype=z.dtype)[:, None]
        return (0.4 + 0.1 * k) * (2 * z[..., 0]).sin() - 0.1 * z.square().sum(-1)


def model(d=1, tilted=True):
    bases = [
        GaussianMixtureBase(
            [0.3, 0.7],
            [[-1.0 - 0.1 * k] * d, [1.5] * d],
            torch.eye(d).double().repeat(2, 1, 1) * (0.8 + 0.1 * k),
        )
        for k in range(N_MEMBERS)
    ]
    identity = FeatureMap(AffineTransform(torch.zeros(d), torch.ones(d)))
    out = TiltedMixture(bases, bases, identity, Bumps() if tilted else None)
    if tilted:
        out.calibrate(1.3, torch.tensor([0.5, -0.2], dtype=torch.float64), bases)
        out.log_partition = torch.linspace(-0.2, 0.3, N_MEMBERS, dtype=torch.float64)
        out.log_partition_std_error = torch.linspace(0.02, 0.1, N_MEMBERS, dtype=torch.float64)
    return out


def literal_members(m, x):
    """Unnormalised densities of all members, from the formula."""
    rows = []
    for k, q in enumerate(m.bases):
        z = x.clamp(-CLIP, CLIP)
        f = (0.4 + 0.1 * k) * (2 * z[:, 0]).sin() - 0.1 * z.square().sum(1)
        joint = q.weights * torch.stack(
            [
                torch.as_tensor(
                    stats.multivariate_normal(
                        q.means[j].numpy(), (q.scale_tril[j] @ q.scale_tril[j].mT).numpy()
                    ).pdf(x.numpy())
                ).reshape(len(x))
                for j in range(2)
            ],
            dim=1,
        )
        density = joint.sum(1)
        share = joint / density[:, None]
        rows.append(density * (1.3 * f + 0.5 * share[:, 0] - 0.2 * share[:, 1]).exp())
    return torch.stack(rows)


@pytest.mark.parametrize("d", [1, 2])
def test_log_prob_against_a_literal_formula(d):
    m, x = model(d), normal(60, std=3.0, d=d)
    expected = literal_members(m, x) / m.log_partition.exp()[:, None]
    torch.testing.assert_close(m.log_members(x), expected.log())
    torch.testing.assert_close(m.log_prob(x), expected.mean(0).log())
    base = torch.stack([q.log_prob(x).exp() for q in m.bases]).mean(0).log()
    torch.testing.assert_close(m.base_log_prob(x), base)


def test_integrates_to_one():
    m = model()
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    m.log_partition = torch.trapezoid(literal_members(m, x[:, None]), x).log()
    total = torch.trapezoid(m.log_prob(x[:, None]).exp(), x)
    assert total.item() == pytest.approx(1.0, abs=1e-9)


def test_untilted_is_its_bases():
    m, x = model(2, tilted=False), normal(50, d=2)
    assert m.is_untilted
    assert torch.equal(m.log_prob(x), m.base_log_prob(x))
    assert (m.log_prob_std(x) == 0).all()
    assert m.n_members == 3
    assert m.n_features == 2


def test_standard_error_by_simulation():
    m, x = model(), normal(6, std=2.0)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4000, 3)) * m.log_partition_std_error.numpy()
    logs = m.log_members(x).numpy()
    simulated = np.log(np.exp(logs - noise[:, :, None]).mean(1)).std(0)
    np.testing.assert_allclose(m.log_prob_std(x), simulated, rtol=0.06)


def test_score_against_finite_differences():
    m, x, h = model(2), normal(30, std=2.0, d=2), 1e-5
    steps = torch.eye(2, dtype=torch.float64) * h
    expected = torch.stack([(m.log_prob(x + s) - m.log_prob(x - s)) / (2 * h) for s in steps], 1)
    torch.testing.assert_close(m.score(x), expected, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(m.score(x), expected, atol=1e-6, rtol=1e-6)


def test_tails_fall_back_to_the_base():
    m = model()
    x = torch.tensor([[40.0], [60.0]], dtype=torch.float64)
    difference = m.log_members(x) - torch.stack([q.log_prob(x) for q in m.bases])
    torch.testing.assert_close(difference[:, 0], difference[:, 1])


def test_chunks_do_not_matter(monkeypatch):
    m, x = model(2), normal(100, d=2)
    whole = m.log_prob(x), m.log_prob_std(x), m.score(x), m.log_weights(x.expand(3, -1, -1))
    monkeypatch.setattr(tilted_module, "_CHUNK", 7)
    parts = m.log_prob(x), m.log_prob_std(x), m.score(x), m.log_weights(x.expand(3, -1, -1))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_without_a_graph_as_with_one(monkeypatch):
    rng = np.random.default_rng(0)
    columns = rng.standard_t(3, size=(400, 2))
    maps = [MarginalGaussianization.fit(columns[k::4]) for k in range(N_MEMBERS + 1)]
    bases = [
        StackedBase([model(2).bases[k], TransformedBase(maps[k], model(2).bases[0])], [0.4, 0.6])
        for k in range(N_MEMBERS)
    ]
    m = TiltedMixture(bases, bases, FeatureMap(maps[-1]), Bumps())
    modes = [ModesTogether([q, MarginalBin(0, -1.0, 0.5)]) for q in bases]
    m.calibrate(0.8, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), modes)
    x = torch.as_tensor(columns[:80])
    x[0] = torch.tensor([1e4, -3e5])
    expected = m.log_members(x.clone().requires_grad_()).detach()
    before = pickle.dumps(m)
    with monkeypatch.context() as patch:  # bases and responsibilities come out of one evaluation
        for name in ("log_prob", "responsibilities"):
            patch.delattr(StackedBase, name)
        torch.testing.assert_close(m.log_members(x), expected, rtol=1e-12, atol=1e-9)
    assert len(pickle.dumps(m)) == len(before)  # what is made for it is not stored
    rows = [m.log_members(row) for row in x.split([1, 2, 77])]
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, rtol=1e-12, atol=1e-9)
    copied = pickle.loads(pickle.dumps(m))
    assert torch.equal(copied.log_members(x), m.log_members(x))
    # other bases are noticed
    m.bases = nn.ModuleList([model(2).bases[k] for k in range(N_MEMBERS)])
    fresh = m.log_members(x.clone().requires_grad_()).detach()
    torch.testing.assert_close(m.log_members(x), fresh, rtol=1e-12, atol=1e-9)
    # the modes of a single mixture are its own components
    weights = torch.linspace(-0.3, 0.3, m.bases[0].n_components + 1, dtype=torch.float64)
    m.calibrate(0.8, weights, [ModesTogether([q, MarginalBin(0, -1.0, 0.5)]) for q in m.bases])
    fresh = m.log_members(x.clone().requires_grad_()).detach()
    torch.testing.assert_close(m.log_members(x), fresh, rtol=1e-12, atol=1e-9)


def test_log_weights_measure_log_z():
    m = model()
    grid = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    exact = torch.trapezoid(literal_members(m, grid[:, None]), grid).log()
    x, log_weights = m.draw(40_000, rngs())
    assert x.shape == (3, 40_000, 1)
    estimate = log_weights.exp().mean(1).log()
    error = log_weights.exp().std(1) / log_weights.exp().mean(1) / 200
    assert ((estimate - exact).abs() < 4 * error).all()
    # another proposal changes weights, not log Z
    m.proposals = nn.ModuleList([gaussian(0.5, 2.5) for _ in range(3)])
    x, log_weights = m.draw(40_000, rngs())
    error = log_weights.exp().std(1) / log_weights.exp().mean(1) / 200
    assert ((log_weights.exp().mean(1).log() - exact).abs() < 4 * error).all()
    expected = literal_members(m, x[1])[1].log() - m.proposals[1].log_prob(x[1])
    torch.testing.assert_close(log_weights[1], expected)


def test_log_ratio_of_one_distribution_is_exactly_zero():
    q, p, x = gaussian(), gaussian(0.5), normal(9).expand(2, -1, -1)
    ratio = log_ratio([q, q], [q, p], x)
    assert (ratio[0] == 0).all()
    torch.testing.assert_close(ratio[1], q.log_prob(x[1]) - p.log_prob(x[1]))


def test_pickle():
    m, x = model(2), normal(20, d=2)
    assert torch.equal(pickle.loads(pickle.dumps(m)).log_prob(x), m.log_prob(x))
