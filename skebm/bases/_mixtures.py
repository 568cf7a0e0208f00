"""Gaussian mixtures and kernel densities as torch modules."""

import math
from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import nn

from ._chunks import in_chunks

_LOG_2PI = math.log(2.0 * math.pi)
_LOG2_E = 1.0 / math.log(2.0)
_FAR = 1e6  # squared distance from the origin, in bandwidths


def log_sum_exp(values: torch.Tensor, dim: int) -> torch.Tensor:
    """`torch.logsumexp`; in place of `values`, which are lost, where these need no gradient.

    The library behind `torch.exp` takes ten times as long for what underflows, as most components
    do far away from them; `torch.exp2` does not.
    """
    if values.requires_grad:
        return values.logsumexp(dim)
    most = 0.5 * torch.finfo(values.dtype).max
    largest = values.amax(dim, keepdim=True).clamp_(-most, most)  # -inf where all are
    # the difference first, which is exact where it matters, however large values are
    return values.sub_(largest).mul_(_LOG2_E).exp2_().sum(dim).log_().add_(largest.squeeze(dim))


def draw_components(weights: torch.Tensor, n: int, rng: torch.Generator) -> torch.Tensor:
    """Component of each of `n` rows; `torch.multinomial` itself refuses n = 0."""
    if n == 0:
        return torch.empty(0, dtype=torch.long, device=weights.device)
    return torch.multinomial(weights, n, replacement=True, generator=rng)


class GaussianMixtureBase(nn.Module):
    r"""Mixture of Gaussians, :math:`q(x) = \sum_j w_j N(x; \mu_j, \Sigma_j)`.

    One component makes it the plain Gaussian base.

    Parameters
    ----------
    weights : array-like of shape (n_components,)
        Positive, summing to one.
    means : array-like of shape (n_components, n_features)
    covariances : array-like of shape (n_components, n_features, n_features)

    See Also
    --------
    fit_gaussian_mixture : Fits one to rows.
    MixedMixtureBase : The same for rows with categories and missing cells.
    KernelDensityBase : A kernel around every row.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase
    >>> mixture = GaussianMixtureBase(
    ...     weights=[0.25, 0.75], means=[[-3.0], [3.0]], covariances=[[[1.0]], [[1.0]]]
    ... )
    >>> x = torch.tensor([[-3.0], [3.0]], dtype=torch.float64)
    >>> mixture.log_prob(x)
    tensor([-2.3052, -1.2066], dtype=torch.float64)
    >>> mixture.responsibilities(x).round()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
    >>> mixture.sample(2, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1])
    """

    weights: torch.Tensor
    means: torch.Tensor
    scale_tril: torch.Tensor
    whitening: torch.Tensor
    flat: torch.Tensor
    shift: torch.Tensor
    log_constant: torch.Tensor

    def __init__(self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike):
        super().__init__()
        weights, means, covariances = (
            torch.as_tensor(a, dtype=torch.float64) for a in (weights, means, covariances)
        )
        scale_tril = torch.linalg.cholesky(covariances)
        identity = torch.eye(means.shape[1], dtype=torch.float64)
        # rows of `whitening` stand for L^-T, so that (x - mu) @ whitening is standard normal
        whitening = torch.linalg.solve_triangular(scale_tril, identity, upper=False).mT
        log_det = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means)
        self.register_buffer("scale_tril", scale_tril.contiguous())
        self.register_buffer("whitening", whitening.contiguous())
        # all components in one product, (n, d) @ (d, n_components * d) - shift
        self.register_buffer("flat", whitening.permute(1, 0, 2).flatten(1).contiguous())
        self.register_buffer("shift", torch.einsum("kd,kde->ke", means, whitening).flatten())
        self.register_buffer(
            "log_constant",
            self.weights.log() - log_det - 0.5 * means.shape[1] * _LOG_2PI,
        )

    @property
    def n_features(self) -> int:
        return self.means.shape[1]

    @property
    def n_components(self) -> int:
        return self.means.shape[0]

    def _white(self, x):
        """x in the standard coordinates of every component, (n, d) -> (n, n_components, d)."""
        return torch.addmm(-self.shift, x, self.flat).unflatten(1, self.means.shape)

    def _joint(self, x):
        """log w_j + log N(x; mu_j, Sigma_j), shape (n, n_components)."""
        return self.log_constant - 0.5 * self._white(x).square().sum(-1)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density in nats, (n, d) -> (n,)."""
        return in_chunks(
            lambda r: log_sum_exp(self._joint(r), -1), x, self.whitening[..., 0].numel()
        )

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Posterior probability of each component, (n, d) -> (n, n_components)."""
        return in_chunks(lambda r: self._joint(r).softmax(-1), x, self.whitening[..., 0].numel())

    def value_and_gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density (n,) and its gradient (n, d), without autograd: what samplers ask for."""
        white = self._white(x)
        joint = self.log_constant - 0.5 * white.square().sum(-1)
        pull = (white * joint.softmax(-1)[..., None]).flatten(1)
        return joint.logsumexp(-1), (pull @ self.flat.mT).neg_()

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) rows."""
        which = draw_components(self.weights, n, rng)
        x = torch.randn(n, self.n_features, dtype=torch.float64, generator=rng,
                        device=self.means.device)  # fmt: skip
        for j in range(self.n_components):
            rows = which == j
            x[rows] = self.means[j] + x[rows] @ self.scale_tril[j].mT
        return x

    def marginal(self, kept: Sequence[int]) -> "GaussianMixtureBase":
        """Distribution of some columns, the others integrated out."""
        kept = list(kept)
        covariances = self.scale_tril @ self.scale_tril.mT
        return GaussianMixtureBase(
            self.weights, self.means[:, kept], covariances[:, kept][:, :, kept]
        )


