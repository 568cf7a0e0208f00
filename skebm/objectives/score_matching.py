r"""Score matching: fitting the gradient of the log-density, with no log Z and no samples.

The letters of all functions. A model :math:`\tilde p = q e^f`, its *score*
:math:`s = \nabla \log q + \nabla f`, all in the coordinates z that f sees. Score matching minimises
the Fisher divergence :math:`\tfrac12 E\|s(z) - \nabla \log p(z)\|^2` to the distribution p of the
data, which integration by parts rids of the unknown :math:`\nabla \log p`.

``base_score`` is :math:`\nabla \log q` at the points of evaluation; None is a pure energy. Terms
that do not depend on f are left out, so that f = 0 has the loss 0 (the denoising form apart). The
losses have one value per row and are to be minimised; leading axes (one per member of an ensemble)
are free.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from skebm.derivatives import derivatives

__all__ = [
    "denoising_score_matching_losses",
    "draw_directions",
    "score_matching_losses",
    "sliced_score_matching_losses",
]


def score_matching_losses(
    energy: Callable[[Tensor], Tensor], z: Tensor, base_score: Tensor | None = None
) -> Tensor:
    r"""Exact score matching (Hyvärinen 2005).

    .. math:: \tfrac12 \|\nabla f\|^2 + \nabla f \cdot \nabla \log q + \operatorname{tr} \nabla^2 f

    which is :math:`\tfrac12 \|s\|^2 + \operatorname{tr} \nabla s` without the terms of q alone.

    Parameters
    ----------
    energy : nn.Module or callable
        f, (..., n, d) -> (..., n).
    z : Tensor of shape (..., n, d)
        Rows.
    base_score : Tensor of shape (..., n, d), optional
        Gradient of log q at `z`.

    Returns
    -------
    Tensor of shape (..., n)

    See Also
    --------
    sliced_score_matching_losses : Cheaper in many columns.
    denoising_score_matching_losses : The score of the smoothed distribution.
    skebm.ScoreMatchingEBM : Trains with it.

    References
    ----------
    Hyvärinen, A. (2005). Estimation of non-normalized statistical models by score matching. JMLR 6.
    https://jmlr.org/papers/v6/hyvarinen05a.html

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import score_matching_losses
    >>> z = torch.tensor([[0.0], [2.0]])
    >>> score_matching_losses(lambda z: -0.5 * z.square().sum(-1), z).detach()
    tensor([-1.,  1.])
    """
    _, gradient, laplacian = derivatives(energy, z)
    return _half_square(gradient, base_score) + laplacian


def sliced_score_matching_losses(
    energy: Callable[[Tensor], Tensor],
    z: Tensor,
    directions: Tensor,
    base_score: Tensor | None = None,
    *,
    variance_reduced: bool = True,
) -> Tensor:
    r"""Sliced score matching (Song et al. 2019): curvature along random directions only.

    With P directions v per row, :math:`E[v v^\top] = I`,

    .. math:: \tfrac12 \|\nabla f\|^2 + \nabla f \cdot \nabla \log q
              + \frac1P \sum_v v^\top \nabla^2 f\, v

    in the variance-reduced form. Its last term is Hutchinson's estimate of the trace; the rest is
    exact, so the loss is that of :func:`score_matching_losses` in expectation. The general form
    slices the gradients as well: they enter as :math:`v \cdot \nabla f` and
    :math:`v \cdot \nabla \log q`.

    Parameters
    ----------
    energy : nn.Module or callable
        f, (..., n, d) -> (..., n).
    z : Tensor of shape (..., n, d)
        Rows.
    directions : Tensor of shape (..., P, n, d)
        From :func:`draw_directions`.
    base_score : Tensor of shape (..., n, d), optional
        Gradient of log q at `z`.
    variance_reduced : bool, default=True
        False gives the general form.

    Returns
    -------
    Tensor of shape (..., n)

    See Also
    --------
    draw_directions : Makes the directions.
    score_matching_losses : The same with all directions.
    sliced_score_network_losses : For a network that is the score.

    References
    ----------
    Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching: a scalable approach to
    density and score estimation. UAI. https://arxiv.org/abs/1905.07088

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import draw_directions, sliced_score_matching_losses
    >>> z = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> v = draw_directions(z, torch.Generator().manual_seed(0), n_projections=3)
    >>> sliced_score_matching_losses(lambda z: -0.5 * z.square().sum(-1), z, v).detach()
    tensor([-2.,  0.])
    """
    _, gradient, curvature = derivatives(energy, z, directions)
    curvature = curvature / directions.shape[-3]
    if variance_reduced:
        return _half_square(gradient, base_score) + curvature
    along = (directions * gradient.unsqueeze(-3)).sum(-1)
    value = 0.5 * along.square()
    if base_score is not None:
        value = value + along * (directions * base_score.unsqueeze(-3)).sum(-1)
    return value.mean(-2) + curvature


def draw_directions(
    z: Tensor, rng: torch.Generator, n_projections: int = 1, projection: str = "rademacher"
) -> Tensor:
    """Random directions for the sliced form, with mean 0 and covariance I.

    Parameters
    ----------
    z : Tensor of shape (..., n, d)
        Rows; gives shape, dtype and device.
    rng : torch.Generator
        On the device of `z`.
    n_projections : int, default=1
        Directions per row, P.
    projection : {"rademacher", "gaussian"}, default="rademacher"
        Entries of +-1, which give the trace its smallest variance, or standard normal ones.

    Returns
    -------
    Tensor of shape (..., P, n, d)

    See Also
    --------
    sliced_score_matching_losses : Takes them, for energies.
    sliced_score_network_losses : Takes them, for networks that are scores.

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import draw_directions
    >>> z = torch.zeros(4, 2)
    >>> directions = draw_directions(z, torch.Generator().manual_seed(0), n_projections=3)
    >>> directions.shape
    torch.Size([3, 4, 2])
    >>> directions.abs().unique()
    tensor([1.])
    """
    shape = (*z.shape[:-2], n_projections, *z.shape[-2:])
    like = {"generator": rng, "dtype": z.dtype, "device": z.device}
    if projection == "gaussian":
        return torch.randn(shape, **like)
    return torch.rand(shape, **like).sub_(0.5).sign_()


def denoising_score_matching_losses(
    energy: Callable[[Tensor], Tensor],
    z_noisy: Tensor,
    noise: Tensor,
    sigma: Tensor,
    base_score: Tensor | None = None,
) -> Tensor:
    r"""Denoising score matching (Vincent 2011).

    At the noisy points :math:`\tilde z = z + \sigma \epsilon`, weighted by :math:`\sigma^2` so that
    all noise levels weigh about the same (Song & Ermon 2019),

    .. math:: \tfrac12 \|\sigma\, s(\tilde z) + \epsilon\|^2 .

    The minimiser is the score of the *smoothed* distribution, p convolved with the noise. Given the
    score of the equally smoothed base as `base_score`, f is the log-ratio of the two smoothed
    distributions, and most of the smoothing cancels from :math:`q e^f`.

    Parameters
    ----------
    energy : nn.Module or callable
        f, (..., n, d) -> (..., n).
    z_noisy : Tensor of shape (..., n, d)
        z + sigma * noise.
    noise : Tensor of shape (..., n, d)
        Standard normal.
    sigma : Tensor, broadcast against (..., n, 1)
        Noise levels.
    base_score : Tensor of shape (..., n, d), optional
        Gradient of log q at `z_noisy`.

    Returns
    -------
    Tensor of shape (..., n)

    See Also
    --------
    score_matching_losses : Without noise, by the Laplacian.
    sliced_score_matching_losses : Without noise, along random directions.

    References
    ----------
    Vincent, P. (2011). A connection between score matching and denoising autoencoders. Neural
    Computation 23(7). Song, Y. and Ermon, S. (2019). Generative modeling by estimating gradients of
    the data distribution. NeurIPS. https://arxiv.org/abs/1907.05600

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import denoising_score_matching_losses
    >>> z, noise = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    >>> denoising_score_matching_losses(
    ...     lambda z: -0.5 * z.square().sum(-1), z + 0.2 * noise, noise, torch.tensor(0.2)
    ... ).detach()
    tensor([0.0392])
    """
    with torch.enable_grad():
        leaf = z_noisy.detach().requires_grad_(True)
        value = energy(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    score = gradient if base_score is None else gradient + base_score
    return 0.5 * (sigma * score + noise).square().sum(-1)


def _half_square(gradient, base_score):
    """Half the squared norm of the total score, without the term of the base alone."""
    if base_score is None:
        return 0.5 * gradient.square().sum(-1)
    return (gradient * (0.5 * gradient + base_score)).sum(-1)
