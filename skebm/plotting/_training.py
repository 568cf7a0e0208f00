"""How the held-out likelihood moved while the tilt was trained."""

from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ._common import DATA_COLOR, MARK_COLOR, MODEL_COLOR, above, import_pyplot, tidy


class TrainingCurveDisplay:
    """Held-out log-likelihood during training, and the training loss where it was kept.

    Use :meth:`from_estimator` to read a fitted estimator; the constructor takes arrays.

    Parameters
    ----------
    n_iter : ndarray of shape (n_evaluations,)
        Training time at each evaluation, in the units of ``n_iter_``; 0 is the base.
    held_out_log_likelihood : ndarray of shape (n_evaluations,)
        Mean log-density of rows held out of training, in nats per row.
    train_loss : ndarray of shape (n_evaluations,), default=None
        The objective on the training rows.
    best_iter : int, default=None
        The state that was kept.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The Axes of the log-likelihood.
    loss_ax_ : matplotlib Axes or None
        The Axes of the loss, on the right-hand scale.
    figure_ : matplotlib Figure
        The figure they belong to.

    See Also
    --------
    StagesDisplay : Stages of a fit, with their errors.
    DensityDisplay : What was learned.

    Examples
    --------
    >>> from skebm.plotting import TrainingCurveDisplay
    >>> display = TrainingCurveDisplay([0, 1, 2], [-3.0, -2.5, -2.6], best_iter=1).plot()
    >>> display.ax_.get_ylabel()
    'held-out log-likelihood (nats)'
    """

    ax_: Any
    figure_: Any
    loss_ax_: Any

    def __init__(
        self,
        n_iter: np.ndarray,
        held_out_log_likelihood: np.ndarray,
        *,
        train_loss: np.ndarray | None = None,
        best_iter: int | None = None,
    ):
        self.n_iter = n_iter
        self.held_out_log_likelihood = held_out_log_likelihood
        self.train_loss = train_loss
        self.best_iter = best_iter

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, plot: bool = True, ax: Any = None, **plot_params: Any
    ) -> Self:
        """Read ``history_`` and ``n_iter_`` of a fitted estimator.

        Parameters
        ----------
        estimator : object
            Fitted, with ``history_``: a mapping with "n_iter" and "held_out_log_likelihood",
            possibly "train_loss".
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : TrainingCurveDisplay
            The computed display.
        """
        check_is_fitted(estimator)
        if not hasattr(estimator, "history_"):
            raise TypeError(
                f"{type(estimator).__name__} has no history_: nothing is trained step by step."
            )
        history = estimator.history_
        loss = history.get("train_loss")
        display = cls(
            np.asarray(history["n_iter"]),
            np.asarray(history["held_out_log_likelihood"]),
            train_loss=None if loss is None else np.asarray(loss),
            best_iter=getattr(estimator, "n_iter_", None),
        )
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None) -> Self:
        """Draw the curve.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw.

        Returns
        -------
        self : TrainingCurveDisplay
            With ``ax_``, ``loss_ax_`` and ``figure_``.
        """
        plt = import_pyplot("TrainingCurveDisplay.plot")
        if ax is None:
            _, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
        # Held-out rows are not judged at every step: join the points that are there.
        n_iter, curve = _known(self.n_iter, self.held_out_log_likelihood)
        marker = "o" if len(n_iter) <= 40 else None
        ax.plot(
            n_iter, curve, color=DATA_COLOR, marker=marker, markersize=3.5, label="held-out rows"
        )
        if len(n_iter) and n_iter[0] == 0:
            ax.axhline(curve[0], color=DATA_COLOR, linewidth=0.8, linestyle=":", label="the base")
        if self.best_iter is not None:
            ax.axvline(
                self.best_iter,
                color=MARK_COLOR,
                linewidth=1.2,
                linestyle="--",
                label=f"kept: {self.best_iter}",
            )
        handles, labels = ax.get_legend_handles_labels()
        self.loss_ax_ = None
        if self.train_loss is not None:
            self.loss_ax_ = ax.twinx()
            self.loss_ax_.plot(
                *_known(self.n_iter, self.train_loss), color=MODEL_COLOR, label="training loss"
            )
            self.loss_ax_.set_ylabel("training loss", color=MODEL_COLOR)
            self.loss_ax_.tick_params(axis="y", colors=MODEL_COLOR)
            self.loss_ax_.spines[["top", "left"]].set_visible(False)
            more = self.loss_ax_.get_legend_handles_labels()
            handles, labels = handles + more[0], labels + more[1]
        ax.set_xlabel("n_iter")
        ax.set_ylabel("held-out log-likelihood (nats)")
        above(ax, handles, labels)
        tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _known(n_iter, values):
    """The points whose value is a number."""
    n_iter, values = np.asarray(n_iter), np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    return n_iter[known], values[known]
