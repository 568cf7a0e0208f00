"""Cross-fitted members: splits, pooled held-out gain, acceptance, recalibration, ESS guard.

Every estimator trains its energies on the rows of `Members` and hands the values of f, at the
held-out rows and at a common pool of base samples, back to the functions of this file.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from skebm._random import Seeds
from skebm.bases import MAX_FIT_ROWS, StackedBase, fit_gaussian_mixture

from ._model import ModesAndBackground, log_ratio

POOL_SIZE = 8192
"""Base samples per member on which every choice is made: common random numbers."""

MAX_HELD_OUT = 50_000
"""A member is judged on at most this many held-out rows."""

MAX_MODES, ROWS_PER_MODE, ROWS_PER_COLUMN = 8, 50, 10
"""Size of the mixture whose components recalibration may weight: so many rows for each mode, and so
many more for each column."""

MIN_ESS = 0.02
"""Effective sample size, as a fraction, below which importance sampling is not trusted."""


def make_splits(n, n_members, validation_fraction, generator):
    """Rows that each member is trained on, and rows that it is judged on.

    Parameters
    ----------
    n : int
    n_members : int
        With one member, a validation split; with more, member k is judged on fold k.
    validation_fraction : float
    generator : torch.Generator

    Returns
    -------
    list of (train, held_out) index tensors
    """
    order = torch.randperm(n, generator=generator)
    if n_members == 1:
        n_held = min(max(1, round(validation_fraction * n)), n - 1)
        return [(order[n_held:].sort().values, order[:n_held][:MAX_HELD_OUT].sort().values)]
    folds = order.tensor_split(min(n_members, n))
    keep = torch.ones(n, dtype=torch.bool)
    splits = []
    for held in folds:
        keep[held] = False
        splits.append((torch.where(keep)[0], held[:MAX_HELD_OUT].sort().values))
        keep[held] = True
    return splits


@dataclass
class Members:
    """Splits, bases and the pool on which tilts are judged.

    Attributes
    ----------
    x : Tensor of shape (n_samples, n_features)
        Standardised rows.
    weight : Tensor of shape (n_samples,)
        Row weights.
    splits : list of K (train, held_out) index tensors
    bases, proposals : lists of K laws
    features : FeatureMap
    pool : Tensor of shape (K, POOL_SIZE, n_features)
        Samples of the proposals.
    pool_log_ratio : Tensor of shape (K, POOL_SIZE)
        log base - log proposal at the pool.
    z, pool_z : Tensors
        What the energies see at `x` and at the pool.
    noise : list of K laws
        What networks are trained against; the proposals unless given.
    n_threads : int
        Threads for training.
    modes : list of K laws or None
        Laws with `responsibilities` whose components mean the same in every member: what
        recalibration may weight. By default the bases, where they are stacks or one law.
    n_rows : int
        Number of rows, of which `x` may hold several copies; ``len(x)`` by default.
    """

    x: torch.Tensor
    weight: torch.Tensor
    splits: list
    bases: list
    proposals: list
    features: torch.nn.Module
    seeds: Seeds
    noise: list | None = None
    n_threads: int = 1
    modes: list | None = None
    n_rows: int | None = None
    pool: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.noise = self.proposals if self.noise is None else self.noise
        self.n_rows = len(self.x) if self.n_rows is None else self.n_rows
        first = self.bases[0]
        shared = isinstance(first, StackedBase) or all(q is first for q in self.bases)
        if self.modes is None and shared and getattr(first, "n_components", 1) > 1:
            self.modes = self.bases
        own = self.seeds.generators("pool", len(self.proposals))
        self.pool = torch.stack(
            [p.sample(POOL_SIZE, g) for p, g in zip(self.proposals, own, strict=True)]
        )
        self.pool_log_ratio = log_ratio(self.bases, self.proposals, self.pool)
        self.z = self.features(self.x)
        self.pool_z = torch.stack([self.features(rows) for rows in self.pool])

    def __len__(self):
        return len(self.splits)

    @property
    def tilts_its_proposal(self):
        """Whether the proposals are the bases, so that log-ratios vanish."""
        return all(q is p for q, p in zip(self.bases, self.proposals, strict=True))

    @property
    def held_weights(self):
        """Weight of every held-out row, a list of K tensors."""
        return [self.weight[held] for _, held in self.splits]

    def log_partition(self, pool_tilt):
        """log Z of every member on the pool, (..., K, m) -> (..., K)."""
        return (pool_tilt + self.pool_log_ratio).logsumexp(-1) - math.log(pool_tilt.shape[-1])

    def gain(self, held_tilt, pool_tilt):
        """Held-out log p - log q of every row, in nats.

        Parameters
        ----------
        held_tilt : list of K tensors of shape (..., n_k)
            t_k at the held-out rows of member k.
        pool_tilt : Tensor of shape (..., K, m)
            t_k at the pool of member k.

        Returns
        -------
        Tensor of shape (..., n_held)
        """
        log_z = self.log_partition(pool_tilt)
        return torch.cat([t - log_z[..., k, None] for k, t in enumerate(held_tilt)], dim=-1)

    def mean_gain(self, held_tilt, pool_tilt):
        """Weighted mean of `gain` over the held-out rows, shape (...)."""
        weight = torch.cat(self.held_weights)
        return self.gain(held_tilt, pool_tilt) @ weight / weight.sum()

    def accepts(self, gain, pool_tilt):
        """Whether the mean gain exceeds two of its standard errors (rows and log Z)."""
        weight = torch.cat(self.held_weights)
        share = weight / weight.sum()
        mean = share @ gain
        rows = (share.square() @ (gain - mean).square()).item()
        ess = self.ess(pool_tilt)
        masses = torch.stack([w.sum() for w in self.held_weights]) / weight.sum()
        log_z = (masses.square() * (1 / ess - 1) / pool_tilt.shape[-1]).sum().item()
        return mean.item() > 2.0 * math.sqrt(rows + log_z)

    def ess(self, pool_tilt):
        """Effective sample size of every member on the pool, as a fraction, (K,)."""
        log_w = pool_tilt + self.pool_log_ratio
        return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp() / log_w.shape[-1]

    def responsibilities(self):
        """Responsibilities of the components of `modes` at held-out rows and pool, or None."""
        if self.modes is None:
            return None
        held = [
            q.responsibilities(self.x[h]) for q, (_, h) in zip(self.modes, self.splits, strict=True)
        ]
        pool = [q.responsibilities(x) for q, x in zip(self.modes, self.pool, strict=True)]
        return held, torch.stack(pool)


def data_modes(x, weight, n_rows, splits, bases, seeds):
    """Mixtures whose components recalibration may weight, where training hardly sees modes.

    Parameters
    ----------
    x, weight, n_rows, splits, bases, seeds
        As of :class:`Members`.

    Returns
    -------
    list of K ModesAndBackground, or None where there are too few rows for two modes
    """
    n_modes = min(MAX_MODES, n_rows // (ROWS_PER_MODE + ROWS_PER_COLUMN * x.shape[1]))
    if n_modes < 2:
        return None

    def fit(rows, generator, start=None):
        rows = rows[torch.randperm(len(rows), generator=generator)[:MAX_FIT_ROWS]]
        return fit_gaussian_mixture(
            x[rows], n_modes, generator, diagonal=True, sample_weight=weight[rows], start=start
        )

    # one start, so that components mean the same; then each from its own rows, because a mixture
    # that has seen the held-out rows would favour them
    shared = fit(torch.arange(len(x)), seeds.generator("modes, shared"))
    return [
        ModesAndBackground(fit(train, seeds.generator("modes", k), shared), base)
        for k, ((train, _), base) in enumerate(zip(splits, bases, strict=True))
    ]


@dataclass(frozen=True)
class Trained:
    """What training hands back: energies and their values where they are judged.

    Attributes
    ----------
    energy : nn.Module
        (K, n, d) -> (K, n).
    held : list of K tensors of shape (n_k,)
        f at the held-out rows.
    pool : Tensor of shape (K, POOL_SIZE)
        f at the pool.
    n_iter : int
        Epochs or boosting iterations of the state that was kept.
    history : dict of ndarrays
        ``n_iter``, ``gain`` (held-out, nats per row) and, for networks, ``train_loss``.
    log_partition : Tensor of shape (K,) or None
        Learned log Z of the objective, where it learns one.
    """

    energy: torch.nn.Module
    held: list
    pool: torch.Tensor
    n_iter: int
    history: dict
    log_partition: torch.Tensor | None = None

    @classmethod
    def nothing(cls, members):
        """No training: f = 0."""
        held = [torch.zeros(len(h), dtype=torch.float64) for _, h in members.splits]
        history = {"n_iter": np.zeros(1, dtype=int), "gain": np.zeros(1)}
        return cls(None, held, torch.zeros_like(members.pool_log_ratio), 0, history)


def recalibrate(members, held_f, pool_f, *, ridge=(1e-2, 1e-3)):
    """Exponential tilt on [f, responsibilities of modes] by maximum likelihood on held-out rows.

    Convex: maximises the mean over held-out rows of theta . phi(x) - log E_q exp(theta . phi),
    with a ridge towards theta = (1, 0), by L-BFGS. Kept only if it raises the likelihood in a
    two-fold check, each half judged with the theta of the other half.

    Parameters
    ----------
    members : Members
    held_f : list of K tensors (n_k,)
    pool_f : Tensor (K, m)
    ridge : (float, float), default=(1e-2, 1e-3)
        For the factor on f and for the weights of the modes.

    Returns
    -------
    temperature : float
        Factor on f; at least 1 with several members.
    mode_weights : Tensor of shape (n_components,), or (0,) if they are not needed
    gain : Tensor of shape (n_held,)
        Held-out log p - log q of every row, with the theta of the half that the row is not in.
    """
    parts = members.responsibilities()
    if parts is None:
        held = [f[:, None] for f in held_f]
        pool = pool_f[..., None]
    else:
        held = [torch.cat([f[:, None], r], 1) for f, r in zip(held_f, parts[0], strict=True)]
        pool = torch.cat([pool_f[..., None], parts[1]], dim=-1)
    n_features = pool.shape[-1]
    identity = torch.zeros(n_features, dtype=torch.float64)
    identity[0] = 1.0
    penalty = torch.full((n_features,), ridge[1], dtype=torch.float64)
    penalty[0] = ridge[0]

    def gain(theta):
        return members.gain([h @ theta for h in held], pool @ theta)

    def solve(row_weight, columns):
        theta = identity.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")
        mask = torch.zeros(n_features, dtype=torch.float64)
        mask[columns] = 1.0

        def closure():
            optimizer.zero_grad()
            change = mask * (theta - identity)
            loss = penalty @ change.square() - row_weight @ gain(identity + change)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return identity + mask * (theta.detach() - identity)

    def fit(row_weight, columns):
        row_weight = row_weight / row_weight.sum()
        theta = solve(row_weight, columns)
        if len(members) > 1 and theta[0] < 1.0:
            # held-out rows see one member; the average of K is less sure of itself already
            theta = solve(row_weight, [c for c in columns if c])
        return theta

    weight = torch.cat(members.held_weights)
    share = weight / weight.sum()
    half = torch.arange(len(weight)) % 2
    best, best_columns = gain(identity), None
    for columns in ([0], list(range(n_features))):
        value = torch.where(
            half == 0, gain(fit(weight * half, columns)), gain(fit(weight * (1 - half), columns))
        )
        rise = (share @ (value - best)).item()
        if rise > 0.0 and math.isfinite(rise):
            best, best_columns = value, columns
    theta = identity if best_columns is None else fit(weight, best_columns)
    return theta[0].item(), theta[1:] if theta[1:].any() else theta[:0], best


def guard(members, pool_tilt):
    """Largest factor in (0, 1] that keeps the effective sample size of every member honest.

    Parameters
    ----------
    members : Members
    pool_tilt : Tensor of shape (K, m)

    Returns
    -------
    float
    """

    def honest(factor):
        return members.ess(factor * pool_tilt).min().item() >= MIN_ESS

    if honest(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if honest(middle) else (low, middle)
    return low
