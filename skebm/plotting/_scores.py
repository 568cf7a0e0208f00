"""How odd the rows are, and where the threshold lies."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from ._common import DATA_COLOR, MARK_COLOR, MODEL_COLOR, above, import_pyplot, tidy


class AnomalyScoreDisplay:
    """Histogram of anomaly scores with the threshold of the outlier detector.

    Use :meth:`from_estimator` to score rows; the constructor takes arrays that are already
    computed.

    Parameters
    ----------
    scores : ndarray of shape (n_samples,)
        Scores, the lower the odder.
    threshold : float, default=None
        Rows below it count as outliers.
    labels : ndarray of shape (n_samples,), default=None
        A class per row; each class gets its own histogram.
    score_name : str, default="score"
        Label of the horizontal axis.

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
    ):
        self.scores = scores
        self.threshold = threshold
        self.labels = labels
        self.score_name = score_name

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
        response_method : {"score_samples", "decision_function"}, default="score_samples"
            What to show: log-densities, whose threshold is ``offset_``, or their difference
            from it, whose threshold is zero.
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
        }
        if response_method not in names:
            raise ValueError(
                "response_method must be 'score_samples' or 'decision_function', "
                f"got {response_method!r}."
            )
        labels = None if y is None else np.asarray(y)
        relative = response_method == "decision_function"
        if X is None:
            offset = estimator.out_of_fold_offset_
            scores = estimator.out_of_fold_decision_function_
            held = ~np.isnan(scores)
            scores = scores[held] + (0.0 if relative else offset)
            labels = None if labels is None else labels[held]
        else:
            offset = getattr(estimator, "offset_", None)
            if relative or offset is None:
                scores = np.asarray(getattr(estimator, response_method)(X))
            else:  # a log-density as thresholds take it, where rows lack values
                scores = np.asarray(estimator.decision_function(X)) + offset
        display = cls(
            scores,
            threshold=0.0 if relative else offset,
            labels=labels,
            score_name=names[response_method],
        )
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None, *, bins: int = 40) -> Self:
        """Draw the histogram.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw.
        bins : int, default=40
            Number of bins.

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
        groups = (
            [("rows", self.scores)]
            if self.labels is None
            else [(str(c), self.scores[self.labels == c]) for c in np.unique(self.labels)]
        )
        edges = np.histogram_bin_edges(self.scores, bins=bins)
        colors = [DATA_COLOR, MODEL_COLOR, *plt.rcParams["axes.prop_cycle"].by_key()["color"]]
        for i, (name, scores) in enumerate(groups):
            color = colors[i % len(colors)]
            ax.hist(
                scores,
                bins=edges,
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
        ax.set_xlabel(self.score_name)
        ax.set_ylabel("number of rows")
        if self.threshold is not None or self.labels is not None:
            above(ax, *ax.get_legend_handles_labels())
        tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self
