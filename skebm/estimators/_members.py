"""Densities that are the mean of members: scores, gradients, sampling by importance."""

import copy
from dataclasses import field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.metaestimators import available_if

from skebm._parallel import resolve_n_jobs
from skebm._sklearn_compat import Interval, StrOptions
from skebm._tensors import results_like
from skebm._threads import limit_threads
from skebm._typing import FloatArray, RandomState
from skebm._warnings import warn
from skebm.bases import MarginalGaussianization, StackedBase
from skebm.derivatives import smoothed_score
from skebm.energies import ClassifierEnergy
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.models import Conditioner
from skebm.partition import rows_by_importance
from skebm.samplers import mala, run
from skebm.training import make_task

from ._asking import Asking
from ._base import BaseDensity, parameters
from ._completer import Completer

SCORED_ROWS = 8192
"""Rows that are scored at once, so that memory does not grow with n."""

VALIDATION_FRACTION = 0.1
"""Rows held out where there is one member; with more, every row is held out once."""

REPEATED_SHARE = 0.05
"""Share of repeated rows beyond which `sample` warns."""

SMOOTHED_COLUMNS = 3
"""The score is that of a smoothed density in at most so many columns."""

SCORE_SOFTNESS = 0.25
"""Softness of the trees in `stein_score` where the chosen ones are hard."""


def _has_gradient(estimator):
    """Whether the fitted (or to be fitted) energy can be differentiated."""
    model = getattr(estimator, "model_", None)
    if model is None:
        given = getattr(estimator, "energy_model", None)
        if not hasattr(given, "predict_proba"):
            return True
        from sklearn.ensemble import HistGradientBoostingClassifier  # here: its import is slow

        return isinstance(given, HistGradientBoostingClassifier)
    members = getattr(model.energy, "members", ())
    return not any(isinstance(f, ClassifierEnergy) for f in members)


_Method = TypeVar("_Method")


def _if_differentiable(method: _Method) -> _Method:
    """The method, where the energy has a gradient."""
    return available_if(_has_gradient)(method)  # pyright: ignore[reportReturnType]


