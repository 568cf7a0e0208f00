"""What each stage of a fit has gained."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from ._common import DATA_COLOR, MODEL_COLOR, import_pyplot, tidy


class StagesDisplay:
    """Gain of each stage of a fit over the base, in nats per row, with its standard error.

    Use :meth:`from_estimator` to read a fitted estimator; the constructor takes numbers.

    Parameters
    ----------
    names : sequence of str
        The stages in their order.
    gains : ndarray of shape (n_stages,)
        Mean log-density minus that of the base.
    errors : ndarray of shape (n_stages,)
        Standard errors of the gains; NaN where none is known.
    new : ndarray of shape (n_stages,), bool
        Whether a gain was measured on rows that took no part in the fit.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where the gains were drawn.
    figure_ : matplotlib Figure
        The figure they belong to.

    See Also
    --------
    TrainingCurveDisplay : The held-out likelihood while a tilt is trained.

    Examples
    --------
    >>> from skebm.plotting import StagesDisplay
    >>> display = StagesDisplay(
    ...     ["base", "tilt"], [0.0, 0.12], errors=[float("nan"), 0.02], new=[False, False]
    ... ).plot()
    >>> display.ax_.get_xlabel()
    'gain over the base (nats per row)'
    """

    ax_: Any
    figure_: Any

    def __init__(
        self,
        names: Sequence[str],
        gains: np.ndarray,
        *,
        errors: np.ndarray,
        new: np.ndarray,
    ):
        self.names = names
        self.gains: np.ndarray = np.asarray(gains, dtype=np.float64)
        self.errors: np.ndarray = np.asarray(errors, dtype=np.float64)
        self.new: np.ndarray = np.asarray(new, dtype=bool)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike | None = None,
        *,
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Read what a fit says of its stages, and measure the gain on new rows.

        Parameters
        ----------
        estimator : object
            Fitted, of a tilted base: with ``held_out_gain_`` and its standard error, and possibly
            ``stages_``.
        X : array-like of shape (n_samples, n_features), default=None
            New rows, on which the gain of the model over its base is measured, row by row.
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : StagesDisplay
            The computed display.
        """
        stages = getattr(estimator, "stages_", None) or {"base": 0.0}
        start = next(iter(stages.values()))
        entries = [
            (name.replace("_", " "), value - start, np.nan, False) for name, value in stages.items()
        ]
        held_out = estimator.held_out_gain_, estimator.held_out_gain_std_error_
        verdict = "tilt rejected" if estimator.accepted_ == "base" else estimator.accepted_
        entries.append((f"{verdict}, held-out rows", *held_out, False))
        if X is not None:
            gain = np.asarray(estimator.score_samples(X))
            gain = gain - np.asarray(estimator.base_score_samples(X))
            error = gain.std(ddof=1) / len(gain) ** 0.5
            entries.append(("model, new rows", gain.mean(), error, True))
        names, gains, errors, new = zip(*entries, strict=True)
        display = cls(names, np.array(gains), errors=np.array(errors), new=np.array(new))
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None) -> Self:
        """Draw a point for each stage, with two standard errors.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw.

        Returns
        -------
        self : StagesDisplay
            With ``ax_`` and ``figure_``.
        """
        plt = import_pyplot("StagesDisplay.plot")
        if ax is None:
            height = 1.0 + 0.4 * len(self.names)
            _, ax = plt.subplots(figsize=(6.0, height), layout="constrained")
        place = np.arange(len(self.names))[::-1]
        ax.axvline(0.0, color="0.5", linewidth=0.8)
        for kind, color in ((~self.new, DATA_COLOR), (self.new, MODEL_COLOR)):
            errors = 2.0 * np.nan_to_num(self.errors[kind])
            style = {"fmt": "o", "color": color, "capsize": 3, "elinewidth": 1.2}
            ax.errorbar(self.gains[kind], place[kind], xerr=errors, **style)
        ax.set_yticks(place, self.names)
        ax.set_ylim(-0.6, len(self.names) - 0.4)
        ax.set_xlabel("gain over the base (nats per row)")
        tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self
