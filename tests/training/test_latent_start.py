"""Where latent-variable models start: factor analysis, exact posteriors, modules of users."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import FactorAnalysis
from torch import nn

from skebm._layout import Layout
from skebm._random import Seeds
from skebm.latents import factor_analysis
from skebm.training.latent import LatentSettings
from skebm.training.latent_start import (
    FactorColumns,
    build_model,
    choose_n_components,
    logits,
)
from skebm.training.task import make_splits

SETTINGS = {
    "n_components": 2, "encoder": "implicit", "likelihood": "gaussian", "kl_weight_start": 1.0,
    "n_importance_samples": 100, "encoder_model": "mlp", "decoder_model": "mlp",
    "hidden_layer_sizes": (16,), "learning_rate": "auto", "weight_decay": 1e-3, "batch_size": 128,
    "max_epochs": 3, "patience": None, "callbacks": None,
}  # fmt: skip


def linear_rows(n=200, d=5, k=2):
    rng = np.random.default_rng(1)
    loadings = rng.normal(size=(d, k))
    return torch.as_tensor(rng.normal(size=(n, k)) @ loadings.T + 0.5 * rng.normal(size=(n, d)))


def build(x, weight=None, **options):
    weight = torch.ones(len(x)) if weight is None else weight
    settings = LatentSettings(**SETTINGS | options)
    layout = Layout((), (), x.shape[1])
    return build_model(x, weight, settings.n_components, settings, Seeds(0), layout).double()


@pytest.mark.parametrize("encoder", ["implicit", "stein", "gaussian"])
def test_the_start_is_factor_analysis_and_its_exact_posterior(encoder):
    x, weight = linear_rows(), 0.5 + torch.arange(200) % 3
    model = build(x, weight, encoder=encoder)
    factors = factor_analysis(x, weight, 2)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(
        model.mean(z), factors.center + z @ factors.loadings.mT, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(model.likelihood.variance, factors.variance, rtol=1e-5, atol=1e-6)
    gain, bias, deviation = factors.posterior()
    location, log_scale = model.encoder(x)
    torch.testing.assert_close(location, x @ gain.mT + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_scale.exp(), deviation.expand(200, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:FactorAnalysis did not converge")
@pytest.mark.parametrize(("d", "k"), [(10, 6), (10, 2), (3, 1), (1, 1)])
def test_auto_components_are_those_of_the_best_held_out_likelihood(d, k):
    x, weight = linear_rows(300, d, k), 1 + np.arange(300) % 3
    (split,) = make_splits(300, 1, 0.3, torch.Generator().manual_seed(0))
    # weights are repetitions, for scikit-learn
    train, test = (x[rows].numpy().repeat(weight[rows], axis=0) for rows in split)
    levels = {
        n: FactorAnalysis(n, svd_method="lapack", tol=1e-4).fit(train).score(test)
        for n in (1, 2, 3, 4, 6, 8)
        if n < max(d, 2)
    }
    found = choose_n_components(x, torch.as_tensor(weight).double(), split, Layout((), (), d))
    assert found == max(max(levels, key=levels.get), min(d, 4))


def test_binary_rows_start_from_factor_analysis():
    rng = torch.Generator().manual_seed(0)
    on = torch.rand(400, 1, generator=rng) < 0.4
    p = torch.where(on, torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.7, 0.6]))
    x = (torch.rand(400, 4, generator=rng) < p).double()
    model, factors = build(x, likelihood="bernoulli"), factor_analysis(x, torch.ones(400), 2)
    # means at z = 0, and their slopes there
    z = 1e-3 * torch.cat([torch.zeros(1, 2), torch.eye(2), -torch.eye(2)]).double()
    center, up, down = model.mean(z).split([1, 2, 2])
    torch.testing.assert_close(center[0], factors.center, rtol=0, atol=1e-6)
    torch.testing.assert_close((up - down) / 2e-3, factors.loadings.mT, rtol=0, atol=1e-4)


def test_hidden_layer_sizes_are_those_of_every_perceptron():
    model = build(linear_rows(d=2), n_components=1, hidden_layer_sizes=(7, 5))
    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    # of decoder, encoder, its residual and its score
    assert widths == [7, 5, 2, 7, 5, 2, 7, 5, 1, 7, 5, 1]


# ---------------------------------------------------------------------- modules of users


def test_modules_of_users_start_with_little_noise():
    x = linear_rows()
    variance = build(x, decoder_model=nn.Linear).likelihood.variance
    torch.testing.assert_close(variance, 0.1 * x.var(0, correction=0), rtol=0.02, atol=0)


def test_factories_get_the_sizes():
    seen = []

    def factory(n_inputs, n_outputs):
        seen.append((n_inputs, n_outputs))
        return nn.Linear(n_inputs, n_outputs)

    build(linear_rows(d=3), n_components=5, decoder_model=factory, encoder_model=factory)
    assert seen == [(5, 3), (3, 10)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_model": nn.Linear(2, 3)}, r"decoder_model must map \(n, 2\) to \(n, 5\)"),
        ({"encoder_model": nn.Linear(3, 4)}, r"encoder_model failed on rows of shape \(3, 5\)"),
    ],
)
def test_modules_of_the_wrong_shape(options, message):
    with pytest.raises(ValueError, match=message):
        build(linear_rows(), **options)


# ---------------------------------------------------------------------- states, and values


def mixed_rows(n=500):
    """Three categories, a number or missing, and a number that all rows have."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=n)
    kind = np.digitize(z + 0.5 * rng.normal(size=n), [-0.5, 1.0])
    missing = rng.random(n) < 0.3
    value = np.where(missing, np.nan, 2.0 + z + rng.normal(size=n))
    x = np.c_[kind, missing, value, z + 0.3 * rng.normal(size=n)]
    return torch.as_tensor(x), Layout((3, 2), (-1, 0), 2)


