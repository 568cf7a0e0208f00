"""A fit of tilted bases, from top to bottom."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from skebm._memory import key_of, remembered
from skebm._parallel import side_by_side
from skebm._typing import FloatArray
from skebm._warnings import warn
from skebm.bases import MAX_PATTERNS, Coordinates, patterns
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.models import FeatureMap, TiltedMixture
from skebm.partition import MIN_ESS_SHARE, LogPartition, adaptive_importance_sampling, estimate

from .acceptance import NOT_TRAINED, Decision, accept, data_modes
from .distributions import (
    Distributions,
    gaussianization,
    make_distributions,
    make_flows,
    on_flows,
    resolve,
)
from .task import Task
from .tilted_task import TiltedTask, tilted_task
from .trained import Fitted, Trained

TARGET_STD_ERROR = 0.01
"""Standard error of log Z, in nats, that ``n_partition_samples="auto"`` aims at."""

MAX_PARTITION_SAMPLES = 400_000

MAX_LEARNED_GAP = 0.5
"""Nats by which a learned log Z may differ from the measured one before a warning."""


def leave_results(task: TiltedTask, trained: Trained, model: TiltedMixture) -> dict[str, Any]:
    """Attributes that a method leaves behind, by default: its results."""
    return trained.results


@dataclass(frozen=True)
class Recipe:
    """What is particular to a method.

    Attributes
    ----------
    train : callable or None
        ``train(task)`` -> Trained. None: the bases alone.
    base, noise : as the user gives them
    own_energy : bool
        Whether the user has made the energy, and is to hear when it is rejected.
    flow : str, flow, callable or None
        What the bases are made of where they are flows.
    flow_batch_size : int
        Rows per step, in the training of those.
    flow_effort : float
        Share of the usual steps that it takes.
    data_modes : bool
        Whether recalibration may weight modes of the data, because training hardly sees them.
    recalibrates : bool
        Whether inverse temperature and mode weights are set by held-out likelihood.
    n_partition_samples : int or "auto"
    finish : callable
        ``finish(task, trained, model)`` -> attributes of the estimator, by name, once it is known
        which model is kept; those that begin with an underscore are for its own use. The model is
        still on the CPU, and its log Z not measured yet; it will move, so that its parts are copied
        where they are to stay. By default the results of the training.

    See Also
    --------
    fit_tilted : Follows it.
    Trained : What its `train` returns.

    Examples
    --------
    >>> from skebm.training import Recipe
    >>> recipe = Recipe(train=None, base="gaussian")  # no tilt: the base alone
    >>> recipe.recalibrates, recipe.n_partition_samples
    (True, 'auto')
    """

    train: Callable | None
    base: Any
    noise: Any = None
    own_energy: bool = False
    flow: Any = None
    flow_batch_size: int = 256
    flow_effort: float = 1.0
    data_modes: bool = False
    recalibrates: bool = True
    n_partition_samples: Any = "auto"
    finish: Callable = leave_results


def fit_tilted(task: Task, recipe: Recipe) -> Fitted:
    """Fit tilted bases: distributions, training, acceptance, log Z, out-of-fold scores.

    Parameters
    ----------
    task : Task
    recipe : Recipe

    Returns
    -------
    Fitted

    See Also
    --------
    make_task : Makes the task.
    Recipe : What is particular to a method.
    Fitted : What is returned.

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
    >>> x = torch.as_tensor(columns.standardize(X))
    >>> fitted.model.log_prob(x).shape
    torch.Size([200])
    """
    with torch.no_grad():
        task = prepare(task, recipe)
        trained = Trained.nothing(task)
        if recipe.train is not None:
            with torch.enable_grad():
                key = _key(task, recipe, "trained", recipe.train)
                trained = remembered(task.memory, key, lambda: recipe.train(task))
        model, decision = accept(
            task, trained, recalibrates=recipe.recalibrates, always=recipe.base is None
        )
        if not decision.is_tilted:
            trained = replace(trained, n_iter=0, log_partition=None)
            if recipe.own_energy and decision is not NOT_TRAINED:
                warn(
                    f"your energy_model was trained and rejected: {decision.text}. A gain has to "
                    "exceed two standard errors. Another base or longer training may leave it, or "
                    "let it find, more; summary() of the estimator repeats this."
                )
        left = recipe.finish(task, trained, model)
        partition = measure(model, task, recipe.n_partition_samples)
        return finished(task, trained, decision, model, partition, left)


def prepare(task: Task, recipe: Recipe) -> TiltedTask:
    """Fit the distributions of all members and draw the pool, or take them from a warm start."""
    added = remembered(task.memory, _key(task, recipe, "prepared"), lambda: _prepared(task, recipe))
    return TiltedTask(**vars(task), **added)


def _prepared(task, recipe):
    """What a tilted task has beside the task, by name."""
    start = task.start
    if start is None:
        distributions = _distributions(task, recipe)
        rng = task.seeds.rng("features")
        features = FeatureMap(gaussianization(task.x, task.weight, rng, task.layout))
    else:
        features, distributions = start.features, _distributions_of(task, recipe)
    modes = data_modes(task, distributions.bases) if _weights_modes(task, recipe) else None
    tilted = tilted_task(task, distributions, features, modes)
    return {name: value for name, value in vars(tilted).items() if name not in vars(task)}


def _weights_modes(task, recipe):
    # states are modes, whose masses are the base's
    of_numbers = not task.layout.n_states
    return recipe.data_modes and recipe.recalibrates and recipe.train is not None and of_numbers


def _key(task, recipe, *further):
    """Name of what follows from the rows, their bases, and something else."""
    if task.memory is None or task.start is not None:
        return None
    rows = task.columns, task.given, task.x, task.weight, task.splits, task.changes
    flow = recipe.flow, recipe.flow_batch_size, recipe.flow_effort
    bases = recipe.base, recipe.noise, *flow, _weights_modes(task, recipe)
    return key_of(*rows, task.seeds, task.device, *bases, *further)


def _distributions(task, recipe):
    if recipe.flow is not None:
        flow = recipe.flow, recipe.base, recipe.flow_batch_size, recipe.flow_effort
        return make_flows(task, *flow)
    return make_distributions(task, recipe.base, recipe.noise)


def _distributions_of(task, recipe):
    """Those of a warm start."""
    bases, proposals = list(task.start.bases), list(task.start.proposals)
    if recipe.flow is not None:
        flows = bases if recipe.base is not None else [p.components[0] for p in proposals]
        coordinates, flow = Coordinates.of(flows)
        return replace(
            on_flows(task, flow, coordinates, recipe.base), bases=bases, proposals=proposals
        )
    noise = proposals if recipe.noise is None else resolve(task, recipe.noise, "noise")
    return Distributions(bases, proposals, noise)


def measure(model: TiltedMixture, task: TiltedTask, n_partition_samples: int | str) -> LogPartition:
    """Log Z of every member by importance sampling, on fresh samples; kept in the model.

    Parameters
    ----------
    model : TiltedMixture
    task : TiltedTask
    n_partition_samples : int or "auto"

    Returns
    -------
    LogPartition
    """
    if model.is_untilted:
        exact = torch.zeros(model.n_members, dtype=torch.float64)
        return LogPartition(exact, exact, torch.full_like(exact, math.inf), 0, "exact")
    partition = by_importance(model, task, n_partition_samples, MAX_PARTITION_SAMPLES)
    if isinstance(n_partition_samples, str):
        partition = _anneal_where_needed(model, partition, task)
    model.log_partition = partition.value
    model.log_partition_std_error = partition.std_error
    _warn_of_errors(partition)
    return partition


def by_importance(
    model: TiltedMixture, task: TiltedTask, n_partition_samples: int | str, max_samples: int
) -> LogPartition:
    """Log Z of every member by importance sampling, on fresh samples.

    Parameters
    ----------
    model : TiltedMixture
    task : TiltedTask
    n_partition_samples : int or "auto"
    max_samples : int
        Of every member, for "auto".

    Returns
    -------
    LogPartition
    """
    task.progress.stage("log Z")
    if isinstance(n_partition_samples, str):
        options = {"target_std_error": _target(model), "max_samples": max_samples}
    else:
        options = {"target_std_error": 0.0, "max_samples": n_partition_samples}
        options["batch_size"] = max(1, min(8192, n_partition_samples // 2))
    rngs = task.seeds.rngs("log Z", model.n_members)
    members = [model.member(k) for k in range(model.n_members)]

    def draw(n, _):
        drawn = side_by_side(
            lambda member, rng: member.draw(n, [rng])[1],
            zip(members, rngs, strict=True), task.n_jobs, in_threads=True,
        )  # fmt: skip
        return torch.cat(drawn)

    return adaptive_importance_sampling(draw, rngs[0], **options)


def _target(model):
    """Standard error of every member: they are independent and average out."""
    return TARGET_STD_ERROR * math.sqrt(model.n_members)


def _anneal_where_needed(model, partition, task):
    """Measure again, by sequential Monte Carlo and bridge sampling, where the ESS is too low.

    The model then goes on as before; its samples are still proposed by the base.
    """
    low = (partition.ess < MIN_ESS_SHARE * partition.n_samples).nonzero()[:, 0].tolist()
    method = partition.method
    if task.layout.n_states:  # paths go through values, and states have none
        return partition
    for done, k in enumerate(low):
        task.progress.stage("log Z, annealed", done, len(low))
        single = model.member(k)

        def log_density(x, single=single):
            return single.bases[0].log_prob(x) + single.tilt(x[None])[0]

        try:
            again = estimate(
                log_density, model.proposals[k], task.seeds.rng("log Z, annealed", k),
                target_std_error=_target(model), max_samples=0,
            )  # fmt: skip
        except ValueError:  # no path from the proposal to the model
            continue
        # importance sampling is unbiased: far above means that annealing has missed a region
        missed = (partition.value[k] - again.value).item()
        error = again.std_error
        if missed > 3.0 * math.hypot(error, partition.std_error[k].item()):
            error = max(error, missed)
        partition.value[k], partition.std_error[k] = again.value, error
        partition.ess[k], method = again.ess, "annealed"
    return partition._replace(method=method)


def _warn_of_errors(partition):
    """Warn where the standard error of log Z is large, or not to be trusted."""
    error = partition.std_error.square().sum().sqrt().item() / len(partition.value)
    share = (partition.ess / partition.n_samples).min().item()
    if partition.method == "importance sampling" and share < MIN_ESS_SHARE:
        warn(
            f"log Z rests on an effective sample size of {share:.2%}: its standard error "
            f'({error:.3g} nats) is not to be trusted. Take n_partition_samples="auto", which '
            "anneals where the base covers the data badly, or another base.",
            LowEffectiveSampleSizeWarning,
        )
    elif error > TARGET_STD_ERROR * 1.05:
        warn(
            f"the standard error of log Z is {error:.3g} nats, above {TARGET_STD_ERROR}"
            + (
                ", although it was annealed; another base would help."
                if partition.method == "annealed"
                else f", after {partition.n_samples} samples per member; raise n_partition_samples."
            ),
            LowEffectiveSampleSizeWarning,
        )


def finished(
    task: TiltedTask,
    trained: Trained,
    decision: Decision,
    model: TiltedMixture,
    partition: LogPartition,
    left: dict[str, Any],
) -> Fitted:
    """Bring the model to its device, score the held-out rows, and gather the attributes.

    Parameters
    ----------
    task : TiltedTask
    trained : Trained
        With neither iterations nor log Z where its energies were not accepted.
    decision : Decision
    model : TiltedMixture
    partition : LogPartition
    left : dict
        What the method leaves behind.

    Returns
    -------
    Fitted
    """
    base = np.average(task.held_log_prob(task.bases).numpy(), weights=task.held_weight.numpy())
    history = dict(trained.history)
    gain = history.pop("gain")
    given = torch.cat(list(task.held))
    factor = task.columns.log_factors_of(task.given[given].numpy())
    base += np.average(factor, weights=task.held_weight.numpy())
    history["held_out_log_likelihood"] = base + gain
    attributes = {
        "history_": history,
        "n_iter_": trained.n_iter,
        "accepted_": decision.accepted,
        "held_out_gain_": decision.gain,
        "held_out_gain_std_error_": decision.std_error,
        "_summary": decision.text + _diagonal_for(task),
        "log_partition_": partition.value.numpy(),
        "log_partition_std_error_": partition.std_error.numpy(),
        "effective_sample_size_": partition.ess.numpy(),
    }
    if trained.log:
        attributes["training_log_"] = trained.log
    if trained.log_partition is not None:
        attributes["log_partition_learned_"] = trained.log_partition.numpy()
        # before recalibration: that is the f whose log Z was learned
        measured = task.log_partition(trained.pool)
        gap = (trained.log_partition - measured).abs().max().item()
        if gap > MAX_LEARNED_GAP:
            warn(
                f"the learned log Z differs from the measured one by {gap:.2f} nats; the measured "
                "one is used. Train longer, or with a lower learning rate, by "
                "energy_model=Network(max_epochs=..., learning_rate=...).",
                ConvergenceWarning,
            )
    model = model.to(task.model_device)
    return Fitted(model, held_out_scores(task, model), task.judges, attributes | left)


def _diagonal_for(task):
    """Why mixtures have diagonal covariances, in words; nothing where they need not."""
    layout = task.layout
    n_patterns = len(patterns(layout.values(task.given))) if layout.n_states else 1
    if n_patterns <= MAX_PATTERNS:
        return ""
    return (
        f"; mixtures have diagonal covariances, because rows have values in {n_patterns} different "
        "sets of columns"
    )


def held_out_scores(task: TiltedTask, model: TiltedMixture) -> FloatArray:
    """Log-density of every row, in the units of X, under the member that has not seen it."""
    scores = np.full(task.n_rows, np.nan)
    x = task.given.to(model.log_partition.device)
    values = side_by_side(
        lambda k, held: model.log_member(k, x[held.to(x.device)]),
        enumerate(task.held), task.n_jobs, in_threads=True,
    )  # fmt: skip
    for held, log_density in zip(task.held, values, strict=True):
        scores[held.numpy()] = log_density.cpu().numpy()
    return scores + task.columns.log_factors_of(task.given.numpy())
