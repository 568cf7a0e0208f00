"""How odd the rows are, and where the threshold lies."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_consistent_length

from ._common import COLORS, MARK_COLOR, above, import_pyplot, tidy

FAR = 5.0
"""Interquartile ranges below the lower quartile from which on scores share a bar."""


class AnomalyScoreDisplay:
    """Histogram of anomaly scores with the threshold of the outlier detector, or of p-values.

    P-values of rows like the training rows are uniform. So theirs are drawn as densities, of every
    class alone, beside the uniform one: where a density exceeds it near zero there are odd rows,
    and where it does so elsewhere the new rows are not like the training rows.

    Use :meth:`from_estimator` to score rows; the constructor takes arrays that are already
    computed.

    Parameters
    ----------
    scores : ndarray of shape (n_samples,)
        Scores, the lower the odder.
    threshold : float, default=None
        Rows below it count as outliers.
    labels : ndarray of shape (n_samples,), default=None
        A class per row; each class gets its own histogram, as a density, so that few odd rows are
        seen beside many others.
    score_name : str, default="score"
        Label of the horizontal axis.
    p_values : bool, default=False
        Whether the scores are p-values.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where the histogram was drawn.
    figure_ : matplotlib Figure
        The figure it belongs to.
    n_outliers_ : int or None
        How many scores lie below the threshold.

    See Also
    --------
    sklearn.metrics.RocCurveDisplay : How well scores tell two known classes apart.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.plotting import AnomalyScoreDisplay
    >>> scores = np.random.default_rng(0).normal(size=200)
    >>> display = AnomalyScoreDisplay(scores, threshold=-1.5).plot()
    >>> display.n_outliers_ == int((scores < -1.5).sum())
    True
    """

    ax_: Any
    figure_: Any
    n_outliers_: int | None

    def __init__(
        self,
        scores: np.ndarray,
        *,
        threshold: float | None = None,
        labels: np.ndarray | None = None,
        score_name: str = "score",
        p_values: bool = False,
    ):
        self.scores = scores
        self.threshold = threshold
        self.labels = labels
        self.score_name = score_name
        self.p_values = p_values

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike | None = None,
        y: ArrayLike | None = None,
        *,
        response_method: str = "score_samples",
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Score the rows of X and draw the histogram.

        Parameters
        ----------
        estimator : object
            Fitted outlier detector.
        X : array-like of shape (n_samples, n_features), default=None
            The rows to score: new ones. None shows the training rows that were held out, by
            ``out_of_fold_scores_`` and the threshold of ``fit_predict``; passed as X they would
            look more ordinary than they are, because the model has seen them.
        y : array-like of shape (n_samples,), default=None
            A known class per row, for colours only; without X per training row (of positive
            weight).
        response_method : {"score_samples", "decision_function", "p_values"}, \
                default="score_samples"
            What to show: log-densities, whose threshold is ``offset_``; their difference
            from it, whose threshold is zero; or p-values (:class:`~skebm.OutlierDetector`).
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : AnomalyScoreDisplay
            The computed display.
        """
        names = {
            "score_samples": "log-density (nats)",
            "decision_function": "log-density above the threshold (nats)",
            "p_values": "p-value",
        }
        if response_method not in names:
            raise ValueError(
                "response_method must be 'score_samples', 'decision_function' or 'p_values', "
                f"got {response_method!r}."
            )
        relative, p_values = response_method == "decision_function", response_method == "p_values"
        labels = None if y is None else np.asarray(y)
        if X is not None:
            check_consistent_length(X, labels)
        if p_values and not hasattr(estimator, "p_values"):
            raise ValueError(
                f"response_method='p_values', and {type(estimator).__name__} has none: take an "
                "OutlierDetector, or another response_method."
            )
        offset = None
        if p_values:
            scores = np.asarray(
                estimator.out_of_fold_p_values_ if X is None else estimator.p_values(X)
            )
        elif X is None:
            offset = estimator.out_of_fold_offset_
            scores = estimator.out_of_fold_decision_function_ + (0.0 if relative else offset)
        else:
            offset = getattr(estimator, "offset_", None)
            if relative or offset is None:
                scores = np.asarray(getattr(estimator, response_method)(X))
            else:  # a log-density as thresholds take it, where rows lack values
                scores = np.asarray(estimator.decision_function(X)) + offset
        if X is None:
            held = ~np.isnan(scores)
            scores, labels = scores[held], None if labels is None else labels[held]
        display = cls(
            scores,
            threshold=0.0 if relative else offset,
            labels=labels,
            score_name=names[response_method],
            p_values=p_values,
        )
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None, *, bins: int | None = None) -> Self:
        """Draw the histogram.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw.
        bins : int, default=None
            Number of bins; None: 40, and 20 of p-values.

        Returns
        -------
        self : AnomalyScoreDisplay
            With ``ax_``, ``figure_`` and ``n_outliers_``.
        """
        plt = import_pyplot("AnomalyScoreDisplay.plot")
        if not np.isfinite(self.scores).all():
            n_bad = int((~np.isfinite(self.scores)).sum())
            raise ValueError(f"{n_bad} of {len(self.scores)} scores are not finite.")
        if ax is None:
            _, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        # a class of few rows would not be seen beside one of many
        as_density = self.p_values or self.labels is not None
        scores, n_beyond = self.scores, 0
        if self.p_values:
            edges = np.linspace(0.0, 1.0, (bins or 20) + 1)
        else:  # a few rows of no density at all would leave one bar for all others
            low, high = np.quantile(scores, [0.25, 0.75])
            least = low - FAR * (high - low)
            if self.threshold is not None:
                least = min(least, self.threshold - (high - low))
            n_beyond = int((scores < least).sum()) if high > low else 0
            scores = scores.clip(min=least) if n_beyond else scores
            edges = np.histogram_bin_edges(scores, bins=bins or 40)
        groups = (
            [("rows", scores)]
            if self.labels is None
            else [(str(c), scores[self.labels == c]) for c in np.unique(self.labels)]
        )
        for i, (name, own) in enumerate(groups):
            color = COLORS[i % len(COLORS)]
            ax.hist(
                own,
                bins=edges,
                density=as_density,
                histtype="stepfilled",
                facecolor=(color, 0.3),
                edgecolor=color,
                linewidth=1.0,
                label=name,
            )
        self.n_outliers_ = None
        if self.threshold is not None:
            self.n_outliers_ = int((self.scores < self.threshold).sum())
            ax.axvline(
                self.threshold,
                color=MARK_COLOR,
                linestyle="--",
                linewidth=1.2,
                label=f"threshold: {self.n_outliers_} of {len(self.scores)} below",
            )
        if self.p_values:
            ax.axhline(1.0, color="black", linestyle=":", linewidth=1.2, label="uniform")
        rows = "row" if n_beyond == 1 else "rows"
        beyond = f"\n{n_beyond} {rows} below {least:.3g} in the first bar" if n_beyond else ""
        ax.set_xlabel(self.score_name + beyond)
        ax.set_ylabel("density" if as_density else "number of rows")
        if self.threshold is not None or self.labels is not None or self.p_values:
            above(ax, *ax.get_legend_handles_labels())
        tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self
