"""The shell of every estimator: validation, scores, pickling."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted

from skebm import _threads
from skebm._random import Seeds, seed_of
from skebm._sklearn_compat import _check_sample_weight, _fit_context
from skebm._state import ModulesAsArrays
from skebm._tensors import results_like, without_tensors
from skebm._threads import limit_threads
from skebm._typing import FloatArray, RandomState
from skebm._version import __version__
from skebm._warnings import warn
from skebm.exceptions import InconsistentVersionWarning
from skebm.training import (
    Columns,
    Fitted,
    Kinds,
    Progress,
    join_groups,
    merge_copies,
    merge_near_ties,
    resolve_device,
)
from skebm.training.degenerate import warn_of_degenerate_columns
from skebm.training.precision import Precision

from ._detector import Detector
from ._reader import TableReader
from ._schema import Schema

MIN_DRAWN, MAX_DRAWN, MIN_COMPLETE = 64, 100_000, 1e-3
"""Rows that are drawn at once where incomplete ones are left out, and the least share of others."""

OF_X = ("n_features_in_", "feature_names_in_")
"""What a fit sets that belongs to X, and not to what was learned from it."""

_Estimator = TypeVar("_Estimator")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def parameters(cls: type[_Estimator]) -> type[_Estimator]:
    """Make the constructor of an estimator: keyword-only, of the fields of class and bases."""
    return dataclass(kw_only=True, eq=False, repr=False)(cls)


@contextmanager
def unchanged_by_failure(estimator: BaseEstimator) -> Iterator[dict[str, Any]]:
    """Run a fit, and leave the estimator as it was if that fails; yields what it was."""
    before = vars(estimator).copy()
    try:
        yield before
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def sampling_rng(
    random_state: RandomState,
    *,
    n_samples: int,
    n_steps: int = 0,
    device: str | torch.device = "cpu",
) -> torch.Generator:
    """Random stream for draws; raises where these are no numbers of rows and steps."""
    for name, value, least in (("n_samples", n_samples, 1), ("n_steps", n_steps, 0)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    return torch.Generator(device).manual_seed(seed_of(random_state))


@parameters
class BaseDensity(ModulesAsArrays, DensityMixin, TableReader, Detector, BaseEstimator, ABC):
    """What all estimators share; a family of them adds the methods below.

    Parameters are documented in the estimators. A fitted one has `model_`, a module on standardised
    columns, and for itself `_columns` and `_seed`.
    """

    contamination: float | Literal["auto"] = "auto"
    device: str | torch.device = "auto"
    random_state: RandomState = None
    verbose: int = 0

    # what a fit sets
    model_: Any = field(init=False)
    history_: dict[str, np.ndarray] = field(init=False)
    n_iter_: int = field(init=False)
    out_of_fold_scores_: FloatArray = field(init=False)
    out_of_fold_members_: NDArray[np.int_] = field(init=False)
    _columns: Columns = field(init=False)
    _schema: Schema = field(init=False)
    _seed: int = field(init=False)
    _summary: str = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **Detector._parameter_constraints,
        "device": [str, torch.device],
        "random_state": ["random_state"],
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

    @property
    def _n_folds(self) -> int:
        """Folds that the rows are held out in, at least two."""
        return 2

    def _learn_columns(
        self,
        rows: np.ndarray,
        names: Any,
        weight: np.ndarray,
        precision: Precision,
        kinds: Kinds,
    ) -> Columns:
        """Columns of these rows; arguments as of `Columns.learn`."""
        return Columns.learn(rows, names, weight, precision, kinds)

    def _kinds(self, rows: np.ndarray, names: Any, atoms: Any = None) -> Kinds:
        """What is known of the columns before their values are looked at."""
        columns = self._schema.columns
        if not columns:
            return replace(Kinds.numbers(rows.shape[1]), atoms=atoms)
        return Kinds(
            np.array([c.n_categories for c in columns]),
            np.array([c.is_whole for c in columns]),
            atoms,
        )

    def _start(
        self,
        before: dict[str, Any],
        rows: np.ndarray,
        weight: np.ndarray,
        columns: Columns,
        n_units: int,
    ) -> Any:
        """The model that a fit goes on from, on the CPU, or None; see `WarmStart`."""
        return None

    def _report(self, columns: Columns, schema: Schema) -> Any:
        """What `columns_` shows; None for an estimator that does not have it."""
        return None

    # ------------------------------------------------------------------ fit

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        """Learn the density of the rows of X.

        Copies of a row (of a bootstrap sample or a joined table: equal rows that chance does not
        make, or that differ by a tiny jitter) count as one row of that weight, so that no fold
        holds out a row whose copy another one has seen.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows; numpy, pandas, polars or torch, at least two different ones. Numbers are finite;
            `NCEDensity`, `ScoreMatchingEBM`, `ContrastiveDivergenceEBM` and `ImplicitVAE` also take
            missing cells and categories. Of tensors, results are arrays; under scikit-learn's array
            API dispatch they are tensors, too.
        y : Ignored
            Present for API consistency by convention.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the rows; rows of weight zero are left out.
        groups : array-like of shape (n_samples,), default=None
            Labels of rows that belong together, such as the patient or the block of a time series
            that they come from. Rows of one group are held out together, so that held-out
            likelihoods, and the threshold of `predict`, are about new groups. At least two
            different ones. Groups that hold copies of one row are one.

        Returns
        -------
        self : object
            Fitted. If fitting fails or is interrupted, the estimator stays as it was.
        """
        if _threads.was_forked:
            _threads.was_forked = False
            warn(
                "this process was forked from one that computed with several threads; torch keeps "
                "to one here, because it would wait for ever for the others. Start processes by "
                "'spawn' or 'forkserver', or by joblib's loky, to train with several."
            )
        with unchanged_by_failure(self) as before:
            n_threads = torch.get_num_threads()  # for training; all else is made of small steps
            with (
                torch.inference_mode(False),  # which training cannot do with; it allows gradients
                torch.no_grad(),
                limit_threads(1),
                Progress(self.verbose) as progress,
            ):
                self._check_parameters()
                seeds = Seeds(seed_of(self.random_state))
                rows, weight, groups, looked_at, precision, self._schema = self._read(
                    X, sample_weight, groups, seeds.rng("rows")
                )
                rows = merge_near_ties(rows, precision)
                kept, copy_of = merge_copies(rows, weight, self._n_folds)
                rows, weight = rows[kept], np.bincount(copy_of, weight)
                weight /= weight.mean()
                if groups is not None:
                    groups = join_groups(copy_of, groups)
                    if groups.max() == 0:
                        raise ValueError(
                            "copies of rows occur in several groups and join them all, so that "
                            "none can be held out: give each row once, with its number as "
                            "sample_weight, or groups=None."
                        )
                names = self._names(rows)
                kinds = self._kinds(rows, names)
                columns = self._learn_columns(rows, names, weight, precision, kinds)
                n_units = len(rows) if groups is None else groups.max() + 1
                start = self._start(before, rows, weight, columns, n_units)
                if start is not None:
                    columns = before["_columns"].relearned(rows, weight)
                warn_of_degenerate_columns(rows, names, precision, kinds.n_categories == 0)
                rows = columns.snap(rows, precision)
                context = {
                    "seeds": seeds, "device": resolve_device(self.device), "groups": groups,
                    "n_threads": n_threads, "progress": progress, "start": start,
                }  # fmt: skip
                fitted = self._fit(rows, weight, columns, context)
                self._keep(fitted, columns, seeds, copy_of, looked_at)
                for name, values in self._judge(rows, weight, groups, fitted).items():
                    setattr(self, name, np.full(len(looked_at), np.nan))
                    getattr(self, name)[looked_at] = values[copy_of]
        return self

    def _keep(self, fitted, columns, seeds, copy_of, looked_at):
        """Set what a fit has learned, and forget an earlier one."""
        for name in [name for name in vars(self) if name.endswith("_") and name not in OF_X]:
            delattr(self, name)
        report = self._report(columns, self._schema)
        if report is not None:
            self.columns_ = report
        self._columns, self._seed, self.model_ = columns, seeds.seed, fitted.model
        self.out_of_fold_scores_ = np.full(len(looked_at), np.nan)
        self.out_of_fold_scores_[looked_at] = fitted.scores[copy_of]
        self.out_of_fold_members_ = np.full(len(looked_at), -1)
        self.out_of_fold_members_[looked_at] = fitted.judges[copy_of]
        for name, value in fitted.attributes.items():
            setattr(self, name, value)

    def summary(self) -> str:
        """What the fit has kept, and why, in one line.

        Returns
        -------
        str
            With the held-out gain and its standard error, in nats per row.
        """
        check_is_fitted(self)
        return self._summary

    # ------------------------------------------------------------------ density

    @property
    def _device(self):
        # a mixture of tilted bases has buffers of its own, which are found at once
        return next(chain(self.model_.buffers(), self.model_.parameters())).device

    def _tensor(self, X):
        return torch.as_tensor(self._columns.encode(X), device=self._device)

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
            In nats, in the units of X. A column that was constant in the n rows of `fit` has two
            states: its constant, of probability (n + 1) / (n + 2), and any other value, which is
            not modelled, of 1 / (n + 2).
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
        scores = without_tensors(self.score_samples(X))
        weight: Any = without_tensors(sample_weight)
        if weight is not None:
            weight = _check_sample_weight(weight, scores[:, None], ensure_non_negative=True)
        return float(np.average(scores, weights=weight))

    # ------------------------------------------------------------------ sampling

    def _sampling_rng(self, random_state, *, n_samples, n_steps=0):
        check_is_fitted(self)
        return sampling_rng(random_state, n_samples=n_samples, n_steps=n_steps, device=self._device)

    def _complete(self, draw: Callable[[int], torch.Tensor], n: int) -> torch.Tensor:
        """n rows without missing cells, of those that ``draw(n)`` returns."""
        parts, found, drawn = [], 0, 0
        while found < n:
            size = max(MIN_DRAWN, math.ceil(1.2 * (n - found) * (drawn + 1) / (found + 1)))
            x = draw(min(size, MAX_DRAWN))
            x = x[torch.as_tensor(self._columns.is_complete(x.cpu().numpy()), device=x.device)]
            parts.append(x)
            found, drawn = found + len(x), drawn + size
            if drawn > MAX_DRAWN and found < MIN_COMPLETE * drawn:
                raise ValueError(
                    f"complete=True: of {drawn} rows that were drawn, {found} have no missing "
                    "cell. Draw rows with missing cells, or fit columns that have fewer."
                )
        return torch.cat(parts)[:n]

    def _as_table(
        self,
        x: torch.Tensor,
        output: str,
        rng: torch.Generator,
        given: tuple[NDArray[np.bool_], FloatArray] | None = None,
    ) -> Any:
        """Drawn rows, states and standardised values, as a table like the one that was fitted.

        Cells that are known, as the first array of `given` says, show what the second one has.
        """
        if output not in ("auto", "array"):
            raise ValueError(f'output={output!r} must be "auto" or "array".')
        seed = int(torch.randint(2**31 - 1, (), generator=rng, device=rng.device))
        own = np.random.RandomState(seed)
        rows = self._columns.restore(x.cpu().numpy(), own)
        rows = rows if given is None else np.where(given[0], given[1], rows)
        return self._schema.decode(rows, output, own)

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
