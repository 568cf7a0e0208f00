"""A fit as data: what a method is given (`Task`) and what it hands back (`Trained`).

A row is what its `Columns` make of it (today one number per varying column). Which rows belong
together is known to the splits alone, and every random draw has a seed of its stage and member.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from skebm._engine import MemberBatches
from skebm._random import Seeds, draw_seed
from skebm.bases import StackedBase
from skebm.models import FeatureMap, TiltedMixture, log_ratio

from .columns import Columns, scott
from .progress import Progress

POOL_SIZE = 8192
"""Base samples per member on which every choice is made: common random numbers."""

MAX_HELD_OUT = 50_000
"""A member is judged on at most this many held-out rows."""

SMOOTHED_ROWS = 4_000
"""Smoothing makes perturbed copies of few rows, until there are about this many."""


@dataclass(frozen=True)
class Task:
    """One fit: its rows, the members that share them, and where to compute.

    Attributes
    ----------
    columns : Columns
    given : Tensor of shape (n_rows, n_features), float64
        Rows on standardised columns, as they were given.
    x : Tensor of shape (n_copies * n_rows, n_features), float64
        The same, spread over the resolution of their columns and smoothed. With
        smoothing there are several perturbed copies of few rows; the first copy comes first.
    weight : Tensor of shape (n_copies * n_rows,)
        Of mean one.
    splits : list of K (train, held_out) index tensors
        All copies of a row are in one fold; the first alone is held out.
    n_rows : int
    draw : callable
        ``draw(seed)`` -> rows like `x`, perturbed by another seed.
    changes : bool
        Whether those differ from `x`: whether columns have ties, or are smoothed.
    seeds : Seeds
    device : torch.device
        Of the training, and of the model in the end.
    n_threads : int
        For training; all else is made of small steps, and uses one.
    progress : Progress
    start : nn.Module or None
        Model of a warm start, on the CPU.
    """

    columns: Columns
    given: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    splits: list
    n_rows: int
    draw: Callable
    changes: bool
    seeds: Seeds
    device: torch.device
    n_threads: int = 1
    progress: Progress = field(default_factory=lambda: Progress(0))
    start: torch.nn.Module | None = None

    def __len__(self):
        """Return the number of members K."""
        return len(self.splits)

    @property
    def n_features(self):
        """Number of varying columns."""
        return self.x.shape[1]

    @property
    def n_train(self):
        """Training rows of a member, at most."""
        return max(len(train) for train, _ in self.splits)

    @property
    def train(self):
        """Training rows of every member, a list of K index tensors."""
        return [train for train, _ in self.splits]

    @property
    def held(self):
        """Held-out rows of every member, a list of K index tensors."""
        return [held for _, held in self.splits]

    @property
    def held_weight(self):
        """Weights of the held-out rows of all members, one after the other, (n_held,)."""
        return torch.cat([self.weight[held] for held in self.held])

    @property
    def judges(self):
        """Member that each row is held out from, -1 where there is none, (n_rows,)."""
        judges = np.full(self.n_rows, -1)
        for k, held in enumerate(self.held):
            judges[held.numpy()] = k
        return judges

    def mean(self, values):
        """Weighted mean of values at the held-out rows of all members, (..., n_held) -> (...)."""
        weight = self.held_weight
        return values @ weight / weight.sum()

    def fresh(self, generator):
        """Rows like `x` with fresh jitter, where they have any."""
        return self.draw(draw_seed(generator)) if self.changes else self.x

    def row_weight(self):
        """Weights as losses take them, float32 on the device, (n_copies * n_rows,)."""
        return (self.weight / self.weight.mean()).float().to(self.device)

    def batches(
        self, make, stage, *, batch_size, copies=None, rows=None, noise=(), noise_ratio=1.0
    ):
        """Minibatches of what a method makes of the rows, for all members at once.

        Parameters
        ----------
        make : callable
            ``make(x, generator)`` -> tuple of tensors (K, n, ...) on the device.
        stage : str
            Of the seeds.
        batch_size : int
        copies : int, optional
            Rows with fresh jitter are made so often, and then one of those is taken again: a few
            are enough to learn from, where they are dear to make. By default anew every epoch, and
            once where rows have no jitter.
        rows : list of K index tensors, optional
            The training rows by default.
        noise : tuple of tensors of shape (K, m, ...), default=()
        noise_ratio : float, default=1.0

        Returns
        -------
        MemberBatches
        """
        generator = self.seeds.generator(f"{stage}, batches")
        if copies is None and not self.changes:
            copies = 1

        def data(generator):
            return make(self.fresh(generator), generator)

        if copies is not None:
            data = data(generator) if copies == 1 else few_copies(data, copies)
        return MemberBatches(
            data,
            self.train if rows is None else rows,
            noise,
            batch_size=batch_size,
            noise_ratio=noise_ratio,
            generator=generator,
        )


def few_copies(make, n_copies):
    """Return ``make(generator)``, called anew `n_copies` times, and then one of those again."""
    copies = []

    def draw(generator):
        if len(copies) < n_copies:
            copies.append(make(generator))
            return copies[-1]
        return copies[int(torch.randint(n_copies, (), generator=generator))]

    return draw


def make_task(
    rows, weight, columns, *, n_members, validation_fraction, smoothing, seeds, **where
):  # fmt: skip
    """Split and perturb the rows of a table.

    Parameters
    ----------
    rows : ndarray of shape (n_rows, n_features)
        In the units of X.
    weight : ndarray of shape (n_rows,)
        Positive, of mean one.
    columns : Columns
    n_members : int
    validation_fraction : float
        Share of the rows that is held out where there is one member.
    smoothing : float or "scott"
        In standard deviations of the columns.
    seeds : Seeds
    **where
        `device`, `n_threads`, `progress` and `start` of the task.

    Returns
    -------
    Task
    """
    x, _ = columns.standardize(rows)
    h = scott(x) if isinstance(smoothing, str) else float(smoothing)
    n = len(x)
    folds = make_splits(n, n_members, validation_fraction, seeds.generator("folds"))
    n_copies = -(-SMOOTHED_ROWS // n) if h > 0 else 1
    starts = n * torch.arange(n_copies)[:, None]

    def draw(seed):
        tiled = np.tile(x, (n_copies, 1))
        return torch.as_tensor(columns.perturb(tiled, h, np.random.RandomState(seed)))

    return Task(
        columns=columns,
        given=torch.as_tensor(x),
        x=draw(seeds.of("jitter")),
        weight=torch.as_tensor(weight).repeat(n_copies),
        splits=[((train + starts).flatten(), held) for train, held in folds],
        n_rows=n,
        draw=draw,
        changes=h > 0 or columns.has_ties,
        seeds=seeds,
        **where,
    )


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


@dataclass(frozen=True)
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
    weights_data_modes : bool
        Whether these are modes of the data, and not the components of stacked bases.
    features : FeatureMap
        To what the energies see.
    z : Tensor of shape (n_copies * n_rows, n_features)
        The rows as the energies see them.
    pool : Tensor of shape (K, POOL_SIZE, n_features)
        Samples of the proposals.
    pool_z : Tensor of the same shape
    pool_log_ratio : Tensor of shape (K, POOL_SIZE)
        log base - log proposal at the pool.
    """

    bases: list = field(kw_only=True)
    proposals: list = field(kw_only=True)
    noise: list = field(kw_only=True)
    flow: torch.nn.Module | None = field(kw_only=True, default=None)
    coordinates: torch.nn.Module | None = field(kw_only=True, default=None)
    modes: list | None = field(kw_only=True)
    weights_data_modes: bool = field(kw_only=True, default=False)
    features: FeatureMap = field(kw_only=True)
    z: torch.Tensor = field(kw_only=True)
    pool: torch.Tensor = field(kw_only=True)
    pool_z: torch.Tensor = field(kw_only=True)
    pool_log_ratio: torch.Tensor = field(kw_only=True)

    @property
    def flow_distributions(self):
        """Distributions of the flows that maximum likelihood left."""
        return self.bases if self.tilts_its_proposal else self.coordinates.laws(self.flow)

    @property
    def tilts_its_proposal(self):
        """Whether the proposals are the bases, so that log-ratios vanish."""
        return all(q is p for q, p in zip(self.bases, self.proposals, strict=True))

    @property
    def n_judged(self):
        """How many points an evaluation looks at, per member."""
        return max(len(held) for held in self.held) + self.pool.shape[1]

    def held_log_prob(self, distributions):
        """Log-densities of the held-out rows of all members, (n_held,), on standardised columns."""
        pairs = zip(distributions, self.held, strict=True)
        return torch.cat([q.log_prob(self.x[held]) for q, held in pairs])

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
        return self.mean(self.gain(held_tilt, pool_tilt))

    def responsibilities(self):
        """Responsibilities of the components of `modes` at held-out rows and pool, or None."""
        if self.modes is None:
            return None
        held = [q.responsibilities(self.x[h]) for q, h in zip(self.modes, self.held, strict=True)]
        pool = [q.responsibilities(x) for q, x in zip(self.modes, self.pool, strict=True)]
        return held, torch.stack(pool)


