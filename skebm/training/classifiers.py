"""Energies that are classifiers: data against samples of the base (NCE is classification).

A classifier of data (1) against nu times as many samples of the base (0) has the logit
f(x) - log nu at its optimum, so f is the logit plus log nu.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter

from skebm._parallel import side_by_side
from skebm._sklearn_compat import TreeBooster
from skebm.energies import (
    Boosting,
    ClassifierEnergy,
    CorrectedEnergy,
    MemberEnergies,
    SoftTrees,
    logit,
)
from skebm.partition import systematic_resampling

from .convergence import warn_if_unfinished
from .networks import in_blocks
from .tilted_task import TiltedTask
from .trained import Trained

MAX_ROWS = 200_000
"""Rows per member, at most: a random subsample of larger splits."""

MAX_NOISE = 200_000
"""Noise samples per member, at most; beyond, nu is smaller than asked for."""

SOFTNESS = (0.1, 0.25, 0.5)
"""Softness of the splits of trees: candidates beside hard ones, tried in this order as long as each
is better than the last."""

FEW_COLUMNS = 3
"""In so many columns the steps of trees are seen, so that the softest splits are taken that are
nearly as good as hard ones, and better than no trees."""

MANY_ROWS = 5_000
"""Above so many rows less noise is drawn for each."""

LAST_SHARE, WORTH_IT = 0.2, 0.002
"""No more trees are grown where this share of them, the last ones, has raised the held-out
likelihood by less than that, in nats per row."""

_PROPOSED = 2  # base samples per noise sample, where the noise is a tilted base
_FIRST, _ROUND = 50, 25  # trees before the first look at the held-out curve, and between looks
_STRIDE = 5  # stages from one point of that curve to the next
_MAX_JUDGED, _MAX_POOL = 4096, 2048  # rows, and samples per member, on which softness is chosen


@dataclass(frozen=True)
class _Contrast:
    """What the classifier of one member is fitted on and judged on."""

    z: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    judged: np.ndarray  # held-out rows, then the pool
    n_held: int
    offset: float  # log nu
    floor: float  # probabilities are kept this far from 0 and 1

    @property
    def weight_if_any(self) -> np.ndarray | None:
        """Weights, or None where all are equal: weighted quantiles would make bins slowly."""
        return None if np.ptp(self.weight) == 0 else self.weight

    def as_numbers(self, layout):
        """The same for a classifier that knows numbers only."""
        z, judged = (layout.as_numbers(torch.as_tensor(a)).numpy() for a in (self.z, self.judged))
        return replace(self, z=z, judged=judged)

    def booster(self, model, n_rows, seed, n_categories):
        """Boosting of data against noise, before the first tree."""
        classifier = model.classifier(n_rows, seed)
        return TreeBooster(
            classifier, self.z, self.y, self.weight_if_any, self.judged, n_categories
        )

    def fit_and_judge(self, classifier):
        """Fit a classifier, and return it, which may be a copy, its stages, and f at the judged
        rows, (n_stages, n).
        """
        return classifier, *_curve(self._fit(classifier), self)

    def _fit(self, classifier):
        if self.weight_if_any is None:
            return classifier.fit(self.z, self.y)
        if not has_fit_parameter(classifier, "sample_weight"):
            raise ValueError(
                f"energy_model={classifier!r} takes no sample_weight in fit; choose one that does."
            )
        return classifier.fit(self.z, self.y, sample_weight=self.weight)


def train_classifiers(
    task: TiltedTask,
    model: Any,
    *,
    noise_ratio: float | str = "auto",
    stage: str = "energy",
    start: Trained | None = None,
) -> Trained:
    """Fit one classifier per member: its rows against samples of its base, or of its base tilted.

    Parameters
    ----------
    task : TiltedTask
        Whose proposals are the bases: a classifier learns log p - log proposal.
    model : Boosting or classifier
        A classifier is cloned, and of its stages, if it has any, those count that are best on the
        held-out rows. Trees of a HistGradientBoostingClassifier are read into
        :class:`~skebm.energies.SoftTrees`.
    noise_ratio : float or "auto", default="auto"
        nu, base samples per row; "auto" is 10, and 5 above 5,000 rows.
    stage : str, default="energy"
        Of the seeds.
    start : Trained, optional
        Energies that the classifiers correct: the noise is then the base tilted by these.

    Returns
    -------
    Trained
        Without improvement, of 0 iterations.
    """
    if not task.tilts_its_proposal:
        raise ValueError(
            f"energy_model={model!r} is a classifier of data against samples of the base; it needs "
            "a base, and noise=None."
        )
    if isinstance(noise_ratio, str):
        noise_ratio = 5.0 if len(task.x) > MANY_ROWS else 10.0
    start = Trained.nothing(task) if start is None else start
    members = [(task, k, noise_ratio, start, stage) for k in range(len(task))]
    contrasts = side_by_side(_contrast, members, task.n_jobs, in_threads=True)
    if isinstance(model, Boosting):
        energy, history = _boost(task, model, contrasts, start, stage)
        n_iter, values = energy.members[0].n_trees, None
    else:
        energy, n_iter, history, values = _fit_classifiers(task, model, contrasts, start)
    if values is None:
        members = list(zip(energy.members, task.held, task.pool_z, strict=True))
        pairs = side_by_side(
            lambda f, held, pool: (f(task.z[held]), f(pool)), members, task.n_jobs, in_threads=True
        )
        held = [first + f for first, (f, _) in zip(start.held, pairs, strict=True)]
        values = held, start.pool + torch.stack([f for _, f in pairs])
    if start.energy is not None:
        energy = CorrectedEnergy(start.energy, energy)
    return Trained(energy, *values, n_iter, history)


def _boost(task, model, contrasts, start, stage):
    """Boosted trees of all members, until their held-out likelihood rises no more.

    Returns
    -------
    energy : MemberEnergies
        Of as many trees as are best.
    history : dict of ndarrays
        Numbers of trees, 0 first, and the gains after them.
    """
    # members side by side, one thread each: a single tree is too small a job to be shared out
    seeds = [task.seeds.of(f"{stage}, trees", k) for k in range(len(contrasts))]
    boosters = side_by_side(
        _Contrast.booster,
        [
            (c, model, len(task.x), seed, task.layout.sizes)
            for c, seed in zip(contrasts, seeds, strict=True)
        ],
        task.n_jobs,
    )
    most, n_trees = model.max_iter, 0
    stages, gains = [0], [task.mean_gain(start.held, start.pool).item()]
    while n_trees < most:
        more = min(_ROUND if n_trees else _FIRST, most - n_trees)
        grown = side_by_side(_grow, [(booster, more) for booster in boosters], task.n_jobs)
        boosters, f = zip(*grown, strict=True)
        stages += [n for n in range(n_trees + 1, n_trees + more + 1) if _is_looked_at(n)]
        n_trees += more
        f = [logits + c.offset for logits, c in zip(f, contrasts, strict=True)]
        held = [
            v[:, : c.n_held] + first for v, c, first in zip(f, contrasts, start.held, strict=True)
        ]
        pool = torch.stack([v[:, c.n_held :] for v, c in zip(f, contrasts, strict=True)], dim=1)
        gains += task.mean_gain(held, pool + start.pool).tolist()
        task.progress.stage("energy", n_trees, most, gain=f"{max(gains):.3f} nats")
        before = [g for n, g in zip(stages, gains, strict=True) if n <= (1 - LAST_SHARE) * n_trees]
        if model.early_stopping and max(gains) < max(before) + WORTH_IT:
            break
    history = {"n_iter": np.array(stages), "gain": np.array(gains)}
    if model.early_stopping:
        n_trees = stages[int(np.argmax(gains))]
        looked_at = {"epoch": history["n_iter"], "validation_gain": history["gain"]}
        last = math.ceil(LAST_SHARE * most)
        warn_if_unfinished(looked_at, most, last, "max_iter of Boosting(...)")
    trees = [
        SoftTrees.from_nodes(b.nodes(n_trees), task.n_features, offset=c.offset)
        for b, c in zip(boosters, contrasts, strict=True)
    ]
    return _softened(task, MemberEnergies(trees), start), history


def _grow(booster, n_trees):
    """Grow trees, and return the booster, which may be a copy, and the logits at the judged rows
    after those looked at, (n_stages, n).
    """
    # the rows of the contrast stay where they are: a process is sent the booster alone
    logits = []
    for _ in range(n_trees):
        booster.grow()
        if _is_looked_at(booster.n_trees):
            logits.append(booster.logit.copy())
    return booster, torch.as_tensor(np.array(logits).reshape(-1, len(booster.logit)))


def _fit_classifiers(task, model, contrasts, start):
    """Fit clones of a classifier of the user.

    Returns
    -------
    energy : MemberEnergies
        Of the stage that is best.
    n_iter : int
        That stage.
    history : dict of ndarrays
        Stages that were looked at, where 0 is f = 0, and their gains.
    values : tuple or None
        f at held-out rows and pool, with that of `start`; None where trees were read.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier  # here: its import is slow

    layout, of_trees = task.layout, isinstance(model, HistGradientBoostingClassifier)
    if layout.n_states and of_trees:
        model = clone(model).set_params(categorical_features=list(range(layout.n_states)))  # pyright: ignore[reportAttributeAccessIssue]
    elif layout.n_states:
        contrasts = [c.as_numbers(layout) for c in contrasts]
    fitted = side_by_side(
        _Contrast.fit_and_judge, [(c, clone(model)) for c in contrasts], task.n_jobs
    )
    classifiers, curves = [c for c, _, _ in fitted], [f for _, _, f in fitted]
    stages = fitted[0][1]
    judged = list(zip(curves, contrasts, start.held, strict=True))
    held = [f[:, : contrast.n_held] + first for f, contrast, first in judged]
    pool = torch.stack([f[:, c.n_held :] for f, c, _ in judged], dim=1) + start.pool
    gain = task.mean_gain(held, pool)
    best = int(gain.argmax())
    task.progress.stage("energy", 1, 1, gain=f"{gain.max().item():.3f} nats")
    history = {"n_iter": np.array(stages), "gain": gain.numpy()}
    if of_trees and not layout.n_states:  # it codes states in its own way
        trees = [
            SoftTrees.from_hist_gradient_boosting(c, n_trees=stages[best], offset=contrast.offset)
            for c, contrast in zip(classifiers, contrasts, strict=True)
        ]
        return _softened(task, MemberEnergies(trees), start), stages[best], history, None
    staged = hasattr(classifiers[0], "staged_predict_proba")
    energy = MemberEnergies(
        ClassifierEnergy(
            c,
            k.offset,
            stages[best] if staged else None,
            k.floor,
            layout if layout.n_states and not of_trees else None,
        )
        for c, k in zip(classifiers, contrasts, strict=True)
    )
    return energy, stages[best], history, ([h[best] for h in held], pool[best])


