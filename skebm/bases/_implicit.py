"""A generator without a density."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from skebm._random import spawn

__all__ = ["ImplicitGenerator"]

_MIN_SCALE, _MAX_SCALE = 0.05, 0.3


class ImplicitGenerator(nn.Module):
    r"""K networks that turn noise into points, :math:`z = g(u) + \sigma \epsilon`.

    u and epsilon are standard normal, g is a residual perceptron that starts as the identity, and
    sigma is learned within [0.05, 0.3]. The density of z,

    .. math:: \log q(z) = \log E_u\, N(z; g(u), \sigma^2),

    is an integral. :meth:`rsample` returns an estimate of it from the u that z was made of and
    `n_contrast` fresh ones, all of equal weight. On average it is too large, by Jensen's inequality
    (Yin & Zhou 2018), so that the entropy, and with it a bound on log Z, errs to the low side. The
    posterior of u given z is sampled with these candidates, weighted by N(z; g(u), sigma^2). (A
    local approximation of it, around the u that z was made of, misses other origins of z and
    overestimates the entropy.)

    Parameters
    ----------
    n_features : int
    n_members : int, default=1
        K.
    hidden : sequence of int, default=(128, 128)
    n_contrast : int, default=192
    rng : torch.Generator
        On the CPU. Source of the initial weights.

    See Also
    --------
    CouplingSplineFlow : A generator with an exact density.
    skebm.AdversarialEBM : Plays it against an energy.

    References
    ----------
    Yin, M. and Zhou, M. (2018). Semi-implicit variational inference. ICML.

    Grathwohl, W. et al. (2021). No MCMC for me: amortized sampling for fast and stable training of
    energy-based models. ICLR.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import ImplicitGenerator
    >>> rng = torch.Generator().manual_seed(0)
    >>> generator = ImplicitGenerator(n_features=2, n_members=3, rng=rng)
    >>> points, log_prob = generator.rsample(5, rng)
    >>> points.shape, log_prob.shape
    (torch.Size([3, 5, 2]), torch.Size([3, 5]))
    """

    n_features: int
    n_members: int
    n_contrast: int
    weights: nn.ParameterList
    biases: nn.ParameterList
    log_scale: nn.Parameter

    def __init__(
        self,
        n_features: int,
        n_members: int = 1,
        *,
        hidden: Sequence[int] = (128, 128),
        n_contrast: int = 192,
        rng: torch.Generator,
    ):
        super().__init__()
        self.n_features, self.n_members, self.n_contrast = n_features, n_members, n_contrast
        widths = [n_features, *hidden, n_features]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        rngs = spawn(rng, n_members)
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            draws = [torch.randn(n_in, n_out, generator=own, dtype=torch.float32) for own in rngs]
            self.weights.append(n_in**-0.5 * torch.stack(draws))
            self.biases.append(torch.zeros(n_members, 1, n_out, dtype=torch.float32))
        nn.init.zeros_(self.weights[-1])
        start = torch.full((n_members,), math.log(_MAX_SCALE), dtype=torch.float32)
        self.log_scale = nn.Parameter(start)

    @property
    def scale(self) -> torch.Tensor:
        """Sigma, (K,)."""
        free = self.log_scale.exp()
        # the gradient passes the bounds, so that sigma can come back from them
        return free + (free.clamp(_MIN_SCALE, _MAX_SCALE) - free).detach()

    def mean(self, u: torch.Tensor) -> torch.Tensor:
        """g(u), (K, n, d) -> (K, n, d)."""
        h = u
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, functional.silu(h) if i else h, weight)
        return u + h

    def _normal(self, n, rng):
        shape = self.n_members, n, self.n_features
        draw = torch.randn(shape, generator=rng, device=rng.device, dtype=self.log_scale.dtype)
        return draw.to(self.log_scale.device)

    def rsample(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw from each generator, differentiable in the parameters.

        Returns
        -------
        z : Tensor of shape (K, n, d)
        log_prob : Tensor of shape (K, n)
            Estimate of log q(z), not below it on average; with the gradient through z.
        """
        noise = self._normal(n, rng)
        scale = self.scale[:, None, None]
        z = self.mean(self._normal(n, rng)) + scale * noise
        others = self.mean(self._normal(self.n_contrast, rng))
        distance = (
            z.square().sum(-1, keepdim=True)
            - 2.0 * z @ others.mT
            + others.square().sum(-1)[:, None]
        ).clamp_min(0.0)
        own = noise.square().sum(-1, keepdim=True)
        exponents = -0.5 * torch.cat([own, distance / scale.square()], dim=-1)
        constant = self.n_features * (self.scale.log() + 0.5 * math.log(2.0 * math.pi))
        log_prob = exponents.logsumexp(-1) - math.log(self.n_contrast + 1) - constant[:, None]
        return z, log_prob

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (K, n, d) points, n from each generator."""
        scale = self.scale[:, None, None]
        return self.mean(self._normal(n, rng)) + scale * self._normal(n, rng)
