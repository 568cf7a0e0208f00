"""Distributions of a row given the output of a decoder.

Columns are independent given that. A value that is NaN is not there, or not known, and is left out,
which integrates over it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from skebm._layout import Layout
from skebm.bases import draw_states

__all__ = ["BernoulliLikelihood", "GaussianLikelihood", "MixedLikelihood", "WithLogMasses"]

MIN_NOISE = 1e-3
"""Least standard deviation of the noise, in standard deviations of the column."""


class GaussianLikelihood(nn.Module):
    """Independent normal columns around the output of the decoder, with learned variances.

    Parameters
    ----------
    variance : Tensor of shape (d,)
        What the variances start from.

    See Also
    --------
    BernoulliLikelihood : For columns in [0, 1].
    skebm.models.LatentVariableModel : A model with such a likelihood.

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import GaussianLikelihood
    >>> likelihood = GaussianLikelihood(torch.ones(2))
    >>> x, output = torch.tensor([[0.0, 0.0], [0.0, torch.nan]]), torch.zeros(2, 2)
    >>> likelihood.log_prob(x, output).detach()  # missing cells are left out
    tensor([-1.8379, -0.9189])
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
        log_norm, absent = (2 * math.pi * variance).log(), x.isnan()
        if not absent.any():
            return -0.5 * ((x - output).square() @ variance.reciprocal()) - 0.5 * log_norm.sum()
        square = torch.where(absent, 0.0, x - output).square()
        return -0.5 * (square @ variance.reciprocal() + (~absent).to(square) @ log_norm)

    def slope(self, x: Tensor, output: Tensor) -> Tensor:
        """Derivatives of `log_prob` in the output, (..., d)."""
        return torch.where(x.isnan(), 0.0, (x - output) / self.variance)

    def information(self, x: Tensor, output: Tensor) -> Tensor:
        """Fisher information about the output, (..., d): minus the mean curvature.

        Of columns that rows have no value of, zero.
        """
        return torch.where(x.isnan(), 0.0, self.variance.reciprocal().expand_as(output))

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

    See Also
    --------
    GaussianLikelihood : For columns of numbers.
    skebm.models.LatentVariableModel : A model with such a likelihood.

    References
    ----------
    Loaiza-Ganem, G. and Cunningham, J. P. (2019). The continuous Bernoulli: fixing a pervasive
    error in variational autoencoders. NeurIPS. https://arxiv.org/abs/1907.06845

    Examples
    --------
    >>> import torch
    >>> from skebm.latents import BernoulliLikelihood
    >>> likelihood = BernoulliLikelihood(binary=True)
    >>> logits = torch.zeros(1, 2)
    >>> likelihood.log_prob(torch.tensor([[0.0, 1.0]]), logits)  # two fair coins
    tensor([-1.3863])
    >>> likelihood.mean(logits)
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, binary: bool):
        super().__init__()
        self.binary = binary

    def supports(self, x: Tensor) -> Tensor:
        """Whether rows have a probability or density above zero, (n, d) -> (n,)."""
        inside = (x == 0) | (x == 1) if self.binary else (x >= 0) & (x <= 1)
        return (inside | x.isnan()).all(-1)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Log-probability or log-density of rows, (..., d) and (..., d) -> (...)."""
        x, output = torch.broadcast_tensors(x, output)
        absent = x.isnan()
        x = torch.where(absent, 0.0, x)
        if self.binary:
            logs = -functional.binary_cross_entropy_with_logits(output, x, reduction="none")
        else:
            logs = output * x - _log_normalizer(output)
        return torch.where(absent, 0.0, logs).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """Mean of the rows, (..., d)."""
        return output.sigmoid() if self.binary else _slope(output)

    def slope(self, x: Tensor, output: Tensor) -> Tensor:
        """Derivatives of `log_prob` in the output, (..., d)."""
        return torch.where(x.isnan(), 0.0, x - self.mean(output))

    def information(self, x: Tensor, output: Tensor) -> Tensor:
        """Fisher information about the output, (..., d): the variance of a column.

        Of columns that rows have no value of, zero.
        """
        p = output.sigmoid()
        information = p * (1 - p) if self.binary else _curvature(output)
        return torch.where(x.isnan(), 0.0, information)

    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """One row for each output, (..., d)."""
        like = {"dtype": output.dtype, "device": output.device}
        uniform = torch.rand(output.shape, generator=rng, **like)
        if self.binary:
            return (uniform < output.sigmoid()).to(output)
        return _quantile(output, uniform)


class MixedLikelihood(nn.Module):
    """Independent columns of states, and of values where the states say that there is one.

    An output has the log-probabilities of all states, as :class:`WithLogMasses` makes them, and
    then what `of_values` takes.

    Parameters
    ----------
    layout : Layout
    of_values : GaussianLikelihood or BernoulliLikelihood
    """

    layout: Layout
    of_values: GaussianLikelihood | BernoulliLikelihood

    def __init__(self, layout: Layout, of_values: GaussianLikelihood | BernoulliLikelihood):
        super().__init__()
        self.layout, self.of_values = layout, of_values

    def _split(self, x, output):
        """Indicators of the states of rows, their values, log-masses, and the values' output."""
        n_masses, n_states = sum(self.layout.sizes), self.layout.n_states
        shown = self.layout.as_numbers(x)[..., :n_masses]
        return shown, x[..., n_states:], output[..., :n_masses], output[..., n_masses:]

    def supports(self, x: Tensor) -> Tensor:
        """Whether rows have a density above zero, (n, n_features) -> (n,)."""
        return self.of_values.supports(self.layout.values(x))

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Log-density of rows, mass for states, (..., n_features) and (..., d) -> (...)."""
        shown, values, log_masses, of_values = self._split(x, output)
        return (shown * log_masses).sum(-1) + self.of_values.log_prob(values, of_values)

    def slope(self, x: Tensor, output: Tensor) -> Tensor:
        """Derivatives of `log_prob` in the output, (..., d)."""
        shown, values, log_masses, of_values = self._split(x, output)
        slope = self.of_values.slope(values, of_values)
        return torch.cat([shown.expand_as(log_masses), slope], dim=-1)

    def information(self, x: Tensor, output: Tensor) -> Tensor:
        """Fisher information about the output, (..., d): minus the mean curvature.

        Of the cells that rows have. It is diagonal because log-masses are normalised.
        """
        shown, values, log_masses, of_values = self._split(x, output)
        known = [
            part.sum(-1, keepdim=True).expand_as(part)
            for part in shown.split(self.layout.sizes, dim=-1)
        ]
        information = self.of_values.information(values, of_values)
        return torch.cat([torch.cat(known, dim=-1) * log_masses.exp(), information], dim=-1)

    def mean(self, output: Tensor) -> Tensor:
        """Mean of ``layout.as_numbers`` of the rows, (..., d)."""
        *parts, of_values = output.split([*self.layout.sizes, self.layout.n_values], dim=-1)
        masses, means = [part.exp() for part in parts], self.of_values.mean(of_values).clone()
        for mass, j in zip(masses, self.layout.value_of, strict=True):
            if j >= 0:
                means[..., j] *= mass[..., 0]
        return torch.cat([*masses, means], dim=-1)

    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """One row for each output, (n, d) -> (n, n_features)."""
        *parts, of_values = output.split([*self.layout.sizes, self.layout.n_values], dim=-1)
        each = torch.arange(len(output), device=output.device)
        codes = draw_states([part.exp() for part in parts], each, rng)
        return self.layout.join(codes, self.of_values.sample(of_values, rng))


class WithLogMasses(nn.Module):
    """A decoder whose logits of states are made log-probabilities, (..., k) -> (..., d).

    Parameters
    ----------
    network : nn.Module
        Returns logits of all states, and then what stands for the values.
    layout : Layout
    """

    network: nn.Module
    layout: Layout

    def __init__(self, network: nn.Module, layout: Layout):
        super().__init__()
        self.network, self.layout = network, layout

    def forward(self, z: Tensor) -> Tensor:
        *parts, of_values = self.network(z).split(
            [*self.layout.sizes, self.layout.n_values], dim=-1
        )
        return torch.cat([*(part.log_softmax(-1) for part in parts), of_values], dim=-1)


# Not torch's ContinuousBernoulli, whose probabilities are clamped: at large logits its density has
# the integral 0.1. With l the logit and a = |l|, the density is exp(l x) / ((exp(l) - 1) / l).

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
