"""Scores of smoothed densities, from values alone."""

import torch

from skebm._random import sobol_points
from skebm._typing import LogDensity


def smoothed_score(
    log_density: LogDensity,
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    n_points: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    r"""Gradient of the log of a density that is convolved with normal noise.

    By parts, with :math:`z` standard normal,

    .. math:: \nabla \log E\, p(x + s z) = \frac{E\, z\, p(x + s z)}{s\, E\, p(x + s z)},

    so that p needs no derivative: it may have kinks or steps. The expectations are over
    quasi-random points and their mirror images, the same ones at every x, with the covariance of a
    normal distribution.

    Parameters
    ----------
    log_density : callable
        (n, d) -> (n,), in nats, up to a constant.
    x : Tensor of shape (n, d)
        In few columns: the number of points that are needed grows fast with d.
    scale : Tensor of shape (d,)
        s, standard deviations of the noise.
    n_points : int, default=64
        Half of them are the mirror images of the other half. For the score of a normal distribution
        and s = 0.28 the error is 1, 2 and 3 % in one, two and three columns, with 256 points half
        of that.
    seed : int, default=0
        Of the scrambling of the points.

    Returns
    -------
    Tensor of shape (n, d)
        In nats per unit of x.

    See Also
    --------
    derivatives : The gradient itself, where there is one.

    Examples
    --------
    >>> import torch
    >>> from skebm.derivatives import smoothed_score
    >>> x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    >>> scale = torch.tensor([0.5], dtype=torch.float64)
    >>> smoothed_score(lambda x: -0.5 * x.square().sum(1), x, scale).round(decimals=1)
    tensor([[ 0.8000],
            [-1.6000]], dtype=torch.float64)
    """
    d = x.shape[1]
    uniform = sobol_points(n_points // 2, d, seed).clamp(1e-6, 1 - 1e-6)
    half = torch.special.ndtri(uniform).to(x)
    z = torch.cat([half, -half])
    # of covariance one exactly, as a log-density that is nearly linear along them asks for
    tril = torch.linalg.cholesky(z.mT @ z / len(z))
    z = torch.linalg.solve_triangular(tril, z.mT, upper=False).mT
    logs = torch.stack([log_density(x + scale * point) for point in z])
    return logs.softmax(0).mT @ z / scale
