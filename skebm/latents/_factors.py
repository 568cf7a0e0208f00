"""Linear latent-variable models: where the networks start."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

__all__ = ["AffinePlus", "FactorModel", "factor_analysis"]

MIN_NOISE_SHARE = 1e-4
"""Least share of a column's variance that is noise at the start."""

FULL_NOISE_SHARE = 0.1
"""That share where there are as many factors as columns."""


class FactorModel(NamedTuple):
    """Factor analysis: x = center + loadings z + noise, with uncorrelated posteriors.

    Attributes
    ----------
    center : Tensor of shape (d,)
    loadings : Tensor of shape (d, k)
        Such that ``loadings.T / variance @ loadings`` is diagonal, decreasing.
    variance : Tensor of shape (d,)
        Of the noise.

    See Also
    --------
    factor_analysis : Fits one to rows.
    skebm.ImplicitVAE : Starts from it.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import FactorModel
    >>> model = FactorModel(torch.zeros(2), torch.tensor([[1.0], [1.0]]), torch.tensor([0.5, 0.5]))
    >>> model.log_prob(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))  # along the factor, and across
    tensor([-2.3494, -3.9494])
    >>> weight, bias, scale = model.posterior()
    >>> weight
    tensor([[0.4000, 0.4000]])
    """

    center: Tensor
    loadings: Tensor
    variance: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density, (n, d) -> (n,)."""
        distribution = torch.distributions.LowRankMultivariateNormal(
            self.center, self.loadings, self.variance, validate_args=False
        )
        return distribution.log_prob(x)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (k, d), bias (k,) and standard deviation (k,) of z given x: N(W x + b, s^2)."""
        scaled = self.loadings / self.variance[:, None]
        precision = 1.0 + (scaled * self.loadings).sum(0)
        weight = scaled.T / precision[:, None]
        return weight, -weight @ self.center, precision.rsqrt()


def factor_analysis(x: Tensor, weight: Tensor, n_components: int) -> FactorModel:
    """Maximum likelihood, by scikit-learn, with one pseudo-row of unit variance.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        On columns whose scale is about one.
    weight : Tensor of shape (n,)
    n_components : int
        k; factors beyond d have loadings of zero.

    Returns
    -------
    FactorModel
        In float64.

    See Also
    --------
    FactorModel : What is returned.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import factor_analysis
    >>> rng = torch.Generator().manual_seed(0)
    >>> z = torch.randn(2000, 1, generator=rng)
    >>> x = z * torch.tensor([1.0, 1.0, 0.0]) + 0.5 * torch.randn(2000, 3, generator=rng)
    >>> model = factor_analysis(x, torch.ones(2000), n_components=1)
    >>> model.loadings.abs().round(decimals=1).flatten()
    tensor([1., 1., 0.], dtype=torch.float64)
    """
    x, weight = x.double().cpu().numpy(), weight.double().cpu().numpy()  # pyright: ignore[reportAssignmentType]
    d = x.shape[1]
    center = np.average(x, axis=0, weights=weight)
    covariance = np.atleast_2d(np.cov(x.T, aweights=weight, bias=True))
    # as if there were one row more: a column may be constant among few
    n = weight.sum()
    covariance = (n * covariance + np.eye(d)) / (n + 1.0)
    total = np.diag(covariance)
    if n_components < d:
        loadings, variance = _maximum_likelihood(covariance, n_components)
        variance = np.maximum(variance, MIN_NOISE_SHARE * total)
    else:
        # any noise that leaves a covariance behind is as likely, but factors without loadings
        # would be no start
        scale = np.sqrt(total)
        least = np.linalg.eigvalsh(covariance / np.outer(scale, scale))[0]
        share = max(min(FULL_NOISE_SHARE, 0.5 * least), MIN_NOISE_SHARE)
        variance = share * total
        values, vectors = np.linalg.eigh(covariance - np.diag(variance))
        loadings = vectors * np.sqrt(values.clip(min=0.0))
    # the posterior's axes
    _, turn = np.linalg.eigh(loadings.T / variance @ loadings)
    loadings = np.c_[loadings @ turn[:, ::-1], np.zeros((d, max(0, n_components - d)))]
    return FactorModel(
        *(torch.as_tensor(np.ascontiguousarray(a)) for a in (center, loadings, variance))
    )


def _maximum_likelihood(covariance, n_components):
    """Loadings and variances of factor analysis, by scikit-learn."""
    from sklearn.decomposition import FactorAnalysis

    # 2 d rows with this covariance: weights need no care then, and time does not depend on n
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(len(values) * values.clip(min=0.0))[:, None] * vectors.T
    fitted = FactorAnalysis(n_components, svd_method="lapack", tol=1e-4, max_iter=500)
    with warnings.catch_warnings():
        # whether it converged does not matter for a start
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(np.r_[root, -root])
    return fitted.components_.T, fitted.noise_variance_


class AffinePlus(nn.Module):
    """weight x + bias + network(x), (..., n) -> (..., m).

    Parameters
    ----------
    weight : Tensor of shape (m, n)
    bias : Tensor of shape (m,)
    network : nn.Module

    See Also
    --------
    perceptron : A network that starts at zero.
    factor_analysis : Weights to start from.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import AffinePlus, perceptron
    >>> decoder = AffinePlus(torch.ones(3, 1), torch.zeros(3), perceptron(1, 3, (16,), seed=0))
    >>> decoder(torch.tensor([[2.0]])).detach()  # the network is zero at the start
    tensor([[2., 2., 2.]])
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor, network: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.network(x)
