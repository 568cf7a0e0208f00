"""The model that every estimator ends with: a mixture of tilted bases, in standardised columns."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from skebm._layout import Layout
from skebm._typing import Distribution, Modules
from skebm.bases import MarginalGaussianization, StackedBase, Together, marginal

CLIP = 5.0
"""Energies see Gaussianised coordinates clipped to [-CLIP, CLIP]: beyond, f is constant along
that column and the tails are those of the base."""

_CHUNK = 8192


class FeatureMap(nn.Module):
    """What an energy sees: states as they are, and z = clip(G(x)) of the values.

    Parameters
    ----------
    transform : MarginalGaussianization or ValuesTransform
        G; the second for rows with states.

    See Also
    --------
    skebm.bases.MarginalGaussianization : The map before it is clipped.
    TiltedMixture : The model that it belongs to.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import AffineTransform
    >>> from skebm.models import FeatureMap
    >>> features = FeatureMap(AffineTransform([0.0], [1.0]))
    >>> features(torch.tensor([[1.0], [9.0]], dtype=torch.float64))  # constant beyond 5
    tensor([[1.],
            [5.]], dtype=torch.float64)
    """

    transform: Any

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform

    @property
    def layout(self) -> Layout | None:
        """What the columns of a row are; None where all are values."""
        return getattr(self.transform, "layout", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows as energies see them, (n, d) -> (n, d)."""
        return self.clip(self.transform(x)[0])

    def clip(self, z: torch.Tensor) -> torch.Tensor:
        """Coordinates as energies see them, (..., d) -> (..., d)."""
        if self.layout is None:
            return z.clamp(-CLIP, CLIP)
        states, values = z.tensor_split([self.layout.n_states], dim=-1)
        return torch.cat([states, values.clamp(-CLIP, CLIP)], dim=-1)


class ModesAndBackground(nn.Module):
    """Responsibilities of the components of a mixture, and of a wider distribution around them.

    What recalibration weights where training hardly sees the mass of separate regions: the modes
    of the data against each other, and all of them against what the base has between and around.

    Parameters
    ----------
    mixture : nn.Module
        Distribution of the data, with `responsibilities`.
    background : nn.Module
        Distribution that takes over where the mixture is ten times less dense than it.
    """

    mixture: Distribution
    background: Distribution

    def __init__(self, mixture: Distribution, background: Distribution):
        super().__init__()
        self.mixture = mixture
        self.background = background

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """Posterior probabilities, (n, d) -> (n, n_components + 1)."""
        odds = self.mixture.log_prob(x) - self.background.log_prob(x) + math.log(10.0)
        inside = odds.sigmoid()[:, None]
        return torch.cat([inside * self.mixture.responsibilities(x), 1.0 - inside], dim=1)


class MarginalBin(nn.Module):
    """Indicator of an interval of one column, which recalibration may weight to match its mass.

    Parameters
    ----------
    column : int
    low, high : float
        The interval is [low, high) on the standardised column.
    """

    column: int
    low: float
    high: float

    def __init__(self, column: int, low: float, high: float):
        super().__init__()
        self.column, self.low, self.high = column, low, high

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """One inside and zero outside, (n, d) -> (n, 1)."""
        at = x[:, self.column]
        return ((at >= self.low) & (at < self.high)).to(x.dtype)[:, None]


class ModesTogether(nn.Module):
    """All of several responsibilities, side by side.

    Parameters
    ----------
    parts : sequence of nn.Module
        With `responsibilities`.
    """

    def __init__(self, parts: Sequence[Any]):
        super().__init__()
        self.parts: Modules = nn.ModuleList(parts)

    def responsibilities(self, x: torch.Tensor) -> torch.Tensor:
        """All of theirs, (n, d) -> (n, n_components)."""
        return torch.cat([part.responsibilities(x) for part in self.parts], dim=1)


