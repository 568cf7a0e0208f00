"""Energies that are classifiers: data against samples of the base (NCE is classification).

A classifier of data (1) against nu times as many samples of the base (0) has the logit
f(x) - log nu at its optimum, so f is the logit plus log nu.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.utils.validation import has_fit_parameter

from skebm._threads import limit_threads
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

SOFTNESS = (0.0, 0.1, 0.25, 0.5)
"""Softness of the splits of trees: candidates, 0 = hard."""

MANY_ROWS = 5_000
"""Above so many rows less noise is drawn for each."""

WAITED_FOR = 0.3
"""Share of the trees without a better held-out likelihood after which no more are grown."""

_PROPOSED = 2  # base samples per noise sample, where the noise is a tilted base
_ROUND = 100  # boosting iterations before the first look at the held-out curve; then doubled
_STRIDE = 5  # stages from one point of that curve to the next
_MAX_JUDGED = 4096  # rows and pool samples per member on which the softness is chosen


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

    def fit_and_judge(self, classifier, early_stopping):
        """Fit, and return the stages looked at and f at the judged rows, (n_stages, n)."""
        with limit_threads(1):
            return _curve(self._fit(classifier), self, early_stopping)

    def _fit(self, classifier):
        if np.ptp(self.weight) == 0:  # boosting bins by weighted quantiles otherwise, slowly
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
    contrasts = [_contrast(task, k, noise_ratio, start, stage) for k in range(len(task))]
    classifiers, stages, held, pool = _fit_all(task, model, contrasts, start, stage)
    gain = task.mean_gain(held, pool)
    best = int(gain.argmax()) if _stops_early(model) else len(stages) - 1
    history, n_stages = {"n_iter": np.array(stages), "gain": gain.numpy()}, stages[best]
    if isinstance(model, Boosting) and model.early_stopping:
        looked_at = {"epoch": history["n_iter"], "validation_gain": history["gain"]}
        last = math.ceil(WAITED_FOR * model.max_iter)
        warn_if_unfinished(looked_at, model.max_iter, last, "max_iter of Boosting(...)")
    if isinstance(classifiers[0], HistGradientBoostingClassifier):
        energy = _soft_trees(task, classifiers, contrasts, n_stages, start)
        rows = [task.z[h] for h in task.held]
        held = [first + f(z) for first, f, z in zip(start.held, energy.members, rows, strict=True)]
        pool = start.pool + energy(task.pool_z)
    else:
        staged = hasattr(classifiers[0], "staged_predict_proba")
        energy = MemberEnergies(
            ClassifierEnergy(c, k.offset, n_stages if staged else None, k.floor)
            for c, k in zip(classifiers, contrasts, strict=True)
        )
        held, pool = [h[best] for h in held], pool[best]
    if start.energy is not None:
        energy = CorrectedEnergy(start.energy, energy)
    return Trained(energy, held, pool, n_stages, history)


def _stops_early(model):
    return model.early_stopping if isinstance(model, Boosting) else True


def _fit_all(task, model, contrasts, start, stage):
    """Fit the classifiers of all members; boosting in rounds, until the held-out curve turns.

    Returns
    -------
    classifiers : list of K classifiers
    stages : list of int
        Numbers of trees, or other stages, that were looked at; 0 is f = 0.
    held : list of K tensors (n_stages, n_k)
        f at the held-out rows after these, with that of `start`.
    pool : Tensor of shape (n_stages, K, m)
        The same at the pool.
    """
    boosting, n_rows = isinstance(model, Boosting), len(task.x)
    classifiers: list[Any] = [
        model.classifier(n_rows, task.seeds.of(f"{stage}, trees", k)) if boosting else clone(model)
        for k in range(len(contrasts))
    ]
    stops = _stops_early(model)
    # members side by side, one thread each: a single tree is too small a job to be shared out
    parallel = Parallel(n_jobs=min(len(contrasts), task.n_threads), backend="threading")
    most = model.max_iter if boosting else 1
    total = min(_ROUND, most) if stops else most
    while True:
        if boosting:
            for classifier in classifiers:
                classifier.set_params(max_iter=total, warm_start=True)
        curves: Any = parallel(
            delayed(contrast.fit_and_judge)(classifier, stops)
            for classifier, contrast in zip(classifiers, contrasts, strict=True)
        )
        stages = curves[0][0]
        judged = list(zip((f for _, f in curves), contrasts, start.held, strict=True))
        held = [f[:, : contrast.n_held] + first for f, contrast, first in judged]
        pool = torch.stack([f[:, c.n_held :] for f, c, _ in judged], dim=1) + start.pool
        gain = task.mean_gain(held, pool)
        best = stages[int(gain.argmax())]
        task.progress.stage("energy", stages[-1], most, gain=f"{gain.max().item():.3f} nats")
        # a maximum this far from the end will not be beaten by another round
        if not boosting or not stops or total >= most or best <= (1 - WAITED_FOR) * total:
            return classifiers, stages, held, pool
        total = min(2 * total, most)


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


def _curve(classifier, contrast, early_stopping):
    """f at the judged rows after several stages; before the first, f = 0."""
    if early_stopping and hasattr(classifier, "staged_predict_proba"):
        staged = enumerate(classifier.staged_predict_proba(contrast.judged), start=1)
        kept = [(i, p) for i, p in staged if i % _STRIDE == 0 or i < _STRIDE]
    else:
        n_iter = getattr(classifier, "n_iter_", 1)
        n_iter = int(np.max(n_iter)) if np.size(n_iter) else 1
        kept = [(n_iter, classifier.predict_proba(contrast.judged))]
    f = [np.zeros(len(contrast.judged))] + [
        logit(p, contrast.floor) + contrast.offset for _, p in kept
    ]
    return [0] + [i for i, _ in kept], torch.as_tensor(np.stack(f))


def _soft_trees(task, classifiers, contrasts, n_trees, start):
    """The first trees of every member, with the softness that suits the held-out rows best."""
    energy = MemberEnergies(
        SoftTrees.from_hist_gradient_boosting(c, n_trees=n_trees, offset=contrast.offset)
        for c, contrast in zip(classifiers, contrasts, strict=True)
    )
    share = -(-_MAX_JUDGED // len(task))
    judged = [held[:share] for held in task.held]
    weight = torch.cat([task.weight[h] for h in judged])

    def gain(softness):
        energy.set_softness(softness)
        pool = energy(task.pool_z[:, :_MAX_JUDGED]) + start.pool[:, :_MAX_JUDGED]
        log_z = pool.logsumexp(-1) - math.log(pool.shape[1])
        f = [e(task.z[h]) - c for e, h, c in zip(energy.members, judged, log_z, strict=True)]
        return (torch.cat(f) @ weight).item()

    if n_trees:
        energy.set_softness(max(SOFTNESS, key=gain))
    return energy
