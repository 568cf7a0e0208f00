"""Candidates for a base, by name: how each is fitted, and how its settings are chosen.

Every candidate is fitted once per split (the rows of a cross-fitted member), with settings chosen
on the first split and reused on the others. A new one is a class with `fit`, and `choose` where it
has settings, and an entry of `CANDIDATES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from skebm._engine import Budget
from skebm._layout import Layout
from skebm._random import spawn
from skebm._typing import Distribution

from ._adapters import SklearnDensityBase, UniformBase
from ._combine import AffineTransform, Coordinates, TransformedBase
from ._em import fit_gaussian_mixture
from ._flow_training import train_flows
from ._flows import build_flow
from ._marginal import MarginalGaussianization
from ._mixed import MixedKernelBase, ValuesTransform, patterns
from ._mixed_em import fit_mixed_mixture
from ._mixtures import KernelDensityBase

MAX_FIT_ROWS = 20_000
"""A base is fitted on at most this many rows, a seeded random subsample of its split."""

MAX_CHOICE_ROWS = 5_000
"""Settings are chosen on at most this many of them."""

MAX_KERNEL_ROWS = 1_500
"""Kernel densities are candidates of ``base="auto"`` up to this many rows, or in up to three
columns."""

MIN_KERNEL_GAIN = 0.02
"""A kernel density stays in a stack if it raises the held-out log-likelihood by so many nats per
row: the average of several members is smooth without it, and it is by far the slowest to score."""

MIN_FLOW_ROWS = 300
"""With fewer rows no flow is looked at."""

MIN_FLOW_STEPS, MAX_FLOW_STEPS = 120, 600
"""Steps of training of autoregressive flows, at least and at most."""

QUICK_LEARNING_RATE = 6e-2
"""Of the same: at a third of it, two thirds more steps reach about as far."""

MAX_CENTERS = 2_000
"""A kernel density has at most this many centres: it costs that much per row scored."""

MAX_PATTERNS = 24
"""Mixtures of rows that have more sets of values than this (because of holes) have diagonal
covariances: full ones take as much longer as there are sets."""

_MAX_COMPONENTS, _PROBED = 32, 8
_CHOICE = {"tol": 2e-3, "max_iter": 40}  # of EM: enough to tell which mixture is best
_NARROW, _WIDE = 0.3, 1.0  # kernel widths of the marginal maps, in multiples of Silverman's rule


@dataclass(frozen=True)
class Rows:
    """Rows on which a candidate is fitted."""

    x: torch.Tensor
    weight: torch.Tensor
    layout: Layout
    box: Any = None  # lowest and highest values of *all* rows

    def mapped(self, transform: Any) -> tuple["Rows", torch.Tensor]:
        z, log_det = transform(self.x)
        return replace(self, x=z), log_det

    def at(self, rows: Any) -> "Rows":
        return replace(self, x=self.x[rows], weight=self.weight[rows])

    def first(self, n: int) -> "Rows":
        return self.at(slice(n))

    def mean(self, values: torch.Tensor) -> float:
        return float(self.weight @ values / self.weight.sum())


def _gaussianization(rows, bandwidth):
    transform = MarginalGaussianization.fit(
        rows.layout.values(rows.x).numpy(), bandwidth=bandwidth, sample_weight=rows.weight.numpy()
    )
    return ValuesTransform(rows.layout, transform) if rows.layout.n_states else transform


def _standardization(rows):
    share = rows.weight / rows.weight.sum()
    mean = share @ rows.x
    scale = (share @ (rows.x - mean).square()).sqrt().clamp_min(1e-12)
    return AffineTransform(-mean / scale, 1.0 / scale)


def moments(rows):
    """Mean and standard deviation of every column of values, of the rows that have it."""
    values = rows.layout.values(rows.x)
    there = (~values.isnan()).to(values)
    share = rows.weight[:, None] * there
    share = share / share.sum(0).clamp(min=1e-300)
    filled = values.nan_to_num()
    mean = (share * filled).sum(0)
    return mean, (share * (filled - mean).square()).sum(0).sqrt().clamp(min=1e-3)


def subsample(rows, n, rng):
    """At most n of these rows, in random order."""
    return rows[torch.randperm(len(rows), generator=rng)[:n]]


class BaseCandidate(ABC):
    """A distribution to be fitted on every split."""

    min_gain = 0.0
    """Nats per row by which it has to raise the held-out log-likelihood of a stack."""

    @abstractmethod
    def fit(self, rows: Rows, settings: Any, rng: torch.Generator) -> Distribution:
        """Distribution of `rows` at the settings that were chosen."""

    def choose(self, rows: Rows, held: Rows, rng: torch.Generator) -> Any:
        """Settings by the likelihood of the held-out rows."""
        return None

    def fit_splits(
        self,
        rows: Rows,
        splits: Sequence[tuple[torch.Tensor, torch.Tensor]],
        rng: torch.Generator,
    ) -> list[Distribution]:
        """Distributions, one per split."""
        settings, distributions = None, []
        every = replace(rows, box=(rows.x.amin(0), rows.x.amax(0)))
        for (train, held), own in zip(splits, spawn(rng, len(splits)), strict=True):
            rows = every.at(subsample(train, MAX_FIT_ROWS, own))
            if settings is None:
                some = every.at(subsample(held, MAX_CHOICE_ROWS, rng))
                settings = self.choose(rows.first(MAX_CHOICE_ROWS), some, rng)
            distributions.append(self.fit(rows, settings, own))
        return distributions


class _Mixture(BaseCandidate):
    """Gaussian mixture; size, covariance type and prior strength by held-out likelihood."""

    def fit(self, rows, settings, rng, start=None, **patience):
        n_components, prior_strength, diagonal = settings
        # many rows and a cheap step: worth running until it has converged (few rows overfit then)
        many = len(rows.x) >= MAX_CHOICE_ROWS
        if diagonal and many and not patience:
            patience = {"tol": 1e-4, "max_iter": 300}
        options: Any = {"prior_strength": prior_strength, "diagonal": diagonal, "start": start}
        options |= {"sample_weight": rows.weight, **patience}
        if rows.layout.n_states:
            return fit_mixed_mixture(rows.x, rows.layout, n_components, rng, **options)
        return fit_gaussian_mixture(rows.x, n_components, rng, **options)

    def choose(self, rows, held, rng):
        values, fitted = {}, {}
        patience = {} if rows.layout.n_states else _CHOICE

        def attempt(size, strength, diagonal):
            # one of the same size, fitted with another strength, is nearly there
            start = fitted.get((size, diagonal))
            mixture = self.fit(rows, (size, strength, diagonal), rng, start, **patience)
            fitted.setdefault((size, diagonal), mixture)
            value = held.mean(mixture.log_prob(held.x))
            improved = value > max(values.values(), default=-np.inf)
            values[size, strength, diagonal] = value
            return improved

        def best():
            return max(values, key=values.__getitem__)

        failures, k, only_diagonal = 0, 1, _has_many_patterns(rows)
        while k <= min(_MAX_COMPONENTS, len(rows.x) // 4 or 1) and failures < 2:
            failures = 0 if attempt(k, 3.0, only_diagonal) else failures + 1
            k *= 2
        k, _, _ = best()
        others = [(k, 1.0), (k, 10.0), (2 * k, 10.0), (2 * k, 30.0)]
        others = [(size, strength, only_diagonal) for size, strength in others]
        if rows.layout.n_states and not only_diagonal:
            others += [(2 * k, 3.0, True), (4 * k, 3.0, True)]
        elif not only_diagonal:
            # where many full ones are worth it, diagonal ones hardly ever are
            if k >= _PROBED:
                attempt(_PROBED, 3.0, True)
            if k < _PROBED or values[_PROBED, 3.0, True] > values[_PROBED, 3.0, False]:
                others += [(2 * k, 3.0, True), (4 * k, 3.0, True)]
        for own in others:
            if own[0] <= min(2 * _MAX_COMPONENTS, len(rows.x) // 2):
                attempt(*own)
        return best()


class GaussianCandidate(_Mixture):
    def choose(self, rows, held, rng):
        return 1, 3.0, _has_many_patterns(rows)


def _has_many_patterns(rows):
    return len(patterns(rows.layout.values(rows.x))) > MAX_PATTERNS


class _Kernel(BaseCandidate):
    """Kernel density; bandwidth and shape of the kernel by held-out likelihood."""

    min_gain = MIN_KERNEL_GAIN

    def fit(self, rows, settings, rng):
        factor, shaped = settings
        rows = rows.first(MAX_CENTERS)  # a random subsample: rows come in random order
        if rows.layout.n_states:
            return self._fit_mixed(rows, factor, mixing=shaped)
        n, d = rows.x.shape
        covariance = None
        if shaped:
            covariance = torch.cov(rows.x.mT, aweights=rows.weight, correction=0).reshape(d, d)
            covariance = covariance + 1e-6 * torch.eye(d, dtype=torch.float64)
        return KernelDensityBase(
            rows.x, factor * n ** (-1.0 / (d + 4)), weights=rows.weight, covariance=covariance
        )

    @staticmethod
    def _fit_mixed(rows, factor, mixing):
        bandwidth = factor * len(rows.x) ** (-1.0 / (max(1, rows.layout.n_values) + 4))
        mean, spread = moments(rows)
        return MixedKernelBase(rows.layout, rows.x, bandwidth, mixing, mean, spread, rows.weight)

    def choose(self, rows, held, rng):
        mixed = rows.layout.n_states > 0
        options = [
            (float(factor), other)
            for other in ((0.01, 0.03, 0.1, 0.3) if mixed else (False, True))
            for factor in np.geomspace(0.05, 1.6, 6 if mixed else 11)
        ]
        return max(options, key=lambda s: held.mean(self.fit(rows, s, rng).log_prob(held.x)))


class _Uniform(BaseCandidate):
    """Box around all rows, a twentieth wider on every side."""

    def fit(self, rows, settings, rng):
        low, high = rows.box
        margin = 0.05 * (high - low)
        return UniformBase(low - margin, high + margin)


class _Flow:
    """Normalizing flow by maximum likelihood; those of all splits are trained side by side."""

    min_gain = 0.0

    def __init__(self, kind, to_normal, train):
        self.kind = kind
        self.to_normal = to_normal  # makes coordinates of rows
        self.train = train

    def fit_splits(self, rows, splits, rng):
        splits = [
            (subsample(train, MAX_FIT_ROWS, own), subsample(held, MAX_CHOICE_ROWS, own))
            for (train, held), own in zip(splits, spawn(rng, len(splits)), strict=True)
        ]
        # only these rows: every member sees them in coordinates of its own
        used = torch.cat([own for split in splits for own in split]).unique()
        splits = [
            (torch.searchsorted(used, train), torch.searchsorted(used, held))
            for train, held in splits
        ]
        maps = [self.to_normal] * len(splits)
        return fit_flows(self.kind, maps, rows.at(used), splits, rng, self.train)


def fit_flows(kind, maps, rows, splits, rng, train):
    """Flows of several splits, each in coordinates that one of `maps` makes of its rows."""
    pairs = zip(maps, splits, strict=True)
    coordinates = Coordinates([to(rows.at(seen)) for to, (seen, _) in pairs])
    flow = build_flow(kind, rows.x.shape[1], len(splits), rng=rng)
    train(flow, coordinates(rows.x), rows.weight, splits, rng=rng)
    return coordinates.distributions(flow)


def train_quickly(flow, y, weight, splits, *, rng, n_steps=None):
    """Few steps at a high rate: of few rows, more of them are worth nothing."""
    n_rows = min(len(train) for train, _ in splits)
    n_steps = n_steps or min(MAX_FLOW_STEPS, max(MIN_FLOW_STEPS, n_rows // 5))
    budget = Budget(epochs=1, steps=n_steps, patience_steps=n_steps // 3)
    train_flows(flow, y, weight, splits, rng=rng, learning_rate=QUICK_LEARNING_RATE, budget=budget)


class SklearnDensity(BaseCandidate):
    """An unfitted scikit-learn density; a clone is fitted per split."""

    def __init__(self, estimator: Any):
        self.estimator = estimator

    def fit(self, rows: Rows, settings: Any, rng: torch.Generator) -> SklearnDensityBase:
        from sklearn.base import clone
        from sklearn.utils.validation import has_fit_parameter

        options = {}
        if has_fit_parameter(self.estimator, "sample_weight"):
            options["sample_weight"] = rows.weight.numpy()
        elif len(rows.weight.unique()) > 1:
            raise ValueError(
                f"{self.estimator!r} takes no sample_weight in fit; choose a base that does."
            )
        return SklearnDensityBase(clone(self.estimator).fit(rows.x.numpy(), **options))  # pyright: ignore[reportAttributeAccessIssue]


class MappedCandidate(BaseCandidate):
    """A candidate on columns that a map has made, ``make(rows)``."""

    def __init__(self, candidate, make):
        self.candidate = candidate
        self.make = make
        self.min_gain = candidate.min_gain

    def fit(self, rows, settings, rng):
        transform = self.make(rows)
        z, _ = rows.mapped(transform)
        return TransformedBase(transform, self.candidate.fit(z, settings, rng))

    def choose(self, rows, held, rng):
        transform = self.make(rows)
        return self.candidate.choose(rows.mapped(transform)[0], held.mapped(transform)[0], rng)


_widely = partial(_gaussianization, bandwidth=_WIDE)
_narrowly = partial(_gaussianization, bandwidth=_NARROW)
CANDIDATES: dict[str, Any] = {
    "gaussian": GaussianCandidate(),
    "gmm": _Mixture(),
    "gaussianized_gmm": MappedCandidate(_Mixture(), _widely),
    "gaussianized_gmm_narrow": MappedCandidate(_Mixture(), _narrowly),
    "kde": _Kernel(),
    "gaussianized_kde": MappedCandidate(_Kernel(), _widely),
    "flow": _Flow("coupling", _widely, train_flows),
    "autoregressive": _Flow("autoregressive", _standardization, train_quickly),
    "gaussianized_autoregressive": _Flow("autoregressive", _widely, train_quickly),
    "uniform": _Uniform(),
}
"""Name -> candidate, with ``fit_splits(rows, splits, rng)``: distributions, one per split."""

WITH_STATES = tuple(
    name for name, own in CANDIDATES.items() if not isinstance(own, _Flow | _Uniform)
)
"""Those that can be fitted to rows with states."""


def auto_candidates(n: int, d: int) -> tuple[str, ...]:
    """Names stacked by ``base="auto"``: kernel densities only where they are affordable."""
    names = ("gmm", "gaussianized_gmm", "gaussianized_gmm_narrow")
    if n <= MAX_KERNEL_ROWS or d <= 3:
        names += ("kde", "gaussianized_kde")
    return names


def auto_flows(n: int, d: int) -> tuple[str, ...]:
    """Names of the flows that ``base="auto"`` looks at."""
    return ("autoregressive", "gaussianized_autoregressive") if n >= MIN_FLOW_ROWS and d > 1 else ()
