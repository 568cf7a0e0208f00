import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import MultivariateNormal

from skebm.bases import (
    FlowBase,
    ZukoFlows,
    _stacked_flow,
    build_flow,
    fit_flow,
)

K = 3
OWN = ["coupling", "autoregressive"]
KINDS = [*OWN, "nsf", "maf", "nice"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed(kind="coupling", d=2, *, scale=0.1, seed=0, dtype=torch.float64, n_members=K):
    flow = build_flow(kind, d, n_members, rng=rng(seed)).to(dtype)
    if kind in OWN:  # zuko's start at random weights
        g = rng(seed + 1)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype))
    return flow


def draw(*shape, seed=7, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("d", [1, 2, 7])
def test_starts_at_the_standard_normal_law(kind, d):
    flow = build_flow(kind, d, K, rng=rng()).double()
    z = 3 * draw(K, 100, d)
    expected = MultivariateNormal(torch.zeros(d).double(), torch.eye(d).double()).log_prob(z)
    torch.testing.assert_close(flow.log_prob(z), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*OWN, "nsf"])
@pytest.mark.parametrize("d", [1, 2])
def test_integrates_to_one(kind, d):
    flow = perturbed(kind, d, n_members=2)
    axis = torch.linspace(-16, 16, 601 if d == 2 else 20001, dtype=torch.float64) + 0.003
    grid = torch.cartesian_prod(*d * [axis]).reshape(1, -1, d)
    cell = (axis[1] - axis[0]).item() ** d
    with torch.no_grad():
        total = torch.zeros(2).double()
        for rows in grid.split(4000, dim=1):
            total += flow.log_prob(rows.expand(2, -1, -1)).exp().sum(1) * cell
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_along_the_way_is_the_density_there(kind, d, dtype):
    flow = perturbed(kind, d, dtype=dtype)
    z, log_prob = flow.rsample(500, rng(1))
    assert z.shape == (K, 500, d)
    assert z.dtype == log_prob.dtype == dtype
    exact = dtype == torch.float64 and kind in OWN
    atol = 1e-8 if exact else 5e-3
    torch.testing.assert_close(flow.log_prob(z), log_prob, rtol=0, atol=atol)
    assert torch.equal(flow.sample(500, rng(1)), z)
    assert not flow.sample(5, rng(1)).requires_grad


@pytest.mark.parametrize("kind", OWN)
def test_samples_follow_the_density(kind):
    flow = perturbed(kind, d=1, scale=0.3)
    grid = torch.linspace(-16, 16, 40001, dtype=torch.float64)
    for k in range(K):
        law = flow.member(k)
        cdf = np.cumsum(law.log_prob(grid[:, None]).exp().numpy())
        u = np.interp(law.sample(4000, rng(2))[:, 0], grid, cdf / cdf[-1])
        assert stats.kstest(u, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_layers_invert(kind, d, dtype, atol):
    flow = perturbed(kind, d, dtype=dtype, scale=0.1 if dtype == torch.float64 else 0.05)
    bound = flow.layers[0].bound
    x = 2 * draw(K, d, 1000, dtype=dtype)
    x[:, :, :3] = torch.tensor([-bound, bound, 0.0], dtype=dtype)  # ends of the spline
    x[:, :, 3:5] = torch.tensor([-1e3, 1e3], dtype=dtype)
    for layer in flow.layers:
        y, log_det = layer(x)
        back, same = layer.inverse(y)
        torch.testing.assert_close(back, x, rtol=atol, atol=atol)
        torch.testing.assert_close(same, log_det, rtol=0, atol=100 * atol)
        assert y.isfinite().all()


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_log_determinant_is_that_of_the_jacobian(kind, d):
    flow = perturbed(kind, d, n_members=1)

    def towards_normal(z):
        u = z[None, :, None]
        for layer in flow.layers:
            u, _ = layer(u)
        return u[0, :, 0]

    for z in 2 * draw(20, d):
        jacobian = torch.autograd.functional.jacobian(towards_normal, z)
        u = towards_normal(z)
        expected = -0.5 * (u.square() + math.log(2 * math.pi)).sum() + jacobian.slogdet().logabsdet
        torch.testing.assert_close(flow.log_prob(z[None, None])[0, 0], expected)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradients_against_finite_differences(kind, d):
    flow = perturbed(kind, d, n_members=2)
    a = draw(d, seed=3)

    def value():
        z, log_prob = flow.rsample(64, rng(5))
        return (z @ a).sin().mean() + (log_prob * z[..., 0].cos()).mean()

    gradients = torch.autograd.grad(value(), list(flow.parameters()))
    for i, (p, gradient) in enumerate(zip(flow.parameters(), gradients, strict=True)):
        direction = draw(*p.shape, seed=i)
        with torch.no_grad():
            values = [value() for step in (1e-6, -2e-6) if p.add_(step * direction) is not None]
            p.add_(1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_finite_everywhere_with_finite_gradients(dtype, scale):
    flow = perturbed(d=3, scale=scale, dtype=dtype)
    bound = flow.layers[0].bound
    edges = torch.tensor([-bound, bound, 0.0, 1e4, -1e4, bound - 1e-6], dtype=dtype)
    z = torch.cartesian_prod(edges, edges, edges).expand(K, -1, -1).clone().requires_grad_()
    log_prob = flow.log_prob(z)
    assert log_prob.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_prob.sum(), [z, *_p(flow)]))
    x, log_prob = flow.rsample(5000, rng())
    assert x.isfinite().all()
    assert log_prob.isfinite().all()
    gradients = torch.autograd.grad(x.square().mean() + log_prob.mean(), _p(flow))
    assert all(g.isfinite().all() for g in gradients)


