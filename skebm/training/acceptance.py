"""Whether a tilt is kept: held-out gain, recalibration, a guard on the effective sample size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize

from skebm._typing import Distribution
from skebm.bases import MAX_FIT_ROWS, fit_gaussian_mixture
from skebm.models import MarginalBin, ModesAndBackground, TiltedMixture
from skebm.partition import ess, largest_power

from .marginals import misplaced_bin, share_of_bin, with_bins
from .task import Task
from .tilted_task import TiltedTask
from .trained import Trained

MAX_MODES, ROWS_PER_MODE, ROWS_PER_COLUMN = 8, 50, 10
"""Size of the mixture whose components recalibration may weight: so many rows for each mode, and so
many more for each column."""

MAX_BINS = 5
"""Bins of columns whose masses recalibration may match; then the tilt is rejected."""

MIN_ESS = 0.02
"""Effective sample size, as a fraction, below which importance sampling is not trusted."""


def accept(
    task: TiltedTask, trained: Trained, *, recalibrates: bool, always: bool
) -> "tuple[TiltedMixture, Decision]":
    """The tilted bases where held-out likelihood favours them; else a candidate or the bases.

    Parameters
    ----------
    task : TiltedTask
    trained : Trained
    recalibrates : bool
    always : bool
        Whether a tilt is kept without a test: where there is no base to fall back on.

    Returns
    -------
    model : TiltedMixture
    decision : Decision
    """
    model, decision = _tilted(task, trained, recalibrates, always)
    accepted = decision.is_tilted
    reached = task.mean_gain(trained.held, trained.pool).item() if accepted else 0.0
    for candidate in trained.candidates:
        gain, error = mean_and_error(task, candidate.gain)
        if gain > max(reached, 2.0 * error):
            text = f"{candidate.name} accepted in place of base and tilt: {in_nats(gain, error)}"
            model, reached = candidate.model, gain
            decision = Decision(candidate.name, gain, error, text)
    return model, decision


@dataclass(frozen=True)
class Decision:
    """What a fit has kept, and why.

    Attributes
    ----------
    accepted : str
        "tilt"; "recalibration", where the tilt is the weights of modes alone; "base"; "views", the
        lowest of several; or the name of a candidate.
    gain, std_error : float
        Of the held-out log-likelihood over the base, in nats per row: of what was accepted, or of
        the tilt that was rejected; 0 where there was none.
    text : str
        The same as a sentence.
    """

    accepted: str
    gain: float
    std_error: float
    text: str

    @property
    def is_tilted(self) -> bool:
        """Whether the model is tilted by the energies that were trained."""
        return self.accepted in ("tilt", "recalibration")


NOT_TRAINED = Decision("base", 0.0, 0.0, "base alone: no energy was trained")


def in_nats(gain: float, error: float) -> str:
    """A gain in words."""
    return f"gain {gain:.3g} +- {error:.2g} nats per row on held-out rows"


def _tilted(task, trained, recalibrates, always):
    """The tilted bases, or the bases, and the decision."""
    untilted = TiltedMixture(task.bases, task.proposals, task.features, None)
    # a warm start that finds nothing better stays at the tilt it came with, and the weights of
    # modes may be wrong where training found nothing
    changes = (
        trained.n_iter > 0
        or (task.start is not None and not task.start.is_untilted)
        or task.weights_data_modes
    )
    if trained.energy is None:
        return untilted, NOT_TRAINED
    nothing = Decision("base", 0.0, 0.0, "base kept: training found no gain")
    if not changes:
        return untilted, nothing
    bins: list[MarginalBin] = []
    shares = task.responsibilities()  # once: of kernel densities they are dear
    while True:
        inverse_temperature, mode_weights, gain = recalibrate(
            task, trained.held, trained.pool, shares,
            only_bins=not recalibrates, n_bins=len(bins),
        )  # fmt: skip
        pool = inverse_temperature * trained.pool
        if len(mode_weights):
            pool = pool + shares[1] @ mode_weights
        mean, error = gain_and_error(task, gain, pool)
        told = in_nats(mean, error)
        if not always and not mean > 2.0 * error:
            if trained.n_iter == 0 and not len(mode_weights):
                return untilted, nothing
            return untilted, Decision("base", mean, error, f"base kept; tilt rejected: {told}")
        factor = guard(task, pool)
        wrong = None if always else misplaced_bin(task, factor * pool)
        if wrong is None:
            break
        if len(bins) == MAX_BINS:
            text = f"base kept; tilt rejected: {told}, but its mass is not where the rows are"
            return untilted, Decision("base", mean, error, text)
        bins.append(wrong)
        shares = share_of_bin(task, shares, wrong)
    model = TiltedMixture(task.bases, task.proposals, task.features, trained.energy)
    model.calibrate(factor * inverse_temperature, factor * mode_weights, with_bins(task, bins))
    if always:
        text = f"tilt kept without a test, as there is no base: {told}, over the confining Gaussian"
        return model, Decision("tilt", mean, error, text)
    if trained.n_iter == 0 and task.start is None:
        text = f"weights of modes accepted, without an energy: {told}"
        return model, Decision("recalibration", mean, error, text)
    return model, Decision("tilt", mean, error, f"tilt accepted: {told}")


def mean_and_error(task: TiltedTask, values: torch.Tensor) -> tuple[float, float]:
    """Weighted mean of values at the held-out rows, and its standard error over the rows."""
    share = task.held_weight
    share = share / share.sum()
    mean = (share @ values).item()
    return mean, (share.square() @ (values - mean).square()).sqrt().item()


def gain_and_error(
    task: TiltedTask, gain: torch.Tensor, pool_tilt: torch.Tensor
) -> tuple[float, float]:
    """Mean gain, and its standard error (rows and log Z)."""
    mean, error = mean_and_error(task, gain)
    weight = task.held_weight
    masses = torch.stack([task.weight[held].sum() for held in task.held]) / weight.sum()
    n = pool_tilt.shape[-1]
    share = ess(pool_tilt + task.pool_log_ratio) / n
    # rounding makes the share of equal weights a little more than one
    log_z = (masses.square() * (1 / share - 1).clamp(min=0.0) / n).sum().item()
    return mean, math.sqrt(error**2 + log_z)


def guard(task: TiltedTask, pool_tilt: torch.Tensor) -> float:
    """Largest factor in (0, 1] that keeps the effective sample size of every member honest.

    Parameters
    ----------
    task : TiltedTask
    pool_tilt : Tensor of shape (K, m)

    Returns
    -------
    float
    """
    return largest_power(pool_tilt, MIN_ESS, offset=task.pool_log_ratio).min().item()


def recalibrate(
    task: TiltedTask,
    held_f: Sequence[torch.Tensor],
    pool_f: torch.Tensor,
    shares: tuple[list[torch.Tensor], torch.Tensor] | None,
    *,
    ridge: tuple[float, float] = (1e-2, 1e-3),
    n_bins: int = 0,
    only_bins: bool = False,
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Exponential tilt on [f, responsibilities of modes] by maximum likelihood on held-out rows.

    Convex: maximises the mean over held-out rows of theta . phi(x) - log E_q exp(theta . phi),
    with a ridge towards theta = (1, 0), by L-BFGS. Kept only if it raises the likelihood in a
    two-fold check, each half judged with the theta of the other half.

    Parameters
    ----------
    task : TiltedTask
    held_f : list of K tensors (n_k,)
    pool_f : Tensor (K, m)
    shares : tuple or None
        Responsibilities of the modes at held-out rows and pool, as of `task.responsibilities`.
    ridge : (float, float), default=(1e-2, 1e-3)
        For the factor on f and for the weights of the modes.
    n_bins : int, default=0
        How many of the modes, the last ones, are bins whose masses are to be matched: these
        weights are free without a check, and without a ridge.
    only_bins : bool, default=False
        Whether nothing else is changed.

    Returns
    -------
    inverse_temperature : float
        Factor on f; at least 1 with several members.
    mode_weights : Tensor of shape (n_components,), or (0,) if they are not needed
    gain : Tensor of shape (n_held,)
        Held-out log p - log q of every row, with the theta of the half that the row is not in.
    """
    held, pool = [f[:, None] for f in held_f], pool_f[..., None]
    if shares is not None:
        held = [torch.cat(pair, dim=1) for pair in zip(held, shares[0], strict=True)]
        pool = torch.cat([pool, shares[1]], dim=-1)
    n_features = pool.shape[-1]
    identity = torch.zeros(n_features, dtype=torch.float64)
    identity[0] = 1.0
    penalty = torch.full((n_features,), ridge[1], dtype=torch.float64)
    penalty[0] = ridge[0]
    bins = list(range(n_features - n_bins, n_features))
    penalty[bins] = 0.0

    def gain(theta):
        return task.gain([h @ theta for h in held], pool @ theta)

    def solve(row_weight, columns):
        def loss(free):
            change = torch.zeros(n_features, dtype=torch.float64)
            change[columns] = torch.as_tensor(free)
            change.requires_grad_(True)
            with torch.enable_grad():
                value = penalty @ change.square() - row_weight @ gain(identity + change)
            return value.item(), torch.autograd.grad(value, change)[0][columns].numpy()

        theta = identity.clone()
        if columns:
            theta[columns] += _minimum(loss, len(columns))
        return theta

    def fit(row_weight, columns):
        row_weight = row_weight / row_weight.sum()
        theta = solve(row_weight, columns)
        if len(task) > 1 and theta[0] < 1.0:
            # held-out rows see one member; the average of K is less sure of itself already
            theta = solve(row_weight, [c for c in columns if c])
        return theta

    weight = task.held_weight
    share = weight / weight.sum()
    half = torch.arange(len(weight)) % 2

    def crossed(columns):
        return torch.where(
            half == 0, gain(fit(weight * half, columns)), gain(fit(weight * (1 - half), columns))
        )

    best, best_columns = (crossed(bins), bins) if bins else (gain(identity), None)
    for columns in () if only_bins else ([0, *bins], list(range(n_features))):
        value = crossed(columns)
        rise = (share @ (value - best)).item()
        if rise > 0.0 and math.isfinite(rise):
            best, best_columns = value, columns
    theta = identity if best_columns is None else fit(weight, best_columns)
    return theta[0].item(), theta[1:] if theta[1:].any() else theta[:0], best


