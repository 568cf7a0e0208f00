"""Value and gradient in z of an energy, as Markov chains ask for them: without a graph.

One forward and one backward pass of autograd, which stops at z: gradients in the weights are not
computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["value_and_gradient"]


def value_and_gradient(energy: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate an energy and its gradient in z, by autograd.

    Also under ``torch.no_grad``. Gradients that parameters hold are left alone.

    Parameters
    ----------
    energy : callable
        (n, d) -> (n,) or (n, 1); a stack of energies (K, n, d) -> (K, n). Rows must not interact.
    z : Tensor of shape (n, d) or (K, n, d)
        Where to evaluate; not changed.

    Returns
    -------
    value : Tensor of shape (n,) or (K, n)
        Values f.
    gradient : Tensor of the shape of z
        Gradient of f in z. Both are without a graph.

    See Also
    --------
    derivatives : With the Laplacian, and differentiable in the parameters.
    skebm.samplers.State : Holds both for chains.

    Examples
    --------
    >>> import torch
    >>> from skebm.derivatives import value_and_gradient
    >>> value_and_gradient(lambda z: -0.5 * z.square().sum(-1), torch.tensor([[1.0, 2.0]]))
    (tensor([-2.5000]), tensor([[-1., -2.]]))
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = energy(z).reshape(z.shape[:-1])
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient
