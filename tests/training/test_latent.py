"""Training of latent-variable models: what is lowered, for how long, and whether it is kept."""

from dataclasses import replace
from functools import cache, partial
from itertools import combinations

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from torch import nn

from skebm._random import Seeds
from skebm.datasets import make_two_moons
from skebm.latents import GaussianLikelihood, ImplicitEncoder, factor_analysis, perceptron
from skebm.models import LatentVariableModel
from skebm.objectives import gaussian_divergences
from skebm.training import Columns, latent, make_task
from skebm.training.latent import (
    ONE_SIDED,
    LatentSettings,
    fit_latent,
    gain_over,
    negative_bounds,
    train_latent,
)
from skebm.training.latent_start import build_model

SETTINGS = {
    "n_components": 2, "encoder": "gaussian", "likelihood": "gaussian", "kl_weight_start": 1.0,
    "n_importance_samples": 100, "encoder_model": "mlp", "decoder_model": "mlp",
    "hidden_layer_sizes": (16,), "learning_rate": "auto", "weight_decay": 1e-3, "batch_size": 128,
    "max_epochs": 3, "patience": None, "callbacks": None,
}  # fmt: skip
AT_REST = {"learning_rate": 1e-12, "weight_decay": 0.0}
"""A rate at which nothing is learned, so that losses are those of the start."""

moons = cache(partial(make_two_moons, random_state=0))


@cache
def linear_rows(n=400, d=5, k=2, seed=0):
    """Probabilistic principal components."""
    rng = np.random.default_rng(1)
    loadings = rng.normal(size=(d, k))
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)) @ loadings.T + 0.5 * rng.normal(size=(n, d))


def task_of(X, weight=None, *, smoothing=0.0, validation_fraction=0.1, seed=0):
    return make_task(
        X, np.ones(len(X)) if weight is None else weight, Columns.learn(X, range(X.shape[1])),
        n_members=1, validation_fraction=validation_fraction, smoothing=smoothing,
        seeds=Seeds(seed), device=torch.device("cpu"),
    )  # fmt: skip


def start_of(task, **options):
    settings, rows = LatentSettings(**SETTINGS | options), task.train[0]
    return build_model(
        task.x[rows], task.weight[rows], settings.n_components, settings, task.seeds, task.layout
    )


def trained(task, *, stops_early=False, **options):
    """The model after training, and its history."""
    model = start_of(task, **options)
    history = train_latent(task, model, LatentSettings(**SETTINGS | options), stops_early)
    return model, history


# ---------------------------------------------------------------------- what is lowered


def test_train_loss_is_minus_the_bound():
    # the bound of the start, which is tight with a linear decoder
    task = task_of(linear_rows())
    _, history = trained(task, encoder="implicit", max_epochs=40, hidden_layer_sizes=(), **AT_REST)
    rows = task.train[0]
    exact = factor_analysis(task.x[rows], torch.ones(len(rows)), 2).log_prob(task.x[rows]).mean()
    losses = history["train_loss"][1:]
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() + exact.item()) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("encoder", ["gaussian", "implicit", "stein"])
def test_it_is_the_divergence_that_has_the_weight(encoder):
    # losses differ by kl (weight - 1), kl that of exact posteriors
    task = task_of(linear_rows())
    options = {"encoder": encoder, "max_epochs": 20, "batch_size": 60, "hidden_layer_sizes": ()}
    plain, tempered = (
        trained(task, kl_weight_start=w, **options, **AT_REST)[1]["train_loss"][1:]
        for w in (1.0, 5.0)
    )
    x = task.x[task.train[0]]
    gain, bias, scale = factor_analysis(x, torch.ones(len(x)), 2).posterior()
    exact = gaussian_divergences(x @ gain.mT + bias, scale.log()).mean().item()
    steps = np.arange(12 * 6).reshape(12, 6)
    weight = (5.0 ** (1 - steps / (0.6 * 120))).mean(axis=1)
    found = (tempered[:12] - plain[:12]) / (weight - 1)
    assert abs(found.mean() - exact) < 4 * found.std(ddof=1) / np.sqrt(12)
    assert found.std() < 0.1 * exact
    # it ends at one
    np.testing.assert_allclose(tempered[12:], plain[12:], rtol=1e-6)


