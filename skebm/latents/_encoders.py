"""Encoders: distributions of latent variables given rows that can be sampled."""

import torch
from torch import Tensor, nn

from skebm._layout import Layout

__all__ = ["GaussianEncoder", "ImplicitEncoder"]

MIN_LOG_SCALE, MAX_LOG_SCALE = -10.0, 3.0
SIGN = 2.0  # size of the random signs; with signs of one, modes stayed together


class GaussianEncoder(nn.Module):
    r"""Independent normal latent variables, :math:`z = m(x) + s(x) \epsilon`.

    Parameters
    ----------
    network : nn.Module
        (..., d) -> (..., 2 k): m and log s.
    n_components : int
        k.
    layout : Layout or None, default=None
        What the columns of a row are: networks see ``layout.as_numbers(x)``, of d columns. None is
        for rows of numbers that are all known.

    See Also
    --------
    ImplicitEncoder : Of any distribution, and without a density.
    skebm.objectives.gaussian_divergences : Its divergence from the prior.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import GaussianEncoder, perceptron
    >>> encoder = GaussianEncoder(perceptron(3, 2 * 2, (16,), seed=0), n_components=2)
    >>> noise = encoder.noise(10, rng=torch.Generator().manual_seed(0))
    >>> encoder.draw(torch.ones(5, 3), noise).shape  # ten draws for each of five rows
    torch.Size([5, 10, 2])
    """

    network: nn.Module
    n_components: int
    layout: Layout | None

    def __init__(self, network: nn.Module, n_components: int, layout: Layout | None = None):
        super().__init__()
        self.network, self.n_components, self.layout = network, n_components, layout

    @property
    def n_noise(self) -> int:
        """Random numbers behind one draw."""
        return self.n_components

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location m and log s, (..., d) -> (..., k), (..., k)."""
        location, log_scale = self.network(self._numbers(x)).chunk(2, dim=-1)
        return location, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)

    def _numbers(self, x):
        """Rows as the networks see them."""
        return x if self.layout is None else self.layout.as_numbers(x)

    def noise(
        self, *shape: int, rng: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """What draws are made of, ``(*shape, n_noise)``."""
        like = {"dtype": dtype, "device": rng.device}
        return torch.randn(*shape, self.n_noise, generator=rng, **like)

    def draw(self, x: Tensor, noise: Tensor) -> Tensor:
        """Latent variables of rows (n, d) from noise (M, n_noise) that all share, (n, M, k)."""
        location, log_scale = self(x)
        return location[:, None] + log_scale.exp()[:, None] * self.standardized(x, noise)

    def standardized(self, x: Tensor, noise: Tensor) -> Tensor:
        """u = (z - m) / s for rows (n, d) and noise (M, n_noise) or (n, M, n_noise)."""
        return noise.expand(len(x), *noise.shape[-2:])

    def moments(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n, k) and covariance (n, k, k) of the latent variables of rows (n, d).

        By formula here; where there is none, from what `noise`, (M, n_noise), makes.
        """
        location, log_scale = self(x)
        return location, (2 * log_scale).exp().diag_embed()


class ImplicitEncoder(GaussianEncoder):
    r"""Latent variables of any distribution, :math:`z = m(x) + s(x)\, u`, with no density.

    .. math:: u = \epsilon + g(x, \epsilon', b)

    where epsilon and epsilon' are normal, b are random signs (which let the distribution fall into
    pieces), and g is a network that starts at zero: at the start this is the
    :class:`GaussianEncoder`. The epsilon that g does not see keeps the distribution of u smooth, so
    that its score can be learned (an encoder that could shape all of its noise ran ahead of its
    score, into distributions of no width). The entropy is sum(log s) + H(u | x), so that only u
    needs a score,

    .. math:: \nabla_u \log q(u \mid x) \approx h(x, u) - u .

    Parameters
    ----------
    network, n_components, layout : as of :class:`GaussianEncoder`
    residual : nn.Module
        g, (..., d + 2 k) -> (..., k), of rows, normal noise and signs.
    score_network : nn.Module or None
        h, (..., d + k) -> (..., k); None where the score is estimated otherwise.

    See Also
    --------
    GaussianEncoder : What it is at the start.
    skebm.objectives.stein_scores : Scores of its draws, without a network.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import ImplicitEncoder, perceptron
    >>> d, k = 3, 2
    >>> encoder = ImplicitEncoder(
    ...     perceptron(d, 2 * k, (16,), seed=0), k,
    ...     residual=perceptron(d + 2 * k, k, (16,), seed=1),
    ...     score_network=perceptron(d + k, k, (16,), seed=2),
    ... )
    >>> noise = encoder.noise(10, rng=torch.Generator().manual_seed(0))
    >>> encoder.draw(torch.ones(5, d), noise).shape
    torch.Size([5, 10, 2])
    """

    residual: nn.Module
    score_network: nn.Module | None

    def __init__(
        self,
        network: nn.Module,
        n_components: int,
        residual: nn.Module,
        score_network: nn.Module | None,
        layout: Layout | None = None,
    ):
        super().__init__(network, n_components, layout)
        self.residual, self.score_network = residual, score_network

    @property
    def n_noise(self) -> int:
        return 3 * self.n_components

    def noise(
        self, *shape: int, rng: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        noise = super().noise(*shape, rng=rng, dtype=dtype)
        normal, signs = noise.split([2 * self.n_components, self.n_components], dim=-1)
        return torch.cat([normal, SIGN * signs.sign()], dim=-1)

    def standardized(self, x: Tensor, noise: Tensor) -> Tensor:
        noise = noise.expand(len(x), *noise.shape[-2:])
        own, rest = noise.split([self.n_components, 2 * self.n_components], dim=-1)
        return own + self._shape(x, rest)

    def _shape(self, x, rest):
        """The part g of u, (n, M, k)."""
        return self.residual(self._beside(x, rest))

    def moments(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        location, log_scale = self(x)
        scale = log_scale.exp()
        # epsilon does not depend on g, and its moments are known: only those of g are drawn
        g = self._shape(x, noise[:, self.n_components :].expand(len(x), -1, -1))
        mean = g.mean(1)
        centered = g - mean[:, None]
        covariance = torch.eye(self.n_components).to(g) + centered.mT @ centered / len(noise)
        return location + scale * mean, scale[..., None] * covariance * scale[:, None]

    def score(self, x: Tensor, u: Tensor) -> Tensor:
        """Learned score of u given rows, (n, d) and (n, M, k) -> (n, M, k)."""
        return self.score_network(self._beside(x, u)) - u

    def _beside(self, x, values):
        x = self._numbers(x)[:, None]
        return torch.cat([x.expand(-1, values.shape[1], -1), values], dim=-1)
