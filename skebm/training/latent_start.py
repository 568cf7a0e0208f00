"""Where latent-variable models start: factor analysis, with its exact posterior as the encoder."""

import math
from typing import Any, NamedTuple

import torch

from skebm._layout import Layout
from skebm._modules import layer_sizes
from skebm._random import Seeds
from skebm.latents import (
    FULL_NOISE_SHARE,
    AffinePlus,
    BernoulliLikelihood,
    GaussianEncoder,
    GaussianLikelihood,
    ImplicitEncoder,
    MixedLikelihood,
    WithLogMasses,
    factor_analysis,
    perceptron,
    user_network,
)
from skebm.models import LatentVariableModel

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of components that "auto" chooses from: curved, they do the work of more."""

PLANES = 4
"""Fewest of them, where there are as many columns: a curved surface needs more than a plane."""

START_DRAWS, START_STEPS = 500, 30
"""Pairs of latent vectors, and steps, by which states have their shares at the start."""

LEAST = 0.01
"""Probability of a state, or of zero and of one, at the start, at least."""


class FactorColumns(NamedTuple):
    """What factor analysis sees of rows: linear functions of ``layout.as_numbers(x)``.

    Of each column of states the indicators of all states but the likeliest, since together they sum
    to one; and the values, as distances from their mean if there are rows without.

    Attributes
    ----------
    contrasts : Tensor of shape (m, layout.n_numbers)
        The functions.
    back : Tensor of shape (layout.n_numbers, m)
    offset : Tensor of shape (layout.n_numbers,)
        The numbers, of rows that have all values, are ``back @ columns + offset``.
    """

    contrasts: torch.Tensor
    back: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def of_rows(cls, layout: Layout, x: torch.Tensor, weight: torch.Tensor) -> "FactorColumns":
        """The functions that rows (n, layout.n_features) suggest."""
        mean = weight.to(x) @ layout.as_numbers(x) / weight.sum()
        contrasts, offset = torch.eye(len(mean), dtype=x.dtype), torch.zeros_like(mean)
        back, dropped = contrasts.clone(), []
        first, first_value = 0, sum(layout.sizes)
        for size, value in zip(layout.sizes, layout.value_of, strict=True):
            if value >= 0:
                j = first_value + value
                offset[j] = mean[j] / mean[first].clamp_min(1e-300)
                contrasts[j, first] = -offset[j]
            likeliest = first + int(mean[first : first + size].argmax())
            back[likeliest, first : first + size] = -1.0
            offset[likeliest] = 1.0
            dropped.append(likeliest)
            first += size
        kept = [i for i in range(len(mean)) if i not in dropped]
        return cls(contrasts[kept], back[:, kept], offset)


def logits(
    masses: torch.Tensor, slopes: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are linear in z, of states whose probabilities have a mean and slopes in z.

    Parameters
    ----------
    masses : Tensor of shape (size,)
        Mean probabilities over z ~ N(0, I).
    slopes : Tensor of shape (size, k)
        Of the probabilities where all have these means.
    rng : torch.Generator

    Returns
    -------
    bias : Tensor of shape (size,)
    weight : Tensor of shape (size, k)
    """
    masses = masses / masses.sum()
    bias, weight = masses.log(), slopes / masses[:, None]
    z = torch.randn(START_DRAWS, slopes.shape[1], generator=rng, dtype=slopes.dtype)
    for _ in range(START_STEPS):
        found = (bias + torch.cat([z, -z]) @ weight.mT).softmax(1).mean(0)
        bias += masses.log() - found.log()
    return bias, weight


def choose_n_components(
    x: torch.Tensor,
    weight: torch.Tensor,
    split: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
) -> int:
    """Number of factors whose factor analysis has the best held-out likelihood."""
    train_rows, held = split
    columns = FactorColumns.of_rows(layout, x[train_rows], weight[train_rows])
    x = layout.as_numbers(x) @ columns.contrasts.mT
    d, best, chosen = x.shape[1], -math.inf, 1
    for k in CANDIDATES:
        if k > d or k >= len(train_rows):
            break
        factors = factor_analysis(x[train_rows], weight[train_rows], k)
        level = (weight[held] @ factors.log_prob(x[held])).item()
        if level > best:
            best, chosen = level, k
    return max(chosen, min(d, PLANES))


