"""The task of tilting bases: distributions, a common pool, and gains over the bases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from skebm._parallel import side_by_side
from skebm._typing import Distribution
from skebm.bases import StackedBase
from skebm.models import log_ratio

from .distributions import Distributions
from .task import Task

POOL_SIZE = 8192
"""Base samples per member on which every choice is made: common random numbers."""


@dataclass(frozen=True, eq=False)
class TiltedTask(Task):
    """A task of tilting bases: distributions, coordinates of the energies, and a common pool.

    Attributes
    ----------
    bases, proposals, noise : lists of K distributions
        On standardised columns. The proposals cover base and data; networks are trained against
        the noise.
    flow : StackedFlow or None
        What the bases are made of where they are flows, or what proposes where they are not.
    coordinates : Coordinates or None
        Where that flow lives.
    modes : list of K distributions or None
        With `responsibilities`; their components mean the same in every member, so that
        recalibration may weight them.
    features : FeatureMap
        To what the energies see.
    z : Tensor of shape (n_copies * n_rows, n_features)
        The rows as the energies see them.
    pool : Tensor of shape (K, POOL_SIZE, n_features)
        Samples of the proposals.
    pool_z : Tensor of the same shape
    pool_log_ratio : Tensor of shape (K, POOL_SIZE)
        log base - log proposal at the pool.

    See Also
    --------
    Task : What it adds to.
    fit_tilted : Makes it, and hands it to the trainer.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm._random import Seeds
    >>> from skebm.training import Columns, Recipe, Trained, fit_tilted, make_task
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> def train(task):  # looks, and trains nothing
    ...     print(type(task).__name__, task.pool.shape)
    ...     return Trained.nothing(task)
    >>> fitted = fit_tilted(task, Recipe(train=train, base="gaussian"))
    TiltedTask torch.Size([2, 8192, 2])
    """

    bases: list[Distribution] = field(kw_only=True)
    proposals: list[Distribution] = field(kw_only=True)
    noise: list[Distribution] = field(kw_only=True)
    flow: Any = field(kw_only=True, default=None)
    coordinates: Any = field(kw_only=True, default=None)
    modes: list[Distribution] | None = field(kw_only=True)
    features: Any = field(kw_only=True)
    z: torch.Tensor = field(kw_only=True)
    pool: torch.Tensor = field(kw_only=True)
    pool_z: torch.Tensor = field(kw_only=True)
    pool_log_ratio: torch.Tensor = field(kw_only=True)

    @property
    def flow_distributions(self) -> list[Distribution]:
        """Distributions of the flows that maximum likelihood left."""
        return self.bases if self.tilts_its_proposal else self.coordinates.distributions(self.flow)

    @property
    def tilts_its_proposal(self) -> bool:
        """Whether the proposals are the bases, so that log-ratios vanish."""
        return all(q is p for q, p in zip(self.bases, self.proposals, strict=True))

    @property
    def weights_data_modes(self) -> bool:
        """Whether `modes` are those of the data, and not the components of stacked bases."""
        return self.modes is not None and self.modes is not self.bases

    @property
    def n_judged(self) -> int:
        """How many points an evaluation looks at, per member."""
        return max(len(held) for held in self.held) + self.pool.shape[1]

    def held_log_prob(self, distributions: Sequence[Distribution]) -> torch.Tensor:
        """Log-densities of the held-out rows of all members, (n_held,), on standardised columns."""
        pairs = zip(distributions, self.held, strict=True)
        return torch.cat([q.log_prob(self.x[held]) for q, held in pairs])

    def log_partition(self, pool_tilt: torch.Tensor) -> torch.Tensor:
        """log Z of every member on the pool, (..., K, m) -> (..., K)."""
        return (pool_tilt + self.pool_log_ratio).logsumexp(-1) - math.log(pool_tilt.shape[-1])

    def gain(self, held_tilt: Sequence[torch.Tensor], pool_tilt: torch.Tensor) -> torch.Tensor:
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

    def mean_gain(self, held_tilt: Sequence[torch.Tensor], pool_tilt: torch.Tensor) -> torch.Tensor:
        """Weighted mean of `gain` over the held-out rows, shape (...)."""
        return self.mean(self.gain(held_tilt, pool_tilt))

    def responsibilities(self) -> tuple[list[torch.Tensor], torch.Tensor] | None:
        """Responsibilities of the components of `modes` at held-out rows and pool, or None."""
        if self.modes is None:
            return None
        pairs = side_by_side(
            lambda q, held, pool: (q.responsibilities(self.x[held]), q.responsibilities(pool)),
            zip(self.modes, self.held, self.pool, strict=True), self.n_jobs, in_threads=True,
        )  # fmt: skip
        return [held for held, _ in pairs], torch.stack([pool for _, pool in pairs])


def tilted_task(
    task: Task,
    distributions: Distributions,
    features: Any,
    modes: list[Any] | None = None,
) -> TiltedTask:
    """Complete a task by the distributions of its members, and draw the pool.

    Parameters
    ----------
    task : Task
    distributions : Distributions
    features : FeatureMap
    modes : list of K distributions or None
        Modes of the data that recalibration may weight. By default it weights the components of
        the bases, where these are stacks or one distribution for all members.

    Returns
    -------
    TiltedTask
    """
    bases, proposals = distributions.bases, distributions.proposals
    first = bases[0]
    shared = isinstance(first, StackedBase) or all(q is first for q in bases)
    if modes is None and shared and getattr(first, "n_components", 1) > 1:
        modes = bases
    own = task.seeds.rngs("pool", len(task))
    pool = torch.stack([p.sample(POOL_SIZE, g) for p, g in zip(proposals, own, strict=True)])
    return TiltedTask(
        **vars(task),
        **vars(distributions),
        modes=modes,
        features=features,
        z=features(task.x),
        pool=pool,
        pool_z=torch.stack([features(rows) for rows in pool]),
        pool_log_ratio=log_ratio(bases, proposals, pool),
    )