def _minimum(loss, n):
    """Where a convex function of n numbers is least; it returns its gradient, too."""
    # scipy's, because those of torch import its compiler, which takes longer than a fit may
    options = {"maxiter": 100, "ftol": 1e-12, "gtol": 1e-7}
    found = minimize(loss, np.zeros(n), jac=True, method="L-BFGS-B", options=options)
    return torch.as_tensor(found.x)


def data_modes(task: Task, bases: Sequence[Distribution]) -> list[ModesAndBackground] | None:
    """Mixtures whose components recalibration may weight, where training hardly sees modes.

    Parameters
    ----------
    task : Task
    bases : list of K distributions

    Returns
    -------
    list of K ModesAndBackground, or None where there are too few rows for two modes
    """
    n_modes = min(MAX_MODES, task.n_rows // (ROWS_PER_MODE + ROWS_PER_COLUMN * task.n_features))
    if n_modes < 2:
        return None

    def fit(rows, rng, start=None):
        rows = rows[torch.randperm(len(rows), generator=rng)[:MAX_FIT_ROWS]]
        return fit_gaussian_mixture(
            task.x[rows], n_modes, rng, diagonal=True, sample_weight=task.weight[rows],
            start=start,
        )  # fmt: skip

    # one start, so that components mean the same; then each from its own rows, because a mixture
    # that has seen the held-out rows would favour them
    shared = fit(torch.arange(len(task.x)), task.seeds.rng("modes, shared"))
    return [
        ModesAndBackground(fit(train, task.seeds.rng("modes", k), shared), base)
        for k, ((train, _), base) in enumerate(zip(task.splits, bases, strict=True))
    ]
