"""A fit of an outlier detector: views, a common scale, and the lowest of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from skebm._statistics import weighted_quantile
from skebm._warnings import warn
from skebm.bases import IN_OWN_COLUMNS, StackedBase, fit_views, stacking_weights
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.models import CommonScale, LowestView, TiltedMixture
from skebm.partition import MIN_ESS_SHARE, sequential_monte_carlo
from skebm.samplers import random_walk

from .acceptance import Decision
from .distributions import Distributions
from .fit import by_importance, finished
from .task import Task
from .tilted_task import tilted_task
from .trained import Fitted, Trained

MIN_WEIGHT = 0.05
"""Least share of a view in the mixture that proposes rows: each has some where it alone is high."""

MAX_PARTITION_SAMPLES = 16_384
"""Per member: every sample costs as much as thousands of kernels."""

ANNEALING: dict[str, Any] = {
    "n_particles": 64, "n_runs": 16, "n_pilot": 512, "n_moves": 4, "ess_share": 0.5,
}  # fmt: skip
"""Of log Z, where draws of the mixture of the views are not enough."""

MAX_ERROR = 0.25
"""Standard error of an annealed log Z, in nats, from which on a warning says so."""

N_KNOTS = 128
"""Quantiles that the common scale goes through, at levels that are evenly spread in log-odds."""

TRIMMED_SHARE = 0.1
"""Of rows that may be bad so many are left out of what the views learn from, those that are oddest
to the members that have not seen them."""


def fit_lowest_view(
    task: Task,
    names: Sequence[str],
    n_partition_samples: int | str,
    *,
    trims: bool = False,
    density: TiltedMixture | None = None,
) -> Fitted:
    """Fit views and the energy that is the lowest of them.

    The common scale is that of their mixture, at rows that it has not seen.

    Parameters
    ----------
    task : Task
    names : sequence of str
        Of `skebm.bases.VIEWS`.
    n_partition_samples : int or "auto"
    trims : bool, default=False
        Whether views are fitted again without the oddest rows.
    density : TiltedMixture, default=None
        Fitted to the same folds, on the CPU: one more view.

    Returns
    -------
    Fitted
        With `views_`, the names, among the attributes.
    """
    with torch.no_grad():
        model = _lowest_view(task, names, task.splits, density)
        if trims:
            model = _lowest_view(task, names, _trimmed(task, model), density)
        bases = list(model.bases)
        own = tilted_task(task, Distributions(bases, bases, bases), model.features)
        partition = _measure(model, own, n_partition_samples)
        share = (partition.ess / partition.n_samples).mean().item()
        every = list(names) if density is None else [*names, "density"]
        text = (
            f"lowest of the views {', '.join(every)}: draws of their mixture count {share:.2g} "
            "each, and no energy was trained"
        )
        decision = Decision("views", 0.0, 0.0, text)
        return finished(own, Trained.nothing(own), decision, model, partition, {"views_": every})


def _measure(model, task, n_partition_samples):
    """Log Z of every member, kept in the model; of all together where it cannot be told of each."""
    partition = by_importance(model, task, n_partition_samples, MAX_PARTITION_SAMPLES)
    share = (partition.ess / partition.n_samples).min().item()
    if share < MIN_ESS_SHARE:
        # members differ by little, and errors of their own would shuffle the ranks of rows
        value = partition.value.logsumexp(0).item() - math.log(model.n_members)
        error = partition.std_error.max().item()
        can_anneal = task.layout is None or not task.layout.n_states  # of states nothing moves
        if can_anneal:
            value, error = _annealed(model, task)
        one = torch.ones_like(partition.value)
        partition = partition._replace(value=value * one, std_error=error * one)
        if not can_anneal or error > MAX_ERROR:
            after = " after annealing" if can_anneal else ", if not more"
            warn(
                f"log Z rests on an effective sample size of {share:.2%}, because the views have "
                f"little mass in common, and its standard error is {error:.2g} nats{after}: "
                "score_samples is off by an unknown constant, which all rows share, and draws "
                "repeat rows. The ranking does not suffer.",
                LowEffectiveSampleSizeWarning,
            )
    model.log_partition = partition.value
    model.log_partition_std_error = partition.std_error
    return partition


def _annealed(model, task):
    """Log of the mean Z of the members, and its standard error, from the mixture of all views.

    By random walks: gradients of thousands of kernels would take minutes.
    """
    task.progress.stage("log Z, annealed")
    run = sequential_monte_carlo(
        lambda x: model.log_members(x).logsumexp(0) - math.log(model.n_members),
        StackedBase(list(model.bases), torch.ones(model.n_members)),
        task.seeds.rng("log Z, annealed"),
        kernel=random_walk, **ANNEALING,
    )  # fmt: skip
    return run.partition.value, run.partition.std_error


def _lowest_view(task, names, splits, density):
    """The model without log Z."""
    views = fit_views(
        task.x, task.weight, splits, names, task.seeds.rng("views"),
        lambda name: task.progress.stage(f"view: {name}"), task.n_jobs, task.layout,
    )  # fmt: skip
    if density is not None:
        views = [[*own, q] for own, q in zip(views, density.proposals, strict=True)]
    in_own_columns = [name in IN_OWN_COLUMNS for name in names] + [False] * (density is not None)
    logs = torch.cat(
        [
            torch.stack([q.log_prob(task.given[held]) for q in own], dim=1)
            for own, held in zip(views, task.held, strict=True)
        ]
    )
    weights = stacking_weights(logs, task.held_weight, floor=0.0).clamp(min=MIN_WEIGHT)
    bases = [StackedBase(own, weights) for own in views]
    model = LowestView(bases, in_own_columns, task.layout, density)
    held = _held_out(task, model.view_log_probs)
    logs, mixture = (torch.cat(part) for part in zip(*held, strict=True))
    model.scale = common_scale(logs, mixture, task.held_weight)
    return model


def _held_out(task, function):
    """``function(k, rows)`` at the held-out rows of every member."""
    return [function(k, task.given[held]) for k, held in enumerate(task.held)]


def _trimmed(task, model):
    """The splits without the rows that are oddest to members that have not seen them."""
    scores = torch.cat(_held_out(task, lambda k, x: model.member(k).log_members(x)[0]))
    order = scores.argsort(stable=True)
    seen = task.held_weight[order].cumsum(0)
    odd = torch.cat(list(task.held))[order[seen <= TRIMMED_SHARE * seen[-1]]]
    kept = torch.ones(len(task.x), dtype=torch.bool)
    kept[odd] = False
    return [(train[kept[train]], held) for train, held in task.splits]


def common_scale(logs: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> CommonScale:
    """Maps of log-densities to a common scale, by their quantiles at the same rows.

    Parameters
    ----------
    logs : Tensor of shape (n, n_views)
    scale : Tensor of shape (n,)
    weight : Tensor of shape (n,)

    Returns
    -------
    CommonScale
    """
    outer = torch.tensor(0.5 / len(logs), dtype=torch.float64).logit().item()
    levels = torch.linspace(outer, -outer, N_KNOTS, dtype=torch.float64).sigmoid().numpy()
    quantiles = [
        torch.as_tensor(weighted_quantile(column.numpy(), weight.numpy(), levels))
        for column in [*logs.mT, scale]
    ]
    # copies and ties share a value: slopes stay finite
    steps = torch.arange(N_KNOTS, dtype=torch.float64)
    *knots, values = [q + 1e-9 * (1.0 + q.abs().max()) * steps for q in quantiles]
    return CommonScale(torch.stack(knots), values)
