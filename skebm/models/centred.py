r"""Energies that leave the masses of states as the base has them.

What is learned from gradients in the values says nothing about an additive function of the states
s. It is fixed so that the tilt is normalised under every pattern of states:

.. math:: f(s, v) - c(s), \qquad c(s) = \log E_{q(v \mid s)}\, e^{f(s, v)},

and the masses of states are those of the base q. The mean is taken over draws of the values that
are the same whenever s is met, a point set of low discrepancy, so that c is a function of s.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from skebm._layout import Layout
from skebm._random import sobol_points
from skebm._typing import Distribution, Modules
from skebm.bases import values_given_states

from .tilted import FeatureMap

__all__ = ["CentredEnergy", "Drawn", "StateDraws"]

BLOCK = 4096
"""Rows that an energy sees at once: they should stay in the cache."""

MAX_KNOWN = 20_000
"""Patterns of states whose constants are kept, the most frequent ones; others are measured anew."""


@dataclass(frozen=True)
class Drawn:
    """Rows of K members, m under each of n patterns of states, as energies see them.

    Attributes
    ----------
    layout : Layout
    codes : Tensor of shape (K, n, n_states)
    values : Tensor of shape (K, n_distinct, n_values)
    index : Tensor of shape (K, n, m)
        Which of the values stand under which states.
    """

    layout: Layout
    codes: Tensor
    values: Tensor
    index: Tensor

    def to(self, like: Tensor) -> "Drawn":
        """The same in the type and on the device of a tensor."""
        return Drawn(
            self.layout, self.codes.to(like), self.values.to(like), self.index.to(like.device)
        )

    def log_means(self, energy: Callable[[Tensor], Tensor]) -> Tensor:
        """Log of the mean of exp(f) over the draws of every pattern, (K, n)."""
        m = self.index.shape[2]
        size = max(1, BLOCK // m)
        parts = []
        blocks = zip(self.codes.split(size, 1), self.index.split(size, 1), strict=True)
        for codes, index in blocks:
            across = index.flatten(1)[..., None].expand(-1, -1, self.layout.n_values)
            values = self.values.gather(1, across)
            codes = codes.repeat_interleave(m, dim=1)
            rows = self.layout.join(codes.flatten(0, 1), values.flatten(0, 1))
            f = energy(rows.unflatten(0, codes.shape[:2])).unflatten(1, (-1, m))
            parts.append(f.logsumexp(-1) - math.log(m))
        return torch.cat(parts, dim=1)


class StateDraws(nn.Module):
    """Values that the bases of K members draw under given states, always by the same numbers.

    Parameters
    ----------
    bases : list of K distributions
    features : FeatureMap
    points : Tensor of shape (m, 1 + n_values)
        As `values_given_states` takes them; m draws under every pattern of states.

    See Also
    --------
    skebm.bases.values_given_states : Draws of one base.
    CentredEnergy : Takes the constants of states from them.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import MarginalGaussianization, ValuesTransform, fit_mixed_mixture
    >>> from skebm.models import FeatureMap, StateDraws
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> rows = torch.as_tensor(columns.encode(np.tile(X, (20, 1))))
    >>> mixture = fit_mixed_mixture(rows, columns.layout, 2, torch.Generator().manual_seed(0))
    >>> gaussianize = MarginalGaussianization.fit(columns.layout.values(rows).numpy())
    >>> features = FeatureMap(ValuesTransform(columns.layout, gaussianize))
    >>> draws = StateDraws.of([mixture], features, n_draws=256, seed=0)
    >>> drawn = draws.at([torch.tensor([[0], [1]])])  # under both kinds
    >>> drawn.index.shape  # members, patterns of states, draws
    torch.Size([1, 2, 256])
    """

    bases: Modules
    features: Any
    points: Tensor

    def __init__(self, bases: Sequence[Distribution], features: FeatureMap, points: Tensor):
        super().__init__()
        self.bases, self.features = nn.ModuleList(bases), features
        self.register_buffer("points", points)

    @classmethod
    def of(
        cls, bases: Sequence[Distribution], features: FeatureMap, n_draws: int, seed: int
    ) -> Self:
        """Draws at a scrambled Sobol sequence; `n_draws` is a power of two."""
        layout: Any = features.layout
        points = sobol_points(n_draws, 1 + layout.n_values, seed)
        half = 0.5 / n_draws**2  # away from 0 and 1, where a normal number is infinite
        return cls(bases, features, points.clamp(half, 1.0 - half))

    def at(self, patterns: Sequence[Tensor]) -> Drawn:
        """Draws under the patterns of states of every member, K tensors (n, n_states)."""
        found = [
            values_given_states(q, codes, self.points)
            for q, codes in zip(self.bases, patterns, strict=True)
        ]
        codes = torch.stack([codes.to(self.points) for codes in patterns])
        values = nn.utils.rnn.pad_sequence([values for values, _ in found], batch_first=True)
        layout = self.features.layout
        states = values.new_zeros(*values.shape[:2], layout.n_states)
        rows = torch.cat([states, values], dim=2)  # any states: maps are those of single columns
        z = torch.stack([layout.values(self.features(own)) for own in rows])
        return Drawn(layout, codes, z, torch.stack([index for _, index in found]))

    def member(self, k: int) -> "StateDraws":
        """Those of member k alone."""
        return StateDraws([self.bases[k]], self.features, self.points)


class CentredEnergy(nn.Module):
    """A stack of K energies minus the constants of the states, (K, n, d) -> (K, n).

    Parameters
    ----------
    energy : nn.Module
        (K, n, d) -> (K, n), with `member`.
    draws : StateDraws
    keys : Tensor of shape (n_known,)
        Of the patterns whose constants are known, in ascending order.
    constants : Tensor of shape (K, n_known)

    See Also
    --------
    StateDraws : Draws by which the constants are measured.
    skebm.ScoreMatchingEBM : Learns from gradients, and needs this where there are states.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import MarginalGaussianization, ValuesTransform, fit_mixed_mixture
    >>> from skebm.energies import StackedEnergy
    >>> from skebm.models import CentredEnergy, FeatureMap, StateDraws
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> rows = torch.as_tensor(columns.encode(np.tile(X, (20, 1))))
    >>> mixture = fit_mixed_mixture(rows, columns.layout, 2, torch.Generator().manual_seed(0))
    >>> gaussianize = MarginalGaussianization.fit(columns.layout.values(rows).numpy())
    >>> features = FeatureMap(ValuesTransform(columns.layout, gaussianize))
    >>> draws = StateDraws.of([mixture], features, n_draws=256, seed=0)
    >>> class OfStates(StackedEnergy):
    ...     def stacked(self, z):
    ...         return 3.0 * z[..., 0]
    >>> centred = CentredEnergy.of(OfStates(2, 1), draws, rows)
    >>> z = features(rows)[None]
    >>> bool(centred(z).abs().max() < 1e-6)  # nothing is left of a function of states
    True
    """

    energy: Any
    draws: Any
    keys: Tensor
    constants: Tensor

    def __init__(self, energy: nn.Module, draws: StateDraws, keys: Tensor, constants: Tensor):
        super().__init__()
        self.energy, self.draws = energy, draws
        self.register_buffer("keys", keys)
        self.register_buffer("constants", constants)

    @classmethod
    def of(cls, energy: nn.Module, draws: StateDraws, x: Tensor) -> Self:
        """Measure the constants of the patterns that are frequent in rows, (n, d)."""
        layout = draws.features.layout
        patterns, counts = layout.codes(x).unique(dim=0, return_counts=True)
        patterns = patterns[counts.argsort(descending=True, stable=True)[:MAX_KNOWN]]
        keys, order = _keys(patterns).sort()
        patterns = patterns[order]
        constants = draws.at([patterns] * len(draws.bases)).log_means(energy)
        return cls(energy, draws, keys, constants)

    def forward(self, z: Tensor) -> Tensor:
        """Evaluate member k on z[k], (K, n, d) -> (K, n)."""
        return self.energy(z) - self.constants_of(z)

    @torch.no_grad()
    def constants_of(self, z: Tensor) -> Tensor:
        """c_k of the states of z[k], (K, n, d) -> (K, n)."""
        codes = z[..., : self.draws.features.layout.n_states].long()
        keys = _keys(codes)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        constants = self.constants.gather(1, place)
        new = self.keys[place] != keys
        if new.any():
            # members have different ones; those that have fewer repeat another
            found = [
                (own[at] if at.any() else own[:1]).unique(dim=0, return_inverse=True)
                for own, at in zip(codes, new, strict=True)
            ]
            most = max(len(patterns) for patterns, _ in found)
            filled = [
                torch.cat([patterns, patterns[-1:].expand(most - len(patterns), -1)])
                for patterns, _ in found
            ]
            measured = self.draws.at(filled).log_means(self.energy)
            for k, (_, which) in enumerate(found):
                constants[k, new[k]] = measured[k, which[: int(new[k].sum())]]
        return constants

    def member(self, k: int) -> "CentredEnergy":
        """Member k alone, still (1, n, d) -> (1, n)."""
        own = self.constants[k : k + 1]
        return CentredEnergy(self.energy.member(k), self.draws.member(k), self.keys, own)


def _keys(codes):
    """Numbers that tell patterns of states apart, (..., n_states) -> (...,).

    Sums of odd multiples that wrap around 2^64: with random multipliers two patterns hardly ever
    share one, however many columns there are.
    """
    rng = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**62), 2**62, (codes.shape[-1],), generator=rng)
    return (codes * (2 * some + 1).to(codes.device)).sum(-1)
