"""Training by score matching: perturbed rows, the gradient of the base there, three losses."""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.overrides import TorchFunctionMode

from skebm._typing import FloatArray
from skebm._warnings import warn
from skebm.bases import ConfiningGaussian
from skebm.energies import Network
from skebm.models import CLIP, CentredEnergy, StateDraws, feature_scores
from skebm.objectives import (
    denoising_score_matching_losses,
    draw_directions,
    score_matching_losses,
    sliced_score_matching_losses,
)

from .networks import EnergyAlone, build_energy, in_blocks, padded, train_networks
from .tilted_task import TiltedTask
from .trained import Trained

EXACT_FEATURES = 10
"""``method="auto"``: up to this many varying columns the Laplacian is computed, beyond sampled."""

SIGMA = 0.2
"""``sigma="auto"``, as a share of Scott's bandwidth n^(-1 / (d + 4))."""

LEARNING_RATE, LEARNING_RATE_ELSEWHERE = 5e-4, 3e-3
"""Of AdamW: near a base of numbers; and without a base, or with states, where f is broader."""

MAX_ROWS = 200_000
"""Rows that are trained on, at most: the base is differentiated at every one of them."""

MAX_SCORED = 200_000
"""Perturbed rows at which the base is differentiated: some copies of few rows, one of many."""

MAX_BASE_SCORE = 1e4
"""Rows where the base is steeper than this, in nats per unit of z, are left out of training."""

MAX_DRAWS, MIN_DRAWS, DRAWN_ROWS = 1024, 32, 2**16
"""Draws of the values under every pattern of states, behind the constants of the patterns: about so
many of all together, and within these bounds. While networks train there are `MIN_DRAWS`."""

MAX_COPIES = 8
N_OFFSETS = 4
"""Draws behind the gradient of the smoothed base at a point: two, and their mirror images."""

PIECEWISE_LINEAR = {
    "hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "prelu", "relu", "relu6", "rrelu",
    "softshrink", "threshold",
}  # fmt: skip
"""Activations whose second derivative is zero wherever it exists."""


def resolve_method(method: str, n_features: int) -> str:
    """Return "exact", "sliced" or "denoising"; "auto" looks at the number of columns."""
    if method != "auto":
        return method
    return "exact" if n_features <= EXACT_FEATURES else "sliced"


def noise_levels(sigma: float | ArrayLike | str, n_rows: int, n_features: int) -> FloatArray:
    """Noise levels of the perturbed rows, in units of z, (n_levels,).

    Raises
    ------
    ValueError
        Where `sigma` is neither "auto", nor a number of at least 0, nor several positive ones.
    """
    if isinstance(sigma, str):
        return np.array([SIGMA * n_rows ** (-1.0 / (n_features + 4))])
    levels = np.atleast_1d(np.asarray(sigma, dtype=np.float64))
    usable = levels.ndim == 1 and levels.size and np.isfinite(levels).all()
    if not usable or (levels < 0).any() or (levels.size > 1 and (levels == 0).any()):
        raise ValueError(f"sigma={sigma!r} must be a number of at least 0, or positive numbers.")
    return levels