def test_columns_of_factor_analysis():
    x, layout = mixed_rows()
    weight = torch.as_tensor(np.random.default_rng(1).integers(1, 4, len(x)))
    columns = FactorColumns.of_rows(layout, x, weight)
    numbers = layout.as_numbers(x)
    found = numbers @ columns.contrasts.mT
    assert found.shape == (500, 2 + 1 + 2)
    assert torch.linalg.matrix_rank(found - found.mean(0)) == 5
    there = x[:, 1] == 0
    torch.testing.assert_close((found @ columns.back.mT + columns.offset)[there], numbers[there])
    # where there is no value it is at the mean, which says nothing
    mean = weight[there].double() @ x[there, 2] / weight[there].sum()
    torch.testing.assert_close(found[there, 3], x[there, 2] - mean)
    assert not found[~there, 3].any()
    plain = FactorColumns.of_rows(Layout((), (), 3), torch.randn(9, 3), torch.ones(9))
    assert torch.equal(plain.contrasts, torch.eye(3))
    assert not plain.offset.any()


def test_logits_have_the_masses():
    masses = torch.tensor([0.6, 0.3, 0.1]).double()
    slopes = torch.tensor([[0.2, 0.0], [-0.1, 0.15], [-0.1, -0.15]]).double()
    bias, weight = logits(masses, slopes, torch.Generator().manual_seed(0))
    axis = torch.linspace(-7, 7, 281).double()
    z = torch.cartesian_prod(axis, axis)
    density = (-0.5 * z.square().sum(1)).softmax(0)
    found = density @ (bias + z @ weight.mT).softmax(1)
    torch.testing.assert_close(found, masses, atol=0.02, rtol=0)
    # small slopes are those of the probabilities
    _, weight = logits(masses, 1e-3 * slopes, torch.Generator().manual_seed(0))
    change = masses * (weight - masses @ weight).mT
    torch.testing.assert_close(change.mT, 1e-3 * slopes)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_mixed_rows_start_with_their_shares(likelihood):
    x, layout = mixed_rows()
    if likelihood == "bernoulli":
        x[:, 2:] = x[:, 2:].sigmoid()
    settings = LatentSettings(**SETTINGS | {"likelihood": likelihood})
    model = build_model(x, torch.ones(len(x)), 2, settings, Seeds(0), layout).double()
    drawn = model.sample(20_000, torch.Generator().manual_seed(0))
    means = layout.as_numbers(drawn)[:, :5].mean(0)
    torch.testing.assert_close(means, layout.as_numbers(x)[:, :5].mean(0), atol=0.02, rtol=0)
    # rows that differ in z are told apart by all columns
    location, _ = model.encoder(x)
    together = torch.corrcoef(torch.cat([location, x[:, [0, 3]]], dim=1).mT).abs()
    assert together[:2, 2:].max() > 0.8
