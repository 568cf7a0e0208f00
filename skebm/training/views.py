"""A fit of an outlier detector: views, a common scale, and the lowest of them."""

from collections.abc import Sequence
from typing import Any

import torch

from skebm._statistics import weighted_quantile
from skebm.bases import StackedBase, fit_views, stacking_weights
from skebm.models import CommonScale, LowestView

from .acceptance import Decision
from .distributions import Distributions
from .fit import Recipe, finished, fit_tilted, measure
from .task import Task
from .tilted_task import tilted_task
from .trained import Fitted, Trained

MIN_WEIGHT = 0.05
"""Least share of a view in the mixture that proposes rows: each has some where it alone is high."""

N_KNOTS = 128
"""Quantiles that the common scale goes through, at levels that are evenly spread in log-odds."""


def fit_lowest_view(
    task: Task, names: Sequence[str], n_partition_samples: int | str, density: Recipe | None = None
) -> Fitted:
    """Fit views and the energy that is the lowest of them.

    The common scale is that of their mixture, at rows that it has not seen.

    Parameters
    ----------
    task : Task
    names : sequence of str
        Of `skebm.bases.VIEWS`.
    n_partition_samples : int or "auto"
    density : Recipe, default=None
        Of tilted bases that are one more view.

    Returns
    -------
    Fitted
        With `views_`, the names, among the attributes.
    """
    with torch.no_grad():
        views = fit_views(
            task.x, task.weight, task.splits, names, task.seeds.rng("views"),
            lambda name: task.progress.stage(f"view: {name}"), task.n_jobs, task.layout,
        )  # fmt: skip
        model: Any = None
        attributes = {"views_": list(names)}
        if density is not None:
            fitted = fit_tilted(task, density)
            model = fitted.model.cpu()
            attributes["views_"].append("density")
            views = [[*own, q] for own, q in zip(views, model.proposals, strict=True)]
        lowest = _lowest_view(task, views, model)
        bases = list(lowest.bases)
        own = tilted_task(task, Distributions(bases, bases, bases), lowest.features)
        partition = measure(lowest, own, n_partition_samples, for_ranking=True)
        share = (partition.ess / partition.n_samples).mean().item()
        text = (
            f"lowest of the views {', '.join(attributes['views_'])}: draws of their mixture count "
            f"{share:.2g} each, and no energy was trained"
        )
        decision = Decision("views", 0.0, 0.0, text)
        return finished(own, Trained.nothing(own), decision, lowest, partition, attributes)


def _lowest_view(task, views, density):
    """The model without log Z."""
    pairs = list(zip(views, task.held, strict=True))
    logs = torch.cat(
        [torch.stack([q.log_prob(task.given[held]) for q in own], dim=1) for own, held in pairs]
    )
    weights = stacking_weights(logs, task.held_weight, floor=0.0).clamp(min=MIN_WEIGHT)
    bases = [StackedBase(own, weights) for own in views]
    mixture = (logs + bases[0].weights.log()).logsumexp(1)
    if density is not None:
        own = [density.log_member(k, task.given[held]) for k, held in enumerate(task.held)]
        logs[:, -1] = torch.cat(own)
    return LowestView(bases, common_scale(logs, mixture, task.held_weight), task.layout, density)


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
