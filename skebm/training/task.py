"""A fit as data: its rows, the members that share them, and where to compute.

A row is what its `Columns` make of it: states, and then values. Which rows belong together is known
to the splits alone, and every random draw has a seed of its stage and member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from skebm._engine import MemberBatches
from skebm._layout import Layout
from skebm._random import Seeds, draw_seed

from .columns import Columns, scott
from .progress import Progress

MAX_HELD_OUT = 50_000
"""A member is judged on at most this many held-out rows."""

MAX_COPIES = 8
"""Of rows with fresh jitter, where it is dear to make what a method learns from."""

SMOOTHED_ROWS = 4_000
"""Smoothing makes perturbed copies of few rows, until there are about this many."""


@dataclass(frozen=True, eq=False)
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
    draw : callable
        ``draw(seed)`` -> rows like `x`, perturbed by another seed.
    changes : bool
        Whether those differ from `x`: whether columns have ties, or are smoothed.
    seeds : Seeds
    device : torch.device
        Of the training, and of the model in the end.
    n_threads : int
        For the training of networks; all else is made of small steps, and uses one.
    progress : Progress
    start : nn.Module or None
        Model of a warm start, on the CPU.
    n_jobs : int or None
        Members and candidates side by side, for joblib.
    memory : joblib.Memory or alike, or None
        Where results are kept that other fits may share; not those of a warm start.

    See Also
    --------
    make_task : Makes it.
    TiltedTask : The same with bases.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm._random import Seeds
    >>> from skebm.training import Columns, make_task
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> len(task), task.n_rows, task.n_features
    (2, 200, 2)
    >>> [len(held) for held in task.held]
    [100, 100]
    """

    columns: Columns
    given: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    splits: list[tuple[torch.Tensor, torch.Tensor]]
    draw: Callable[[int], torch.Tensor]
    changes: bool
    seeds: Seeds
    device: torch.device
    n_threads: int = 1
    progress: Progress = field(default_factory=lambda: Progress(0))
    start: Any = None
    n_jobs: int | None = 1
    memory: Any = None

    def __len__(self) -> int:
        """Return the number of members K."""
        return len(self.splits)

    @property
    def model_device(self) -> torch.device:
        """Where the model is to compute: doubles are not for every device."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @property
    def n_rows(self) -> int:
        """Number of rows, of which `x` may hold several copies."""
        return len(self.given)

    @property
    def layout(self) -> Layout:
        """What the columns of a row are."""
        return self.columns.layout

    @property
    def n_features(self) -> int:
        """Number of columns of a row."""
        return self.x.shape[1]

    @property
    def n_train(self) -> int:
        """Training rows of a member, at most."""
        return max(len(train) for train, _ in self.splits)

    @property
    def train(self) -> list[torch.Tensor]:
        """Training rows of every member, a list of K index tensors."""
        return [train for train, _ in self.splits]

    @property
    def held(self) -> list[torch.Tensor]:
        """Held-out rows of every member, a list of K index tensors."""
        return [held for _, held in self.splits]

    @property
    def held_weight(self) -> torch.Tensor:
        """Weights of the held-out rows of all members, one after the other, (n_held,)."""
        return torch.cat([self.weight[held] for held in self.held])

    @property
    def judges(self) -> NDArray[np.int_]:
        """Member that each row is held out from, -1 where there is none, (n_rows,)."""
        judges = np.full(self.n_rows, -1)
        for k, held in enumerate(self.held):
            judges[held.numpy()] = k
        return judges

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Weighted mean of values at the held-out rows of all members, (..., n_held) -> (...)."""
        weight = self.held_weight
        return values @ weight / weight.sum()

    def fresh(self, rng: torch.Generator) -> torch.Tensor:
        """Rows like `x` with fresh jitter, where they have any."""
        return self.draw(draw_seed(rng)) if self.changes else self.x

    def copies(self, max_rows: int) -> int:
        """Copies of the rows, each with its own jitter, where all copies may have so many rows."""
        return max(1, min(MAX_COPIES, max_rows // len(self.x))) if self.changes else 1

    def row_weight(self) -> torch.Tensor:
        """Weights as losses take them, float32 on the device, (n_copies * n_rows,)."""
        return (self.weight / self.weight.mean()).float().to(self.device)

    def batches(
        self,
        make: Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, ...]],
        stage: str,
        *,
        batch_size: int,
        copies: int | None = None,
        rows: Sequence[torch.Tensor] | None = None,
        noise: tuple[torch.Tensor, ...] = (),
        noise_ratio: float = 1.0,
    ) -> MemberBatches:
        """Minibatches of what a method makes of the rows, for all members at once.

        Parameters
        ----------
        make : callable
            ``make(x, rng)`` -> tuple of tensors (K, n, ...) on the device.
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
        rng = self.seeds.rng(f"{stage}, batches")
        if copies is None and not self.changes:
            copies = 1

        def draw(rng):
            return make(self.fresh(rng), rng)

        data = draw
        if copies is not None:
            data = draw(rng) if copies == 1 else few_copies(draw, copies)
        return MemberBatches(
            data,
            self.train if rows is None else rows,
            noise,
            batch_size=batch_size,
            noise_ratio=noise_ratio,
            rng=rng,
        )


def few_copies(
    make: Callable[[torch.Generator], Any], n_copies: int
) -> Callable[[torch.Generator], Any]:
    """Return ``make(rng)``, called anew `n_copies` times, and then one of those again."""
    copies = []

    def draw(rng):
        if len(copies) < n_copies:
            copies.append(make(rng))
            return copies[-1]
        return copies[int(torch.randint(n_copies, (), generator=rng))]

    return draw


def make_task(
    rows: np.ndarray,
    weight: np.ndarray,
    columns: Columns,
    *,
    n_members: int,
    validation_fraction: float,
    smoothing: float | str,
    seeds: Seeds,
    groups: NDArray[np.int_] | None = None,
    **context: Any,
) -> Task:
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
    groups : ndarray of shape (n_rows,), optional
        Labels 0, 1, ... of rows that are held out together.
    **context
        `device`, `n_threads`, `progress`, `start`, `n_jobs` and `memory` of the task.

    Returns
    -------
    Task

    See Also
    --------
    Task : What is returned.
    Columns : Reads the columns of X.
    fit_tilted : Takes it from here.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm._random import Seeds
    >>> from skebm.training import Columns, make_task
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> train, held = task.splits[0]
    >>> len(train), len(held)
    (100, 100)
    """
    x = columns.encode(rows)
    h = scott(x) if isinstance(smoothing, str) else float(smoothing)
    n = len(x)
    folds = make_splits(n, n_members, validation_fraction, seeds.rng("folds"), groups)
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
        draw=draw,
        changes=h > 0 or columns.has_ties,
        seeds=seeds,
        **context,
    )


