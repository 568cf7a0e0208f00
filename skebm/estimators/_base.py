"""The shell of every estimator: validation, scores, outlier detection, pickling."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from skebm._random import Seeds
from skebm._sklearn_compat import Interval, StrOptions, _check_sample_weight, _fit_context
from skebm._state import ModulesAsArrays
from skebm._tensors import results_like, without_tensors
from skebm._threads import limit_threads
from skebm._typing import FloatArray, RandomState
from skebm._version import __version__
from skebm._warnings import warn
from skebm.exceptions import InconsistentVersionWarning
from skebm.training import Columns, Fitted, Progress, relative_precision, resolve_device

AUTO_CONTAMINATION = 0.05
"""``contamination="auto"``: share of new rows of the same kind that `predict` calls outliers."""

_Estimator = TypeVar("_Estimator")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def parameters(cls: type[_Estimator]) -> type[_Estimator]:
    """Make the constructor of an estimator: keyword-only, of the fields of class and bases."""
    return dataclass(kw_only=True, eq=False, repr=False)(cls)


@parameters
class BaseDensity(ModulesAsArrays, DensityMixin, OutlierMixin, BaseEstimator, ABC):
    """What all estimators share; a family of them adds the methods below.

    Parameters are documented in the estimators. A fitted one has `model_`, a module on standardised
    columns, and for itself `_columns` and `_seed`.
    """

    smoothing: float | Literal["scott", "multiscale"] = 0.0
    contamination: float | Literal["auto"] = "auto"
    device: str | torch.device = "auto"
    random_state: RandomState = None
    warm_start: bool = False
    verbose: int = 0

    # what a fit sets
    model_: Any = field(init=False)
    offset_: float = field(init=False)
    history_: dict[str, np.ndarray] = field(init=False)
    n_iter_: int = field(init=False)
    out_of_fold_scores_: FloatArray = field(init=False)
    out_of_fold_members_: NDArray[np.int_] = field(init=False)
    _columns: Columns = field(init=False)
    _seed: int = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "smoothing": [StrOptions({"scott"}), Interval(Real, 0, None, closed="left")],
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
        "device": [str, torch.device],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    # ------------------------------------------------------------------ what a family adds

    @abstractmethod
    def _fit(
        self, rows: np.ndarray, weight: np.ndarray, columns: Columns, context: dict[str, Any]
    ) -> Fitted:
        """Learn from rows of positive weight, and return a `Fitted`.

        Parameters
        ----------
        rows : ndarray of shape (n_rows, n_features)
            In the units of X.
        weight : ndarray of shape (n_rows,)
            Of mean one.
        columns : Columns
        context : dict
            `seeds`, `device`, `n_threads`, `progress` and `start`, for `make_task`.
        """

    @abstractmethod
    def _log_density_std(self, X: np.ndarray) -> tuple[FloatArray, FloatArray]:
        """Log-density of validated rows, in the units of X, and its standard error."""

    def _log_density(self, X: np.ndarray) -> FloatArray:
        """The first of these; to be overridden where the second costs much."""
        return self._log_density_std(X)[0]

    def _check_parameters(self):
        """Raise where parameters contradict each other: before anything is fitted."""

    def _goes_on_from(self, model: Any, n_rows: int) -> bool:
        """Whether a warm start on so many rows can go on from that model."""
        return True

    def _learn_columns(self, rows, names, precision):
        """Columns of these rows; the last two as of `Columns.learn`."""
        return Columns.learn(rows, names, precision)

    # ------------------------------------------------------------------ fit

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Learn the density of the rows of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows; numpy, pandas, polars or torch, finite, at least two different ones. Of tensors,
            results are arrays; under scikit-learn's array API dispatch they are tensors, too.
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the rows; rows of weight zero are left out.

        Returns
        -------
        self : object
            Fitted. If fitting fails or is interrupted, the estimator stays as it was.
        """
        before = self.__dict__.copy()
        n_threads = torch.get_num_threads()  # for training; all else is made of small steps
        try:
            with limit_threads(1), Progress(self.verbose) as progress, torch.no_grad():
                self._check_parameters()
                model = getattr(self, "model_", None) if self.warm_start else None
                rows, weight, precision = self._read(X, sample_weight, reset=model is None)
                start = None
                if model is not None and self._goes_on_from(model, len(rows)):
                    start = copy.deepcopy(model).to("cpu")
                if start is None:
                    columns = self._learn_columns(rows, self._names(rows), precision)
                else:
                    columns = self._columns
                rows = columns.snap(rows, precision)
                seeds = Seeds(self._draw_seed(self.random_state))
                context = {
                    "seeds": seeds, "device": resolve_device(self.device),
                    "n_threads": n_threads, "progress": progress, "start": start,
                }  # fmt: skip
                fitted = self._fit(rows, weight, columns, context)
                self._keep(fitted, columns, seeds)
                self.offset_ = self._threshold(rows, weight)
        except BaseException:
            self.__dict__.clear()  # pyright: ignore[reportAttributeAccessIssue]
            self.__dict__.update(before)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        return self

    def _read(self, X: Any, sample_weight: Any, *, reset: bool) -> tuple[Any, Any, Any]:
        """The rows of positive weight, their weights of mean one, and the precision of X."""
        precision, X = relative_precision(X), without_tensors(X)
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2, reset=reset)
        weight = _check_sample_weight(
            without_tensors(sample_weight), X, dtype=np.float64, ensure_non_negative=True
        )
        used = weight > 0
        if used.sum() < 2:
            raise ValueError("sample_weight must be positive for at least 2 samples.")
        return X[used], weight[used] / weight[used].mean(), precision

    def _names(self, rows):
        """Names of the columns of X, for messages."""
        return getattr(self, "feature_names_in_", range(rows.shape[1]))

    def _keep(self, fitted, columns, seeds):
        """Set what a fit has learned, and forget an earlier one."""
        for name in [name for name in vars(self) if name.endswith("_") and name not in _OF_X]:
            delattr(self, name)
        self._columns, self._seed, self.model_ = columns, seeds.seed, fitted.model
        self.out_of_fold_scores_ = fitted.scores
        for name, value in fitted.attributes.items():
            setattr(self, name, value)

    def _threshold(self, rows, weight):
        """Score below which `predict` calls a row an outlier."""
        if self.contamination != "auto":
            return _weighted_quantile(self._log_density(rows), weight, self.contamination)
        scores = self.out_of_fold_scores_
        held = ~np.isnan(scores)
        return _weighted_quantile(scores[held], weight[held], AUTO_CONTAMINATION)

    def _draw_seed(self, random_state):
        return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))

    # ------------------------------------------------------------------ density

    def _validate(self, X: Any) -> FloatArray:
        check_is_fitted(self)
        checked: Any = validate_data(self, without_tensors(X), dtype=np.float64, reset=False)
        return self._columns.snap(checked, relative_precision(X))

    @property
    def _device(self):
        return next(chain(self.model_.parameters(), self.model_.buffers())).device

    def _tensor(self, X):
        x, met = self._columns.standardize(X)
        return torch.as_tensor(x, device=self._device), met

    @overload
    def score_samples(self, X: ArrayLike, return_std: Literal[False] = ...) -> FloatArray: ...
    @overload
    def score_samples(
        self, X: ArrayLike, return_std: Literal[True]
    ) -> tuple[FloatArray, FloatArray]: ...
    def score_samples(
        self, X: ArrayLike, return_std: bool = False
    ) -> FloatArray | tuple[FloatArray, FloatArray]:
        """Log-density of every row, normalised.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_std : bool, default=False
            Also return the standard error of the log-density: what the error of log Z, or of the
            integral over latent variables, puts on it.

        Returns
        -------
        log_density : ndarray of shape (n_samples,), float64
            In nats, in the units of X. Columns that were constant in `fit` are a point mass: a row
            that differs there has -inf.
        std_error : ndarray of shape (n_samples,), float64
            Only if `return_std`; in nats.
        """
        rows, like = self._validate(X), results_like(X)
        if not return_std:
            return like(self._log_density(rows))
        log_density, std_error = self._log_density_std(rows)
        return like(log_density), like(std_error)

    def score(
        self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None
    ) -> float:
        """Mean log-density of the rows of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the mean.

        Returns
        -------
        float
            In nats per row, in the units of X (a mean, as for GaussianMixture).
        """
        scores = self._log_density(self._validate(X))
        weight: Any = without_tensors(sample_weight)
        if weight is not None:
            weight = _check_sample_weight(weight, scores[:, None], ensure_non_negative=True)
        return float(np.average(scores, weights=weight))

    # ------------------------------------------------------------------ sampling

    def _sampling_rng(self, random_state, *, n_samples, n_steps=0):
        check_is_fitted(self)
        for name, value, least in (("n_samples", n_samples, 1), ("n_steps", n_steps, 0)):
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        return torch.Generator(self._device).manual_seed(self._draw_seed(random_state))

    # ------------------------------------------------------------------ outlier detector

    def decision_function(self, X: ArrayLike) -> FloatArray:
        """`score_samples` minus `offset_`: negative for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), float64
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> NDArray[np.int_]:
        """Label rows: +1 for inliers, -1 for outliers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        scores = self._log_density(self._validate(X))
        return results_like(X)(np.where(scores - self.offset_ < 0, -1, 1))

    def fit_predict(
        self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None
    ) -> NDArray[np.int_]:
        """Fit, then label the same rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None

        Returns
        -------
        ndarray of shape (n_samples,), int
        """
        return self.fit(X, sample_weight=sample_weight).predict(X)

    # ------------------------------------------------------------------ pickling

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {_VERSION: __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.get(_VERSION, "of no stated version")
        if stored != __version__:
            warn(
                f"this {type(self).__name__} was stored by skebm {stored} and is loaded by "
                f"{__version__}: its results may differ, or be wrong. Fit it again, or load it "
                "with the version that stored it.",
                InconsistentVersionWarning,
            )
        super().__setstate__({name: value for name, value in state.items() if name != _VERSION})


_VERSION = "_skebm_version"

_OF_X = ("n_features_in_", "feature_names_in_")


def _weighted_quantile(values, weight, level):
    """Quantile of values of which each stands for the middle of its weight."""
    order = np.argsort(values)
    weight = weight[order]
    position = (np.cumsum(weight) - 0.5 * weight) / weight.sum()
    return float(np.interp(level, position, values[order]))
