"""Distributions made of distributions: change of variables and stacking."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from numpy.typing import ArrayLike
from torch import nn

from skebm._typing import Distribution, Modules

from ._mixtures import draw_components


class TransformedBase(nn.Module):
    """Distribution of x when G(x) follows `base`: log q(x) = log base(G(x)) + log |det dG/dx|.

    Parameters
    ----------
    transform : MarginalGaussianization
        G, called as ``transform(x) -> (z, log_det)``, with ``transform.inverse(z)``.
    base : nn.Module
        Distribution of z = G(x).
    """

    transform: Any
    base: Distribution

    def __init__(self, transform: Any, base: Distribution):
        super().__init__()
        self.transform = transform
        self.base = base

    @property
    def n_features(self) -> int:
        return self.base.n_features

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density in nats, (n, d) -> (n,)."""
        z, log_det = self.transform(x)
        return self.base.log_prob(z) + log_det

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) rows."""
        return self.transform.inverse(self.base.sample(n, rng))

    @property
    def n_components(self) -> int:
        """A mixture stays a mixture in other coordinates."""
        return getattr(self.base, "n_components", 1)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Posterior probability of each component of `base`, (n, d) -> (n, n_components)."""
        return self.base.responsibilities(self.transform(x)[0])

    def marginal(self, kept: Sequence[int]) -> "TransformedBase":
        """Distribution of some columns, the others integrated out; of a map of single columns."""
        return TransformedBase(self.transform.marginal(kept), marginal(self.base, kept))


class Coordinates(nn.Module):
    """Where flows live: each member Gaussianises the columns by its own training rows.

    Parameters
    ----------
    maps : list of K MarginalGaussianization
    """

    maps: Modules

    def __init__(self, maps: Iterable[nn.Module]):
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows on standardised columns as every member sees them, (n, d) -> (K, n, d)."""
        return torch.stack([to(x)[0] for to in self.maps])

    def columns(self, y: torch.Tensor) -> torch.Tensor:
        """Back to standardised columns, (K, n, d) -> (K, n, d)."""
        return torch.stack([to.inverse(p) for to, p in zip(self.maps, y.double(), strict=True)])

    def inverse(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with log |det dy/dx|, (K, n)."""
        x = self.columns(y)
        return x, torch.stack([to(rows)[1] for to, rows in zip(self.maps, x, strict=True)])

    @classmethod
    def of(cls, distributions: Sequence[Distribution]) -> tuple[Self, nn.Module]:
        """Coordinates of distributions that `distributions` has made, and the flow in them,
        trainable, in float32.
        """
        first, *others = [distribution.base.flow for distribution in distributions]
        flow = first.beside(others).float().requires_grad_(True)
        return cls([distribution.transform for distribution in distributions]), flow

    def distributions(self, flow: Any) -> list[TransformedBase]:
        """Distributions on standardised columns, one per member, of flows in these coordinates."""
        return [TransformedBase(to, flow.member(k)) for k, to in enumerate(self.maps)]


class StackedBase(nn.Module):
    r"""Mixture of whole distributions, :math:`q(x) = \sum_j w_j q_j(x)` (Smyth & Wolpert 1999).

    Parameters
    ----------
    components : list of nn.Module
    weights : array-like of shape (n_components,)
    """

    components: Modules
    weights: torch.Tensor

    def __init__(self, components: Iterable[Distribution], weights: ArrayLike):
        super().__init__()
        weights = torch.as_tensor(weights, dtype=torch.float64)
        self.components = nn.ModuleList(components)
        self.register_buffer("weights", weights / weights.sum())

    @property
    def n_features(self) -> int:
        return self.components[0].n_features

    @property
    def n_components(self) -> int:
        return len(self.components)

    def log_components(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density of every component, (n, d) -> (n, n_components)."""
        return torch.stack([component.log_prob(x) for component in self.components], dim=-1)

    def _joint(self, x):
        return self.log_components(x) + self.weights.log()

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density in nats, (n, d) -> (n,)."""
        return self._joint(x).logsumexp(-1)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Posterior probability of each component, (n, d) -> (n, n_components)."""
        return self._joint(x).softmax(-1)

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) rows, in random order."""
        which = draw_components(self.weights, n, rng)
        x = torch.empty(n, self.n_features, dtype=torch.float64, device=self.weights.device)
        for j in which.unique().tolist():  # not all distributions can draw 0 rows
            rows = which == j
            x[rows] = self.components[j].sample(int(rows.sum()), rng)
        return x

    def marginal(self, kept: Sequence[int]) -> "StackedBase":
        """Distribution of some columns, the others integrated out."""
        return StackedBase([marginal(q, kept) for q in self.components], self.weights)


def marginal(distribution: Any, kept: Sequence[int]) -> Any:
    """Distribution of some columns, the others summed and integrated out.

    Parameters
    ----------
    distribution : distribution
    kept : sequence of int

    Returns
    -------
    distribution

    Raises
    ------
    ValueError
        For one whose marginals have no closed form, such as a flow.
    """
    if not hasattr(distribution, "marginal"):
        raise ValueError(
            f"a row has cells that are not known, and {type(distribution).__name__} cannot "
            'integrate them out; take base="auto", or another one that is made of mixtures.'
        )
    return distribution.marginal(kept)


class AffineTransform(nn.Module):
    """Columns in other units: x -> center + scale * x.

    Parameters
    ----------
    center, scale : array-like of shape (n_features,)
        `scale` positive.
    """

    center: torch.Tensor
    scale: torch.Tensor

    def __init__(self, center: ArrayLike, scale: ArrayLike):
        super().__init__()
        self.register_buffer("center", torch.as_tensor(center, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return center + scale * x, (n, d), and its log-determinant, (n,)."""
        log_det = self.scale.log().sum()
        return self.center + self.scale * x, log_det.expand(len(x))

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Return x with center + scale * x = z."""
        return (z - self.center) / self.scale

    def marginal(self, kept: Sequence[int]) -> "AffineTransform":
        """The map of some columns."""
        kept = list(kept)
        return AffineTransform(self.center[kept], self.scale[kept])


class ArcsinhTransform(nn.Module):
    """Columns whose tails are logarithms: x -> arcsinh(x)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return arcsinh(x), (n, d), and its log-determinant, (n,)."""
        z, log_slope = self.columns(x)
        return z, log_slope.sum(1)

    def columns(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map columns, (d, n), and return log dz/dx as well, of the same shape; NaN stays NaN."""
        return x.arcsinh(), -0.5 * x.square().log1p()

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Return x with arcsinh(x) = z."""
        return z.sinh()

    def marginal(self, kept: Sequence[int]) -> "ArcsinhTransform":
        """The map of some columns."""
        return self