def tilted_task(task, distributions, features, modes=None):
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
    weights_data_modes = modes is not None
    if modes is None and shared and getattr(first, "n_components", 1) > 1:
        modes = bases
    own = task.seeds.generators("pool", len(task))
    pool = torch.stack([p.sample(POOL_SIZE, g) for p, g in zip(proposals, own, strict=True)])
    return TiltedTask(
        **vars(task),
        **vars(distributions),
        modes=modes,
        weights_data_modes=weights_data_modes,
        features=features,
        z=features(task.x),
        pool=pool,
        pool_z=torch.stack([features(rows) for rows in pool]),
        pool_log_ratio=log_ratio(bases, proposals, pool),
    )


@dataclass(frozen=True)
class Trained:
    """What a method hands back: energies, and their values where they are judged.

    Attributes
    ----------
    energy : nn.Module or None
        (K, n, d) -> (K, n); None if nothing was trained.
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
    results : dict
        What else the method leaves behind.
    candidates : tuple of Candidate
        Other models that may be better than the tilted bases.
    """

    energy: torch.nn.Module | None
    held: list
    pool: torch.Tensor
    n_iter: int
    history: dict
    log_partition: torch.Tensor | None = None
    results: dict = field(default_factory=dict)
    candidates: tuple = ()

    @classmethod
    def nothing(cls, task):
        """No training: f = 0."""
        held = [torch.zeros(len(h), dtype=torch.float64) for h in task.held]
        history = {"n_iter": np.zeros(1, dtype=int), "gain": np.zeros(1)}
        return cls(None, held, torch.zeros_like(task.pool_log_ratio), 0, history)


@dataclass(frozen=True)
class Candidate:
    """A normalised model that a method has found beside its energies.

    Attributes
    ----------
    model : TiltedMixture
        Untilted.
    gain : Tensor of shape (n_held,)
        Its log-density minus that of the base, at the held-out rows, in nats.
    """

    model: TiltedMixture
    gain: torch.Tensor


@dataclass(frozen=True)
class Fitted:
    """What a fit ends with.

    Attributes
    ----------
    model : nn.Module
        On standardised columns, where it is to compute.
    scores : ndarray of shape (n_rows,)
        Log-density of every row, in the units of X, under the member that has not seen it; NaN for
        rows that were never held out.
    attributes : dict
        What else the estimator gets, by name; names that begin with an underscore are for its own
        use.
    """

    model: torch.nn.Module
    scores: np.ndarray
    attributes: dict
