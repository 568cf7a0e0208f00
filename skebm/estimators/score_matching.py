"""Score matching."""

import warnings
from numbers import Integral, Real

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from skebm._engine import MemberBatches
from skebm._sklearn_compat import Interval, StrOptions
from skebm.objectives import (
    denoising_score_matching_losses,
    draw_directions,
    score_matching_losses,
    sliced_score_matching_losses,
)

from ._members import data_modes
from ._model import CLIP, feature_scores
from ._neural import EnergyAlone, build_energy, few_copies, if_auto, rows_judged, train_networks
from ._tilted import BaseTiltedDensity

EXACT_FEATURES = 10
"""``method="auto"``: up to this many varying columns the Laplacian is computed, beyond sampled."""

SIGMA = 0.2
"""``sigma="auto"``, as a share of Scott's bandwidth n^(-1 / (d + 4))."""

MAX_ROWS = 200_000
"""Rows that are trained on, at most: the base is differentiated at every one of them."""

MAX_SCORED = 200_000
"""Perturbed rows at which the base is differentiated: some copies of few rows, one of many."""

MAX_BASE_SCORE = 1e4
"""Rows where the base is steeper than this, in nats per unit of z, are left out of training."""

MAX_COPIES = 8
N_OFFSETS = 4
"""Draws behind the gradient of the smoothed base at a point: two, and their mirror images."""

PIECEWISE_LINEAR = {
    "hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "prelu", "relu", "relu6", "rrelu",
    "softshrink", "threshold",
}  # fmt: skip
"""Activations whose second derivative is zero wherever it exists."""