def _contrast(task, k, noise_ratio, start, stage):
    rng = task.seeds.rng(stage, k)
    train, held = task.splits[k]
    train = train[torch.randperm(len(train), generator=rng)[:MAX_ROWS]]
    n_noise = max(1, min(round(noise_ratio * len(train)), MAX_NOISE))
    noise = _noise(task, k, n_noise, start, rng)
    weight = task.weight[train]
    return _Contrast(
        z=torch.cat([task.z[train], noise]).numpy(),
        y=np.repeat([1, 0], [len(train), n_noise]),
        weight=torch.cat([weight, weight.mean().expand(n_noise)]).numpy(),
        judged=torch.cat([task.z[held], task.pool_z[k]]).numpy(),
        n_held=len(held),
        offset=math.log(n_noise / len(train)),
        floor=1.0 / (len(train) + n_noise),
    )


def _noise(task, k, n, start, rng):
    """Samples of base k, tilted where there is a tilt, as the energies see them, (n, d)."""
    proposal = task.proposals[k]
    if start.energy is None:
        return task.features(proposal.sample(n, rng))
    z = task.features(proposal.sample(_PROPOSED * n, rng))
    weights = in_blocks(start.energy.member(k), z[None])[0].softmax(0)
    offset = torch.rand(1, generator=rng, dtype=torch.float32)
    return z[systematic_resampling(weights, offset, n)]