def train_by_score_matching(
    task: TiltedTask,
    network: Network,
    *,
    method: str,
    n_projections: int,
    sigma: float | ArrayLike | str,
    recalibrates: bool,
) -> Trained:
    """Train a stack of K energies by score matching against the gradient of the base.

    Parameters
    ----------
    task : TiltedTask
    network : Network
    method : {"auto", "exact", "sliced", "denoising"}
    n_projections : int
        Directions per row of "sliced".
    sigma : float, array-like of float or "auto"
    recalibrates : bool
        Whether recalibration follows.

    Returns
    -------
    Trained
        Its results: ``method_`` and ``sigma_``, which "auto" leaves to the rows. Rows that have
        states and no values leave nothing to train.
    """
    layout = task.layout
    if not layout.n_values:
        return Trained.nothing(task)
    method = resolve_method(method, layout.n_values)
    levels = noise_levels(sigma, task.n_rows, layout.n_values)
    confined = isinstance(task.bases[0], ConfiningGaussian)
    _warn_of_blind_spots(confined, recalibrates)
    # how slopes differ between states is broad: periodic embeddings learned less than half of it
    energy = build_energy(task, network, None if layout.n_states else "periodic")
    if method != "denoising":
        _warn_of_kinks(network, energy, method)
    # denoising takes its rows in pairs
    pair = 2 if method == "denoising" else 1
    rows = _ScoredRows(task, torch.as_tensor(levels), in_pairs=pair == 2)
    batches = task.batches(
        rows, "energy", batch_size=max(1, network.batch_size // pair), copies=rows.n_copies,
        rows=rows.train,
    )  # fmt: skip
    directions = task.seeds.rng("directions", device=task.device)

    def batch_loss(module, batch):
        z, base_score, weight, noise, sigma = batch
        if method == "denoising":
            z, base_score, noise = (t.flatten(1, 2) for t in (z, base_score, noise))
            weight, sigma = (t.repeat_interleave(2, dim=1) for t in (weight, sigma))
        f, z = module.energy.of_values(z) if layout.n_states else (module.energy, z)
        if method == "denoising":
            losses = denoising_score_matching_losses(f, z, noise, sigma, base_score)
        elif method == "exact":
            losses = score_matching_losses(f, z, base_score)
        else:
            v = draw_directions(z, directions, n_projections)
            losses = sliced_score_matching_losses(f, z, v, base_score)
        return (weight * losses).mean(1).sum()

    # in forward passes, per row; an evaluation is one. A third of it is charged: networks overfit
    # soon under score matching, so that it pays to look often
    n_streams = {"exact": layout.n_values, "sliced": n_projections, "denoising": 1}[method]
    n_train = pair * max(len(train) for train in rows.train)
    centring = _Centring(task) if layout.n_states else None
    n_judged = task.n_judged if centring is None else centring.n_judged
    trained = train_networks(
        task, EnergyAlone(energy).to(task.device), batch_loss, batches, network=network,
        learning_rate=LEARNING_RATE_ELSEWHERE if confined or layout.n_states else LEARNING_RATE,
        evaluation_cost=n_judged / (3 * (6 + 3 * n_streams) * n_train),
        judge=None if centring is None else centring.judge,
    )  # fmt: skip
    if centring is not None:
        trained = centring.applied(trained)
    return replace(trained, results={"method_": method, "sigma_": levels})


class _Centring:
    """What fixes the constants of the states, which score matching leaves open.

    Parameters
    ----------
    task : TiltedTask
    """

    def __init__(self, task):
        self.task = task
        self.held, self.lengths = padded([task.z[held] for held in task.held])
        codes = [task.layout.codes(z) for z in self.held]
        patterns, self.which = zip(
            *(own.unique(dim=0, return_inverse=True) for own in codes), strict=True
        )
        patterns, _ = padded(patterns)
        like = torch.empty(0, dtype=torch.float32, device=task.device)
        self.drawn = self._draws(MIN_DRAWS).at(list(patterns)).to(like)
        self.n_judged = self.held.shape[1] + MIN_DRAWS * patterns.shape[1]
        self.z = self.held.to(like)

    def _draws(self, n):
        task = self.task
        return StateDraws.of(task.bases, task.features, n, task.seeds.of("values given states"))

    def judge(self, module):
        """Tilts of the held-out rows under their states, where log Z is 0."""
        f = in_blocks(module.energy, self.z).cpu().double()
        constants = self.drawn.log_means(module.energy).cpu().double()
        parts = zip(f, constants, self.which, self.lengths, strict=True)
        held = [(own - c[which])[:n] for own, c, which, n in parts]
        return held, torch.zeros_like(self.task.pool_log_ratio)

    @torch.no_grad()
    def applied(self, trained):
        """The energies with their constants, and what they are at held-out rows and pool."""
        task = self.task
        n_patterns = len(task.layout.codes(task.z).unique(dim=0))
        n = 2 ** int(math.log2(DRAWN_ROWS / n_patterns))
        draws = self._draws(min(MAX_DRAWS, max(MIN_DRAWS, n)))
        energy = CentredEnergy.of(trained.energy, draws, task.z)
        f = energy(torch.cat([self.held, task.pool_z], dim=1))
        held = [own[:n] for own, n in zip(f, self.lengths, strict=True)]
        return replace(trained, energy=energy, held=held, pool=f[:, self.held.shape[1] :])


def _warn_of_blind_spots(confined, recalibrates):
    if confined:
        warn(
            "base=None: score matching hardly sees the relative weights of separate modes; without "
            "a base to start from they rest on the recalibration alone."
        )
    elif not recalibrates:
        warn(
            "recalibration=False: score matching hardly sees the relative weights of separate "
            "modes; they stay where the base has them, or drift."
        )


def _warn_of_kinks(network, energy, method):
    if network.module is None:
        if network.embedding == "piecewise_linear":
            warn(
                f'an energy on piecewise-linear embeddings has kinks, and method="{method}" '
                'does not see them; take method="denoising" or energy_model="periodic".'
            )
        return
    for name in _kinked_activations(energy):
        warn(
            f'energy_model calls {name}, which is piecewise linear, and method="{method}" does not '
            "see the kinks: second derivatives are zero beside them. Take a smooth activation, "
            'such as SiLU or softplus, or method="denoising".'
        )


class _Calls(TorchFunctionMode):
    """The names of the torch functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(getattr(function, "__name__", "").strip("_"))
        return function(*args, **(kwargs or {}))


def _kinked_activations(energy):
    """Names of the piecewise-linear activations that a stack of modules evaluates."""
    training = energy.training
    with torch.no_grad(), _Calls() as calls:
        energy.eval()(torch.zeros(energy.n_members, 2, energy.n_features, dtype=torch.float32))
    energy.train(training)
    return sorted(calls.names & PIECEWISE_LINEAR)


class _ScoredRows:
    """Perturbed rows in the coordinates of f, with the gradient of the base there.

    Every call perturbs the rows afresh; the gradient of a base costs more than a step, so
    `n_copies` of them should do.

    Parameters
    ----------
    task : TiltedTask
    levels : Tensor of shape (n_levels,)
        Noise levels; a row draws one of them.
    in_pairs : bool
        Whether every row comes with noise and with the opposite noise: what is odd in the noise
        then cancels from the gradient of the loss.
    """

    def __init__(self, task, levels, in_pairs):
        self.task, self.levels = task, levels
        # Fisher divergences of several levels count by their squares, as the denoising loss does
        mean = levels.square().mean()
        plain = in_pairs or mean == 0
        self.importance = torch.ones_like(levels) if plain else levels.square() / mean
        self.in_pairs = in_pairs
        n = len(task.x)
        chosen = torch.arange(n)
        if n > MAX_ROWS:
            chosen = (
                torch.randperm(n, generator=task.seeds.rng("scored rows"))[:MAX_ROWS].sort().values
            )
        self.chosen = chosen
        place = torch.full((n,), -1)
        place[chosen] = torch.arange(len(chosen))
        self.train = [place[train][place[train] >= 0] for train in task.train]
        changes = task.changes or (levels > 0).any()
        n_scored = len(chosen) * (2 if in_pairs else 1)
        self.n_copies = min(MAX_COPIES, max(2, MAX_SCORED // n_scored)) if changes else 1

    def __call__(self, x, rng):
        """Points, gradients of the base, weights, noise and its levels, members in front."""
        task = self.task
        rows, _ = task.features.transform(x[self.chosen])
        states, z = rows.tensor_split([task.layout.n_states], dim=1)
        n, absent = len(z), z.isnan()
        level = torch.randint(len(self.levels), (n,), generator=rng)
        sigma = self.levels[level][:, None]
        noise = torch.randn(z.shape, generator=rng, dtype=z.dtype)
        noise = torch.stack([noise, -noise]) if self.in_pairs else noise[None]
        points = z + sigma * noise
        scores = torch.stack([self._base_scores(states, at, sigma, rng) for at in points], dim=2)
        # f is constant beyond the clip, and some bases end somewhere
        inside = (absent | (points.abs() < CLIP)).all(-1).all(0)
        inside &= (absent[:, None] | (scores.abs() < MAX_BASE_SCORE)).all(-1).all(2).all(0)
        points, noise = (torch.where(inside[:, None], t, 0.0) for t in (points, noise))
        scores = torch.where(inside[:, None, None], scores, 0.0)
        noise = torch.where(absent, 0.0, noise)
        scores = torch.where(absent[:, None], 0.0, scores)
        points = torch.cat([states.expand(len(points), -1, -1), points], dim=2)
        weight = task.weight[self.chosen] / task.weight.mean()
        weight = weight * inside * self.importance[level]

        def prepare(t, shared=True):
            t = t.float().to(task.device)
            return t.expand(len(task), *t.shape) if shared else t

        points, noise = points.transpose(0, 1), noise.transpose(0, 1)
        if not self.in_pairs:
            points, noise, scores = points[:, 0], noise[:, 0], scores[:, :, 0]
        return (
            prepare(points),
            prepare(scores, shared=False),
            prepare(weight),
            prepare(noise),
            prepare(sigma),
        )

    def _base_scores(self, states, z, sigma, rng):
        """Gradients in the values z, (K, n, n_values), not finite where one is absent."""
        shape = (N_OFFSETS // 2, *z.shape)
        if (sigma > 0).any():
            half = sigma * torch.randn(shape, generator=rng, dtype=z.dtype)
            offsets = torch.cat([half, -half])
        else:
            offsets = z.new_zeros(1, *z.shape)
        offsets = torch.cat([states.new_zeros(len(offsets), *states.shape), offsets], dim=2)
        rows = torch.cat([states, z], dim=1)
        scores = feature_scores(self.task.bases, self.task.features, rows, offsets)
        return scores[..., states.shape[1] :]
