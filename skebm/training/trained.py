"""What a method hands back, and what a fit ends with."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch

from skebm.models import TiltedMixture


@dataclass(frozen=True, eq=False)
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
    log : list of dict
        History of skorch, one dict per epoch of all networks that were trained.
    candidates : tuple of Candidate
        Other models that may be better than the tilted bases.

    See Also
    --------
    Recipe : Names the function that returns it.
    Candidate : Other models that may be better.
    train_networks : Trains networks and returns it.

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
    >>> fitted = fit_tilted(task, Recipe(train=Trained.nothing, base="gaussian"))
    >>> fitted.attributes["accepted_"]
    'base'
    """

    energy: torch.nn.Module | None
    held: list[torch.Tensor]
    pool: torch.Tensor
    n_iter: int
    history: dict[str, np.ndarray]
    log_partition: torch.Tensor | None = None
    results: dict[str, Any] = field(default_factory=dict)
    log: list[Any] = field(default_factory=list)
    candidates: "tuple[Candidate, ...]" = ()

    @classmethod
    def nothing(cls, task: Any) -> Self:
        """No training: f = 0."""
        held = [torch.zeros(len(h), dtype=torch.float64) for h in task.held]
        history = {"n_iter": np.zeros(1, dtype=int), "gain": np.zeros(1)}
        return cls(None, held, torch.zeros_like(task.pool_log_ratio), 0, history)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A normalised model that a method has found beside its energies.

    Attributes
    ----------
    model : TiltedMixture
        Untilted.
    gain : Tensor of shape (n_held,)
        Its log-density minus that of the base, at the held-out rows, in nats.
    name : str, default="candidate"
        What it is, for the user.

    See Also
    --------
    Trained : Holds candidates.
    fit_tilted : Keeps one where it is better.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm._random import Seeds
    >>> from skebm.training import Candidate, Columns, Recipe, fit_tilted, make_task
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> model = fit_tilted(task, Recipe(train=None, base="kde")).model
    >>> candidate = Candidate(model, gain=torch.full((200,), 0.1), name="kernels")
    >>> candidate.model.is_untilted
    True
    """

    model: TiltedMixture
    gain: torch.Tensor
    name: str = "candidate"


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit ends with.

    Attributes
    ----------
    model : nn.Module
        On standardised columns, where it is to compute.
    scores : ndarray of shape (n_rows,)
        Log-density of every row, in the units of X, under the member that has not seen it; NaN for
        rows that were never held out.
    judges : ndarray of shape (n_rows,), int
        Which member that is; -1 for rows that were never held out.
    attributes : dict
        What else the estimator gets, by name; names that begin with an underscore are for its own
        use.

    See Also
    --------
    fit_tilted : Returns it.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm._random import Seeds
    >>> from skebm.training import Columns, Recipe, fit_tilted, make_task
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> fitted = fit_tilted(task, Recipe(train=None, base="gaussian"))
    >>> fitted.scores.shape, np.bincount(fitted.judges)
    ((200,), array([100, 100]))
    >>> fitted.attributes["n_iter_"]
    0
    """

    model: torch.nn.Module
    scores: np.ndarray
    judges: np.ndarray
    attributes: dict[str, Any]