class ConfiningGaussian(GaussianMixtureBase):
    """What keeps an energy-based model without a base normalisable: one wide Gaussian.

    Parameters
    ----------
    mean : Tensor of shape (n_features,)
    variance : Tensor of shape (n_features,)
    """

    def __init__(self, mean: torch.Tensor, variance: torch.Tensor):
        super().__init__(torch.ones(1), mean[None], torch.diag(variance)[None])


class KernelDensityBase(nn.Module):
    r"""Gaussian kernel density, :math:`q(x) = \sum_i w_i N(x; c_i, h_i^2 \Sigma)`.

    Parameters
    ----------
    centers : array-like of shape (n_centers, n_features)
    bandwidth : float or array-like of shape (n_centers,)
        h; the same at every centre, or one for each (Breiman, Meisel & Purcell 1977).
    weights : array-like of shape (n_centers,), default=None
        Uniform by default.
    covariance : array-like of shape (n_features, n_features), default=None
        :math:`\Sigma`, the shape of the kernel; the identity by default.

    See Also
    --------
    GaussianMixtureBase : A few Gaussians in place of a kernel around every row.
    MixedKernelBase : The same for rows with categories and missing cells.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import KernelDensityBase
    >>> kernels = KernelDensityBase(centers=[[0.0], [4.0]], bandwidth=0.5)
    >>> kernels.log_prob(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    tensor([-0.9189, -8.2258], dtype=torch.float64)
    >>> kernels.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 1])
    """

    centers: torch.Tensor
    weights: torch.Tensor
    widths: torch.Tensor
    scale_tril: torch.Tensor
    whitening: torch.Tensor
    white_centers: torch.Tensor
    log_heights: torch.Tensor

    def __init__(
        self,
        centers: ArrayLike,
        bandwidth: float | ArrayLike,
        weights: ArrayLike | None = None,
        covariance: ArrayLike | None = None,
    ):
        super().__init__()
        centers = torch.as_tensor(centers, dtype=torch.float64)
        n, d = centers.shape
        weights = torch.ones(n) if weights is None else torch.as_tensor(weights)
        weights = weights.to(torch.float64)
        covariance = torch.eye(d) if covariance is None else torch.as_tensor(covariance)
        scale_tril = torch.linalg.cholesky(covariance.to(torch.float64))
        widths = torch.as_tensor(bandwidth, dtype=torch.float64)
        if not widths.ndim:
            scale_tril, widths = widths * scale_tril, torch.ones(1, dtype=torch.float64)
        whitening = torch.linalg.solve_triangular(
            scale_tril, torch.eye(d, dtype=torch.float64), upper=False
        ).mT
        self.register_buffer("centers", centers)
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("widths", widths)  # in the units of scale_tril
        self.register_buffer("scale_tril", scale_tril.contiguous())
        self.register_buffer("whitening", whitening.contiguous())
        self.register_buffer("white_centers", centers @ whitening)
        log_det = scale_tril.diagonal().log().sum() + d * widths.log()
        self.register_buffer("log_heights", self.weights.log() - log_det - 0.5 * d * _LOG_2PI)

    @property
    def n_features(self) -> int:
        return self.centers.shape[1]

    def _joint(self, x):
        """Log-kernel around every centre with its weight, (n, n_centers)."""
        distance = torch.cdist(
            x @ self.whitening, self.white_centers, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return self.log_heights - 0.5 * (distance / self.widths).square()

    def _rows(self, x):
        y = x @ self.whitening
        square = y.square().sum(-1)
        precision = self.widths.square().reciprocal()
        constant = self.log_heights - 0.5 * precision * self.white_centers.square().sum(-1)
        if len(precision) == 1:
            logs = torch.addmm(constant, y, self.white_centers.mT)
            logs = log_sum_exp(logs, -1) - 0.5 * square
        else:
            linear = torch.cat([(precision[:, None] * self.white_centers).mT, precision[None]])
            functions = torch.cat([y, -0.5 * square[:, None]], dim=1)
            logs = log_sum_exp(torch.addmm(constant, functions, linear), -1)
        far = square.detach() * precision.max() > _FAR
        if far.any():  # |y|^2 - 2 y.c + |c|^2 has lost its digits there
            logs = logs.index_put((far,), log_sum_exp(self._joint(x[far]), -1))
        return logs

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density in nats, (n, d) -> (n,)."""
        return in_chunks(self._rows, x, len(self.centers))

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) rows."""
        which = draw_components(self.weights, n, rng)
        noise = torch.randn(n, self.n_features, dtype=torch.float64, generator=rng,
                            device=self.centers.device)  # fmt: skip
        noise = self.widths.expand(len(self.centers))[which, None] * noise
        return self.centers[which] + noise @ self.scale_tril.mT

    def marginal(self, kept: Sequence[int]) -> "KernelDensityBase":
        """Distribution of some columns, the others integrated out."""
        kept = list(kept)
        covariance = (self.scale_tril @ self.scale_tril.mT)[kept][:, kept]
        widths = self.widths.expand(len(self.centers))
        return KernelDensityBase(self.centers[:, kept], widths, self.weights, covariance)
