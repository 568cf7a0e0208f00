"""Energies that are classifiers: data against samples of the base (NCE is classification).

A classifier of data (1) against nu times as many samples of the base (0) has the logit
f(x) - log nu at its optimum, so f is the logit plus log nu.
"""

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.utils.validation import has_fit_parameter
from torch import nn

from skebm.energies import SoftTrees

from ._members import Trained
from ._neural import in_blocks
from ._threads import limit_threads

MAX_ROWS = 200_000
"""Rows per member, at most: a random subsample of larger splits."""

MAX_NOISE = 200_000
"""Noise samples per member, at most; beyond, nu is smaller than asked for."""

SOFTNESS = (0.0, 0.1, 0.25, 0.5)
"""Softness of the splits of trees: candidates, 0 = hard."""

MANY_ROWS, MAX_ITER = 5_000, 600
"""Above so many rows boosting defaults to less noise and larger steps; iterations by default."""

_PROPOSED = 2  # base samples per noise sample, where the noise is a tilted base
_ROUND = 100  # boosting iterations before the first look at the held-out curve; then doubled
_STRIDE = 5  # stages from one point of that curve to the next
_MAX_JUDGED = 4096  # rows and pool samples per member on which the softness is chosen


def boosting_settings(n_rows):
    """Noise samples per row, learning rate and iterations of boosting, by default."""
    many = n_rows > MANY_ROWS
    return {
        "noise_ratio": 5.0 if many else 10.0,
        "learning_rate": 0.2 if many else 0.1,
        "max_iter": MAX_ITER,
    }


def boosting_classifier(learning_rate, random_state):
    """Boosted trees with the settings that did best on tables."""
    return HistGradientBoostingClassifier(
        learning_rate=learning_rate, max_leaf_nodes=31, max_features=0.5, l2_regularization=1.0,
        min_samples_leaf=20, early_stopping=False, random_state=random_state,
    )  # fmt: skip


class ClassifierEnergy(nn.Module):
    """Logit of a fitted scikit-learn classifier plus a constant; no gradient.

    Parameters
    ----------
    classifier : fitted classifier
    offset : float
        log nu.
    n_stages : int or None
        For staged classifiers: how many stages count.
    floor : float
        Probabilities are kept this far from 0 and 1, so that f is finite.
    """

    def __init__(self, classifier, offset, n_stages, floor):
        super().__init__()
        self.classifier = classifier
        self.offset, self.n_stages, self.floor = offset, n_stages, floor

    def forward(self, z):
        """Evaluate f, (n, d) -> (n,)."""
        rows = z.detach().cpu().numpy()
        if self.n_stages is None:
            p = self.classifier.predict_proba(rows)
        else:
            p = next(islice(self.classifier.staged_predict_proba(rows), self.n_stages - 1, None))
        return torch.as_tensor(_logit(p, self.floor) + self.offset, device=z.device)


