"""From what a user writes for `base`, `noise` or `flow` to one distribution per member."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch.distributions import Distribution

from skebm._layout import Layout
from skebm.bases import (
    CANDIDATES,
    MAX_FIT_ROWS,
    WITH_STATES,
    AffineTransform,
    ConfiningGaussian,
    Coordinates,
    GaussianMixtureBase,
    MarginalGaussianization,
    SklearnDensity,
    SklearnDensityBase,
    StackedBase,
    TorchDistributionBase,
    TransformedBase,
    ValuesTransform,
    auto_candidates,
    auto_flows,
    build_flow,
    fit_bases,
    train_flows,
)

from .task import Task

CONFINEMENT = 3.0
"""``base=None``: width of the confining Gaussian, in standard deviations of the columns."""


@dataclass(frozen=True)
class Distributions:
    """What the members of a fit stand on; the attributes are those of `TiltedTask`."""

    bases: list[Any]
    proposals: list[Any]
    noise: list[Any]
    flow: torch.nn.Module | None = None
    coordinates: Coordinates | None = None


def make_distributions(task: Task, base: Any, noise: Any) -> Distributions:
    """Fit bases, proposals and noise of all members.

    Parameters
    ----------
    task : Task
    base : str, list of str, distribution or None
        As the user gives it.
    noise : the same
        None is the base; without one, "auto" and the confining Gaussian, half and half.

    Returns
    -------
    Distributions
    """
    bases = resolve(task, base, "base")
    if noise is not None:
        given = resolve(task, noise, "noise")
        # noise need not cover the base; log Z and samples come from both
        return Distributions(bases, halves(given, bases), given)
    if base is not None:
        return Distributions(bases, bases, bases)
    # half of the noise lies where only the confining distribution has mass: f is then learned, and
    # log Z measured, there too
    proposals = halves(resolve(task, "auto", "noise"), bases)
    return Distributions(bases, proposals, proposals)


def make_flows(
    task: Task, flow: Any, base: str | None, batch_size: int, effort: float
) -> Distributions:
    """Fit normalizing flows by maximum likelihood, member by member.

    Parameters
    ----------
    task : Task
    flow : str, flow or callable
        As the user gives it, for :func:`skebm.bases.build_flow`.
    base : "flow" or None
        Whether the flows are the bases, or only propose and make noise beside a confining Gaussian.
    batch_size : int
    effort : float
        As in :func:`skebm.bases.train_flows`.

    Returns
    -------
    Distributions
    """
    # not the coordinates of the energies, which come from all rows: they are no density, but the
    # flows are, and held-out rows must not have shaped them
    coordinates = Coordinates(
        [
            gaussianization(task.x[rows], task.weight[rows], task.seeds.rng("coordinates", k))
            for k, rows in enumerate(task.train)
        ]
    )
    rng = task.seeds.rng("flow")
    flow = build_flow(flow, task.n_features, len(task), rng=rng)
    train_flows(
        flow, coordinates(task.x), task.weight, task.splits, rng=rng, batch_size=batch_size,
        effort=effort, device=task.device, progress=partial(task.progress.stage, "flow"),
    )  # fmt: skip
    return on_flows(task, flow.cpu(), coordinates, base)


def on_flows(task: Task, flow: Any, coordinates: Coordinates, base: Any) -> Distributions:
    """Distributions of members whose flows are fitted already; arguments as of `make_flows`."""
    flows = coordinates.distributions(flow)
    if base is not None:
        return Distributions(flows, flows, flows, flow, coordinates)
    bases = resolve(task, None, "base")
    return Distributions(bases, halves(flows, bases), flows, flow, coordinates)


def gaussianization(
    x: torch.Tensor, weight: torch.Tensor, rng: torch.Generator, layout: Layout | None = None
) -> MarginalGaussianization | ValuesTransform:
    """Marginal Gaussianisation of rows, learned from a subsample of many."""
    some = torch.randperm(len(x), generator=rng)[:MAX_FIT_ROWS]
    rows, share = x[some], weight[some].numpy()
    if layout is None or not layout.n_states:
        return MarginalGaussianization.fit(rows.numpy(), sample_weight=share)
    transform = MarginalGaussianization.fit(layout.values(rows).numpy(), sample_weight=share)
    return ValuesTransform(layout, transform)


def halves(distributions: Sequence[Any], others: Sequence[Any]) -> list[StackedBase]:
    """Mixtures of two distributions in equal parts, one per member."""
    pairs = zip(distributions, others, strict=True)
    return [StackedBase([one, other], [0.5, 0.5]) for one, other in pairs]


def resolve(task: Task, given: Any, where: str) -> list[Any]:
    """One distribution per member, on standardised columns.

    Parameters
    ----------
    task : Task
    given : str, list of str, Distribution, density estimator or None
        Names of candidates are fitted per split, several are stacked; distributions that are
        already fitted (of torch, or a fitted scikit-learn density) are in the units of X and serve
        all members; an unfitted scikit-learn density is cloned and fitted on standardised columns.
        None is the confining Gaussian.
    where : str
        Name of the parameter, for messages and seeds.

    Returns
    -------
    list of nn.Module
    """
    if given is None:
        variance = torch.as_tensor((CONFINEMENT * task.columns.spread) ** 2)
        center = task.weight @ task.x / task.weight.sum()
        return [ConfiningGaussian(center, variance)] * len(task)
    if task.layout.n_states:
        _check_for_states(given, where, task)
    candidates = _candidates(given, where, task)
    if candidates is None:
        distributions = [_fixed(given, where, task.columns)] * len(task)
    else:
        is_auto = isinstance(given, str) and given == "auto" and where == "base"
        only_numbers = not task.layout.n_states
        flows = auto_flows(*task.x.shape) if is_auto and only_numbers else ()
        done, n_stages = itertools.count(), len(candidates) + 2 * bool(flows)
        distributions = fit_bases(
            task.x, task.weight, task.splits, candidates, task.seeds.rng(where),
            lambda name: task.progress.stage(f"{where}: {name}", next(done), n_stages),
            task.n_jobs, task.layout, flows,
        )  # fmt: skip
    if candidates is None or hasattr(given, "fit"):  # not one of ours
        _check(task, distributions, given, where)
    return distributions


def _check(task, distributions, given, where):
    """Refuse distributions of the user that cannot be drawn from, or leave rows without density."""
    try:
        for distribution in {id(q): q for q in distributions}.values():
            distribution.sample(1, task.seeds.rng(where))
    except NotImplementedError as error:
        raise ValueError(
            f"{where}={given!r} cannot draw rows (its sample is not implemented), which log Z and "
            'sample need; take one that can, such as KernelDensity(kernel="gaussian").'
        ) from error
    n_lost = sum(
        int((~q.log_prob(task.x[held]).isfinite()).sum())
        for q, held in zip(distributions, task.held, strict=True)
    )
    if n_lost:
        raise ValueError(
            f"{where}={given!r} gives no density to {n_lost} of the held-out rows, and "
            "no tilt can put that right; take one with a density everywhere, such as "
            'KernelDensity(kernel="gaussian"), "auto" or "kde".'
        )


def _check_for_states(given, where, task):
    """Refuse what cannot be fitted to rows with states."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, tuple | list) or not {*names} <= {"auto", *WITH_STATES}:
        raise ValueError(
            f"{where}={given!r} knows numbers only, and {task.columns.first_state()}; take "
            f'"auto", or some of {list(WITH_STATES)}.'
        )