def make_splits(
    n: int,
    n_members: int,
    validation_fraction: float,
    rng: torch.Generator,
    groups: NDArray[np.int_] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that each member is trained on, and rows that it is judged on.

    Parameters
    ----------
    n : int
    n_members : int
        With one member, a validation split; with more, member k is judged on fold k.
    validation_fraction : float
    rng : torch.Generator
    groups : ndarray of shape (n,), optional
        Labels 0, 1, ... of rows that are held out together. Large ones are dealt to the folds
        first, each to the one that is smallest so far.

    Returns
    -------
    list of (train, held_out) index tensors
    """
    if groups is None:
        order = torch.randperm(n, generator=rng)
        if n_members == 1:
            n_held = min(max(1, round(validation_fraction * n)), n - 1)
            folds = [order[:n_held]]
        else:
            folds = order.tensor_split(min(n_members, n))
    else:
        folds = _grouped_folds(groups, n_members, validation_fraction, rng)
    keep = torch.ones(n, dtype=torch.bool)
    splits = []
    for held in folds:
        keep[held] = False
        splits.append((torch.where(keep)[0], held[:MAX_HELD_OUT].sort().values))
        keep[held] = True
    return splits


def _grouped_folds(groups, n_members, validation_fraction, rng):
    """Rows that are held out, fold by fold; with one member those of the first groups drawn."""
    size = np.bincount(groups)
    order = torch.randperm(len(size), generator=rng).numpy()
    if n_members == 1:
        before = np.cumsum(size[order]) - size[order]
        n_held = int((before < validation_fraction * len(groups)).sum())
        fold_of = np.ones(len(size), dtype=int)
        fold_of[order[: min(n_held, len(size) - 1)]] = 0
        n_folds = 1
    else:
        n_folds = min(n_members, len(size))
        fold_of, filled = np.empty(len(size), dtype=int), np.zeros(n_folds, dtype=int)
        for group in order[np.argsort(-size[order], kind="stable")]:
            fold_of[group] = filled.argmin()
            filled[fold_of[group]] += size[group]
    rows = torch.as_tensor(fold_of[groups])
    shuffled = torch.randperm(len(groups), generator=rng)
    return [shuffled[rows[shuffled] == k] for k in range(n_folds)]
