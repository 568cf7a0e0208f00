"""Outlier detection by the lowest of several views."""

from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import ArrayLike

from skebm._sklearn_compat import StrOptions
from skebm._tensors import results_like
from skebm._threads import limit_threads
from skebm._typing import FloatArray
from skebm.training import fit_lowest_view, fit_tilted

from ._base import parameters
from ._calibrated import CalibratedDetector
from ._members import SCORED_ROWS
from ._mixed import MixedDensity
from ._tilted import TiltedDensity

VIEWS_OF: dict[str, tuple[str, ...]] = {
    "clean": ("sharp", "linear"),
    "contaminated": ("local", "linear", "wide"),
}
"""Views by `training`."""


@parameters
class OutlierDetector(MixedDensity, CalibratedDetector):
    r"""Outlier detector: a row is as likely as its oddest view says.

    .. math:: \log p(x) = \min_v g_v(\log q_v(x)) - \log Z \quad\text{(nats, in the units of X)}

    The views :math:`q_v` are normalised distributions of the same rows that see different things:
    gaps between rows, single columns, the correlation of columns. The maps :math:`g_v` bring their
    log-densities at rows that they have not seen to one scale, and log Z is measured by importance
    sampling from the mixture of the views, so that the minimum is a density again. The estimator is
    the mean of `n_members` such densities, each fitted to the other folds and judged on its own.

    Parameters
    ----------
    density : estimator or None, default=None
        A density of skebm, not fitted, such as ``NCEDensity()``, that is one more view; it is
        fitted to the same folds. Of its parameters those act that say what it is: not `n_members`,
        `random_state`, `contamination`, and what is said of columns and the computer.
    training : {"clean", "contaminated"}, default="clean"
        Whether the rows of `fit` are known to be good, and new ones are to be judged; or may hold
        outliers themselves, which `out_of_fold_scores_` and `fit_predict` are to find. "clean"
        takes the sharpest views, and "contaminated" those that few outliers hardly change.
    calibration_fraction : float or None, default=None
        Share of the rows, or of the groups, that `fit` sets aside, drawn at random. Nothing is
        learned from them; `p_values` and thresholds come from their scores, and hold exactly. None
        learns from all rows, and takes p-values and thresholds from out-of-fold scores, which they
        hold by approximately.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below 0.01 nats, but
        no more than 16,384. Where the effective sample size stays below one per cent, as in some
        twenty and more columns, members share one log Z, which is annealed. A warning says so where
        its standard error is above a quarter of a nat then, and in tables with states, which are
        not annealed. The ranking of rows hardly depends on it.
    contamination : float or "auto", default="auto"
        Share of the training rows that `fit_predict` calls outliers, by their out-of-fold scores;
        rows with the score at which the share ends are none, so that with ties it is less.
        `predict` has the same threshold for new rows; of the training rows themselves it calls
        fewer outliers, because the model has seen them. "auto" is the threshold below which 5 % of
        *new* rows of the same distribution fall.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". The model scores and
        samples on the device; it is fitted on the CPU.
    categorical_features : "from_dtype", array-like or None, default="from_dtype"
        Columns that hold categories. "from_dtype", the default, takes those of a frame whose dtype
        is of categories, booleans, strings or objects that are no numbers. Otherwise names, numbers
        or a mask of columns, of an array, too; None for no column.
    max_categories : int or None, default=None
        Rare categories of a column share one probability, so that it has at most so many. Without
        it a column with more than 255 categories, or with more than 10 and than a tenth of the
        rows, is refused: it may be an identifier.
    atoms : {"auto", "off"} or dict, default="auto"
        Numbers that have a probability of their own, such as an amount of zero. "auto" finds values
        that many rows share in a column that otherwise hardly repeats one, where bootstrap samples
        agree. A dict gives them by column, ``{"amount": [0]}``.
    handle_missing : {"state", "error"}, default="state"
        Whether a missing cell is a state of its column with a probability of its own, or an error.
    n_jobs : int or None, default=None
        Views that are fitted side by side by joblib: in threads, or where
        ``joblib.parallel_config`` says. None is as many as that says, one within a search that runs
        side by side itself, and elsewhere ``torch.get_num_threads()``; -1 is all cores.
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    views_ : list of str
        Names of the views: "sharp" sees rows in gaps, "local" rows that lie farther from others
        than these lie from each other, "linear" rows off the correlation of the columns,
        "wide" rows on the outside of everything, and "density" is `density`.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_offset_ : float
        Threshold of `fit_predict` on `out_of_fold_scores_`; the same.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of every training row (of positive weight) under the member that has not seen
        it; NaN for rows that were never held out (with one member, beyond 50,000 per member, or in
        a large table of which `fit` looks at a sample).
        This, and not `score_samples`, ranks the rows of the training table itself.
    out_of_fold_members_ : ndarray of shape (n_rows,), int
        Which member that is; -1 for rows that were never held out.
    out_of_fold_decision_function_ : ndarray of shape (n_rows,)
        `out_of_fold_scores_` above `out_of_fold_offset_`, negative for what `fit_predict` calls an
        outlier, and comparable between rows that have values in different columns.
    out_of_fold_p_values_ : ndarray of shape (n_rows,)
        Share of the rows of the same fold that score at most as a training row does; of rows that
        were set aside, of these. They are uniform whatever the table holds, and rank its rows; for
        `discoveries` in a table, fit to another one.
    calibration_scores_ : ndarray of shape (n_apart,)
        Scores of the rows that were set aside, in the order of the table, as thresholds take them.
        Only with `calibration_fraction`.
    accepted_ : str
        "views"; `history_`, `n_iter_`, `held_out_gain_` and `held_out_gain_std_error_` are those of
        a fit that trains nothing.
    columns_ : list of ColumnReport
        How every column was taken: its kind, categories, whether missing cells are a state, atoms,
        grid and bounds.
    model_ : torch.nn.Module
        The fitted density on standardised columns.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    NCEDensity : The density itself, for likelihoods and draws.
    sklearn.ensemble.IsolationForest : Outlier detector without a density.

    Notes
    -----
    Columns, weights, copies of rows, groups, missing cells and categories are taken as by
    :class:`NCEDensity`. Of more than 400,000 rows `fit` looks at so many, which the seed draws;
    kernel densities have at most 2,000 centres.

    References
    ----------
    .. [1] Breiman, L., Meisel, W. and Purcell, E. (1977). Variable kernel estimates of multivariate
           densities. Technometrics.
    .. [2] Emmott, A., Das, S., Dietterich, T., Fern, A. and Wong, W.-K. (2015). A meta-analysis of
           the anomaly detection problem.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import OutlierDetector
    >>> rng = np.random.default_rng(0)
    >>> along = rng.normal(size=600) + 6.0 * rng.integers(2, size=600)
    >>> X = along[:, None] + rng.normal(0.0, 0.4, (600, 2))  # two clusters along a line
    >>> detector = OutlierDetector(random_state=0).fit(X)
    >>> new = [[3.3, 2.7], [0.0, 0.0], [5.0, 1.6]]  # in the gap, in place, off the line
    >>> detector.predict(new)
    array([-1,  1, -1])
    >>> detector.p_values(new) <= 0.05
    array([ True, False,  True])
    >>> detector.discoveries(new, fdr=0.1)
    array([ True, False,  True])

    A row of the table itself, and the view that makes it odd:

    >>> X[0] = [3.3, 2.7]
    >>> detector = OutlierDetector(training="contaminated", random_state=0)
    >>> int(detector.fit_predict(X)[0])
    -1
    >>> view = detector.view_scores(X[:1]).argmin()
    >>> detector.views_[view]
    'local'
    """

    density: TiltedDensity | None = None
    training: Literal["clean", "contaminated"] = "clean"

    # what a fit sets
    views_: list[str] = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixedDensity._parameter_constraints,
        **CalibratedDetector._parameter_constraints,
        "density": [TiltedDensity, None],
        "training": [StrOptions({"clean", "contaminated"})],
    }

    @property
    def _looks_at_all_rows(self):
        return False

    def _check_parameters(self):
        if self.density is not None:
            self.density._validate_params()
            self.density._check_parameters()

    def _fit(self, rows, weight, columns, context):
        model: Any = None
        if self.density is not None:
            smoothing = self.density.smoothing
            task = self._task(rows, weight, columns, context, smoothing=smoothing)
            model = fit_tilted(task, self.density._recipe()).model.cpu()
        return fit_lowest_view(
            self._task(rows, weight, columns, context, smoothing=0.0), VIEWS_OF[self.training],
            self.n_partition_samples, trims=self.training == "contaminated", density=model,
        )  # fmt: skip

    def view_scores(self, X: ArrayLike) -> FloatArray:
        """How likely every row is in every view, on their common scale.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_views)
            In nats, in the units of X, the mean over members; of rows of the table itself also over
            those that have seen them. The lowest of a row says which view of `views_` makes it odd.
        """
        rows = self._validate(X)
        x = self._tensor(rows)
        with torch.no_grad(), limit_threads(1):
            parts = [self.model_.view_scores(c) for c in x.split(SCORED_ROWS)]
        scores = torch.cat(parts).cpu().numpy() + self._columns.log_factors(rows)[:, None]
        return results_like(X)(scores)