class MemberEnergies(nn.Module):
    """K separate energies side by side, (K, n, d) -> (K, n)."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, z):
        """Evaluate member k on z[k], (K, n, d) -> (K, n)."""
        return torch.stack([f(rows) for f, rows in zip(self.members, z, strict=True)])

    def member(self, k):
        """Member k alone, still (1, n, d) -> (1, n)."""
        return MemberEnergies([self.members[k]])

    @property
    def softness(self):
        """Width of the splits of trees; None for energies that have none."""
        return getattr(self.members[0], "softness", None)

    def set_softness(self, softness):
        """Set the width of the splits of all trees."""
        for trees in self.members:
            trees.softness = softness


class CorrectedEnergy(nn.Module):
    """A stack of K energies, and one that corrects it: their sum, (K, n, d) -> (K, n).

    Parameters
    ----------
    first : nn.Module
        With `member`.
    correction : MemberEnergies
    """

    def __init__(self, first, correction):
        super().__init__()
        self.first, self.correction = first, correction

    def forward(self, z):
        """Evaluate member k on z[k], (K, n, d) -> (K, n)."""
        return self.first(z) + self.correction(z)

    def member(self, k):
        """Member k alone, still (1, n, d) -> (1, n)."""
        return CorrectedEnergy(self.first.member(k), self.correction.member(k))

    @property
    def softness(self):
        """Width of the splits of trees."""
        return self.correction.softness

    def set_softness(self, softness):
        """Set it."""
        self.correction.set_softness(softness)


def _logit(p, floor):
    p = np.clip(p[:, 1], floor, 1.0 - floor)
    return np.log(p) - np.log1p(-p)


@dataclass(frozen=True)
class _Task:
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
    members, energy_model, *, noise_ratio, learning_rate, max_iter, early_stopping, progress,
    stage="energy", start=None,
):  # fmt: skip
    """Fit one classifier per member: its rows against samples of its base, or of its base tilted.

    Parameters
    ----------
    members : Members
        Whose proposals are the bases: a classifier learns log p - log proposal.
    energy_model : "boosting" or classifier
        A classifier is cloned. Trees of a HistGradientBoostingClassifier are read into
        :class:`~skebm.energies.SoftTrees`.
    noise_ratio : float
        nu, base samples per row.
    learning_rate : float
        Of ``"boosting"``.
    max_iter : int
        Boosting iterations of ``"boosting"``, at most.
    early_stopping : bool
        Whether the number of stages is chosen on the held-out rows.
    progress : Progress
    stage : str, default="energy"
        Of the seeds.
    start : Trained, optional
        Energies that the classifiers correct: the noise is then the base tilted by these.

    Returns
    -------
    Trained
        Without improvement, of 0 iterations.
    """
    start = Trained.nothing(members) if start is None else start
    tasks = [_task(members, k, noise_ratio, start, stage) for k in range(len(members))]
    boosting = isinstance(energy_model, str)
    classifiers = [
        boosting_classifier(learning_rate, members.seeds.of(f"{stage}, trees", k))
        if boosting
        else clone(energy_model)
        for k in range(len(tasks))
    ]
    total = min(_ROUND, max_iter) if boosting and early_stopping else max_iter
    # members side by side, one thread each: a single tree is too small a job to be shared out
    parallel = Parallel(n_jobs=min(len(tasks), members.n_threads), backend="threading")
    while True:
        if boosting:
            for classifier in classifiers:
                classifier.set_params(max_iter=total, warm_start=True)
        curves = parallel(
            delayed(task.fit_and_judge)(classifier, early_stopping)
            for classifier, task in zip(classifiers, tasks, strict=True)
        )
        stages = curves[0][0]
        judged = list(zip((f for _, f in curves), tasks, start.held, strict=True))
        held = [f[:, : task.n_held] + first for f, task, first in judged]
        pool = torch.stack([f[:, task.n_held :] for f, task, _ in judged], dim=1) + start.pool
        gain = members.mean_gain(held, pool)
        best = int(gain.argmax()) if early_stopping else len(stages) - 1
        progress.stage("energy", stages[-1], max_iter, gain=f"{gain[best].item():.3f} nats")
        if not boosting or total >= max_iter or stages[best] <= 0.7 * total:
            break
        total = min(2 * total, max_iter)
    history = {"n_iter": np.array(stages), "gain": gain.numpy()}
    n_stages = stages[best]
    if isinstance(classifiers[0], HistGradientBoostingClassifier):
        energy = _soft_trees(members, classifiers, tasks, n_stages, start)
        rows = [members.z[h] for _, h in members.splits]
        held = [first + f(z) for first, f, z in zip(start.held, energy.members, rows, strict=True)]
        pool = start.pool + energy(members.pool_z)
    else:
        staged = hasattr(classifiers[0], "staged_predict_proba")
        energy = MemberEnergies(
            ClassifierEnergy(c, t.offset, n_stages if staged else None, t.floor)
            for c, t in zip(classifiers, tasks, strict=True)
        )
        held, pool = [h[best] for h in held], pool[best]
    if start.energy is not None:
        energy = CorrectedEnergy(start.energy, energy)
    return Trained(energy, held, pool, n_stages, history)


def _task(members, k, noise_ratio, start, stage):
    train, held = members.splits[k]
    generator = members.seeds.generator(stage, k)
    train = train[torch.randperm(len(train), generator=generator)[:MAX_ROWS]]
    n_noise = max(1, min(round(noise_ratio * len(train)), MAX_NOISE))
    noise = _noise(members, k, n_noise, start, generator)
    weight = members.weight[train]
    return _Task(
        z=torch.cat([members.z[train], noise]).numpy(),
        y=np.repeat([1, 0], [len(train), n_noise]),
        weight=torch.cat([weight, weight.mean().expand(n_noise)]).numpy(),
        judged=torch.cat([members.z[held], members.pool_z[k]]).numpy(),
        n_held=len(held),
        offset=math.log(n_noise / len(train)),
        floor=1.0 / (len(train) + n_noise),
    )


def _noise(members, k, n, start, generator):
    """Samples of base k, tilted where there is a tilt, as the energies see them, (n, d)."""
    law = members.proposals[k]
    if start.energy is None:
        return members.features(law.sample(n, generator))
    z = members.features(law.sample(_PROPOSED * n, generator))
    weights = in_blocks(start.energy.member(k), z[None])[0].softmax(0)
    # systematic resampling: every sample as often as its weight says, to one
    points = (torch.arange(n, dtype=z.dtype) + torch.rand(1, generator=generator)) / n
    chosen = torch.searchsorted(weights.cumsum(0), points).clamp_max(len(z) - 1)
    return z[chosen]


def _curve(classifier, task, early_stopping):
    """f at the judged rows after several stages; before the first, f = 0."""
    if early_stopping and hasattr(classifier, "staged_predict_proba"):
        staged = enumerate(classifier.staged_predict_proba(task.judged), start=1)
        kept = [(i, p) for i, p in staged if i % _STRIDE == 0 or i < _STRIDE]
    else:
        n_iter = getattr(classifier, "n_iter_", 1)
        n_iter = int(np.max(n_iter)) if np.size(n_iter) else 1
        kept = [(n_iter, classifier.predict_proba(task.judged))]
    f = [np.zeros(len(task.judged))] + [_logit(p, task.floor) + task.offset for _, p in kept]
    return [0] + [i for i, _ in kept], torch.as_tensor(np.stack(f))


def _soft_trees(members, classifiers, tasks, n_trees, start):
    """The first trees of every member, with the softness that suits the held-out rows best."""
    energy = MemberEnergies(
        SoftTrees.from_hist_gradient_boosting(c, n_trees=n_trees, offset=t.offset)
        for c, t in zip(classifiers, tasks, strict=True)
    )
    share = -(-_MAX_JUDGED // len(members))
    judged = [held[:share] for _, held in members.splits]
    weight = torch.cat([members.weight[h] for h in judged])

    def gain(softness):
        energy.set_softness(softness)
        pool = energy(members.pool_z[:, :_MAX_JUDGED]) + start.pool[:, :_MAX_JUDGED]
        log_z = pool.logsumexp(-1) - math.log(pool.shape[1])
        f = [e(members.z[h]) - c for e, h, c in zip(energy.members, judged, log_z, strict=True)]
        return (torch.cat(f) @ weight).item()

    if n_trees:
        energy.set_softness(max(SOFTNESS, key=gain))
    return energy
