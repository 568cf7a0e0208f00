"""The latent-variable model: latent variables, a decoder and a likelihood, and an encoder."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skebm.latents import GaussianEncoder
from skebm.partition import Marginals, RowStreams, marginal_likelihoods

__all__ = ["LatentVariableModel"]

MOMENT_DRAWS = 32
"""Draws of the encoder that give the moments of a first proposal."""

BLOCK = 512
"""Inputs in one pass through a network: few enough for the cache, and always as many, since the
last digit of a product of matrices can depend on their shapes."""

MEASURED_ROWS = 1024
"""Rows that are measured at once, so that memory does not grow with n."""

MODE_STARTS = 8
"""Draws of the encoder's moments, of which the likeliest is where the way to a mode begins."""

MUCH_WIDER = 3.0
"""An encoder that is so much wider than the mode, on average over the axes, knows of more than one
mode, or of none: it is on its own then, since a wrong mode hides what other draws have missed."""

MORE_WITHOUT_MODE = 4
"""Times as many draws for these rows, whose proposal is less even."""

NEWTON_STEPS, STEP_SIZES = 2, (0.0, 1.0, 0.5, 0.2)
"""Gauss-Newton steps to the mode of a posterior, and the shares of a step that are compared."""

DIFFERENCE = 1e-2
"""Half the distance between the latent vectors that slopes of the decoder are taken from: fine
enough for a proposal, and coarse enough for single precision."""


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

    See Also
    --------
    TiltedMixture : The model of the other estimators.
    skebm.latents.GaussianLikelihood : A likelihood.
    skebm.partition.marginal_likelihoods : Its log-density.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import GaussianLikelihood, perceptron
    >>> from skebm.models import LatentVariableModel
    >>> decoder = perceptron(2, 3, (16,), seed=0)
    >>> model = LatentVariableModel(decoder, GaussianLikelihood(torch.ones(3)), n_components=2)
    >>> rng = torch.Generator().manual_seed(0)
    >>> model.sample(5, rng, dtype=torch.float32).shape
    torch.Size([5, 3])
    >>> x, z = torch.zeros(1, 3), torch.zeros(1, 2)
    >>> model.log_joint(x, z).detach()
    tensor([-4.5947])
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

        def both(rows):
            mean, covariance = self.encoder.moments(rows, noise)
            return torch.cat([mean[..., None], covariance], dim=-1)

        found = in_blocks(both, x, BLOCK // MOMENT_DRAWS)
        return found[..., 0], found[..., 1:]

    def modes(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Modes of the posteriors of rows, and Laplace's covariances there, near latent variables.

        From the likeliest of the starts, by Gauss-Newton steps, with the slopes of the decoder as
        differences and the Fisher information of the likelihood, which make every covariance a
        proper one.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        z : Tensor of shape (n, m, k)
            Where to start.

        Returns
        -------
        mode : Tensor of shape (n, k)
        covariance : Tensor of shape (n, k, k)
        """

        def likeliest(tried):
            best = self.log_joint(x[:, None], tried).nan_to_num(-math.inf).argmax(1)
            return tried[torch.arange(len(tried), device=tried.device), best]

        k, z = z.shape[2], likeliest(z)
        eye = torch.eye(k, dtype=z.dtype, device=z.device)
        around = DIFFERENCE * torch.cat([0 * eye[:1], eye, -eye])
        sizes = torch.tensor(STEP_SIZES, dtype=z.dtype, device=z.device)[:, None]
        for n_done in range(NEWTON_STEPS + 1):
            output, above, below = self.decoder(z[:, None] + around).split([1, k, k], dim=1)
            slopes = (above - below) / (2 * DIFFERENCE)
            precision = eye + self.likelihood.information(x[:, None], output) * slopes @ slopes.mT
            gradient = slopes @ self.likelihood.slope(x[:, None], output).mT - z[..., None]
            # where the decoder overflows nothing is known but the prior
            known = precision.isfinite().all(-1).all(-1) & gradient.isfinite().all(-1).all(-1)
            tril = torch.linalg.cholesky(torch.where(known[:, None, None], precision, eye))
            if n_done == NEWTON_STEPS:
                return z, torch.cholesky_inverse(tril)
            step = torch.cholesky_solve(gradient.nan_to_num(0.0, 0.0, 0.0), tril).mT
            z = likeliest(z[:, None] + sizes * step)
        raise AssertionError  # the loop returns

    @torch.no_grad()
    def log_likelihoods(
        self,
        x: Tensor,
        seed: int,
        *,
        at_modes: bool = True,
        n_samples: int = 500,
        **options: Any,
    ) -> Marginals:
        """Measured log p(x) of rows, (n, d) -> Marginals.

        Networks are evaluated in float32, in which they were trained, and all else as x is given.

        Parameters
        ----------
        x : Tensor of shape (n, d)
        seed : int
            The same rows give the same values.
        at_modes : bool, default=True
            Whether a part of the proposal is at the modes of the posteriors, for rows of which the
            encoder is not three times as wide as the mode; other rows have four times as many
            draws instead.
        n_samples : int, default=500
            Draws behind every log-density.
        **options
            Of :func:`skebm.partition.marginal_likelihoods`.
        """
        single = LatentVariableModel(
            InBlocks(self.decoder), self.likelihood, self.n_components, _float32(self.encoder)
        )
        rng = torch.Generator(x.device).manual_seed(seed)
        location, covariance = (t.to(x.dtype) for t in single.moments(x.float(), rng))
        if not at_modes:
            own = location.double(), covariance.double(), RowStreams(x, seed)
            return marginal_likelihoods(single.of_rows(x), *own, n_samples=n_samples, **options)
        usable = location.isfinite().all(-1) & covariance.isfinite().all(-1).all(-1)
        eye = torch.eye(self.n_components, dtype=x.dtype, device=x.device)
        tril = torch.linalg.cholesky(torch.where(usable[:, None, None], covariance, eye))
        noise = torch.randn(MODE_STARTS, len(eye), generator=rng, dtype=x.dtype, device=x.device)
        starts = location[:, None] + torch.cat([0 * noise[:1], noise]) @ tril.mT
        mode, at_mode = single.modes(x, starts)
        log_ratio = tril.logdet() - 0.5 * at_mode.logdet()
        alone = ~(log_ratio < len(eye) * math.log(MUCH_WIDER)) | ~usable
        parts = []
        for some, with_mode in ((~alone, True), (alone, False)):
            rows = some.nonzero()[:, 0]
            found = marginal_likelihoods(
                single.of_rows(x[rows]), location[rows].double(), covariance[rows].double(),
                RowStreams(x[rows], seed),
                mode=(mode[rows].double(), at_mode[rows].double()) if with_mode else None,
                n_samples=n_samples if with_mode else MORE_WITHOUT_MODE * n_samples,
                **options,
            )  # fmt: skip
            parts.append((rows, found))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return Marginals(*(torch.cat(m)[order] for m in zip(*(f for _, f in parts), strict=True)))

    def of_rows(self, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """log p(x, z) of rows (n, d), as :func:`skebm.partition.marginal_likelihoods` takes it."""

        def log_joint(rows, z):
            return self.log_joint(x[rows][:, None], z.to(x.dtype))

        return log_joint

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


class InBlocks(nn.Module):
    """A network in float32, block by block, (..., k) -> (..., d) in the type of its input."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = _float32(network)

    def forward(self, z: Tensor) -> Tensor:
        """Output of the network."""
        output = in_blocks(self.network, z.flatten(0, -2).float(), BLOCK)
        return output.view(*z.shape[:-1], output.shape[-1]).to(z.dtype)


def in_blocks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Values of a function of rows, (n, ...) -> (n, ...), which sees so many rows at every call."""
    parts = []
    for rows in x.split(size):
        missing = size - len(rows)
        parts.append(function(torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])))
    return torch.cat(parts)[: len(x)]


def _float32(network):
    if next((p.dtype for p in network.parameters()), None) == torch.float32:
        return network
    return copy.deepcopy(network).float()


def antithetic_noise(encoder: Any, n: int, rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Noise in pairs of opposite signs, (n, n_noise): what is odd in it averages out."""
    half = encoder.noise(-(-n // 2), rng=rng, dtype=dtype)
    return torch.cat([half, -half])[:n]