def _is_looked_at(n_trees):
    return n_trees % _STRIDE == 0 or n_trees < _STRIDE


def _curve(classifier, contrast):
    """f at the judged rows after several stages; before the first, f = 0."""
    if hasattr(classifier, "staged_predict_proba"):
        staged = enumerate(classifier.staged_predict_proba(contrast.judged), start=1)
        kept = [(i, p) for i, p in staged if _is_looked_at(i)]
    else:
        n_iter = getattr(classifier, "n_iter_", 1)
        n_iter = int(np.max(n_iter)) if np.size(n_iter) else 1
        kept = [(n_iter, classifier.predict_proba(contrast.judged))]
    f = [np.zeros(len(contrast.judged))] + [
        logit(p, contrast.floor) + contrast.offset for _, p in kept
    ]
    return [0] + [i for i, _ in kept], torch.as_tensor(np.stack(f))


def _softened(task, energy, start):
    """Trees with the softness that suits the held-out rows best."""
    share = -(-_MAX_JUDGED // len(task))
    judged = [held[:share] for held in task.held]
    weight = torch.cat([task.weight[h] for h in judged])
    weight = weight / weight.sum()

    def normalized(k):
        f, pool = energy.members[k], start.pool[k, :_MAX_POOL]
        log_z = (pool + f(task.pool_z[k, :_MAX_POOL])).logsumexp(0) - math.log(len(pool))
        return f(task.z[judged[k]]) - log_z

    def gain(softness):
        energy.set_softness(softness)
        members = [(k,) for k in range(len(task))]
        f = side_by_side(normalized, members, task.n_jobs, in_threads=True)
        return (torch.cat(f) @ weight).item()

    if not energy.members[0].n_trees:
        return energy
    if task.n_features <= FEW_COLUMNS:
        pool = start.pool[:, :_MAX_POOL]
        nothing = (pool.logsumexp(1) - math.log(pool.shape[1])).tolist()
        shares = [part.sum().item() for part in weight.split([len(h) for h in judged])]
        least = -sum(z * share for z, share in zip(nothing, shares, strict=True))
        gains = {softness: gain(softness) for softness in (0.0, *SOFTNESS)}
        least = min(gains[0.0], max(least, gains[0.0] - WORTH_IT))
        best = max(c for c, value in gains.items() if value >= least)
    else:
        best, reached = 0.0, gain(0.0)
        for softness in SOFTNESS:  # dearer and dearer, so that each has to be worth it
            value = gain(softness)
            if value < reached + WORTH_IT:
                break
            best, reached = softness, value
    energy.set_softness(best)
    return energy
