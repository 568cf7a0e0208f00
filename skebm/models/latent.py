"""The latent-variable model: latent variables, a decoder and a likelihood, and an encoder."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from skebm.latents import GaussianEncoder
from skebm.partition import Marginals, RowStreams, marginal_likelihoods

__all__ = ["LatentVariableModel"]

MOMENT_DRAWS, MOMENT_ELEMENTS = 128, 2**22
"""Draws of the encoder that give the moments of a first proposal; numbers made at once for them."""

MEASURED_ROWS = 8192
"""Rows that are measured at once, so that memory does not grow with n."""


class LatentVariableModel(nn.Module):
    r"""Rows made from latent variables: z ~ N(0, I), then x ~ p(x | decoder(z)).

    Its log-density is an integral over z, :func:`skebm.partition.marginal_likelihoods`, whose first
    proposal comes from the encoder.

    Parameters
    ----------
    decoder : nn.Module
        (..., k) -> (..., d).
    likelihood : nn.Module
        Of rows given the decoder's output, such as :class:`~skebm.latents.GaussianLikelihood`.
    n_components : int
        k.
    encoder : GaussianEncoder, ImplicitEncoder or None, default=None
        Approximate posterior of z given a row; `log_likelihoods` needs it.
    """

    decoder: nn.Module
    likelihood: Any
    n_components: int
    encoder: Any

    def __init__(
        self,
        decoder: nn.Module,
        likelihood: Any,
        n_components: int,
        encoder: GaussianEncoder | None = None,
    ):
        super().__init__()
        self.decoder, self.likelihood, self.encoder = decoder, likelihood, encoder
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

    def sample(self, n: int, rng: torch.Generator, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw n rows, (n, d)."""
        like = {"dtype": dtype, "device": rng.device}
        z = torch.randn(n, self.n_components, generator=rng, **like)
        return self.likelihood.sample(self.decoder(z), rng)

    def moments(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Approximate posterior means and covariances of rows, (n, k) and (n, k, k)."""
        noise = antithetic_noise(self.encoder, MOMENT_DRAWS, rng, x.dtype)
        n_rows = max(1, MOMENT_ELEMENTS // (MOMENT_DRAWS * (x.shape[1] + noise.shape[1])))
        parts = [self.encoder.moments(rows, noise) for rows in x.split(n_rows)]
        means, covariances = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(covariances)

    @torch.no_grad()
    def log_likelihoods(self, x: Tensor, seed: int, **options: Any) -> Marginals:
        """Measured log p(x) of rows, (n, d) -> Marginals.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        seed : int
            The same rows give the same values.
        **options
            Of :func:`skebm.partition.marginal_likelihoods`.
        """
        rng = torch.Generator(x.device).manual_seed(seed)
        location, covariance = self.moments(x, rng)

        def log_joint(rows, z):
            return self.log_joint(x[rows][:, None], z.to(x.dtype))

        return marginal_likelihoods(
            log_joint, location.double(), covariance.double(), RowStreams(x, seed), **options
        )

    def log_prob(self, x: Tensor, seed: int, *, n_samples: int) -> tuple[Tensor, Tensor]:
        """Log-densities of rows and their standard errors, (n, d) -> (n,), (n,).

        Rows that the likelihood does not support have -inf.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        seed : int
        n_samples : int
            Draws behind every log-density.
        """
        inside = self.likelihood.supports(x)
        value = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        error = torch.zeros_like(value)
        for rows in inside.nonzero()[:, 0].split(MEASURED_ROWS):
            measured = self.log_likelihoods(x[rows], seed, n_samples=n_samples)
            value[rows], error[rows] = measured.value, measured.std_error
        return value, error


def antithetic_noise(encoder: Any, n: int, rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Noise in pairs of opposite signs, (n, n_noise): what is odd in it averages out."""
    half = encoder.noise(-(-n // 2), rng=rng, dtype=dtype)
    return torch.cat([half, -half])[:n]
