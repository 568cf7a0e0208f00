"""Linear latent-variable models: where the networks start."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["AffinePlus", "FactorModel", "factor_analysis"]

MIN_NOISE_SHARE = 1e-4
"""Least share of a column's variance that is noise at the start."""


class FactorModel(NamedTuple):
    """Factor analysis: x = center + loadings z + noise, with uncorrelated posteriors.

    Attributes
    ----------
    center : Tensor of shape (d,)
    loadings : Tensor of shape (d, k)
        Such that ``loadings.T / variance @ loadings`` is diagonal, decreasing.
    variance : Tensor of shape (d,)
        Of the noise.
    """

    center: Tensor
    loadings: Tensor
    variance: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (n, d) -> (n,)."""
        law = torch.distributions.LowRankMultivariateNormal(
            self.center, self.loadings, self.variance, validate_args=False
        )
        return law.log_prob(x)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (k, d), bias (k,) and standard deviation (k,) of z given x: N(W x + b, s^2)."""
        scaled = self.loadings / self.variance[:, None]
        precision = 1.0 + (scaled * self.loadings).sum(0)
        weight = scaled.T / precision[:, None]
        return weight, -weight @ self.center, precision.rsqrt()


def factor_analysis(x: Tensor, weight: Tensor, n_components: int) -> FactorModel:
    """Maximum likelihood, by scikit-learn.

    Parameters
    ----------
    x : Tensor of shape (n, d)
    weight : Tensor of shape (n,)
    n_components : int
        k; factors beyond d have loadings of zero.

    Returns
    -------
    FactorModel
        In float64.
    """
    from sklearn.decomposition import FactorAnalysis

    x, weight = x.double().cpu().numpy(), weight.double().cpu().numpy()
    d = x.shape[1]
    center = np.average(x, axis=0, weights=weight)
    covariance = np.atleast_2d(np.cov(x.T, aweights=weight, bias=True))
    # 2 d rows with this covariance: weights need no care then, and time does not depend on n
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(d * values.clip(min=0.0))[:, None] * vectors.T
    k = min(n_components, d)
    # whether it converged does not matter for a start
    fitted = FactorAnalysis(k, svd_method="lapack", tol=1e-4, max_iter=500)
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(np.r_[root, -root])
    total = np.diag(covariance)
    variance = np.maximum(fitted.noise_variance_, MIN_NOISE_SHARE * total)
    loadings = fitted.components_.T
    # the posterior's axes
    _, turn = np.linalg.eigh(loadings.T / variance @ loadings)
    loadings = np.c_[loadings @ turn[:, ::-1], np.zeros((d, n_components - k))]
    return FactorModel(
        *(torch.as_tensor(np.ascontiguousarray(a)) for a in (center, loadings, variance))
    )


class AffinePlus(nn.Module):
    """weight x + bias + network(x), (..., n) -> (..., m).

    Parameters
    ----------
    weight : Tensor of shape (m, n)
    bias : Tensor of shape (m,)
    network : nn.Module
    """

    def __init__(self, weight: Tensor, bias: Tensor, network: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.network(x)
