"""Distributions evaluated together against the same ones by themselves."""

import numpy as np
import pytest
import torch

from skebm.bases import (
    AffineTransform,
    FlowBase,
    GaussianMixtureBase,
    KernelDensityBase,
    MarginalGaussianization,
    StackedBase,
    Together,
    TransformedBase,
    UniformBase,
    _together,
    build_flow,
)
from skebm.bases._marginal import TogetherMapped
from skebm.bases._together import TOLERANCE

RNG = np.random.default_rng(0)
COLUMNS = np.stack(
    [RNG.normal(size=900), RNG.standard_t(2, size=900), np.exp(RNG.normal(size=900))], axis=1
)


def log_components(q, x):
    """What `Together` returns of one distribution, by itself, (n, d) -> (n_components, n)."""
    if isinstance(q, StackedBase):
        return (q.log_components(x) + q.weights.log()).mT
    return q.log_prob(x)[None]


def maps():
    """Of other knots, and of other numbers of them; with heavy tails and without."""
    fit = MarginalGaussianization.fit
    made = [fit(COLUMNS), fit(COLUMNS[:500], bandwidth=0.3), fit(COLUMNS[:60], n_knots=9)]
    assert (made[0].tails[..., 1] > 0).any()
    assert (made[2].tails[..., 1] == 0).all()
    return made


def mixture(k, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(k, 3, 3))
    covariances = spread * (factor @ factor.swapaxes(1, 2) + 0.3 * np.eye(3))
    return GaussianMixtureBase(rng.uniform(0.1, 1.0, k), rng.normal(size=(k, 3)), covariances)


def members():
    """Stacks of two members, and distributions that are no stacks."""
    one, two, three = maps()
    shared = mixture(5, 0)
    return [
        StackedBase([shared, TransformedBase(one, mixture(4, 1))], [0.3, 0.7]),
        StackedBase([mixture(5, 2), TransformedBase(two, mixture(4, 3))], [0.3, 0.7]),
        StackedBase(
            [
                StackedBase([shared, mixture(2, 4)], [1, 2]),
                UniformBase(torch.full((3,), -99.0), torch.full((3,), 99.0)),
            ],
            [0.9, 0.1],
        ),
        mixture(1, 5),
        TransformedBase(three, mixture(2, 6)),
        TransformedBase(three, KernelDensityBase(COLUMNS[:20], 0.5)),
    ]


def flow(kind, transform, seed):
    made = build_flow(kind, 3, rng=torch.Generator().manual_seed(seed))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return TransformedBase(transform, FlowBase(made))


def test_flows_together_as_apart(monkeypatch):
    monkeypatch.setattr(_together, "_CELLS", 9000)
    one, two, three = maps()
    units = AffineTransform([1.0, 0.0, -1.0], [0.5, 2.0, 1.0])
    first = [flow("autoregressive", one, 1), flow("coupling", two, 2), mixture(2, 1)]
    second = [flow("autoregressive", three, 3), flow("coupling", units, 4), mixture(2, 2)]
    distributions, x = [StackedBase(q, [0.5, 0.3, 0.2]) for q in (first, second)], points()
    joints, mapped = Together(distributions)(x)
    assert mapped is None
    for q, joint in zip(distributions, joints, strict=True):
        torch.testing.assert_close(joint, log_components(q, x), rtol=1e-11, atol=1e-9)


def points():
    x = torch.as_tensor(COLUMNS[::4]).clone()
    x[-3:] = torch.tensor([[1e3, 0, 0], [0, -1e5, 1e9], [-40.0, 7.0, -1e3]])
    x[:3] = maps()[0].knots[:, [0, 5, -1]].mT  # where pieces meet
    return x


@pytest.mark.parametrize("cells", [1 << 18, 1])
def test_together_as_apart(cells, monkeypatch):
    monkeypatch.setattr(_together, "_CELLS", cells)
    distributions, x = members(), points()
    joints, mapped = Together(distributions, maps()[:1])(x)
    for q, joint in zip(distributions, joints, strict=True):
        expected = log_components(q, x)
        torch.testing.assert_close(joint[: len(expected)], expected, rtol=1e-11, atol=1e-9)
        assert (joint[len(expected) :] == -torch.inf).all()
        torch.testing.assert_close(joint.logsumexp(0), q.log_prob(x), rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(mapped[0].mT, maps()[0](x)[0])


def test_maps_together_as_apart():
    x = points()
    z, log_det = TogetherMapped(maps())(x.mT.contiguous())
    for to, own, own_log_det in zip(maps(), z, log_det, strict=True):
        expected, expected_log_det = to(x)
        torch.testing.assert_close(own.mT, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_log_det, expected_log_det, rtol=1e-11, atol=1e-11)


def test_rows_in_reach_need_no_distribution_by_itself(monkeypatch):
    distributions, x = members()[:2], torch.as_tensor(COLUMNS[:50]).clamp(-5, 5)
    expected = [log_components(q, x) for q in distributions]
    together = Together(distributions)
    monkeypatch.delattr(GaussianMixtureBase, "_joint")
    for joint, own in zip(together(x)[0], expected, strict=True):
        torch.testing.assert_close(joint, own, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spread", [1e-4, 1e-8, 1e-12])
def test_tight_components_keep_their_digits(spread):
    q = mixture(6, 7, spread)
    x = q.sample(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(Together([q])(x)[0][0, 0], q.log_prob(x), rtol=0, atol=TOLERANCE)


def test_no_density_anywhere():
    box = UniformBase(torch.zeros(3), torch.ones(3))
    q = StackedBase([StackedBase([box, box], [0.5, 0.5]), box], [0.5, 0.5])
    joint = Together([q])(torch.full((2, 3), 7.0, dtype=torch.float64))[0][0]
    assert (joint == -torch.inf).all()


def test_no_rows_and_no_mixtures():
    box = UniformBase(torch.zeros(3), torch.ones(3))
    assert Together([box])(torch.zeros(4, 3).double())[0].shape == (1, 1, 4)
    joints, mapped = Together(members(), maps())(torch.zeros(0, 3).double())
    assert joints.shape == (6, 2, 0)
    assert mapped.shape == (3, 3, 0)
