"""Where latent-variable models start: factor analysis, with its exact posterior as the encoder."""

import math
from functools import partial
from typing import Any

import torch

from skebm._modules import layer_sizes
from skebm._random import Seeds
from skebm.latents import (
    FULL_NOISE_SHARE,
    AffinePlus,
    BernoulliLikelihood,
    GaussianEncoder,
    GaussianLikelihood,
    ImplicitEncoder,
    factor_analysis,
    perceptron,
    user_network,
)
from skebm.models import LatentVariableModel

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of components that "auto" chooses from: curved, they do the work of more."""

PLANES = 4
"""Fewest of them, where there are as many columns: a curved surface needs more than a plane."""


def choose_n_components(
    x: torch.Tensor, weight: torch.Tensor, split: tuple[torch.Tensor, torch.Tensor]
) -> int:
    """Number of factors whose factor analysis has the best held-out likelihood."""
    train_rows, held = split
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
    x: torch.Tensor, weight: torch.Tensor, n_components: int, settings: Any, seeds: Seeds
) -> LatentVariableModel:
    """Networks that start as factor analysis, with its exact posterior as the encoder.

    Modules of the user replace the decoder, or the encoder's location and scale, as they are.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Rows to start from.
    weight : Tensor of shape (n,)
    n_components : int
    settings : LatentSettings
    seeds : Seeds

    Returns
    -------
    LatentVariableModel
    """
    d, k = x.shape[1], n_components
    factors = factor_analysis(x, weight, k)
    center, loadings = factors.center, factors.loadings
    posterior_weight, posterior_bias, posterior_scale = factors.posterior()
    if settings.likelihood == "bernoulli":
        p = center.clamp(0.01, 0.99)
        center, loadings = p.logit(), loadings / (p * (1 - p))[:, None]
        binary = bool(((x == 0) | (x == 1)).all())  # a probability then, and no density
        likelihood = BernoulliLikelihood(binary)
    elif isinstance(settings.decoder_model, str):
        likelihood = GaussianLikelihood(factors.variance.float())
    else:
        # little noise: with much of it z is of no use at first, and may stay so
        total = factors.variance + loadings.square().sum(1)
        likelihood = GaussianLikelihood((FULL_NOISE_SHARE * total).float())
    make = partial(perceptron, hidden_layer_sizes=layer_sizes(settings.hidden_layer_sizes))
    if isinstance(settings.decoder_model, str):
        decoder = AffinePlus(loadings, center, make(k, d, seed=seeds.of("decoder")))
    else:
        decoder = user_network(
            settings.decoder_model, "decoder_model", k, d, seed=seeds.of("decoder")
        )
        # nothing is known of what its components mean
        posterior_weight, posterior_bias = torch.zeros(k, d), torch.zeros(k)
        posterior_scale = torch.ones(k)
    if isinstance(settings.encoder_model, str):
        network = AffinePlus(
            torch.cat([posterior_weight, torch.zeros(k, d)]),
            torch.cat([posterior_bias, posterior_scale.log()]),
            make(d, 2 * k, seed=seeds.of("encoder")),
        )
    else:
        network = user_network(
            settings.encoder_model, "encoder_model", d, 2 * k, seed=seeds.of("encoder")
        )
    if settings.encoder == "gaussian":
        coder = GaussianEncoder(network, k)
    else:
        score = (
            make(d + k, k, seed=seeds.of("score network"))
            if settings.encoder == "implicit"
            else None
        )
        coder = ImplicitEncoder(
            network, k, make(d + 2 * k, k, seed=seeds.of("encoder, bent")), score
        )
    return LatentVariableModel(decoder, likelihood, k, coder)
