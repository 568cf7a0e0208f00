"""The geometric path between two distributions, for tempering and for annealing."""

import torch


def geometric_path(b: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """log pi_b = b log p + (1 - b) log q, up to a constant; or the gradient of that.

    Where a distribution has no share in pi_b it is left out. (0 times -inf would be nan, but
    outside of the support of p the distribution pi_0 may be positive.)

    Parameters
    ----------
    b : Tensor that broadcasts to the shape of `p`
        In [0, 1].
    p, q : Tensor
        Log-densities, or their gradients.

    Returns
    -------
    Tensor

    See Also
    --------
    ParallelTempering : Runs chains along this path.
    skebm.partition.annealed_importance_sampling : Measures log Z along it.

    Examples
    --------
    >>> import torch
    >>> from skebm.samplers import geometric_path
    >>> p, q = torch.tensor([-torch.inf, 2.0, 3.0]), torch.tensor([1.0, 4.0, -torch.inf])
    >>> geometric_path(torch.tensor([0.0, 0.5, 1.0]), p, q)
    tensor([1., 3., 3.])
    """
    return torch.where(b > 0, b * p, 0.0) + torch.where(b < 1, (1 - b) * q, 0.0)
