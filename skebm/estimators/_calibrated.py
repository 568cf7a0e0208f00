"""What a detector promises of new rows: p-values, discoveries, thresholds that can be moved."""

from dataclasses import field
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from skebm._containers import as_table
from skebm._random import Seeds, seed_of
from skebm._sklearn_compat import Interval, _check_sample_weight, _fit_context, _safe_indexing
from skebm._tensors import results_like, without_tensors
from skebm._typing import FloatArray, RandomState

from ._base import parameters, unchanged_by_failure
from ._calibration import Calibration, at_least, calibration_weight, discovered
from ._cells import refuse_what_would_be_read_through
from ._detector import thresholds
from ._members import MemberDensity

MAX_SCORED = 20_000
"""Training rows whose scores are kept for thresholds that leave a share of these below."""


@parameters
class CalibratedDetector(MemberDensity):
    """A mean of members that keeps the scores of rows which it has not seen.

    These are the out-of-fold scores, each by one member, or with `calibration_fraction` those of
    rows that were set aside, by all of them. New rows are compared with them.
    """

    calibration_fraction: float | None = None

    # what a fit sets
    calibration_scores_: FloatArray = field(init=False)
    out_of_fold_p_values_: FloatArray = field(init=False)
    _calibration: Calibration = field(init=False)
    _trained: dict[str, FloatArray] = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MemberDensity._parameter_constraints,
        "calibration_fraction": [Interval(Real, 0, 1, closed="neither"), None],
    }

    # ------------------------------------------------------------------ fit

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Self:
        table = as_table(without_tensors(X))
        if self.calibration_fraction is None or len(getattr(table, "shape", ())) != 2:
            return super().fit(X, sample_weight=sample_weight, groups=groups)
        refuse_what_would_be_read_through(sample_weight, "sample_weight")
        weight = _check_sample_weight(
            without_tensors(sample_weight), table, dtype=np.float64, ensure_non_negative=True
        )
        labels = None if groups is None else column_or_1d(groups)
        if labels is not None:
            check_consistent_length(table, labels)
        used = np.flatnonzero(weight)
        units = np.arange(len(used)) if labels is None else _codes(labels[used])
        seeds = Seeds(seed_of(self.random_state))
        apart = reserved(units, self.calibration_fraction, seeds.rng("calibration"))

        def part(rows):
            return {
                "X": _safe_indexing(table, rows),
                "sample_weight": weight[rows],
                "groups": None if labels is None else labels[rows],
            }

        with unchanged_by_failure(self):
            super().fit(**part(used[~apart]))
            self._calibrate(**part(used[apart]))
            for name in _OF_ROWS:
                learned = getattr(self, name)
                every = np.full(len(used), -1 if learned.dtype == int else np.nan, learned.dtype)
                every[~apart] = learned
                setattr(self, name, every)
            self.out_of_fold_p_values_[apart] = self._calibration.own_p_values()
        return self

    def _judge(self, rows, weight, groups, fitted):
        judged = super()._judge(rows, weight, groups, fitted)
        # scores of rows that sharp kernels have seen are too high to say anything of new ones
        self.offset_ = self.out_of_fold_offset_
        held = self._comparable(fitted.scores, rows)
        some = np.unique(np.linspace(0, len(rows) - 1, MAX_SCORED).astype(int))
        seen = self._comparable(self._log_density(rows[some]), rows[some])
        self._trained = {"seen": seen, "held": held[some], "weight": weight[some]}
        there = ~np.isnan(held)
        of_groups = None if groups is None else groups[there]
        self._calibration = Calibration(
            held[there], calibration_weight(weight[there], of_groups), fitted.judges[there]
        )
        p_values = np.full(len(rows), np.nan)
        p_values[there] = self._calibration.own_p_values()
        return judged | {"out_of_fold_p_values_": p_values}

    def _calibrate(self, X, sample_weight, groups):
        """Keep the scores of rows that were set aside, and take the threshold from them."""
        rows = self._validate(X)
        scores = self._comparable(self._log_density(rows), rows)
        weight = calibration_weight(sample_weight, None if groups is None else _codes(groups))
        self.calibration_scores_ = scores
        self._calibration = Calibration(scores, weight, np.zeros(len(rows), dtype=int))
        if self.contamination == "auto":
            self._move_thresholds(*thresholds("auto", scores, scores, sample_weight))

    def _move_thresholds(self, offset, out_of_fold_offset):
        moved = self.out_of_fold_offset_ - out_of_fold_offset
        self.offset_, self.out_of_fold_offset_ = offset, out_of_fold_offset
        self.out_of_fold_decision_function_ = self.out_of_fold_decision_function_ + moved

    # ------------------------------------------------------------------ decisions

    def p_values(self, X: ArrayLike, random_state: RandomState = None) -> FloatArray:
        """How odd new rows are: the share of rows of the same distribution that are as odd.

        A row is compared with rows that the model has not seen (a conformal p-value): the share of
        these that score at most as it does, itself among them. Of rows like the training rows, a
        share alpha has a p-value of at most alpha,

        - with `calibration_fraction` at most this share, whatever the model: exactly;
        - without it about this share: each row is compared with the out-of-fold scores of every
          fold, under the member that has not seen the fold. Two alpha is the worst that can be
          (up to a term of the order of one over the number of folds or rows); what is common is
          a little less than alpha.

        That is on the average over training tables, and for one row at a time: a p-value says
        nothing of a row of the training table, for which see `out_of_fold_p_values_`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            New rows. Where `fit` was given groups, rows of new groups: every group counts as one
            row then, and p-values are at least one over their number plus one.
        random_state : int, RandomState instance or None, default=None
            Breaks ties of scores at random, as rows of categories have them, which makes p-values
            uniform on their steps. None counts rows of equal score as odder, so that p-values are
            too large rather than too small.

        Returns
        -------
        ndarray of shape (n_samples,), float64
            In (0, 1], at least 1 / (n + 1) of n rows (or groups) that rows are compared with. With
            weights w these count as (sum w)^2 / sum w^2, and p-values are those of the weighted
            distribution, approximately.
        """
        random = None if random_state is None else check_random_state(random_state)
        return results_like(X)(self._p_values(X, random))

    def _p_values(self, X, random):
        rows = self._validate(X)
        if hasattr(self, "calibration_scores_"):
            scores = self._log_density(rows)[None]
        else:
            scores = self._member_scores(rows)
        return self._calibration.p_values(self._comparable(scores, rows), random)

    def discoveries(self, X: ArrayLike, fdr: float = 0.1) -> NDArray[np.bool_]:
        """Choose rows so that hardly any of them is a false discovery.

        The rule of Benjamini and Hochberg (1995) on `p_values`: of the rows it chooses, a share of
        at most `fdr` is expected to come from the distribution of the training rows, where p-values
        are valid and independent, or positively dependent, as those beside one set of rows are
        (Bates et al. 2023). How many rows are chosen depends on all of X, unlike in `predict`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            New rows.
        fdr : float, default=0.1
            Expected share of false discoveries, in (0, 1).

        Returns
        -------
        ndarray of shape (n_samples,), bool

        Warns
        -----
        UserWarning
            If nothing is discovered, and a single row could not have been, because its p-value
            cannot be as small as `fdr` over the number of rows.
        """
        found = discovered(self._p_values(X, None), fdr, self._calibration.least)
        return results_like(X)(found)

    def set_threshold(
        self, *, contamination: float | None = None, false_alarm_rate: float | None = None
    ) -> Self:
        """Move the threshold of `predict`, without fitting.

        Exactly one of the wishes is to be given. Parameters of the constructor stay as they are, so
        that the next fit, and a clone, put the threshold where these say.

        Parameters
        ----------
        contamination : float, default=None
            Share of the *training rows* that are outliers, by their out-of-fold scores, in
            (0, 0.5]: the threshold that a fit with this `contamination` has (by 20,000 of the rows
            where there are more).
        false_alarm_rate : float, default=None
            Share of *new rows* like the training rows that `predict` may call outliers, in (0, 1):
            at most this on the average with `calibration_fraction`, where `predict` then labels the
            rows whose p-value is at most this; about it without.

        Returns
        -------
        self : object
            With other `offset_`, `out_of_fold_offset_` and `out_of_fold_decision_function_`.

        Raises
        ------
        ValueError
            If there are too few rows to promise such a rate.
        """
        check_is_fitted(self)
        if (contamination is None) == (false_alarm_rate is None):
            raise ValueError("give either contamination or false_alarm_rate, and not both.")
        if false_alarm_rate is None:
            if not isinstance(contamination, Real) or not 0 < contamination <= 0.5:
                raise ValueError(f"contamination={contamination!r} must be a number in (0, 0.5].")
            _, offset = thresholds(contamination, **self._trained)
            self._move_thresholds(offset, offset)
            return self
        if not isinstance(false_alarm_rate, Real) or not 0 < false_alarm_rate < 1:
            raise ValueError(
                f"false_alarm_rate={false_alarm_rate!r} must be a number between 0 and 1."
            )
        least = self._calibration.least
        if least > false_alarm_rate:
            raise ValueError(
                f"false_alarm_rate={false_alarm_rate!r} cannot be promised with "
                f"{1 / least - 1:.0f} rows to compare with: it has to be at least {least:.2g}, or "
                f"there have to be {at_least(1 / false_alarm_rate) - 1} rows."
            )
        offset = self._calibration.threshold(false_alarm_rate)
        self._move_thresholds(offset, offset)
        return self


def reserved(units: NDArray[np.int_], fraction: float, rng: torch.Generator) -> NDArray[np.bool_]:
    """Which rows are set aside.

    Parameters
    ----------
    units : ndarray of shape (n,), int
        What a row belongs to, 0, 1, ...; units are set aside as a whole.
    fraction : float
        Of the units.
    rng : torch.Generator

    Returns
    -------
    ndarray of shape (n,), bool
    """
    n_units = units.max() + 1
    n_apart = round(fraction * n_units)
    if n_apart < 1 or n_units - n_apart < 2:
        raise ValueError(
            f"calibration_fraction={fraction!r} sets {n_apart} of {n_units} rows (or groups) "
            "aside: that has to be at least one, and leave at least two to learn from."
        )
    return np.isin(units, torch.randperm(n_units, generator=rng)[:n_apart].numpy())


def _codes(labels):
    return np.unique(labels, return_inverse=True)[1]


_OF_ROWS = (
    "out_of_fold_scores_", "out_of_fold_members_", "out_of_fold_decision_function_",
    "out_of_fold_p_values_",
)  # fmt: skip
"""What a fit knows of every row of positive weight."""
