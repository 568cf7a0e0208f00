"""How a generator settles on the model, and the bound on log Z that it then gives."""

import copy
import math
from functools import cache, partial

import numpy as np
import pytest
import torch

from skebm import Network
from skebm._engine import Budget
from skebm._random import Seeds
from skebm.bases import _flow_training
from skebm.datasets import TwoMoons
from skebm.exceptions import DivergenceError
from skebm.models import TiltedMixture
from skebm.training import Columns, Recipe, Trained, adversarial, distributions, make_task
from skebm.training.acceptance import accept
from skebm.training.adversarial import settled_generator, train_adversarially
from skebm.training.fit import measure, prepare

every_kind = pytest.mark.parametrize("kind", ["flow", "implicit"])
NETWORK = Network(
    hidden_layer_sizes=(16,), learning_rate=0.01, max_epochs=30, batch_size=128, patience=1000
)


@pytest.fixture(autouse=True, scope="module")
def quick_parts():
    """Flows that fit in a fraction of a second, and shorter stages of the generator alone."""
    with pytest.MonkeyPatch.context() as patch:
        small = partial(distributions.build_flow, n_layers=2, hidden=(16,), n_bins=4)
        patch.setattr(distributions, "build_flow", small)
        patch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=10, steps=1))
        patch.setattr(adversarial, "HEAD_START", 40)
        patch.setattr(adversarial, "GENERATOR_STEPS", 50)
        patch.setattr(adversarial, "SETTLING_STEPS", dict.fromkeys(adversarial.SETTLING_STEPS, 100))
        patch.setattr(
            adversarial, "SETTLING_SAMPLES", dict.fromkeys(adversarial.SETTLING_SAMPLES, 128)
        )
        yield


@cache
def task_of(n=500, base="flow"):
    rows = TwoMoons().sample(n, random_state=0)
    task = make_task(
        rows, np.ones(n), Columns.learn(rows, range(2)), n_members=2, validation_fraction=0.1,
        smoothing=0.0, seeds=Seeds(0), device=torch.device("cpu"),
    )  # fmt: skip
    return prepare(task, Recipe(train=None, base=base, flow="coupling"))


def play(task, kind, network=NETWORK):
    with torch.enable_grad():
        return train_adversarially(
            task, network, kind=kind, generator_learning_rate="auto", gradient_penalty=0.05
        )


@cache
def game(kind):
    """A task, what a game made of it, and the model."""
    task = task_of()
    trained = play(task, kind)
    with torch.no_grad():
        model, decision = accept(task, trained, recalibrates=True, always=False)
    assert decision.accepted == "tilt"
    return task, trained, model


def settle(task, trained, model, kind="flow"):
    """As in a fit, but for a copy of the generator, which is trained in place."""
    with torch.no_grad():
        return settled_generator(task, copy.deepcopy(trained), model, kind)


def scores(settled):
    (flows,) = settled.parts
    return torch.stack([q.log_prob(task_of().x) for q in flows])


def test_early_stopping_does_not_count_what_the_generator_does_alone(monkeypatch):
    seen, penalties = [], adversarial.gradient_penalties

    def spy(energy, z):
        seen.append(z.shape)
        return penalties(energy, z)

    monkeypatch.setattr(adversarial, "gradient_penalties", spy)
    play(task_of(100), "implicit", Network(hidden_layer_sizes=(16,), max_epochs=2))
    assert len(seen) == 2  # an energy that learns in every step, of which there is one an epoch


@pytest.mark.parametrize(
    ("gaps", "n_settled"),
    [((0.01,), 0), ((0.1, 0.01), 1), ((0.1, 0.08), 1), ((0.1, 0.05, 0.03, 0.02), 3)],
)
def test_flow_goes_on_settling_while_that_helps(gaps, n_settled, monkeypatch):
    seen, measured = [], iter(gaps)
    monkeypatch.setattr(adversarial, "_settle", lambda *args: seen.append(args))
    monkeypatch.setattr(adversarial, "_gap", lambda *args: next(measured))
    settle(*game("flow"))
    assert [n for *_, n in seen] == list(range(n_settled))  # of seeds of their own


def test_settling_that_makes_it_worse_is_undone(monkeypatch):
    def spoil(task, generator, *args):
        for parameter in generator.parameters():
            parameter.add_(0.3)

    monkeypatch.setattr(adversarial, "SETTLED", 0.0)
    monkeypatch.setattr(adversarial, "_settle", spoil)
    spoilt = settle(*game("flow"))
    monkeypatch.setattr(adversarial, "MAX_SETTLINGS", 0)
    assert torch.equal(scores(spoilt), scores(settle(*game("flow"))))


def test_settling_that_diverges_is_left_out(monkeypatch):
    def diverge(task, generator, *args):
        for parameter in generator.parameters():
            parameter.fill_(math.nan)
        raise DivergenceError

    monkeypatch.setattr(adversarial, "SETTLED", 0.0)
    monkeypatch.setattr(adversarial, "_settle", diverge)
    settled = settle(*game("flow"))
    assert settled.bound.isfinite().all()
    assert scores(settled).isfinite().all()


def test_gap_that_ends_settling_is_that_of_the_bound(monkeypatch):
    measured, gap = [], adversarial._gap
    monkeypatch.setattr(adversarial, "SETTLED", 0.0)
    monkeypatch.setattr(
        adversarial, "_gap", lambda *args: measured.append(gap(*args)) or measured[-1]
    )
    task, trained, model = game("flow")
    settled = settle(task, trained, model)
    with torch.no_grad():
        partition = measure(copy.deepcopy(model), task, 20_000)
    above = (partition.value - settled.bound).max()
    error = torch.hypot(partition.std_error, settled.bound_std_error).max()
    assert len(measured) > 1
    assert abs(min(measured) - above) < 4.0 * 3.0 * error  # of 4,096 draws, not 20,480


@every_kind
def test_generator_settles_on_the_model_that_is_left(kind, monkeypatch):
    # a tilt that the guard has halved, and one that is not accepted
    task, trained, tilted = game(kind)
    halved = copy.deepcopy(tilted)
    halved.calibrate(0.5 * tilted.inverse_temperature, 0.5 * tilted.mode_weights, tilted.modes)
    untilted = TiltedMixture(task.bases, task.bases, task.features, None)
    seen = []
    monkeypatch.setattr(adversarial, "SETTLED", 0.0)
    monkeypatch.setattr(adversarial, "_settle", lambda *args: seen.append(args[2]))
    for model in (halved, untilted):
        settled = settle(task, trained, model, kind)
        if model is untilted and kind == "flow":
            # the model is its own generator
            assert torch.equal(
                scores(settled), torch.stack([q.log_prob(task.x) for q in task.bases])
            )
            assert settled.bound.abs().max() < 1e-12
            assert not seen
        else:
            assert {id(s) for s in seen} == {id(model)}
            seen.clear()


@pytest.mark.parametrize("base", ["flow", None])
def test_bound_where_nothing_is_trained(base):
    task = task_of(100, base)
    model = TiltedMixture(task.bases, task.bases, task.features, None)
    settled = settle(task, Trained.nothing(task), model)
    (flows,) = settled.parts
    assert all(q.log_prob(task.x).isfinite().all() for q in flows)
    if base == "flow":  # the generator is the model, whose log Z is 0
        assert settled.bound.abs().max() < 1e-9
        assert all(q is p for q, p in zip(flows, task.bases, strict=True))
    else:  # it is not
        assert (settled.bound < -1.0).all()