def _candidates(given, where, task):
    """Candidates to fit, or None if `given` is fitted already."""
    if isinstance(given, str):
        names = auto_candidates(*task.x.shape) if given == "auto" else (given,)
        if given == "auto" and not task.layout.n_values:  # nothing to Gaussianise
            names = tuple(name for name in names if not name.startswith("gaussianized"))
        return {name: CANDIDATES[name] for name in names}
    if isinstance(given, (list, tuple)):
        unknown = [name for name in given if not isinstance(name, str) or name not in CANDIDATES]
        if unknown or not given:
            raise ValueError(
                f"{where}={given!r} must name at least one candidate of {sorted(CANDIDATES)}."
            )
        return {name: CANDIDATES[name] for name in given}
    if isinstance(given, Distribution) or not hasattr(given, "fit"):
        return None
    try:
        check_is_fitted(given)
    except NotFittedError:
        return {type(given).__name__: SklearnDensity(given)}
    return None


def _fixed(given: Any, where, columns):
    """A distribution in the units of X, seen from standardised columns."""
    from sklearn.mixture import GaussianMixture  # here: few need it, and its import is slow

    if isinstance(given, Distribution):
        base = TorchDistributionBase(given)
    elif isinstance(given, GaussianMixture):
        base = GaussianMixtureBase(given.weights_, given.means_, _full_covariances(given))  # pyright: ignore[reportArgumentType]
    else:
        base = SklearnDensityBase(given)
    n_varying = int(columns.varying.sum())
    if base.n_features != n_varying:
        raise ValueError(
            f"{where} has {base.n_features} features, but {n_varying} columns of X vary."
        )
    return TransformedBase(AffineTransform(columns.center, columns.scale), base)


def _full_covariances(mixture):
    """Covariances of a fitted GaussianMixture as (n_components, d, d)."""
    k, d = mixture.means_.shape
    given = mixture.covariances_
    if mixture.covariance_type == "full":
        return given
    if mixture.covariance_type == "tied":
        return np.tile(given, (k, 1, 1))
    diagonal = np.broadcast_to(given if given.ndim == 2 else given[:, None], (k, d))
    return diagonal[:, :, None] * np.eye(d)
