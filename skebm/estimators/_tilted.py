"""What estimators of tilted bases share: scores, gradients, sampling by importance."""

import copy
from abc import abstractmethod
from functools import partial
from numbers import Integral

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.utils.metaestimators import available_if
from torch.distributions import Distribution

from skebm._sklearn_compat import HasMethods, Interval, StrOptions
from skebm._threads import limit_threads
from skebm.bases import CANDIDATES, ConfiningGaussian
from skebm.energies import (
    Boosting,
    ClassifierEnergy,
    EnergyModelMixin,
    Network,
    resolve_energy_model,
)
from skebm.models import FeatureMap
from skebm.partition import rows_by_importance
from skebm.samplers import mala, run
from skebm.training import Recipe, fit_blend, fit_tilted, make_task

from ._base import BaseDensity, parameters

SCORED_ROWS = 8192
"""Rows that are scored at once, so that memory does not grow with n."""

VALIDATION_FRACTION = 0.1
"""Rows held out where there is one member; with more, every row is held out once."""

SCORE_SOFTNESS = 0.25
"""Softness of the trees in `stein_score` where the chosen ones are hard."""

DISTRIBUTION = [StrOptions({"auto", *CANDIDATES}), list, tuple, Distribution,
                HasMethods(["score_samples", "sample"])]  # fmt: skip


def _has_gradient(estimator):
    """Whether the fitted (or to be fitted) energy can be differentiated."""
    model = getattr(estimator, "model_", None)
    if model is None:
        given = estimator.energy_model
        is_classifier = hasattr(given, "predict_proba")
        return not is_classifier or isinstance(given, HistGradientBoostingClassifier)
    members = getattr(model.energy, "members", ())
    return not any(isinstance(f, ClassifierEnergy) for f in members)


@parameters
class TiltedDensity(EnergyModelMixin, BaseDensity):
    """Bases tilted by energies; an estimator adds its fields and `_recipe`.

    It may override `_check_parameters`, too.
    """

    base: object = "auto"
    energy_model: object = "auto"
    n_members: int = 4
    n_partition_samples: object = "auto"
    recalibration: bool = True

    _parameter_constraints = {
        **BaseDensity._parameter_constraints,
        "base": [*DISTRIBUTION, None],
        "energy_model": "no_validation",  # its own `validate` says what is wrong
        "n_members": [Interval(Integral, 1, None, closed="left")],
        "n_partition_samples": [StrOptions({"auto"}), Interval(Integral, 100, None, closed="left")],
        "recalibration": ["boolean"],
        "smoothing": [
            StrOptions({"scott", "multiscale"}),
            *BaseDensity._parameter_constraints["smoothing"][1:],
        ],
    }

    @abstractmethod
    def _recipe(self):
        """What is particular to the method, a `Recipe`; `_basic_recipe` knows the shared fields."""

    def _basic_recipe(self, train, **particular):
        """Recipe with what the shared fields say."""
        return Recipe(
            train=train,
            base=self.base,
            own_energy=not (self.energy_model is None or isinstance(self.energy_model, str)),
            n_partition_samples=self.n_partition_samples,
            recalibrates=self.recalibration,
            **particular,
        )

    def _resolve_energy_model(self, default, *, network_only=False):
        """What `energy_model` says, checked: a specification, a classifier, or None for no energy.

        Parameters
        ----------
        default : Network or Boosting
            Of "auto".
        network_only : bool, default=False
            Whether the method trains networks and nothing else.
        """
        if self.energy_model is None:
            if self.base is None:
                raise ValueError("energy_model=None is the base alone, so that it needs a base.")
            return None
        model = resolve_energy_model(self.energy_model, default)
        if network_only and not isinstance(model, Network):
            raise ValueError(
                f"{type(self).__name__} trains networks only, and energy_model is {model!r}; take "
                "Network(...), a torch module, or NCEDensity."
            )
        if isinstance(model, Network | Boosting):
            model.validate()
        return model

    # ------------------------------------------------------------------ fit

    def _goes_on_from(self, model, n_rows):
        # a blend of scales has nothing to go on from, nor has a fit of other folds, or one with a
        # base from one without
        return (
            isinstance(model.features, FeatureMap)
            and model.n_members == min(self.n_members, n_rows)
            and isinstance(model.bases[0], ConfiningGaussian) == (self.base is None)
        )

    def _fit(self, rows, weight, columns, context):
        task_at = partial(
            make_task, rows, weight, columns, n_members=self.n_members,
            validation_fraction=VALIDATION_FRACTION, **context,
        )  # fmt: skip
        recipe = self._recipe()
        if self.smoothing == "multiscale":
            return fit_blend(task_at, recipe)
        return fit_tilted(task_at(smoothing=self.smoothing), recipe)

    # ------------------------------------------------------------------ density

    def _on_rows(self, function, X):
        """Log-density-like `function` of standardised rows; -inf where a constant column moved."""
        x, met = self._tensor(X)
        with torch.no_grad(), limit_threads(1):
            values = torch.cat([function(c) for c in x.split(SCORED_ROWS)]).cpu().numpy()
            values += self._columns.log_det
        return np.where(met, values, -np.inf)

    def _log_density(self, X):
        return self._on_rows(self.model_.log_prob, X)

    def _log_density_std(self, X):
        with torch.no_grad():
            error = self.model_.log_prob_std(self._tensor(X)[0]).cpu().numpy()
        return self._log_density(X), error

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
    @torch.inference_mode(False)
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

    @torch.inference_mode(False)
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
        rng = self._sampling_rng(random_state, n_samples=n_samples, n_steps=n_steps)
        with torch.no_grad(), limit_threads(1):
            x = self._shuffled(self._draw(self._member_sizes(n_samples, rng), rng),
                               rng)  # fmt: skip
        return self._columns.restore(self._walk(x, n_steps, rng).cpu().numpy())

    def _walk(self, x, n_steps, rng):
        """Steps of MALA under the model, from rows on standardised columns."""
        if not n_steps:
            return x
        chains = run(
            mala, x, self.model_.log_prob, rng, n_steps=n_steps,
            n_burn_in=max(20, n_steps // 2), step_size=x.shape[1] ** (-1.0 / 3.0),
        )  # fmt: skip
        return chains.samples[-1]

    def _member_sizes(self, n, rng):
        """How many of n rows come from each member, (K,)."""
        n_members = self.model_.n_members
        which = torch.randint(n_members, (int(n),), generator=rng, device=self._device)
        return which.bincount(minlength=n_members)

    @staticmethod
    def _shuffled(parts, rng):
        x = torch.cat(parts)
        return x[torch.randperm(len(x), generator=rng, device=x.device)]

    def _draw(self, sizes, rng):
        """Rows of every member by importance, a list of K tensors (sizes[k], d)."""
        model, n_members = self.model_, self.model_.n_members
        if model.is_untilted:
            pairs = zip(model.bases, sizes.tolist(), strict=True)
            # not all distributions can draw 0 rows
            return [base.sample(max(n, 1), rng)[:n] for base, n in pairs]

        def propose(n):
            x, log_weights = model.draw(n, [rng] * n_members)
            return x, (log_weights - model.log_partition[:, None]).exp()

        def uniform(shape):
            like = {"dtype": torch.float64, "device": self._device}
            return torch.rand(shape, generator=rng, **like)

        return rows_by_importance(propose, sizes, uniform)
