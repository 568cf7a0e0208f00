"""Adversarial training of energies: a variational bound on log Z in place of samples."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradient_penalties", "variational_bound_terms"]


def variational_bound_terms(f: Tensor | float, log_base: Tensor, log_generator: Tensor) -> Tensor:
    r"""Terms whose mean over samples of a generator is a lower bound on log Z.

    For any density g, with equality where g is the model :math:`q e^f / Z`,

    .. math:: \log Z \ge E_g \left[ f + \log q - \log g \right]
              = E_g \left[ f + \log q \right] + H(g) .

    An energy that raises ``f(data).mean() - bound`` and a generator that raises the bound play a
    game whose solution is maximum likelihood (Grathwohl et al. 2021, equations 3 and 4). A
    ``log_generator`` that is too large on average, such as that of
    :class:`skebm.bases.ImplicitGenerator`, leaves it a lower bound.

    Parameters
    ----------
    f : Tensor of shape (..., n), or 0.0
        Minus the residual energy at samples of the generator.
    log_base, log_generator : Tensor of shape (..., n)
        Log-densities of base and generator at the samples.

    Returns
    -------
    Tensor of shape (..., n)

    References
    ----------
    Grathwohl, W., Kelly, J., Hashemi, M., Norouzi, M., Swersky, K. and Duvenaud, D. (2021). No MCMC
    for me: amortized sampling for fast and stable training of energy-based models. ICLR.
    https://arxiv.org/abs/2010.04230

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import variational_bound_terms
    >>> x = torch.linspace(-1.0, 1.0, 5)
    >>> log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(x)
    >>> variational_bound_terms(torch.full((5,), 2.0), log_normal, log_normal)  # Z = e^2
    tensor([2., 2., 2., 2., 2.])
    """
    return f + log_base - log_generator


def gradient_penalties(energy: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    r"""Values of f and its squared gradients, :math:`\|\nabla_z f\|^2`, from one evaluation.

    Parameters
    ----------
    energy : callable
        f, (..., n, d) -> (..., n). Rows must not interact.
    z : Tensor of shape (..., n, d)

    Returns
    -------
    f : Tensor of shape (..., n)
        Differentiable in the parameters and, once, in z.
    penalties : Tensor of shape (..., n)
        Differentiable in the parameters alone.
    """
    leaf = z.detach().requires_grad_(True)
    f = energy(leaf)
    (gradient,) = torch.autograd.grad(f.sum(), leaf, create_graph=True)
    # zero, with the gradient of f in z: on the way back to z there is no need for the energy
    through_z = ((z - z.detach()) * gradient.detach()).sum(-1)
    return f + through_z, gradient.square().sum(-1)
