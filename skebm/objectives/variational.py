r"""Variational inference with an encoder whose density need not be known.

The evidence lower bound of a latent-variable model p(x, z) and an encoder q(z | x),

.. math:: \mathrm{ELBO}(x) = E_q \log p(x, z) + H(q(\cdot \mid x)) \le \log p(x) ,

needs of an encoder z = g(x, eps) only samples and the gradient of its entropy H, which is an
expectation of its score (:func:`entropy_surrogates`). The score is estimated from samples, by
:func:`stein_scores` or by a network trained with :func:`sliced_score_network_losses`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "calibrated_scores",
    "entropy_surrogates",
    "gaussian_divergences",
    "sliced_score_network_losses",
    "stein_scores",
]


def gaussian_divergences(location: Tensor, log_scale: Tensor) -> Tensor:
    r"""Kullback-Leibler divergences of diagonal Gaussians from the standard normal distribution.

    .. math:: \tfrac12 \sum_j (m_j^2 + s_j^2 - 1) - \sum_j \log s_j

    Parameters
    ----------
    location, log_scale : Tensor of shape (..., k)
        Means m and logs of the standard deviations s.

    Returns
    -------
    Tensor of shape (...)
        In nats.

    See Also
    --------
    skebm.latents.GaussianEncoder : Has these means and deviations.

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import gaussian_divergences
    >>> gaussian_divergences(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2))
    tensor([0., 2.])
    """
    squares = location.square() + (2 * log_scale).exp()
    return (0.5 * (squares - 1.0) - log_scale).sum(-1)


def entropy_surrogates(u: Tensor, score: Tensor) -> Tensor:
    r"""Values with the gradient of the entropy of u, whatever their own size.

    For :math:`u = g_\phi(\epsilon)` with density q,

    .. math:: \nabla_\phi H(q) = -E \left[ \nabla_u \log q(u)^\top
              \frac{\partial g_\phi(\epsilon)}{\partial \phi} \right] ,

    because the score itself has mean zero (Roeder et al. 2017; Song et al. 2019, section 5.2).

    Parameters
    ----------
    u : Tensor of shape (..., k)
        Samples, differentiable in the parameters.
    score : Tensor of shape (..., k)
        Score of their distribution at the samples; no gradient goes through it.

    Returns
    -------
    Tensor of shape (...)
        To be raised.

    See Also
    --------
    stein_scores : The score, from samples alone.
    sliced_score_network_losses : Trains a network to be the score.

    References
    ----------
    Roeder, G., Wu, Y. and Duvenaud, D. (2017). Sticking the landing: simple, lower-variance
    gradient estimators for variational inference. NeurIPS. https://arxiv.org/abs/1703.09194
    Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching: a scalable approach to
    density and score estimation. UAI. https://arxiv.org/abs/1905.07088

    Examples
    --------
    The entropy of N(0, s^2) is log s and a constant: its gradient at s = 2 is 1/2.

    >>> import torch
    >>> from skebm.objectives import entropy_surrogates
    >>> s = torch.tensor(2.0, requires_grad=True)
    >>> noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    >>> entropy_surrogates(s * noise, -s * noise / s**2).mean().backward()
    >>> round(s.grad.item(), 2)
    0.5
    """
    return -(score.detach() * u).sum(-1)


def calibrated_scores(score: Tensor, u: Tensor) -> Tensor:
    r"""Estimated scores with the multiple of u added that Stein's identity asks for.

    For any distribution, :math:`E\, s_j(u)\, (u_j - E u_j) = -1`. An estimate that is too small on
    this scale lets an encoder shrink, and one that lags behind its samples lets it spread without
    end: the scale of what follows it is right only if this holds.

    Parameters
    ----------
    score, u : Tensor of shape (..., M, k)
        Estimates at M samples of each distribution. The identity is made to hold on average over
        all distributions, each around the mean of its own samples (around 0 if M is 1: E s = 0).

    Returns
    -------
    Tensor of shape (..., M, k)
        Without gradient.

    See Also
    --------
    stein_scores : Estimates that this puts right.
    entropy_surrogates : What takes the scores.

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import calibrated_scores
    >>> u = torch.tensor([[-1.0], [1.0]])
    >>> calibrated_scores(-0.3 * u, u)  # the mean of u^2 around the mean of two has lost a half
    tensor([[ 0.5000],
            [-0.5000]])
    """
    score, u = score.detach(), u.detach()
    n = u.shape[-2]
    target = -1.0
    if n > 1:
        u, target = u - u.mean(-2, keepdim=True), -(1.0 - 1.0 / n)
    distributions = tuple(range(u.ndim - 1))
    missing = target - (score * u).mean(distributions)
    return score + missing / u.square().mean(distributions).clamp_min(1e-12) * u


def sliced_score_network_losses(
    score: Callable[[Tensor], Tensor], u: Tensor, directions: Tensor
) -> Tensor:
    r"""Sliced score matching of a network that is the score itself, not an energy.

    .. math:: \tfrac12 \|s(u)\|^2 + \frac1P \sum_v v^\top \nabla s(u)\, v ,

    the variance-reduced form; :func:`sliced_score_matching_losses` is the one for energies. No
    second derivative of a network is needed here, but s need not be a gradient.

    Parameters
    ----------
    score : callable
        s, (..., n, k) -> (..., n, k).
    u : Tensor of shape (..., n, k)
        Samples; no gradient goes through them.
    directions : Tensor of shape (..., P, n, k)
        From :func:`draw_directions`.

    Returns
    -------
    Tensor of shape (..., n)
        To be lowered. At the true score its mean is minus half the mean of the score's square.

    See Also
    --------
    draw_directions : Makes the directions.
    sliced_score_matching_losses : For an energy.
    stein_scores : Scores of samples without training.

    References
    ----------
    Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching: a scalable approach to
    density and score estimation. UAI. https://arxiv.org/abs/1905.07088

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import draw_directions, sliced_score_network_losses
    >>> u = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> v = draw_directions(u, torch.Generator().manual_seed(0))
    >>> sliced_score_network_losses(lambda u: -u, u, v).detach()
    tensor([-2.,  0.])
    """
    with torch.enable_grad():
        leaf = u.detach().requires_grad_(True)
        value = score(leaf)
        curvature = torch.zeros(())
        for v in directions.unbind(-3):
            along = (value * v).sum()
            (gradient,) = torch.autograd.grad(along, leaf, create_graph=True)
            curvature = curvature + (gradient * v).sum(-1)
    return 0.5 * value.square().sum(-1) + curvature / directions.shape[-3]


def stein_scores(u: Tensor, *, mass: float = 0.99) -> Tensor:
    r"""Spectral Stein estimate of the score of a distribution at samples of it (Shi et al. 2018).

    The score is expanded in the eigenfunctions of a Gaussian kernel (width: the median distance)
    under the distribution, estimated from the samples themselves by Nyström's method; by Stein's
    identity its coefficients are :math:`-E\,\nabla \psi_j`. With eigenvectors :math:`w_j` of the
    kernel matrix K and eigenvalues :math:`\lambda_j`,

    .. math:: s(u_m) = -\sum_j \frac{w_{jm}}{\lambda_j} \sum_{i, n} w_{jn}\, \nabla_{u_i} K_{in} .

    No training, but a bias: what the leading eigenfunctions cannot express is left out, and the
    estimate is too small. The part of it that is linear is put right by :func:`calibrated_scores`.

    Parameters
    ----------
    u : Tensor of shape (..., M, k)
        M samples of each distribution.
    mass : float, default=0.99
        Share of the sum of the eigenvalues that the eigenfunctions used have, in (0, 1].

    Returns
    -------
    Tensor of shape (..., M, k)
        Without gradient.

    See Also
    --------
    calibrated_scores : Puts the linear part of them right.
    sliced_score_network_losses : Trains a network to be the score.

    References
    ----------
    Shi, J., Sun, S. and Zhu, J. (2018). A spectral approach to gradient estimation for implicit
    distributions. ICML. https://arxiv.org/abs/1806.02925

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import stein_scores
    >>> u = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    >>> error = stein_scores(u) - (-u)
    >>> bool(error.square().mean() < 0.1)
    True
    """
    u = u.detach()
    n = u.shape[-2]
    square = torch.cdist(u, u).square()
    # the median over pairs: the zeros of the diagonal would pull it down for few samples
    off = ~torch.eye(n, dtype=torch.bool, device=u.device)
    width = square[..., off].median(-1).values.clamp_min(1e-12)[..., None, None]
    kernel = (-0.5 * square / width).exp()
    values, vectors = torch.linalg.eigh(kernel)
    share = values.flip(-1).cumsum(-1) / values.sum(-1, keepdim=True)
    # those before the mass is reached, and the one that reaches it
    used = torch.cat([torch.ones_like(share[..., :1]), (share < mass)[..., :-1].to(share)], -1)
    inverse = used.flip(-1) / values.clamp_min(1e-6 * math.sqrt(n))
    # sum over i of the gradients of K_in in u_i: (..., n, k)
    gradients = (u * kernel.sum(-1, keepdim=True) - kernel @ u) / width
    score = -(vectors * inverse.unsqueeze(-2)) @ (vectors.mT @ gradients)
    return calibrated_scores(score, u)