def _p(flow):
    return list(flow.parameters())


def test_tails_are_linear():
    """Far out the map is affine: second differences vanish, along every ray."""
    flow = perturbed(d=3)
    values = []
    for distance in (1e6, 2e6, 3e6):
        u = distance * draw(K, 3, 50)
        for layer in flow.layers:
            u, _ = layer(u)
        values.append(u)
    bend = values[0] - 2 * values[1] + values[2]
    assert bend.abs().max() < 1e3  # of some ten thousands that it would be by the networks


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_independent(kind):
    flow = perturbed(kind, 3)
    z = draw(K, 20, 3)
    before, draws = flow.log_prob(z), flow.sample(20, rng())
    alone = [flow.alone(k) for k in range(K)]
    with torch.no_grad():
        for p in flow.flows[0].parameters() if kind not in OWN else flow.parameters():
            (p if kind not in OWN else p[0]).mul_(1.5)
    after, again = flow.log_prob(z), flow.sample(20, rng())
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)
    torch.testing.assert_close(again[1:], draws[1:], rtol=0, atol=0)
    assert not torch.equal(before[0], flow.log_prob(z[:1].expand(K, -1, -1))[1])
    for k, single in enumerate(alone):
        torch.testing.assert_close(single.log_prob(z[k][None])[0], before[k])
        assert any(p.requires_grad for p in single.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_member_is_a_law(kind):
    flow = perturbed(kind, 2, dtype=torch.float32)
    law = flow.member(1)
    assert isinstance(law, FlowBase)
    assert law.n_features == 2
    assert not any(p.requires_grad for p in law.parameters())
    x = law.sample(50, rng(3))
    assert x.shape == (50, 2)
    assert x.dtype == law.log_prob(x.float()).dtype == torch.float64
    torch.testing.assert_close(
        law.log_prob(x), flow.log_prob(x.float().expand(K, -1, -1))[1].double(), rtol=0, atol=1e-3
    )
    x.requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    with torch.no_grad():
        for j, h in enumerate(1e-6 * torch.eye(2, dtype=torch.float64)):
            slope = (law.log_prob(x + h) - law.log_prob(x - h)) / 2e-6
            torch.testing.assert_close(score[:, j], slope, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        whole = law.log_prob(x)
        one_by_one = torch.cat([law.log_prob(row[None]) for row in x])
    torch.testing.assert_close(whole, one_by_one, rtol=0, atol=1e-9)
    for twin in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law), law.to("cpu")):
        assert twin.n_features == 2
        assert torch.equal(twin.log_prob(x), law.log_prob(x))
        assert torch.equal(twin.sample(5, rng(4)), law.sample(5, rng(4)))
    stack = pickle.loads(pickle.dumps(flow))
    assert torch.equal(stack.sample(5, rng(4)), flow.sample(5, rng(4)))


