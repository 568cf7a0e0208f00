"""What estimators of tilted bases share: members, training, log Z, sampling by importance."""

import copy
import math
import warnings
from abc import abstractmethod
from numbers import Integral

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.metaestimators import available_if
from torch.distributions import Distribution

from skebm._random import Seeds, draw_seed
from skebm._sklearn_compat import HasMethods, Interval, StrOptions
from skebm.bases import CANDIDATES, MAX_FIT_ROWS, MarginalGaussianization, StackedBase
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.partition import (
    MIN_ESS_SHARE,
    LogPartition,
    adaptive_importance_sampling,
    estimate,
)
from skebm.samplers import mala, run

from ._base import SCORED_ROWS, BaseDensity, perturbed_copies, resolve_device, scott
from ._classifiers import ClassifierEnergy
from ._columns import Columns, relative_precision
from ._laws import resolve_law
from ._members import Members, Trained, guard, make_splits, recalibrate
from ._model import FeatureMap, ScaleAverage, TiltedMixture
from ._progress import Progress
from ._threads import limit_threads

TARGET_STD_ERROR = 0.01
"""Standard error of log Z, in nats, that ``n_partition_samples="auto"`` aims at."""

MAX_PARTITION_SAMPLES = 400_000
MAX_BLEND_SAMPLES = 32_768

COARSE_SMOOTHING = 0.5
"""Coarsest scale of ``smoothing="multiscale"``; the others are 0 and Scott's."""

MAX_COPIES = 10.0
"""Sampling: weights above this multiple of their mean give repeated rows."""

SCORE_SOFTNESS = 0.25
"""Softness of the trees in `stein_score` where the chosen ones are hard."""

LAW = [StrOptions({"auto", *CANDIDATES}), list, tuple, Distribution,
        HasMethods(["score_samples", "sample"])]  # fmt: skip


def _has_gradient(estimator):
    """Whether the fitted (or to be fitted) energy can be differentiated."""
    model = getattr(estimator, "model_", None)
    if model is None:
        return not estimator._energy_is_opaque()
    members = getattr(model.energy, "members", ())
    return not any(isinstance(f, ClassifierEnergy) for f in members)