class TiltedMixture(nn.Module):
    r"""Mean over K members of :math:`q_k(x)\, e^{t_k(x)} / Z_k`.

    The tilt is :math:`t_k(x) = \alpha f_k(z(x)) + \beta^\top r_k(x)`, where f is the trained
    energy (minus the residual energy), r the responsibilities of the components of a mixture
    (often the base itself), and (alpha, beta) the recalibration, (1, 0) before it and shared by all
    members.

    Parameters
    ----------
    bases : list of K nn.Module
        q_k, distributions on standardised columns.
    proposals : list of K nn.Module
        Normalised distributions that cover member k, for log Z and sampling; usually the bases
        themselves.
    features : FeatureMap
    energy : nn.Module or None
        (K, n, d) -> (K, n). None: no tilt.

    See Also
    --------
    FeatureMap : What its energies see.
    LatentVariableModel : The model of ImplicitVAE.
    Conditioner : Completes rows by it.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm import NCEDensity
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> est = NCEDensity(energy_model=None, n_members=2, random_state=0).fit(X)
    >>> model = est.model_
    >>> model.n_members, model.is_untilted
    (2, True)
    >>> model.log_members(torch.zeros(3, 2, dtype=torch.float64)).shape
    torch.Size([2, 3])
    """

    bases: Modules
    proposals: Modules
    features: Any
    energy: Any
    modes: Modules
    inverse_temperature: torch.Tensor
    mode_weights: torch.Tensor
    log_partition: torch.Tensor
    log_partition_std_error: torch.Tensor

    def __init__(
        self,
        bases: Sequence[Distribution],
        proposals: Sequence[Distribution],
        features: nn.Module,
        energy: Any,
    ):
        super().__init__()
        self.bases = nn.ModuleList(bases)
        self.proposals = nn.ModuleList(proposals)
        self.features = features
        self.energy = energy
        n_members = len(bases)
        self.modes = nn.ModuleList()
        self.register_buffer("inverse_temperature", torch.ones((), dtype=torch.float64))
        self.register_buffer("mode_weights", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("log_partition", torch.zeros(n_members, dtype=torch.float64))
        self.register_buffer("log_partition_std_error", torch.zeros_like(self.log_partition))

    def calibrate(
        self,
        inverse_temperature: float | torch.Tensor,
        mode_weights: torch.Tensor,
        modes: Iterable[Distribution] | None,
    ) -> None:
        """Set (alpha, beta) and the K mixtures that beta weights."""
        self.inverse_temperature.fill_(inverse_temperature)
        self.mode_weights = mode_weights
        self.modes = nn.ModuleList(modes if len(mode_weights) else [])

    @property
    def n_members(self) -> int:
        """Number of members K."""
        return len(self.bases)

    @property
    def n_features(self) -> int:
        """Number of columns d of a row."""
        return self.bases[0].n_features

    @property
    def is_untilted(self) -> bool:
        """Whether the model is its base: log Z is then exactly 0."""
        return self.energy is None

    def energies(self, x: torch.Tensor) -> torch.Tensor:
        """f_k(z(x[k])), (K, n, d) -> (K, n) in float64."""
        z = torch.stack([self.features(rows) for rows in x])
        return self.energy(z)

    def mode_tilt(self, x: torch.Tensor) -> torch.Tensor:
        """The part of the tilt that weights modes, (K, n, d) -> (K, n)."""
        return torch.stack([self.mode_tilt_of(k, rows) for k, rows in enumerate(x)])

    def mode_tilt_of(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """The same of member k, (n, d) -> (n,)."""
        if not len(self.mode_weights):
            return x.new_zeros(len(x))
        return self.modes[k].responsibilities(x) @ self.mode_weights

    def tilt(self, x: torch.Tensor) -> torch.Tensor:
        """t_k(x[k]), (K, n, d) -> (K, n)."""
        return self.inverse_temperature * self.energies(x) + self.mode_tilt(x)

    def log_members(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised log-density of every member at the same rows, (n, d) -> (K, n)."""
        return self.log_members_and_bases(x)[0]

    def log_members_and_bases(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and those of their bases, (K, n) each."""
        log_base, components, z = self._log_bases(x)
        if self.is_untilted:
            return log_base, log_base
        if z is None:
            tilt = self.tilt(x.expand(self.n_members, *x.shape))
        else:
            tilt = self.inverse_temperature * self.energy(z.expand(self.n_members, *z.shape))
            if len(self.mode_weights):
                tilt = tilt + self._mode_tilt_together(x, components)
        return log_base + tilt - self.log_partition[:, None], log_base

    def _log_bases(self, x):
        """Log-densities of the bases, (K, n); without a graph also those of what they stack, (K,
        n_components, n), and the rows as energies see them, which members share.
        """
        if x.requires_grad:
            return torch.stack([q.log_prob(x) for q in self.bases]), None, None
        components, mapped = self._bases_together()(x)
        z = self.features(x) if mapped is None else self.features.clip(mapped[0].mT)
        return components.logsumexp(1), components, z

    def _mode_tilt_together(self, x, components):
        """`mode_tilt` at the same rows, where what the bases stack has been evaluated, (K, n)."""
        tilt, end = 0.0, 0
        of_members = (m.parts if isinstance(m, ModesTogether) else [m] for m in self.modes)
        for modes in zip(*of_members, strict=True):
            pairs = zip(modes, self.bases, strict=True)
            if all(q is p and isinstance(q, StackedBase) for q, p in pairs):
                shares = components.softmax(1)
            elif all(one is modes[0] for one in modes):
                shares = modes[0].responsibilities(x).mT[None]
            else:
                shares = torch.stack([one.responsibilities(x).mT for one in modes])
            begin, end = end, end + shares.shape[1]
            tilt = tilt + self.mode_weights[begin:end] @ shares
        return tilt

    def _bases_together(self):
        """The bases and the map of the features, made for evaluation at the same rows."""
        transform = getattr(self.features, "transform", None)
        # buffers are others on another device
        made_for = [*self.bases, transform, next(self.bases.buffers(), None)]
        known, together = self.__dict__.get(_TOGETHER, ([], None))
        if list(map(id, known)) != list(map(id, made_for)):
            maps = [transform] if isinstance(transform, MarginalGaussianization) else []
            together = Together(self.bases, maps)
            self.__dict__[_TOGETHER] = made_for, together
        return together

    def __getstate__(self) -> dict[str, Any]:
        # made anew in no time
        return {k: v for k, v in super().__getstate__().items() if k != _TOGETHER}

    def log_member(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """Normalised log-density of member k, (n, d) -> (n,)."""
        single = self.member(k)
        return torch.cat([single.log_members(c)[0] for c in x.split(_CHUNK)])

    def member(self, k: int) -> "TiltedMixture":
        """Member k alone, as a mixture of one."""
        energy = None if self.energy is None else self.energy.member(k)
        single = TiltedMixture([self.bases[k]], [self.proposals[k]], self.features, energy)
        single.calibrate(self.inverse_temperature, self.mode_weights, self.modes[k : k + 1])
        single.log_partition = self.log_partition[k : k + 1]
        single.log_partition_std_error = self.log_partition_std_error[k : k + 1]
        return single

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) in nats, (n, d) -> (n,).

        Of a row with cells that are not known (NaN, negative codes) it is the log-density of the
        others under the bases, whose marginals have a closed form.
        """
        return self._where_known(lambda rows: self._mean(self.log_members, rows), x)

    def base_log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log of the mean of the bases, (n, d) -> (n,)."""
        return self._where_known(lambda rows: self._mean(lambda c: self._log_bases(c)[0], rows), x)

    def log_prob_std(self, x: torch.Tensor) -> torch.Tensor:
        """Standard error that the errors of log Z put on log p(x), (n,)."""

        def error(rows):
            share = torch.cat([self.log_members(c).softmax(0) for c in rows.split(_CHUNK)], dim=1)
            return (share * self.log_partition_std_error[:, None]).square().sum(0).sqrt()

        return self._where_known(error, x, lambda rows, kept: rows.new_zeros(len(rows)))

    def _mean(self, log_members, x):
        logs = torch.cat([log_members(c).logsumexp(0) for c in x.split(_CHUNK)])
        return logs - math.log(self.n_members)

    def _where_known(self, function, x, elsewhere=None):
        """`function` of rows whose cells are all known, and of others what they have without."""
        layout = getattr(self.features, "layout", None)
        unknown = x.isnan() if layout is None else layout.unknown(x)
        partial = unknown.any(1)
        if not partial.any():
            return function(x)
        values = x.new_empty(len(x))
        if not partial.all():
            values[~partial] = function(x[~partial])
        for pattern in unknown[partial].unique(dim=0):
            rows = (unknown == pattern).all(1)
            kept = (~pattern).nonzero().squeeze(1).tolist()
            values[rows] = (elsewhere or self._log_marginal)(x[rows], kept)
        return values

    def _log_marginal(self, x, kept):
        """Log-density of some columns under the mean of the bases."""
        if not kept:
            return x.new_zeros(len(x))
        logs = [marginal(q, kept).log_prob(x[:, kept]) for q in self.bases]
        return torch.stack(logs).logsumexp(0) - math.log(self.n_members)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """Gradient of log p at x, (n, d) -> (n, d)."""
        parts = []
        for chunk in x.split(_CHUNK):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_(True)
                total = self.log_prob(leaf).sum()
                parts.append(torch.autograd.grad(total, leaf)[0])
        return torch.cat(parts)

    def draw(self, n: int, rngs: Sequence[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw n rows for every member from its proposal, with their log-weights.

        Parameters
        ----------
        n : int
        rngs : list of K torch.Generator

        Returns
        -------
        x : Tensor of shape (K, n, d)
        log_weights : Tensor of shape (K, n)
            log of q_k e^{t_k} / proposal_k at x.
        """
        pairs = zip(self.proposals, rngs, strict=True)
        x = torch.stack([p.sample(n, own) for p, own in pairs])
        return x, self.log_weights(x)

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """log of q_k e^{t_k} / proposal_k at rows drawn from the proposals, (K, n, d) -> (K, n)."""
        tilt = torch.cat([self.tilt(c) for c in x.split(_CHUNK, dim=1)], dim=1)
        return tilt + log_ratio(self.bases, self.proposals, x)


_TOGETHER = "_made_for_and_together"


def log_ratio(
    bases: Iterable[Distribution], proposals: Iterable[Distribution], x: torch.Tensor
) -> torch.Tensor:
    """log q_k - log proposal_k at x[k], (K, n, d) -> (K, n); 0 where the two are the same
    distribution.
    """
    return torch.stack(
        [
            rows.new_zeros(len(rows)) if q is p else q.log_prob(rows) - p.log_prob(rows)
            for q, p, rows in zip(bases, proposals, x, strict=True)
        ]
    )


def feature_scores(
    bases: Iterable[Distribution], features: Any, z: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    r"""Gradients of the log-densities of the bases in the coordinates of the features.

    With several offsets the gradient is that of :math:`\log \sum_o q(z + o)`: with offsets drawn
    from some noise, of the base smoothed by that noise, by Monte Carlo.

    Parameters
    ----------
    bases : list of K distributions on standardised columns
    features : FeatureMap
    z : Tensor of shape (n, d)
        Coordinates, not clipped.
    offsets : Tensor of shape (n_offsets, n, d)

    Returns
    -------
    Tensor of shape (K, n, d)
        Not finite where a base has no density.
    """

    def gradient(base, rows, moves):
        logs = []
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_(True)
            for move in moves:
                x = features.transform.inverse(leaf + move)
                logs.append(base.log_prob(x) - features.transform(x)[1])
            return torch.autograd.grad(torch.stack(logs).logsumexp(0).sum(), leaf)[0]

    chunks = list(zip(z.split(_CHUNK), offsets.split(_CHUNK, dim=1), strict=True))
    return torch.stack([torch.cat([gradient(base, *chunk) for chunk in chunks]) for base in bases])
