"""Proposals for the posteriors of latent variables, one for each row.

The parts of a proposal have fixed numbers of draws, and those that are adapted are drawn in small
Latin hypercubes: of m draws each coordinate has one in every m-th of its distribution. So the error
of the mean of the weights is that of a stratified sample of independent hypercubes.
"""

import functools
import math
from typing import Any, Self

import torch
from torch import nn

from skebm.partition._row_streams import DEGREES
from skebm.partition._weights import largest_power

PRIOR_SHARE = 0.2
"""Share of the draws that come from N(0, I): they find modes that the rest has missed, unless the
prior has next to no mass there."""

INFLATION, MODE_INFLATION = 1.3, 1.1
"""Of the covariance of the t proposal over that of the draws it was fitted to, and of that of the
normal proposal over the one that is given."""

FITTED_SHARE = 0.15
"""Weights are flattened until this share of the draws is effective before moments are taken."""

HYPERCUBE, MIN_HYPERCUBES = 4, 20
"""Draws in a Latin hypercube, which are few since the standard error is that of their means; with
fewer than so many of them there is none."""


class PosteriorProposal(nn.Module):
    """For every row a t distribution, mixed with the standard normal one, and one at its mode.

    Parameters
    ----------
    location : Tensor of shape (n, k)
        Of the t distribution.
    scale_tril : Tensor of shape (n, k, k)
    mode : tuple of Tensors (n, k) and (n, k, k), optional
        Location and Cholesky factor of a normal distribution, which has half of the draws that are
        not from the standard normal one.
    """

    def __init__(
        self,
        location: torch.Tensor,
        scale_tril: torch.Tensor,
        mode: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.location, self.scale_tril, self.mode = location, scale_tril, mode

    def sizes(self, n: int) -> list[int]:
        """How many of n draws are from the prior, the t distribution and that at the mode."""
        m = hypercube(n)
        n_hypercubes = (n - math.ceil(PRIOR_SHARE * n)) // m
        n_mode = 0 if self.mode is None else n_hypercubes // 2 * m
        n_near = n_hypercubes * m - n_mode
        return [n - n_near - n_mode, n_near, n_mode]

    def transport(self, normal: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Draws (n, m, k) from random numbers (n, m, 2 k) and (n, m), part by part."""
        n, k = normal.shape[1], self.location.shape[1]
        sizes = self.sizes(n)
        prior, near, at_mode = normal.split(sizes, dim=1)
        near = _latin_hypercubes(near, hypercube(n))
        near = near * (DEGREES / square.split(sizes, dim=1)[1]).sqrt()[..., None]
        parts = [prior[..., :k], self.location[:, None] + near @ self.scale_tril.mT]
        if self.mode is not None:
            location, tril = self.mode
            at_mode = _latin_hypercubes(at_mode, hypercube(n))
            parts.append(location[:, None] + at_mode @ tril.mT)
        return torch.cat(parts, dim=1)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of a draw that is one of m, (n, m, k) -> (n, m); also (m, k) -> (m,)."""
        if z.ndim == 2:
            return self.log_prob(z[None])[0]
        n, k = z.shape[1:]
        distance, log_scale = _standardized(z, self.location, self.scale_tril)
        half = 0.5 * (DEGREES + k)
        constant = (
            math.lgamma(half) - math.lgamma(0.5 * DEGREES) - 0.5 * k * math.log(DEGREES * math.pi)
        )
        log_norm = 0.5 * k * math.log(2 * math.pi)
        parts = [
            -0.5 * z.square().sum(-1) - log_norm,
            constant - log_scale - half * (distance / DEGREES).log1p(),
        ]
        if self.mode is not None:
            distance, log_scale = _standardized(z, *self.mode)
            parts.append(-log_norm - log_scale - 0.5 * distance)
        # the shares that they have, or the mean of the weights is not p(x)
        parts = [p + math.log(m / n) for p, m in zip(parts, self.sizes(n), strict=False)]
        return functools.reduce(torch.logaddexp, parts)

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draws of a single row, (n, k), in random order."""
        like = {"generator": rng, "dtype": self.location.dtype, "device": rng.device}
        normal = torch.randn(1, n, 2 * self.location.shape[1], **like)
        square = torch.randn(1, n, DEGREES, **like).square().sum(-1)
        return self.transport(normal, square)[0][
            torch.randperm(n, generator=rng, device=rng.device)
        ]

    def refitted(self, z: torch.Tensor, log_weights: torch.Tensor) -> "PosteriorProposal":
        """Proposal with the moments of weighted draws, (n, m, k) and (n, m)."""
        power = largest_power(log_weights, FITTED_SHARE)
        weights = (power[:, None] * log_weights).softmax(-1)
        location = (weights[..., None] * z).sum(1)
        centered = z - location[:, None]
        covariance = centered.mT @ (weights[..., None] * centered)
        n_effective = 1 / weights.square().sum(1)
        return PosteriorProposal.of_moments(location, covariance, n_effective, self.mode)

    @classmethod
    def of_moments(
        cls,
        location: torch.Tensor,
        covariance: torch.Tensor,
        n_effective: float | torch.Tensor,
        mode: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Self:
        """Proposal around moments taken from so many draws."""
        k = location.shape[-1]
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        # few draws: towards the diagonal, so that it is regular
        share = torch.as_tensor(k / (n_effective + k)).to(location).view(-1, 1, 1)
        covariance = covariance.lerp(diagonal.diag_embed(), share)
        floor = 1e-6 + 1e-3 * diagonal.mean(-1, keepdim=True)
        covariance = INFLATION * covariance + floor.expand_as(diagonal).diag_embed()
        return cls(location, torch.linalg.cholesky(covariance), mode)

    def take(self, rows: Any) -> "PosteriorProposal":
        """The proposals of some rows."""
        mode = None if self.mode is None else (self.mode[0][rows], self.mode[1][rows])
        return PosteriorProposal(self.location[rows], self.scale_tril[rows], mode)

    def put(self, rows: Any, other: "PosteriorProposal") -> None:
        """Take the t distributions of some rows from another one."""
        self.location[rows], self.scale_tril[rows] = other.location, other.scale_tril


def hypercube(n):
    """Draws in a Latin hypercube, where there are n of the whole proposal."""
    return HYPERCUBE if n >= MIN_HYPERCUBES * HYPERCUBE else 1


def _latin_hypercubes(normal, m):
    """Normal draws (n, s, k) in Latin hypercubes of m, from independent ones (n, s, 2 k)."""
    order, within = normal.unflatten(1, (-1, m)).chunk(2, dim=-1)
    if m == 1:
        return within.flatten(1, 2)
    uniform = (order.argsort(2) + torch.special.ndtr(within)) / m
    # far below the least that has a probability in any number of draws; zero would be infinite
    return torch.special.ndtri(uniform.clamp(1e-300, 1 - 1e-16)).flatten(1, 2)


def _standardized(z, location, tril):
    """Squared distances of draws (n, m, k) in standard deviations, and log-determinants (n, 1)."""
    white = torch.linalg.solve_triangular(tril, (z - location[:, None]).mT, upper=False)
    log_scale = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return white.square().sum(-2), log_scale