class Widened(nn.Module):
    """g = c times the second of the three noises, for two columns and two components."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.size * inputs[..., 2:4]


def test_gradient_of_the_divergence_with_a_score_of_the_wrong_size():
    # the distribution N(0, (1 + c^2) I), whose score the network takes for that of N(0, I)
    score = perceptron(4, 2, (), seed=0)
    coder = ImplicitEncoder(perceptron(2, 4, (), seed=0), 2, Widened(), score)
    model = LatentVariableModel(nn.Linear(2, 2), GaussianLikelihood(torch.ones(2)), 2, coder)
    plain, doubled = (
        negative_bounds(model, torch.zeros(20_000, 2), torch.Generator().manual_seed(0), weight)
        for weight in (1.0, 2.0)
    )
    (slope,) = torch.autograd.grad((doubled - plain).mean(), coder.residual.size)
    # of c^2 - log(1 + c^2) at c = 1; single draws spread by less than 2
    assert abs(slope - 1) < 4 * 2 / np.sqrt(20_000)


def test_weights_decay_but_not_those_of_the_score():
    # at this rate nothing else happens to them
    options = {"encoder": "implicit", "learning_rate": 1e-4}
    task = task_of(moons(200))
    plain, decayed = (trained(task, weight_decay=w, **options)[0] for w in (0.0, 5000.0))
    for part in ("decoder.weight", "encoder.network.weight"):
        assert decayed.get_parameter(part).norm() < 0.5 * plain.get_parameter(part).norm()
    part = "encoder.score_network.0.weight"
    torch.testing.assert_close(
        decayed.get_parameter(part), plain.get_parameter(part), rtol=0, atol=0.01
    )


# ---------------------------------------------------------------------- on which rows


class Batches(Callback):
    """Keeps the rows that are trained on."""

    def __init__(self):
        self.rows = []

    def on_batch_begin(self, net, batch=None, **_):
        self.rows.append(batch[0][0].clone())


@pytest.mark.parametrize("kind", ["ties", "smoothing"])
def test_every_epoch_has_noise_of_its_own(kind):
    X, smoothing = (moons(400).round(1), 0.0) if kind == "ties" else (moons(400), 0.1)
    seen = Batches()
    trained(task_of(X, smoothing=smoothing), batch_size=10_000, callbacks=[seen])
    for first, second in combinations([rows[:400] for rows in seen.rows], 2):
        assert not (first[:, None] == second).all(-1).any()


def test_score_network_takes_three_steps_on_training_rows_for_each_of_the_others(monkeypatch):
    losses, seen = latent.score_network_losses, []

    def recorded(encoder, x, rng):
        seen.append(x.double())
        return losses(encoder, x, rng)

    monkeypatch.setattr(latent, "score_network_losses", recorded)
    task = task_of(linear_rows())
    trained(task, encoder="implicit", max_epochs=4, batch_size=90)
    assert len(seen) == 3 * 4 * 4
    assert {len(x) for x in seen} == {90}
    found = torch.cdist(task.x, torch.cat(seen)).min(1).values < 1e-4
    assert torch.equal(found.nonzero()[:, 0], task.train[0])


# ---------------------------------------------------------------------- for how long


class Plan(Callback):
    """Reads how long a training would last, and ends it."""

    def on_epoch_end(self, net, **_):
        self.max_epochs, self.patience = net.max_epochs, net.patience
        self.evaluate_every = net.evaluate_every
        raise KeyboardInterrupt


def test_how_long_training_lasts():
    def plan(validation_fraction=0.1, **options):
        seen, task = Plan(), task_of(moons(400), validation_fraction=validation_fraction)
        options = {"max_epochs": "auto", "patience": 20} | options
        trained(task, stops_early=True, callbacks=[seen], **options)
        return seen

    # of 360 rows: 100 epochs, or 6000 steps
    assert plan(batch_size=4).max_epochs == 100
    assert plan(batch_size=90).max_epochs == 1500
    # patience of at least 600 steps
    assert plan(batch_size=90).patience == 150
    assert plan(batch_size=90, patience=200).patience == 200
    assert plan(batch_size=4).patience == 20
    # and of three evaluations, which are rare where many rows are held out
    rare = plan(batch_size=4, validation_fraction=0.5)
    assert rare.evaluate_every > 10
    assert rare.patience >= 3 * rare.evaluate_every
    # not while the divergence has another weight
    assert plan(kl_weight_start=0.5).patience is None


# ---------------------------------------------------------------------- whether it is kept


@pytest.mark.parametrize("decoder_model", ["mlp", nn.Linear])
def test_training_has_to_beat_its_start_on_held_out_rows(decoder_model, monkeypatch):
    seen = []

    def never(task, model, start):
        seen.append((model, start))
        return 0.016, 0.01

    monkeypatch.setattr(latent, "gain_over", never)
    options = {"max_epochs": 40, "learning_rate": 0.01, "decoder_model": decoder_model}
    task = task_of(moons(400))
    fitted = fit_latent(task, LatentSettings(**SETTINGS | options | {"patience": 20}))
    if decoder_model != "mlp":  # its start is not fitted
        assert not seen
        assert fitted.attributes["n_iter_"] > 0
        return
    ((model, start),) = seen
    assert fitted.model is start
    assert fitted.attributes["accepted_"] == "start"
    assert fitted.attributes["_summary"] == (
        "start kept; networks rejected: gain 0.016 +- 0.01 nats per row on held-out rows"
    )
    assert fitted.attributes["n_iter_"] == 0
    before = start_of(task, **options).double().state_dict()
    for name, value in start.state_dict().items():
        torch.testing.assert_close(value, before[name])
    assert (model.decoder.weight != start.decoder.weight).any()


def beats(*args):
    gain, error = gain_over(*args)
    return gain > ONE_SIDED * error


def test_beats_is_a_test_at_five_per_cent():
    weight = np.random.default_rng(0).exponential(size=2000)
    task = task_of(linear_rows(2000, seed=9), weight)
    rng, ones = np.random.default_rng(0), torch.ones(2000, dtype=torch.float64)
    good, poor = (start_of(task, n_components=k, hidden_layer_sizes=(4,)) for k in (2, 1))
    train = task.train[0]
    factors = [factor_analysis(task.x[train], task.weight[train], k) for k in (2, 1)]
    exact = [f.log_prob(task.x) for f in factors]
    decided = []
    for _ in range(60):
        rows = torch.as_tensor(rng.choice(2000, 20, replace=False))
        share = task.weight[rows] / task.weight[rows].sum()
        gain = (exact[0] - exact[1])[rows]
        mean = share @ gain
        t = mean / (share.square() @ (gain - mean).square()).sqrt()
        judged = replace(task, splits=[(train, rows)])
        if abs(t - 1.645) > 0.15:  # the errors of the log-densities count, too
            decided.append(bool(t > 1.645))
            assert beats(judged, good, poor) == decided[-1], t
        if len(decided) % 4 == 0:
            assert not beats(judged, poor, good) or t < -1.645
    assert 5 < sum(decided) < len(decided) - 5
    assert not beats(replace(task, weight=ones), good, good)


# ---------------------------------------------------------------------- encoders of a given decoder


class Folded(nn.Module):
    def forward(self, z):
        return z.abs()


FOLDED_AT = torch.tensor([[0.5], [1.0]], dtype=torch.float64)


def divergences_from_folded_posteriors(encoder):
    """KL(encoder || exact posterior) for x = |z| + .1 noise, by a histogram of 20,000 draws.

    Decoder and noise are fixed at the truth, so that only the encoder can learn.
    """
    rng = np.random.default_rng(0)
    X = np.abs(rng.normal(size=(500, 1))) + 0.1 * rng.normal(size=(500, 1))
    # from some seeds a Gaussian encoder does not leave the middle between the modes
    task = task_of(X, seed=1)
    task = replace(task, x=torch.as_tensor(X), draw=lambda seed: torch.as_tensor(X))
    options = {
        "n_components": 1, "encoder": encoder, "decoder_model": Folded(), "learning_rate": 0.005,
        "hidden_layer_sizes": (32, 32), "kl_weight_start": 30.0, "weight_decay": 0.0,
        "max_epochs": 150,
    }  # fmt: skip
    model = start_of(task, **options)
    with torch.no_grad():
        model.likelihood.log_variance.fill_(np.log(0.01))
    model.likelihood.requires_grad_(False)
    train_latent(task, model, LatentSettings(**SETTINGS | options), False)
    model.double()
    noise = model.encoder.noise(20_000, rng=torch.Generator().manual_seed(0), dtype=torch.float64)
    n_bins, fine = 160, 50
    z = torch.linspace(-4, 4, 2 * n_bins * fine + 1, dtype=torch.float64)[1::2]  # cell centres
    edges = torch.linspace(-4, 4, n_bins + 1, dtype=torch.float64)
    found = []
    with torch.no_grad():
        log_posterior = model.log_joint(FOLDED_AT[:, None], z.expand(2, -1)[..., None])
        log_posterior = log_posterior.log_softmax(1).view(2, n_bins, fine).logsumexp(-1)
        drawn = model.encoder.draw(FOLDED_AT, noise)[..., 0]
    for of_x, log_p in zip(drawn.clamp(-3.99, 3.99), log_posterior, strict=True):
        share = torch.histogram(of_x, edges)[0] / len(of_x)
        hit = share > 0
        found.append((share[hit] * (share[hit].log() - log_p[hit])).sum().item())
    return np.array(found)


def test_a_gaussian_encoder_finds_one_of_two_modes():
    # the posterior has two alike, and a normal distribution can cover one: log 2
    found = divergences_from_folded_posteriors("gaussian")
    np.testing.assert_allclose(found, np.log(2), atol=0.05)


@pytest.mark.parametrize("encoder", ["implicit", "stein"])
def test_an_implicit_encoder_finds_both_modes(encoder):
    found = divergences_from_folded_posteriors(encoder)
    assert (found < 0.25).all(), found