class ScoreMatchingEBM(BaseTiltedDensity):
    r"""Normalised density by score matching.

    .. math:: \log p(x) = \log q(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    The gradient of log q + f is fitted to that of the log-density of the data, in Gaussianised
    coordinates z; neither noise samples nor log Z are needed for that. As in
    :class:`~skebm.NCEDensity`, q is a base that is fitted first, log Z is measured afterwards, the
    estimator is the mean of `n_members` cross-fitted members, and f is kept only if the held-out
    likelihood gains by more than two standard errors, so the result is not below its base.

    Parameters
    ----------
    method : {"auto", "exact", "sliced", "denoising"}, default="auto"
        "exact" computes the Laplacian of f [1]_, in one forward and one reverse sweep. "sliced"
        takes it along random directions [2]_: the same in expectation, at a cost that does not grow
        with the number of columns. "denoising" predicts the noise in perturbed rows [3]_ and asks
        for first derivatives only, so that it takes energies with kinks (``energy_model="mlp"``,
        ReLU).
        "auto" is "exact" up to ten columns and "sliced" beyond.
    n_projections : int, default=1
        Directions per row and step of "sliced".
    projection : {"rademacher", "gaussian"}, default="rademacher"
        Law of the directions: entries of +-1, which give the least variance, or standard normal.
    sigma : float, array-like of float or "auto", default="auto"
        Noise that is added to the rows in training, in units of z (where the columns have a
        standard deviation of about one). "auto" is a fifth of Scott's bandwidth,
        .2 n^(-1 / (d + 4)). Several levels, such as ``np.geomspace(.05, .5, 5)``, are mixed, each
        weighted by its square. 0 fits the rows as they are ("exact" and "sliced" only).
    bias_correction : bool, default=True
        Whether f is matched to the smoothed data *relative to the equally smoothed base*, so that
        the detail of the base survives. False compares smoothed data with the base itself: the
        model is then of the smoothed density, which is better only where the base has detail, on
        the scale of `sigma`, that the data do not have.
    recalibration : bool, default=True
        Whether temperature and mode weights are set by held-out likelihood after training. Score
        matching sees the weights of separate modes hardly at all.
    base : str, list of str, law or None, default="auto"
        As in :class:`~skebm.NCEDensity`. None is the pure energy-based model, exp(f) / Z with a
        confining Gaussian of three standard deviations.
    energy_model : str, torch.nn.Module or callable, default="auto"
        "periodic" ("auto"): network on periodic embeddings of the columns, smooth. "mlp": network
        on piecewise-linear embeddings, for "denoising". A module (instance, or a class or factory
        called with n_features), (n, n_features) -> (n,) or (n, 1), which is copied and never
        trained itself. Energies see Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Of the networks.
    learning_rate : float or "auto", default="auto"
        "auto" is 5e-4, and 3e-3 where there is no base to start from.
    weight_decay : float, default=1e-3
        Of AdamW.
    batch_size : int, default=256
        Points per member and step; "denoising" takes half as many rows, each with opposite noises.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most; "auto" is 100, or 2,000 steps if that is more. 0 is the base
        alone.
    early_stopping : bool, default=True
        Whether to stop by, and keep the best state on, held-out normalised likelihood. The score
        matching loss itself is no guide: it can fall while the likelihood does.
    validation_fraction : float, default=0.1
        Rows held out when `n_members` is 1. With more members every row is held out once.
    patience : int, default=20
        Epochs without improvement before training stops.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below .01 nats, and
        anneals where the effective sample size stays below one per cent.
    smoothing : float, "scott" or "multiscale", default=0.0
        As in :class:`~skebm.NCEDensity`: the scale of the density that is *estimated*, in standard
        deviations of the columns (`sigma` is a matter of training only).
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` calls outliers. "auto" takes the threshold from
        out-of-fold scores instead, so that 5 % of *new* rows of the same law fall below it.
    callbacks : list of skorch callbacks, default=None
        Called while the networks train.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". Bases are fitted on the
        CPU; networks train, and the model scores and samples, on the device.
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps base and columns, and goes on from the trained networks.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    method_ : str
        "exact", "sliced" or "denoising". Not set by ``smoothing="multiscale"``, which trains
        nothing.
    sigma_ : ndarray of shape (n_levels,)
        Noise levels of training; likewise.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z (where it was annealed: of importance samples that
        would give the same error); inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base) and ``train_loss`` (nats per squared unit of z; 0 is the base,
        for "exact" and "sliced").
    n_iter_ : int
        Epochs of the state kept; 0 if no state was better than the base, whose modes the
        recalibration may still have weighted.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of every training row (of positive weight) under the member that has not seen
        it; NaN for rows that were never held out.
    model_ : torch.nn.Module
        The fitted density on standardised columns.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    Warns
    -----
    UserWarning
        In `fit`, where ``base=None`` leaves the weights of separate modes to the recalibration or
        ``recalibration=False`` to the base, and where ``energy_model="mlp"`` or the activations of
        a module (ReLU) have kinks that second derivatives do not see.

    See Also
    --------
    NCEDensity : Contrast with samples of the base; usually the better density.

    Notes
    -----
    Near a good base score matching learns broad structure: its signal is the slope of the
    log-density, its noise the rows themselves. Where the base is far from the data it learns
    faster than noise-contrastive estimation.

    Large tables: networks see at most 200,000 rows, because the base is differentiated at each.

    References
    ----------
    .. [1] Hyvärinen, A. (2005). Estimation of non-normalized statistical models by score matching.
           Journal of Machine Learning Research 6.
    .. [2] Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching: a scalable
           approach to density and score estimation. UAI.
    .. [3] Vincent, P. (2011). A connection between score matching and denoising autoencoders.
           Neural Computation 23(7).

    Examples
    --------
    >>> from skebm import ScoreMatchingEBM
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = ScoreMatchingEBM(max_epochs=50, random_state=0).fit(X)
    >>> density.method_
    'exact'
    >>> density.stein_score(X[:2]).shape
    (2, 2)
    """

    _parameter_constraints: dict = {
        **BaseTiltedDensity._parameter_constraints,
        "method": [StrOptions({"auto", "exact", "sliced", "denoising"})],
        "n_projections": [Interval(Integral, 1, None, closed="left")],
        "projection": [StrOptions({"rademacher", "gaussian"})],
        "sigma": [StrOptions({"auto"}), Interval(Real, 0, None, closed="left"), "array-like"],
        "bias_correction": ["boolean"],
        "recalibration": ["boolean"],
    }

    def __init__(
        self,
        *,
        method="auto",
        n_projections=1,
        projection="rademacher",
        sigma="auto",
        bias_correction=True,
        recalibration=True,
        base="auto",
        energy_model="auto",
        n_members=4,
        hidden_layer_sizes=(128, 128),
        learning_rate="auto",
        weight_decay=1e-3,
        batch_size=256,
        max_epochs="auto",
        early_stopping=True,
        validation_fraction=0.1,
        patience=20,
        n_partition_samples="auto",
        smoothing=0.0,
        contamination="auto",
        callbacks=None,
        device="auto",
        random_state=None,
        warm_start=False,
        verbose=0,
    ):
        self.method = method
        self.n_projections = n_projections
        self.projection = projection
        self.sigma = sigma
        self.bias_correction = bias_correction
        self.recalibration = recalibration
        self.base = base
        self.energy_model = energy_model
        self.n_members = n_members
        self.hidden_layer_sizes = hidden_layer_sizes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.n_partition_samples = n_partition_samples
        self.smoothing = smoothing
        self.contamination = contamination
        self.callbacks = callbacks
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose

    def _recalibrates(self):
        return self.recalibration

    def _modes(self, x, weight, n_rows, splits, bases, seeds):
        if not self.recalibration or self.max_epochs == 0:
            return None
        return data_modes(x, weight, n_rows, splits, bases, seeds)

    def _check_parameters(self):
        self._noise_levels(2, 1)

    def _resolve_method(self, n_features):
        if self.method != "auto":
            return self.method
        return "exact" if n_features <= EXACT_FEATURES else "sliced"

    def _noise_levels(self, n_rows, n_features):
        if isinstance(self.sigma, str):
            return np.array([SIGMA * n_rows ** (-1.0 / (n_features + 4))])
        levels = np.atleast_1d(np.asarray(self.sigma, dtype=np.float64))
        usable = levels.ndim == 1 and levels.size and np.isfinite(levels).all()
        if not usable or (levels < 0).any() or (levels.size > 1 and (levels == 0).any()):
            raise ValueError(
                f"sigma={self.sigma!r} must be a number of at least 0, or positive numbers."
            )
        if self._resolve_method(n_features) == "denoising" and (levels == 0).any():
            raise ValueError('sigma=0 leaves method="denoising" no noise to predict; raise it.')
        return levels

    def _warn_of_blind_spots(self, energy, n_features):
        if self.base is None:
            warnings.warn(
                "base=None: score matching hardly sees the relative weights of separate modes; "
                "without a base to start from they rest on the recalibration alone.",
                UserWarning,
                stacklevel=7,
            )
        elif not self.recalibration:
            warnings.warn(
                "recalibration=False: score matching hardly sees the relative weights of separate "
                "modes; they stay where the base has them, or drift.",
                UserWarning,
                stacklevel=7,
            )
        method = self._resolve_method(n_features)
        if method == "denoising":
            return
        if self.energy_model == "mlp":
            warnings.warn(
                f'energy_model="mlp" is piecewise linear in each column, and method="{method}" '
                'does not see the kinks; take method="denoising" or energy_model="periodic".',
                UserWarning,
                stacklevel=7,
            )
        elif not isinstance(self.energy_model, str):
            for name in _kinked_activations(energy):
                warnings.warn(
                    f'energy_model calls {name}, which is piecewise linear, and method="{method}" '
                    "does not see the kinks: second derivatives are zero beside them. Take a "
                    'smooth activation, such as SiLU or softplus, or method="denoising".',
                    UserWarning,
                    stacklevel=7,
                )

    def _train(self, members, refresh, device, kept, progress):
        n_features = members.x.shape[1]
        method = self._resolve_method(n_features)
        levels = self._noise_levels(members.n_rows, n_features)

        energy = build_energy(
            if_auto(self.energy_model, "periodic"),
            members,
            self.hidden_layer_sizes,
            members.seeds.of("network"),
            kept,
        )
        self._warn_of_blind_spots(energy, n_features)
        rows = _ScoredRows(
            members, refresh, torch.as_tensor(levels), method == "denoising",
            self.bias_correction, device,
        )  # fmt: skip
        # denoising takes its rows in pairs
        pair = 2 if method == "denoising" else 1
        batches = MemberBatches(
            few_copies(rows, rows.n_copies),
            rows.train,
            batch_size=max(1, self.batch_size // pair),
            generator=members.seeds.generator("energy, batches"),
        )
        directions = members.seeds.generator("directions", device=device)

        def batch_loss(module, batch):
            z, base_score, weight, noise, sigma = batch
            if method == "denoising":
                z, base_score, noise = (t.flatten(1, 2) for t in (z, base_score, noise))
                weight, sigma = (t.repeat_interleave(2, dim=1) for t in (weight, sigma))
                losses = denoising_score_matching_losses(module.energy, z, noise, sigma, base_score)
            elif method == "exact":
                losses = score_matching_losses(module.energy, z, base_score)
            else:
                v = draw_directions(z, directions, self.n_projections, self.projection)
                losses = sliced_score_matching_losses(module.energy, z, v, base_score)
            return (weight * losses).mean(1).sum()

        # in forward passes, per row; an evaluation is one. A third of it is charged: networks
        # overfit soon under score matching, so that it pays to look often
        n_streams = {"exact": n_features, "sliced": self.n_projections, "denoising": 1}[method]
        n_train = pair * max(len(train) for train in rows.train)
        return train_networks(
            members, EnergyAlone(energy).to(device), batch_loss, batches,
            evaluation_cost=rows_judged(members) / (3 * (6 + 3 * n_streams) * n_train),
            learning_rate=if_auto(self.learning_rate, 3e-3 if self.base is None else 5e-4),
            weight_decay=self.weight_decay,
            max_epochs=if_auto(self.max_epochs, None), patience=self.patience,
            early_stopping=self.early_stopping, callbacks=self.callbacks, device=device,
            progress=progress,
        )  # fmt: skip

    def _report(self, members, trained, accepted, partition):
        super()._report(members, trained, accepted, partition)
        for name in ("method_", "sigma_"):
            vars(self).pop(name, None)  # of an earlier fit
        if self.smoothing != "multiscale":
            self.method_ = self._resolve_method(members.x.shape[1])
            self.sigma_ = self._noise_levels(members.n_rows, members.x.shape[1])


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
        energy.eval()(torch.zeros(energy.n_members, 2, energy.n_features))
    energy.train(training)
    return sorted(calls.names & PIECEWISE_LINEAR)


class _ScoredRows:
    """Perturbed rows in the coordinates of f, with the gradient of the base there.

    Every call perturbs the rows afresh; the gradient of a base costs more than a step, so
    `n_copies` of them should do.

    Parameters
    ----------
    members : Members
    refresh : callable or None
        ``refresh(generator)`` -> rows with fresh jitter.
    levels : Tensor of shape (n_levels,)
        Noise levels; a row draws one of them.
    in_pairs : bool
        Whether every row comes with noise and with the opposite noise: what is odd in the noise
        then cancels from the gradient of the loss.
    smooth : bool
        Whether the gradient is that of the base smoothed by the noise.
    device : torch.device
    """

    def __init__(self, members, refresh, levels, in_pairs, smooth, device):
        self.members, self.refresh, self.levels = members, refresh, levels
        # Fisher divergences of several levels count by their squares, as the denoising loss does
        mean = levels.square().mean()
        plain = in_pairs or mean == 0
        self.importance = torch.ones_like(levels) if plain else levels.square() / mean
        self.in_pairs, self.smooth, self.device = in_pairs, smooth, device
        n = len(members.x)
        chosen = torch.arange(n)
        if n > MAX_ROWS:
            chosen = (
                torch.randperm(n, generator=members.seeds.generator("scored rows"))[:MAX_ROWS]
                .sort()
                .values
            )
        self.chosen = chosen
        place = torch.full((n,), -1)
        place[chosen] = torch.arange(len(chosen))
        self.train = [place[train][place[train] >= 0] for train, _ in members.splits]
        changes = refresh is not None or (levels > 0).any()
        n_scored = len(chosen) * (2 if in_pairs else 1)
        self.n_copies = min(MAX_COPIES, max(2, MAX_SCORED // n_scored)) if changes else 1

    def __call__(self, generator):
        """Points, gradients of the base, weights, noise and its levels, members in front."""
        members, n_members = self.members, len(self.members)
        rows = members.x if self.refresh is None else self.refresh(generator)
        z, _ = members.features.transform(rows[self.chosen])
        n = len(z)
        level = torch.randint(len(self.levels), (n,), generator=generator)
        sigma = self.levels[level][:, None]
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        noise = torch.stack([noise, -noise]) if self.in_pairs else noise[None]
        points = z + sigma * noise
        scores = torch.stack([self._base_scores(at, sigma, generator) for at in points], dim=2)
        # f is constant beyond the clip, and some bases end somewhere
        inside = (points.abs() < CLIP).all(-1).all(0)
        inside &= (scores.abs() < MAX_BASE_SCORE).all(-1).all(2).all(0)  # False for nan
        points, noise = (torch.where(inside[:, None], t, 0.0) for t in (points, noise))
        scores = torch.where(inside[:, None, None], scores, 0.0)
        weight = members.weight[self.chosen] / members.weight.mean()
        weight = weight * inside * self.importance[level]

        def prepare(t, shared=True):
            t = t.float().to(self.device)
            return t.expand(n_members, *t.shape) if shared else t

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

    def _base_scores(self, z, sigma, generator):
        shape = (N_OFFSETS // 2, *z.shape)
        if self.smooth and (sigma > 0).any():
            half = sigma * torch.randn(shape, generator=generator, dtype=z.dtype)
            offsets = torch.cat([half, -half])
        else:
            offsets = z.new_zeros(1, *z.shape)
        return feature_scores(self.members.bases, self.members.features, z, offsets)
