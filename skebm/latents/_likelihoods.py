"""Distributions of a row given the output of a decoder."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BernoulliLikelihood", "GaussianLikelihood"]

MIN_NOISE = 1e-3
"""Least standard deviation of the noise, in standard deviations of the column."""


class GaussianLikelihood(nn.Module):
    """Independent normal columns around the output of the decoder, with learned variances.

    Parameters
    ----------
    variance : Tensor of shape (d,)
        What the variances start from.
    """

    log_variance: nn.Parameter

    def __init__(self, variance: Tensor):
        super().__init__()
        excess = (variance - MIN_NOISE**2).clamp_min(MIN_NOISE**2)
        self.log_variance = nn.Parameter(excess.log())

    @property
    def variance(self) -> Tensor:
        """Variances of the columns, (d,)."""
        return self.log_variance.exp() + MIN_NOISE**2

    def supports(self, x: Tensor) -> Tensor:
        """Whether rows have a density above zero, (n, d) -> (n,)."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Log-density of rows, (..., d) and (..., d) -> (...)."""
        variance = self.variance
        constant = 0.5 * (2 * math.pi * variance).log().sum()
        return -0.5 * ((x - output).square() @ variance.reciprocal()) - constant

    def slope(self, x: Tensor, output: Tensor) -> Tensor:
        """Derivatives of `log_prob` in the output, (..., d)."""
        return (x - output) / self.variance

    def information(self, output: Tensor) -> Tensor:
        """Fisher information of rows about the output, (..., d): minus the mean curvature."""
        return self.variance.reciprocal().expand_as(output)

    def mean(self, output: Tensor) -> Tensor:
        """Mean of the rows, (..., d)."""
        return output

    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """One row for each output, (..., d)."""
        like = {"dtype": output.dtype, "device": output.device}
        noise = torch.randn(output.shape, generator=rng, **like)
        return output + self.variance.sqrt() * noise


class BernoulliLikelihood(nn.Module):
    """Independent columns in [0, 1] whose logits are the output of the decoder.

    Rows of zeros and ones have a probability. Values in between have the density of the continuous
    Bernoulli distribution (Loaiza-Ganem & Cunningham 2019), which is normalised on [0, 1].

    Parameters
    ----------
    binary : bool
        Whether columns are 0 or 1, and nothing in between.

    References
    ----------
    Loaiza-Ganem, G. and Cunningham, J. P. (2019). The continuous Bernoulli: fixing a pervasive
    error in variational autoencoders. NeurIPS. https://arxiv.org/abs/1907.06845
    """

    def __init__(self, binary: bool):
        super().__init__()
        self.binary = binary

    def supports(self, x: Tensor) -> Tensor:
        """Whether rows have a probability or density above zero, (n, d) -> (n,)."""
        inside = (x == 0) | (x == 1) if self.binary else (x >= 0) & (x <= 1)
        return inside.all(-1)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Log-probability or log-density of rows, (..., d) and (..., d) -> (...)."""
        x, output = torch.broadcast_tensors(x, output)
        if not self.binary:
            return (output * x - _log_normalizer(output)).sum(-1)
        return -functional.binary_cross_entropy_with_logits(output, x, reduction="none").sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """Mean of the rows, (..., d)."""
        return output.sigmoid() if self.binary else _slope(output)

    def slope(self, x: Tensor, output: Tensor) -> Tensor:
        """Derivatives of `log_prob` in the output, (..., d)."""
        return x - self.mean(output)

    def information(self, output: Tensor) -> Tensor:
        """Fisher information of rows about the output, (..., d): the variance of a column."""
        p = output.sigmoid()
        return p * (1 - p) if self.binary else _curvature(output)

    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """One row for each output, (..., d)."""
        like = {"dtype": output.dtype, "device": output.device}
        uniform = torch.rand(output.shape, generator=rng, **like)
        if self.binary:
            return (uniform < output.sigmoid()).to(output)
        return _quantile(output, uniform)


# Not torch's ContinuousBernoulli, whose probabilities are clamped: at large logits its density has
# the integral .1. With l the logit and a = |l|, the density is exp(l x) / ((exp(l) - 1) / l).

SMALL = 0.03  # series below; at 3e-2 the first term left out is under 1e-10


def _log_normalizer(logit):
    """log((exp(l) - 1) / l)."""
    small = logit.abs() < SMALL
    a = torch.where(small, 1.0, logit).abs()
    exact = logit.clamp_min(0.0) + (-torch.expm1(-a)).log() - a.log()
    return torch.where(small, logit / 2 + logit.square() / 24 - logit**4 / 2880, exact)


def _slope(logit):
    """Mean: the derivative of that."""
    small = logit.abs() < SMALL
    large = torch.where(small, 1.0, logit)
    exact = -1.0 / torch.expm1(-large) - 1.0 / large
    return torch.where(small, 0.5 + logit / 12 - logit**3 / 720, exact)


def _curvature(logit):
    """Variance: the derivative of that."""
    small = logit.abs() < SMALL
    # exp(-l) and the like for large logits only ever fall
    large = torch.where(small, 1.0, logit).abs()
    exact = large.square().reciprocal() - (-large).exp() / torch.expm1(-large).square()
    return torch.where(small, 1 / 12 - logit.square() / 240, exact)


def _quantile(logit, u):
    """Inverse of the distribution function."""
    a = logit.abs().clamp_min(1e-12)  # uniform there, without dividing by zero
    # of the distribution with logit -a, from the end where it has its mass
    v = torch.where(logit > 0, 1.0 - u, u)
    x = -torch.log1p(v * torch.expm1(-a)) / a
    return torch.where(logit > 0, 1.0 - x, x)