class BaseTiltedDensity(BaseDensity):
    """Estimators of bases tilted by energies; one of them adds `__init__` and `_train`."""

    _parameter_constraints: dict = {
        **BaseDensity._parameter_constraints,
        "base": [*LAW, None],
        "energy_model": [
            StrOptions({"auto", "mlp", "periodic"}),
            callable,
            torch.nn.Module,
        ],  # fmt: skip
        "n_members": [Interval(Integral, 1, None, closed="left")],
        "n_partition_samples": [StrOptions({"auto"}), Interval(Integral, 100, None, closed="left")],
        "smoothing": [
            StrOptions({"scott", "multiscale"}),
            *BaseDensity._parameter_constraints["smoothing"][1:],
        ],
    }

    # ------------------------------------------------------------------ what an estimator adds

    @abstractmethod
    def _train(self, members, refresh, device, kept, progress):
        """Train energies on `members` and return a `Trained`; `kept` is a model to go on from."""

    def _energy_is_opaque(self):
        """Whether `energy_model` gives an energy without gradient."""
        return False

    def _recalibrates(self):
        """Whether temperature and mode weights are set by held-out likelihood."""
        return True

    def _modes(self, x, weight, n_rows, splits, bases, seeds):
        """Laws, one per member, whose components recalibration may weight; None: the bases'."""
        return None

    def _noise(self):
        """Law given for the noise; None for the base, or for "auto" where there is none."""
        return None

    def _laws(self, law, x, weight, splits, seeds, progress):
        """Bases, proposals and noise (or None), one per member; ``law(value, where)`` resolves."""
        bases = law(self.base, "base")
        if self._noise() is not None:
            noise = law(self._noise(), "noise")
            # noise need not cover the base; log Z and samples come from both
            return bases, halves(noise, bases), noise
        if self.base is not None:
            return bases, bases, None
        # half of the noise lies where only the confining law has mass: f is then learned, and log Z
        # measured, there too
        return bases, halves(law("auto", "noise"), bases), None

    def _transform(self, x, weight, generator):
        """Bijection to the coordinates of the energies."""
        some = torch.randperm(len(x), generator=generator)[:MAX_FIT_ROWS]
        return MarginalGaussianization.fit(x[some].numpy(), sample_weight=weight[some].numpy())

    # ------------------------------------------------------------------ fit

    def _fit(self, X, sample_weight, n_threads):
        self._check_parameters()
        # a blend of scales (smoothing="multiscale") has nothing to go on from
        warm = self.warm_start and isinstance(
            getattr(getattr(self, "model_", None), "features", None), FeatureMap
        )
        kept = copy.deepcopy(self.model_).to("cpu") if warm else None
        precision = relative_precision(X)
        rows, weight = self._usable_rows(X, sample_weight, reset=kept is None)
        seeds = Seeds(self._draw_seed(self.random_state))
        device = resolve_device(self.device)
        if kept is not None and kept.n_members != min(self.n_members, len(rows)):
            kept = None  # other folds, other members: nothing to go on from
        if kept is not None:
            columns = self._columns
            rows = columns.snap(rows, precision)
        else:
            columns = Columns.learn(rows, self._column_names(rows), precision)
        with Progress(self.verbose) as progress, torch.no_grad():
            if self.smoothing == "multiscale":
                members, model = self._blend(rows, weight, columns, seeds, progress)
                trained, accepted = Trained.nothing(members), False
            else:
                members, refresh = self._make_members(rows, weight, columns, kept, seeds, progress)
                members.n_threads = n_threads
                model, trained, accepted = self._tilt(members, kept, refresh, device, progress)
            partition = self._measure(model, seeds, progress)
        self._columns = columns
        self.model_ = model.to("cpu" if device.type == "mps" else device)
        self._report(members, trained, accepted, partition)
        self._set_threshold(rows, members)

    def _make_members(self, rows, weight, columns, kept, seeds, progress):
        """Splits, perturbed rows, bases, features: everything before training."""
        x, _ = columns.standardize(rows)
        h = scott(x) if self.smoothing == "scott" else float(self.smoothing)
        folds = make_splits(
            len(x), self.n_members, self.validation_fraction, seeds.generator("folds")
        )
        draw, row_weight, splits = perturbed_copies(x, weight, folds, columns, h)
        x_fit = draw(seeds.of("jitter"))

        def law(value, where):
            return resolve_law(
                value, where, x_fit, row_weight, splits, columns, seeds.generator(where), progress
            )

        if kept is not None:
            bases, proposals = list(kept.bases), list(kept.proposals)
            noise = None if self._noise() is None else law(self._noise(), "noise")
            features = kept.features
        else:
            bases, proposals, noise = self._laws(law, x_fit, row_weight, splits, seeds, progress)
            features = FeatureMap(self._transform(x_fit, row_weight, seeds.generator("features")))
        modes = self._modes(x_fit, row_weight, len(x), splits, bases, seeds)
        members = Members(
            x_fit, row_weight, splits, bases, proposals, features, seeds, noise,
            modes=modes, n_rows=len(x),
        )  # fmt: skip
        if h == 0 and not columns.has_ties:
            return members, None

        def refresh(generator):
            return draw(draw_seed(generator))

        return members, refresh

    def _blend(self, rows, weight, columns, seeds, progress):
        """``smoothing="multiscale"``: the geometric mean of the bases at several scales."""
        if self.base is None or self._noise() is not None:
            raise ValueError(
                'smoothing="multiscale" blends bases: it needs a base, and noise=None.'
            )
        x, _ = columns.standardize(rows)
        folds = make_splits(
            len(x), self.n_members, self.validation_fraction, seeds.generator("folds")
        )
        scales = []
        for h in (0.0, scott(x), COARSE_SMOOTHING):
            draw, row_weight, splits = perturbed_copies(x, weight, folds, columns, h)
            copies = draw(seeds.of("jitter"))

            def law(value, where, h=h, copies=copies, row_weight=row_weight, splits=splits):
                return resolve_law(
                    value, f"{where}, smoothing {h:.2g}", copies, row_weight, splits, columns,
                    seeds.generator(where), progress,
                )  # fmt: skip

            laws = self._laws(law, copies, row_weight, splits, seeds, progress)
            scales.append(laws[0])
        # their arithmetic mean is normalised, easy to sample, and nowhere below the geometric one
        bases = [StackedBase(laws, [1.0] * len(laws)) for laws in zip(*scales, strict=True)]
        draw, row_weight, splits = perturbed_copies(x, weight, folds, columns, 0.0)
        members = Members(
            draw(seeds.of("jitter")), row_weight, splits, bases, bases, torch.nn.Identity(), seeds
        )
        return members, TiltedMixture(bases, bases, torch.nn.Identity(), ScaleAverage(bases))

    def _tilt(self, members, kept, refresh, device, progress):
        """Train, accept, recalibrate, guard."""
        if self.max_epochs == 0:
            trained = Trained.nothing(members)
        else:
            with torch.enable_grad():
                trained = self._train(members, refresh, device, kept, progress)
        # a warm start that finds nothing better stays at the tilt it came with, and the weights of
        # modes may be wrong where training found nothing
        tilted = (
            trained.n_iter > 0
            or (kept is not None and not kept.is_untilted)
            or (members.modes is not None and members.modes is not members.bases)
        )
        accepted = False
        if tilted and trained.energy is not None:
            temperature, mode_weights = 1.0, torch.zeros(0, dtype=torch.float64)
            pool, gain = trained.pool, members.gain(trained.held, trained.pool)
            if self._recalibrates():
                temperature, mode_weights, gain = recalibrate(members, trained.held, trained.pool)
                pool = temperature * trained.pool
                if len(mode_weights):
                    pool = pool + members.responsibilities()[1] @ mode_weights
            accepted = self.base is None or members.accepts(gain, pool)
        if not accepted:
            untilted = TiltedMixture(members.bases, members.bases, members.features, None)
            return untilted, trained, False
        model = TiltedMixture(members.bases, members.proposals, members.features, trained.energy)
        factor = guard(members, pool)
        model.calibrate(factor * temperature, factor * mode_weights, members.modes)
        return model, trained, True

    def _measure(self, model, seeds, progress):
        """Log Z of every member by importance sampling, on fresh samples."""
        progress.stage("log Z")
        n_members = model.n_members
        # the errors of the members are independent and average out
        target = TARGET_STD_ERROR * math.sqrt(n_members)
        if self.n_partition_samples == "auto":
            # a blend of scales is for ranking: its log Z is not worth more in many columns
            most = MAX_BLEND_SAMPLES if self.smoothing == "multiscale" else MAX_PARTITION_SAMPLES
            options = {"target_std_error": target, "max_samples": most}
        else:
            options = {"target_std_error": 0.0, "max_samples": self.n_partition_samples}
            options["batch_size"] = max(1, min(8192, self.n_partition_samples // 2))
        if model.is_untilted:
            exact = torch.zeros(n_members, dtype=torch.float64)
            return LogPartition(exact, exact, torch.full_like(exact, math.inf), 0, "exact")
        generators = seeds.generators("log Z", n_members)
        partition = adaptive_importance_sampling(
            lambda n, _: model.draw(n, generators)[1], generators[0], **options
        )
        if self.n_partition_samples == "auto":
            partition = self._anneal_where_needed(model, partition, target, seeds, progress)
        model.log_partition = partition.value
        model.log_partition_std_error = partition.std_error
        error = partition.std_error.square().sum().sqrt().item() / n_members
        share = (partition.ess / partition.n_samples).min().item()
        if partition.method == "importance sampling" and share < MIN_ESS_SHARE:
            warnings.warn(
                f"log Z rests on an effective sample size of {share:.2%}: its standard error "
                f'({error:.3g} nats) is not to be trusted. Take n_partition_samples="auto", which '
                "anneals where the base covers the data badly, or another base.",
                LowEffectiveSampleSizeWarning,
                stacklevel=5,
            )
        elif error > TARGET_STD_ERROR * 1.05:
            warnings.warn(
                f"the standard error of log Z is {error:.3g} nats, above {TARGET_STD_ERROR}"
                + (
                    ", although it was annealed; another base would help."
                    if partition.method == "annealed"
                    else f", after {partition.n_samples} samples per member; raise "
                    "n_partition_samples."
                ),
                LowEffectiveSampleSizeWarning,
                stacklevel=5,
            )
        return partition

    def _anneal_where_needed(self, model, partition, target, seeds, progress):
        """Measure again, by sequential Monte Carlo and bridge sampling, where the ESS is too low.

        The model then goes on as before; its samples are still proposed by the base.
        """
        low = (partition.ess < MIN_ESS_SHARE * partition.n_samples).nonzero()[:, 0].tolist()
        # gradients of a blend of kernel densities are slow, and its log Z is worth less
        options = (
            {"n_particles": 512, "max_particles": 512} if self.smoothing == "multiscale" else {}
        )
        for done, k in enumerate(low):
            progress.stage("log Z, annealed", done, len(low))
            single = model.member(k)

            def log_density(x, single=single):
                return single.bases[0].log_prob(x) + single.tilt(x[None])[0]

            try:
                again = estimate(
                    log_density, model.proposals[k], seeds.generator("log Z, annealed", k),
                    target_std_error=target, max_samples=0, **options,
                )  # fmt: skip
            except ValueError:  # no path from the proposal to the model
                return partition
            # importance sampling is unbiased: far above means that annealing has missed a region
            missed = (partition.value[k] - again.value).item()
            error = again.std_error
            if missed > 3.0 * math.hypot(error, partition.std_error[k].item()):
                error = max(error, missed)
            partition.value[k], partition.std_error[k] = again.value, error
            partition.ess[k] = again.ess
        return partition._replace(method="annealed") if low else partition

    def _report(self, members, trained, accepted, partition):
        """Public attributes of a fit."""
        weight = torch.cat(members.held_weights).numpy()
        base = torch.cat(
            [
                q.log_prob(members.x[held])
                for q, (_, held) in zip(members.bases, members.splits, strict=True)
            ]
        )
        level = np.average(base.numpy(), weights=weight) + self._columns.log_det
        history = dict(trained.history)
        history["held_out_log_likelihood"] = level + history.pop("gain")
        self.history_ = history
        self.n_iter_ = trained.n_iter if accepted else 0
        self.log_partition_ = partition.value.numpy()
        self.log_partition_std_error_ = partition.std_error.numpy()
        self.effective_sample_size_ = partition.ess.numpy()
        self.__dict__.pop("log_partition_learned_", None)
        if accepted and trained.log_partition is not None:
            self.log_partition_learned_ = trained.log_partition.numpy()
            measured = members.log_partition(trained.pool)
            # before recalibration: that is the f whose log Z was learned
            gap = (trained.log_partition - measured).abs().max().item()
            if gap > 0.5:
                warnings.warn(
                    f"the learned log Z differs from the measured one by {gap:.2f} nats; the "
                    "measured one is used. Train longer, or lower learning_rate.",
                    ConvergenceWarning,
                    stacklevel=5,
                )

    def _set_threshold(self, rows, members):
        """Out-of-fold scores of the training rows, and the threshold of `predict`."""
        with torch.no_grad():
            x = torch.as_tensor(self._columns.standardize(rows)[0], device=self._device)
            scores = np.full(len(rows), np.nan)
            for k, (_, held) in enumerate(members.splits):
                log_density = self.model_.log_member(k, x[held.to(x.device)])
                scores[held.numpy()] = log_density.cpu().numpy() + self._columns.log_det
        self._set_offset(rows, members.weight[: len(rows)].numpy(), scores)

    # ------------------------------------------------------------------ density

    def _on_rows(self, function, X):
        """Log-density-like `function` of standardised rows; -inf where a constant column moved."""
        x, met = self._tensor(X)
        with torch.no_grad(), limit_threads(1):
            values = torch.cat([function(c) for c in x.split(SCORED_ROWS)]).cpu().numpy()
            values += self._columns.log_det
        return np.where(met, values, -np.inf)

    def _score(self, X):
        return self._on_rows(self.model_.log_prob, X)

    def _score_with_std(self, X):
        with torch.no_grad():
            return self._score(X), self.model_.log_prob_std(self._tensor(X)[0]).cpu().numpy()

    def base_score_samples(self, X):
        """Log-density of every row under the base alone, without the tilt.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats, in the units of X. What `score_samples` adds to it is what the energy learned.
        """
        X = self._validate(X)
        return self._on_rows(self.model_.base_log_prob, X)

    def energy(self, X):
        """Energy of every row: minus the log-density, up to a constant of the fitted model.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats; with ``n_members=1`` it is -(log q + f).
        """
        return -(self.score_samples(X) + self.log_partition_.mean())

    @available_if(_has_gradient)
    def stein_score(self, X):
        """Gradient of the log-density at every row.

        Where the chosen energy is a sum of hard trees, whose gradient is zero almost everywhere,
        the gradient is that of the same trees with softness 0.25.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In nats per unit of X; 0 along columns that were constant in `fit`.
        """
        X = self._validate(X)
        gradient = np.zeros(X.shape)
        score = self._differentiable_model().score(self._tensor(X)[0]).cpu().numpy()
        gradient[:, self._columns.varying] = score / self._columns.scale
        return gradient

    def _differentiable_model(self):
        """The model, with soft trees in place of hard ones."""
        if getattr(self.model_.energy, "softness", None) != 0.0:
            return self.model_
        model = copy.deepcopy(self.model_)
        model.energy.set_softness(SCORE_SOFTNESS)
        return model

    # ------------------------------------------------------------------ sampling

    def sample(self, n_samples=1, random_state=None, *, n_steps=0):
        """Draw new rows from the model.

        Rows are proposed by the base and kept by importance: a proposal of weight w appears
        floor(w / c + U) times, U uniform, so that expected numbers are proportional to w. With
        c = 10 times the mean weight (less where weights are bounded by less) few rows are repeated.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        n_steps : int, default=0
            Steps of the Metropolis-adjusted Langevin algorithm from those rows, which leave the
            model as it is and move repeated rows apart. Where the energy has no gradient (hard
            trees, classifiers) the proposals follow the gradient of the base.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In random order.
        """
        generator = self._sampling_generator(random_state, n_samples=n_samples, n_steps=n_steps)
        with torch.no_grad(), limit_threads(1):
            x = self._shuffled(self._draw(self._member_sizes(n_samples, generator), generator),
                               generator)  # fmt: skip
        return self._columns.restore(self._walk(x, n_steps, generator).cpu().numpy())

    def _walk(self, x, n_steps, generator):
        """Steps of MALA under the model, from rows on standardised columns."""
        if not n_steps:
            return x
        chains = run(
            mala, x, self.model_.log_prob, generator, n_steps=n_steps,
            n_burn_in=max(20, n_steps // 2), step_size=x.shape[1] ** (-1.0 / 3.0),
        )  # fmt: skip
        return chains.samples[-1]

    def _member_sizes(self, n, generator):
        """How many of n rows come from each member, (K,)."""
        n_members = self.model_.n_members
        which = torch.randint(n_members, (int(n),), generator=generator, device=self._device)
        return which.bincount(minlength=n_members)

    @staticmethod
    def _shuffled(parts, generator):
        x = torch.cat(parts)
        return x[torch.randperm(len(x), generator=generator, device=x.device)]

    def _draw(self, sizes, generator):
        """Rows of every member by importance, a list of K tensors (sizes[k], d)."""
        model, n_members = self.model_, self.model_.n_members
        drawn = [[] for _ in range(n_members)]
        missing = sizes.clone()
        cap = None
        while (missing > 0).any():
            if model.is_untilted:
                for k in range(n_members):
                    drawn[k].append(model.bases[k].sample(int(missing[k]), generator))
                break
            n_proposed = int(1.1 * missing.max() * (cap or 2.0))  # one in cap is kept
            n_proposed = max(1024, min(n_proposed, 65_536))
            x, log_weights = model.draw(n_proposed, [generator] * n_members)
            weights = (log_weights - model.log_partition[:, None]).exp()
            if cap is None:
                cap = weights.max().clamp(1.0, MAX_COPIES).item()
            uniform = torch.rand(
                weights.shape, generator=generator, dtype=torch.float64, device=weights.device
            )
            copies = (weights / cap + uniform).floor().long()
            for k in range(n_members):
                rows = x[k].repeat_interleave(copies[k], dim=0)[: int(missing[k])]
                drawn[k].append(rows)
                missing[k] -= len(rows)
        return [torch.cat(parts) for parts in drawn]


def halves(laws, others):
    """Mixtures of two laws in equal parts, one per member."""
    pairs = zip(laws, others, strict=True)
    return [StackedBase([law, other], [0.5, 0.5]) for law, other in pairs]