def build_model(
    x: torch.Tensor,
    weight: torch.Tensor,
    n_components: int,
    settings: Any,
    seeds: Seeds,
    layout: Layout,
) -> LatentVariableModel:
    """Networks that start as factor analysis, with its exact posterior as the encoder.

    Modules of the user replace the decoder, or the encoder's location and scale, as they are.

    Parameters
    ----------
    x : Tensor of shape (n, layout.n_features)
        Rows to start from.
    weight : Tensor of shape (n,)
    n_components : int
    settings : LatentSettings
    seeds : Seeds
    layout : Layout
        What the columns of a row are.

    Returns
    -------
    LatentVariableModel
    """
    k, start = n_components, _LinearModel.of_rows(x, weight, n_components, layout, seeds)
    if settings.likelihood == "bernoulli":
        start = start.of_logits()
    likelihood = _likelihood(start, x, settings, layout)
    if isinstance(settings.decoder_model, str):
        bent = _perceptron(settings, k, layout.n_numbers, seeds.of("decoder"))
        decoder = AffinePlus(start.loadings, start.center, bent)
    else:
        decoder = user_network(
            settings.decoder_model, "decoder_model", k, layout.n_numbers, seed=seeds.of("decoder")
        )
        start = start.without_posterior()  # nothing is known of what its components mean
    if layout.n_states:
        likelihood, decoder = MixedLikelihood(layout, likelihood), WithLogMasses(decoder, layout)
    return LatentVariableModel(decoder, likelihood, k, _encoder(start, settings, seeds, layout))


class _LinearModel(NamedTuple):
    """Factor analysis of rows as numbers, the d columns of ``layout.as_numbers(x)``.

    Attributes
    ----------
    center, loadings : Tensor of shape (d,) and (d, k)
        Of the decoder, logits of the states among them.
    variance : Tensor of shape (n_values,)
        Of the values around it.
    weight, bias, scale : Tensor of shape (k, d), (k,) and (k,)
        Of the posterior: its mean is linear.
    """

    center: torch.Tensor
    loadings: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of_rows(cls, x, weight, n_components, layout, seeds):
        columns = FactorColumns.of_rows(layout, x, weight)
        rows = layout.as_numbers(x) @ columns.contrasts.mT
        factors = factor_analysis(rows, weight, n_components)
        posterior_weight, bias, scale = factors.posterior()
        center = columns.back @ factors.center + columns.offset
        loadings = columns.back @ factors.loadings
        variance = factors.variance[len(factors.variance) - layout.n_values :]
        first, rng = 0, seeds.rng("states of the start")
        for size in layout.sizes:
            own = slice(first, first + size)
            center[own], loadings[own] = logits(center[own].clamp_min(LEAST), loadings[own], rng)
            first += size
        return cls(center, loadings, variance, posterior_weight @ columns.contrasts, bias, scale)

    def of_logits(self):
        """The same where the decoder gives logits of values in the unit interval."""
        n_masses = len(self.center) - len(self.variance)
        center, loadings = self.center.clone(), self.loadings.clone()
        p = center[n_masses:].clamp(LEAST, 1.0 - LEAST)
        center[n_masses:] = p.logit()
        loadings[n_masses:] /= (p * (1 - p))[:, None]
        return self._replace(center=center, loadings=loadings)

    def without_posterior(self):
        """The same with the prior in place of the posterior."""
        k, d = self.weight.shape
        nothing = {"weight": torch.zeros(k, d), "bias": torch.zeros(k), "scale": torch.ones(k)}
        return self._replace(**nothing)


def _likelihood(start, x, settings, layout):
    """Likelihood of the values."""
    if settings.likelihood == "bernoulli":
        values = layout.values(x)
        # a probability then, and no density
        binary = bool(((values == 0) | (values == 1) | values.isnan()).all())
        return BernoulliLikelihood(binary)
    if isinstance(settings.decoder_model, str):
        return GaussianLikelihood(start.variance.float())
    # little noise: with much of it z is of no use at first, and may stay so
    of_values = start.loadings[len(start.center) - layout.n_values :]
    total = start.variance + of_values.square().sum(1)
    return GaussianLikelihood((FULL_NOISE_SHARE * total).float())


def _encoder(start, settings, seeds, layout):
    """Encoder whose location and scale are those of the posterior."""
    k, d = start.weight.shape
    if isinstance(settings.encoder_model, str):
        network = AffinePlus(
            torch.cat([start.weight, torch.zeros(k, d)]),
            torch.cat([start.bias, start.scale.log()]),
            _perceptron(settings, d, 2 * k, seeds.of("encoder")),
        )
    else:
        network = user_network(
            settings.encoder_model, "encoder_model", d, 2 * k, seed=seeds.of("encoder")
        )
    if settings.encoder == "gaussian":
        return GaussianEncoder(network, k, layout)
    score = None
    if settings.encoder == "implicit":
        score = _perceptron(settings, d + k, k, seeds.of("score network"))
    bent = _perceptron(settings, d + 2 * k, k, seeds.of("encoder, bent"))
    return ImplicitEncoder(network, k, bent, score, layout)


def _perceptron(settings, n_inputs, n_outputs, seed):
    sizes = layer_sizes(settings.hidden_layer_sizes)
    return perceptron(n_inputs, n_outputs, hidden_layer_sizes=sizes, seed=seed)