@pytest.mark.parametrize("kind", KINDS)
def test_reproducible_and_global_state_as_found(kind):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    a, b = (perturbed(kind, 2) for _ in "ab")
    other = perturbed(kind, 2, seed=1)
    x = a.sample(20, rng(5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(b.sample(20, rng(5)), x)
    assert not torch.equal(b.sample(20, rng(6)), x)
    assert not torch.equal(other.sample(20, rng(5)), x)


def test_autoregressive_flow_of_shears_and_funnels():
    """One layer whose networks give shifts and scales that are known."""
    flow = build_flow("autoregressive", 3, n_layers=1, hidden=(2,), rng=rng()).double()
    layer = flow.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weights[0].fill_(1.0)  # units: the first column; the sum of the first two
        layer.weights[1][0, 2, 0] = 0.7  # shift of the second column
        layer.weights[1][0, 5] = 0.4  # log-scale of the third
    x = draw(200, 3)
    silu = torch.nn.functional.silu
    unit = silu(x[:, 0]), silu(x[:, 0] + x[:, 1])
    log_scale = 0.4 * (unit[0] + unit[1])
    log_scale = log_scale / (1 + log_scale.abs() / 7)
    u = torch.stack([x[:, 0], x[:, 1] + 0.7 * unit[0], x[:, 2] * log_scale.exp()], dim=1)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(1) + log_scale
    torch.testing.assert_close(flow.log_prob(x[None])[0], expected)


def test_columns_depend_on_those_before_alone():
    layer = perturbed("autoregressive", 5, scale=0.3, n_members=1).layers[0]
    z = draw(5)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: layer(z[None, :, None])[0][0, :, 0].flip(0), z
    )
    assert torch.equal(jacobian, jacobian.tril())
    assert (jacobian.tril() != 0).sum() == 15


def test_zuko_flows_from_instances_and_factories():
    zuko = pytest.importorskip("zuko")
    instance = zuko.flows.NSF(2, transforms=1, hidden_features=(8,), passes=2)
    before = copy.deepcopy(instance.state_dict())
    flow = ZukoFlows(instance, 2, K, rng=rng())
    z = draw(K, 10, 2, dtype=torch.float32)
    torch.testing.assert_close(flow.log_prob(z)[1], instance().log_prob(z[1]))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[name]) for name, v in instance.state_dict().items())
    torch.testing.assert_close(
        FlowBase(instance).log_prob(z[0]).float(), instance().log_prob(z[0]), rtol=0, atol=1e-5
    )
    made = build_flow(zuko.flows.NICE, 2, K, rng=rng(), transforms=2)
    assert made.log_prob(z).shape == (K, 10)
    assert not torch.equal(
        made.log_prob(z[:1].expand(K, -1, -1))[0], made.log_prob(z[:1].expand(K, -1, -1))[1]
    )


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ("glow", "flow='glow' must be"),
        (3, "flow must be"),
        (nn.Linear(2, 2), "flow must be a normalizing flow"),
        (lambda d: nn.Linear(d, d), "flow must be a normalizing flow"),
        (lambda d: "no", "flow must be a normalizing flow"),
    ],
)
def test_what_is_not_a_flow_is_refused(flow, message):
    with pytest.raises(ValueError, match=message):
        build_flow(flow, 2, K, rng=rng())


def test_zuko_laws_that_are_not_flows_and_other_shapes_are_refused():
    zuko = pytest.importorskip("zuko")
    with pytest.raises(ValueError, match="flow must be a normalizing flow"):
        build_flow(zuko.flows.GMM(2), 2, rng=rng())
    with pytest.raises(ValueError, match="context"):
        build_flow(zuko.flows.MAF(2, context=1), 2, rng=rng())
    with pytest.raises(ValueError, match="2 features"):
        build_flow(zuko.flows.MAF(3), 2, rng=rng())


CHECK_VALIDATION = """
import pickle, sys, torch
from skebm.bases import build_flow
g = torch.Generator().manual_seed(0)
for make in (
    lambda: pickle.load(open(sys.argv[1], "rb")),
    lambda: build_flow("maf", 2, rng=g).member(0),
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "zuko"]:
        del sys.modules[name]
    torch.distributions.Distribution.set_default_validate_args(True)
    flow = make()
    assert "zuko" in sys.modules
    flow.sample(5, g)
    assert torch.distributions.Distribution._validate_args
"""


def test_validation_of_distributions_is_as_found(tmp_path):
    path = tmp_path / "flow.pkl"
    path.write_bytes(pickle.dumps(perturbed("maf").member(0)))
    command = [sys.executable, "-c", CHECK_VALIDATION, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_that_are_no_flows_are_refused_without_zuko_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ValueError, match="'coupling', one of .*'gf', 'maf', 'nice', 'nsf'"):
        build_flow("nfs", 2, rng=rng())


def test_without_zuko_only_the_coupling_flow_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    x = torch.randn(50, 2, generator=rng())
    fit_flow(x, rng=rng(), max_epochs=1)
    with pytest.raises(ImportError, match=r'pip install "skebm\[flows\]"'):
        build_flow("nsf", 2, rng=rng())


def test_many_rows_are_evaluated_and_drawn_in_blocks_as_at_once(monkeypatch):
    base, z = FlowBase(perturbed(d=3, n_members=1)), draw(100, 3)
    whole = base.log_prob(z)
    monkeypatch.setattr(_stacked_flow, "BLOCK", 32)
    torch.testing.assert_close(base.log_prob(z), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(base.log_prob(z[:0]), whole[:0])
    for n in (0, 1, 32, 70):
        assert base.sample(n, rng()).shape == (n, 3)
