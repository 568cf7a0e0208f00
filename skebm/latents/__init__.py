"""Latent-variable models: what the rows are made from, and what the rows say about it."""

from skebm.latents._encoders import GaussianEncoder, ImplicitEncoder
from skebm.latents._factors import FULL_NOISE_SHARE, AffinePlus, FactorModel, factor_analysis
from skebm.latents._likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    MixedLikelihood,
    WithLogMasses,
)
from skebm.latents._networks import perceptron, user_network

__all__ = [
    "FULL_NOISE_SHARE",
    "AffinePlus",
    "BernoulliLikelihood",
    "FactorModel",
    "GaussianEncoder",
    "GaussianLikelihood",
    "ImplicitEncoder",
    "MixedLikelihood",
    "WithLogMasses",
    "factor_analysis",
    "perceptron",
    "user_network",
]
