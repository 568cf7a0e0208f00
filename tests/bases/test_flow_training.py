import copy
import math

import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal

from skebm._engine import Budget
from skebm.bases import _flow_training, build_flow, fit_flow, train_flows
from skebm.exceptions import DivergenceError

K = 3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=7, dtype=torch.float64):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def bent(n, seed=0):
    """Rows around a parabola."""
    x = draw(n, 2, seed=seed)
    return torch.stack([x[:, 0], 0.4 * x[:, 1] + x[:, 0].square() - 1.0], dim=1)


@pytest.fixture(scope="module")
def fitted():
    return fit_flow(0.5 * bent(1000), rng=rng(), max_epochs=20)


def test_learns_a_bent_law(fitted):
    """Halved, so that all but a few rows in a thousand are within the reach of the splines."""
    fresh, fitting = bent(4000, seed=1), bent(1000)
    gaussian = MultivariateNormal(fitting.mean(0), torch.cov(fitting.mT))
    truth = stats.norm(fresh[:, 0].square() - 1.0, 0.4).logpdf(fresh[:, 1])
    truth = truth.mean() + stats.norm.logpdf(fresh[:, 0]).mean()
    log_prob = fitted.log_prob(0.5 * fresh) + 2 * math.log(0.5)
    gain = (log_prob - gaussian.log_prob(fresh)).mean()
    assert gain > 0.8 * (truth - gaussian.log_prob(fresh).mean())


def test_fitted_flow_inverts_in_single_precision(fitted):
    flow = copy.deepcopy(fitted.flow).float()
    z, log_prob = flow.rsample(2000, rng())
    torch.testing.assert_close(flow.log_prob(z), log_prob, rtol=0, atol=5e-3)


def test_weights_count_as_rows():
    x = torch.cat([bent(500), 3.0 + 0.1 * draw(500, 2)])
    weight = torch.cat([torch.ones(500), torch.zeros(500)]).double()
    options = dict(rng=rng(), max_epochs=15)
    law = fit_flow(x, sample_weight=weight, **options)
    fresh = bent(2000, seed=1)
    assert law.log_prob(fresh).mean() > fit_flow(x, **options).log_prob(fresh).mean() + 0.3
    with pytest.raises(ValueError, match="sample_weight"):
        fit_flow(x, sample_weight=torch.zeros(1000), **options)


def test_fit_keeps_the_best_state_and_is_reproducible():
    """A destructive learning rate never makes the result worse than where it started."""
    x = bent(300)
    for name in ("coupling", "maf"):
        options = dict(name=name, patience=1, max_epochs=3)
        start = fit_flow(x, rng=rng(), name=name, max_epochs=0)
        try:
            wild = fit_flow(x, rng=rng(), learning_rate=0.5, **options)
        except DivergenceError as error:
            assert "learning_rate" in str(error)  # noqa: PT017
        else:
            assert wild.log_prob(x).mean() >= start.log_prob(x).mean() - 0.1
        a, b = (fit_flow(x, rng=rng(4), **options) for _ in "ab")
        assert torch.equal(a.log_prob(x), b.log_prob(x))
        c = fit_flow(x, rng=rng(5), **options)
        assert not torch.equal(a.log_prob(x), c.log_prob(x))


def test_flows_are_trained_side_by_side_on_their_own_rows():
    """Each learns its own law, and is judged on its own held-out rows; weights count there, too."""
    centers = torch.tensor([-2.0, 0.0, 1.5]).double()
    y = centers[:, None, None] + 0.3 * draw(K, 500, 2)
    y[:, 400:] += 100.0  # of no weight, neither to learn from nor to judge by
    weight = (torch.arange(500) < 400).double()
    order = torch.randperm(500, generator=rng(1))
    splits = [(order[60 + k :], order[: 60 + k]) for k in range(K)]
    flow = build_flow("coupling", 2, K, rng=rng())
    train_flows(flow, y, weight, splits, rng=rng(), max_epochs=40)
    fresh = centers[:, None, None] + 0.3 * draw(K, 2000, 2, seed=2)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3))
    value = torch.stack([flow.member(k).log_prob(fresh[k]).mean() for k in range(K)])
    assert (value > -entropy - 0.1).all()


@pytest.mark.parametrize("row", [10, 390])  # one that teaches, one that judges
@pytest.mark.parametrize("far", [30.0, 1e30, math.inf])
def test_one_gross_outlier_changes_little(row, far):
    fresh, found = bent(2000, seed=1), []
    split = torch.arange(300), torch.arange(300, 400)
    for value in (None, far):
        x = bent(400)
        if value is not None:
            x[row, 0] = value
        flow = build_flow("coupling", 2, rng=rng())
        train_flows(flow, x[None], torch.ones(400), [split], rng=rng(), max_epochs=60)
        found.append(flow.member(0).log_prob(fresh).mean().item())
    start = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    assert found[0] > start.log_prob(fresh).mean() + 0.5
    assert found[1] == pytest.approx(found[0], abs=0.1)


def test_rows_judge_where_all_of_them_are_outliers():
    x = bent(100) + 50.0
    split = torch.arange(50), torch.arange(50, 100)
    flow = build_flow("coupling", 2, rng=rng())
    train_flows(flow, x[None], torch.ones(100), [split], rng=rng(), max_epochs=2)
    assert flow.member(0).log_prob(x).isfinite().all()


def test_patience_is_of_many_steps_where_epochs_are_short(monkeypatch):
    monkeypatch.setattr(_flow_training, "FLOW_PATIENCE", 1)
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(200, 1, patience_steps=40))
    engine, lasted = _flow_training.train, []

    def spy(*args, **options):
        lasted.append((options["patience"], options["max_epochs"]))
        return engine(*args, **options | {"max_epochs": 1})

    monkeypatch.setattr(_flow_training, "train", spy)
    fit_flow(bent(570), rng=rng())  # epochs of two steps
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(200, 1000, patience_steps=40))
    fit_flow(bent(570), rng=rng(), batch_size=128)  # of four
    assert lasted == [(20, 200), (10, 250)]


@pytest.mark.parametrize(("effort", "epochs"), [(1.0, 250), (0.4, 100)])
def test_effort_is_a_share_of_the_usual_length(effort, epochs, monkeypatch):
    engine, lasted = _flow_training.train, []

    def spy(*args, **options):
        lasted.append(options["max_epochs"])
        return engine(*args, **options | {"max_epochs": 1})

    monkeypatch.setattr(_flow_training, "train", spy)
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(200, 500, patience_steps=40))
    fit_flow(bent(570), rng=rng(), effort=effort)  # epochs of two steps
    assert lasted == [epochs]