@parameters
class MemberDensity(Asking, BaseDensity):
    """Density that is the mean of members, a `TiltedMixture`: its scores and draws."""

    n_members: int = 4
    n_partition_samples: int | Literal["auto"] = "auto"
    n_jobs: int | None = None

    # what a fit sets
    log_partition_: FloatArray = field(init=False)
    log_partition_std_error_: FloatArray = field(init=False)
    effective_sample_size_: FloatArray = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseDensity._parameter_constraints,
        "n_members": [Interval(Integral, 1, None, closed="left")],
        "n_partition_samples": [StrOptions({"auto"}), Interval(Integral, 100, None, closed="left")],
        "n_jobs": [Integral, None],
    }

    @property
    def _n_folds(self):
        return max(2, self.n_members)

    def _task(self, rows, weight, columns, context, **particular):
        """Split the rows among the members, `smoothing` and other particulars being given."""
        return make_task(
            rows, weight, columns, n_members=self.n_members,
            validation_fraction=VALIDATION_FRACTION,
            n_jobs=resolve_n_jobs(self.n_jobs, context["n_threads"]), **context, **particular,
        )  # fmt: skip

    # ------------------------------------------------------------------ density

    def _on_rows(self, function, X):
        """Log-density-like `function` of standardised rows, in the units of X."""
        x = self._tensor(X)
        with torch.no_grad(), limit_threads(1):
            values = torch.cat([function(c) for c in x.split(SCORED_ROWS)]).cpu().numpy()
        return values + self._columns.log_factors(X)

    def _log_density(self, X):
        return self._on_rows(self.model_.log_prob, X)

    def _log_density_std(self, X):
        with torch.no_grad():
            error = self.model_.log_prob_std(self._tensor(X)).cpu().numpy()
        return self._log_density(X), error

    def _member_scores(self, X):
        """Log-density of validated rows, in the units of X, under every member, (K, n)."""
        # one by one, each as a model of its own, which knows what to do with states it has not met
        members = [self.model_.member(k) for k in range(self.model_.n_members)]
        return np.stack([self._on_rows(member.log_prob, X) for member in members])

    def base_score_samples(self, X: ArrayLike) -> FloatArray:
        """Log-density of every row under the base alone, without the tilt.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In nats, in the units of X. What `score_samples` adds to it is what the energy learned.
        """
        return results_like(X)(self._on_rows(self.model_.base_log_prob, self._validate(X)))

    def energy(self, X: ArrayLike) -> FloatArray:
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

    @_if_differentiable
    @torch.inference_mode(False)
    def stein_score(self, X: ArrayLike, smoothing: float | Literal["auto"] = "auto") -> FloatArray:
        """Gradient of the log-density at every row.

        A density can be right and its gradient not: the bases of ``base="auto"`` have many
        components and coordinates with kinks, and trees have steps. So in up to three columns the
        gradient is by default that of the density smoothed by a little normal noise.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        smoothing : float or "auto", default="auto"
            Standard deviation of that noise, in standard deviations of the columns. "auto" is
            n^(-1/6), with n training rows, in up to three columns, where the base is stacked or
            lives in Gaussianised columns, or where the energy is of trees; and 0 otherwise.
            0 is the gradient of `score_samples` itself; where the energy is a sum of hard trees,
            whose gradient is zero almost everywhere, of the same trees with softness 0.25.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In nats per unit of X; 0 along columns that were constant in `fit`, NaN where a cell
            holds no number.

        Raises
        ------
        ValueError
            If `smoothing` is negative, or not 0 in more than three columns.
        """
        rows = self._validate(X)
        gradient = np.zeros(rows.shape)
        x, h = self._tensor(rows), self._score_smoothing(smoothing)
        if h:
            scale = torch.as_tensor(h * self._columns.spread, device=self._device)
            with torch.no_grad(), limit_threads(1):
                parts = [
                    smoothed_score(self.model_.log_prob, c, scale) for c in x.split(SCORED_ROWS)
                ]
            score = torch.cat(parts)
        else:
            score = self._differentiable_model().score(x)
        columns = self._columns
        values = columns.layout.values(score).cpu().numpy() / columns.scale
        absent = np.isnan(columns.encode(rows)[:, len(columns.states) :])
        gradient[:, columns.varying] = np.where(absent, np.nan, values)
        gradient[:, [s.column for s in columns.states if s.value < 0]] = np.nan
        return results_like(X)(gradient)

    def _score_smoothing(self, smoothing):
        """Noise for `stein_score`, in standard deviations of the columns."""
        few = self.model_.n_features <= SMOOTHED_COLUMNS and not self._columns.states
        if isinstance(smoothing, str) and smoothing == "auto":
            base: Any = self.model_.bases[0]
            transform = getattr(base, "transform", None)
            uneven = isinstance(base, StackedBase) or isinstance(transform, MarginalGaussianization)
            uneven = uneven or hasattr(self.model_.energy, "softness")
            return self._columns.n_rows ** (-1 / 6) if few and uneven else 0.0
        if not isinstance(smoothing, Real) or not 0 <= float(smoothing) < np.inf:
            raise ValueError(f'smoothing={smoothing!r} must be "auto" or a number of at least 0.')
        if smoothing and not few:
            raise ValueError(
                f"smoothing={smoothing!r} needs at most {SMOOTHED_COLUMNS} columns that vary, all "
                f"of numbers alone, and there are {self.model_.n_features}, or states among them; "
                "take smoothing=0."
            )
        return float(smoothing)

    def _differentiable_model(self):
        """The model, with soft trees in place of hard ones."""
        if getattr(self.model_.energy, "softness", None) != 0.0:
            return self.model_
        model = copy.deepcopy(self.model_)
        model.energy.set_softness(SCORE_SOFTNESS)
        return model

    # ------------------------------------------------------------------ some cells

    def _make_completer(self):
        with torch.no_grad(), limit_threads(1):
            conditioner = Conditioner.of(self.model_, self._columns.layout, self._seed)
        return Completer(
            conditioner, self._columns, self.log_partition_std_error_, self._seed, self._device
        )

    # ------------------------------------------------------------------ sampling

    @torch.inference_mode(False)
    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        n_steps: int = 0,
        output: Literal["auto", "array"] = "auto",
        complete: bool = False,
        given: Any = None,
    ) -> Any:
        """Draw new rows from the model.

        Rows are proposed by the base and kept by importance: a proposal of weight w appears
        floor(w / c + U) times, U uniform, so that expected numbers are proportional to w. Rows with
        w > c are repeated: c is the smallest of 10, 20, 50, 100 and 200 times the mean weight at
        which this concerns 1 % of the rows. Where that is not enough, as for bases that cover the
        model badly in many columns, a warning counts them.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        n_steps : int, default=0
            Steps of the Metropolis-adjusted Langevin algorithm from those rows, which leave the
            model as it is and move repeated rows apart. Where the energy has no gradient (hard
            trees, classifiers) the proposals follow the gradient of the base. Of numbers only:
            states have no gradient.
        output : {"auto", "array"}, default="auto"
            "auto" is a frame where `fit` was given one, with its dtypes; "array" an array, of
            objects if there are categories.
        complete : bool, default=False
            Draw rows under the condition that no cell is missing: others are left out.
        given : mapping or None, default=None
            Cells by the names of their columns (the numbers of an array), as ``{"age": 40}``: the
            others are drawn given these, as by :meth:`condition`, which takes several rows, too.

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            In random order. Numbers lie where the columns can: integers and columns with ties on
            their grid, and not beyond bounds at which the rows pile up.

        Warns
        -----
        LowEffectiveSampleSizeWarning
            If more than 5 % of the rows repeat others.

        Raises
        ------
        ValueError
            If hardly any row is complete, and complete ones are asked for.
        """
        if given is not None:
            if n_steps:
                raise ValueError(
                    f"n_steps={n_steps} moves all cells of a row; given has fixed ones."
                )
            options: Any = {"output": output, "complete": complete}
            return self.condition(given).complete_rows(n_samples, random_state, **options)
        rng = self._sampling_rng(random_state, n_samples=n_samples, n_steps=n_steps)

        def draw(n):
            return self._shuffled(self._draw(self._member_sizes(n, rng), rng), rng)

        with torch.no_grad(), limit_threads(1):
            x = self._complete(draw, n_samples) if complete else draw(n_samples)
        return self._restored(self._walk(x, n_steps, rng), output, rng)

    def _restored(self, x, output, rng):
        """Drawn rows, a tensor of states and values, as a table; warns of repeated ones.

        Warns
        -----
        LowEffectiveSampleSizeWarning
            If more than 5 % of the rows repeat others.
        """
        rows = x.cpu().numpy()
        values = rows[:, len(self._columns.states) :]
        rows = rows[~np.isnan(values).all(axis=1)]  # states alone repeat
        enough = (1.0 - REPEATED_SHARE) * len(rows)
        # a single column mostly tells already, and is much faster
        if len(rows) and len(np.unique(rows[:, -1])) < enough:
            n_distinct = len(np.unique(rows, axis=0))
            if n_distinct < enough:
                warn(
                    f"{len(rows) - n_distinct} of {len(x)} drawn rows repeat others: importance "
                    "keeps few rows where proposals cover the model badly. Steps under the model "
                    "move them apart: call sample with n_steps=50, or more.",
                    LowEffectiveSampleSizeWarning,
                )
        return self._as_table(x, output, rng)

    def _walk(self, x, n_steps, rng):
        """Steps of MALA under the model, from rows on standardised columns."""
        if not n_steps:
            return x
        if self._columns.states:
            raise ValueError(
                f"n_steps={n_steps} moves numbers only, and {self._columns.first_state()}; take "
                "n_steps=0."
            )
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
