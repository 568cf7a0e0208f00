"""Latent variables, a decoder and a likelihood: a law of rows."""

import math

import torch
from torch import Tensor, nn

__all__ = ["LatentVariableModel"]


class LatentVariableModel(nn.Module):
    r"""Rows made from latent variables: z ~ N(0, I), then x ~ p(x | decoder(z)).

    Its log-density is an integral over z, :func:`skebm.partition.marginal_likelihoods`.

    Parameters
    ----------
    decoder : nn.Module
        (..., k) -> (..., d).
    likelihood : nn.Module
        Of rows given the decoder's output, such as :class:`GaussianLikelihood`.
    n_components : int
        k.
    """

    def __init__(self, decoder: nn.Module, likelihood: nn.Module, n_components: int):
        super().__init__()
        self.decoder, self.likelihood = decoder, likelihood
        self.n_components = n_components

    def log_prior(self, z: Tensor) -> Tensor:
        """Log-density of latent variables, (..., k) -> (...)."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) of rows (..., d) and latent variables (..., k), in nats."""
        return self.likelihood.log_prob(x, self.decoder(z))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z)."""
        return self.log_likelihood(x, z) + self.log_prior(z)

    def mean(self, z: Tensor) -> Tensor:
        """Mean of the rows given latent variables, (..., k) -> (..., d)."""
        return self.likelihood.mean(self.decoder(z))

    def sample(self, n: int, generator: torch.Generator, *, dtype=torch.float64) -> Tensor:
        """Draw n rows, (n, d)."""
        like = {"dtype": dtype, "device": generator.device}
        z = torch.randn(n, self.n_components, generator=generator, **like)
        return self.likelihood.sample(self.decoder(z), generator)
