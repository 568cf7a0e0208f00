"""Whether held-out rows lie where the model says that they do."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kstwobign

from skebm._typing import RandomState

from ._common import (
    COLORS,
    MARK_COLOR,
    coded,
    column_names,
    import_pyplot,
    positions,
    tidy,
)

LEVEL = 0.95
"""Probability that the whole curve of a right model lies within its band."""


class CalibrationDisplay:
    """Coverage of held-out rows: of each column, and of the regions of highest density.

    The *level* of a row is the share of the model that lies below it. Under the right model levels
    are uniform: one row in twenty lies below the level 0.05. Drawn is by how much the share of rows
    below each level differs from the level. Of a column the level is its probability integral
    transform; of the log-density it says how often a threshold on it will be crossed.

    Use :meth:`from_estimator` to draw from an estimator; the constructor takes levels.

    Parameters
    ----------
    levels : ndarray of shape (n_samples, n_curves)
        Share of the model below each row; NaN where a row has no value.
    names : sequence of str
        What each curve is of.
    n_draws : int or None, default=None
        Number of draws that the levels rest on; their error widens the band. None: they are exact.

    Attributes
    ----------
    distances_ : ndarray of shape (n_curves,)
        Largest difference of each curve, the statistic of Kolmogorov and Smirnov.
    bands_ : ndarray of shape (n_curves,)
        What the largest difference of a right model exceeds with probability 0.05 (asymptotically).
    ax_ : matplotlib Axes
        Where the curves were drawn.
    figure_ : matplotlib Figure
        The figure they belong to.

    See Also
    --------
    AnomalyScoreDisplay : The log-densities themselves, with the threshold.
    skebm.diagnostics.kernel_stein_discrepancy : A test of rows against the score of a model.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.plotting import CalibrationDisplay
    >>> levels = np.random.default_rng(1).uniform(size=(500, 1))
    >>> display = CalibrationDisplay(levels, names=["right"])
    >>> bool(display.distances_[0] < display.bands_[0])
    True
    """

    ax_: Any
    figure_: Any

    def __init__(self, levels: np.ndarray, *, names: Sequence[Any], n_draws: int | None = None):
        self.levels: np.ndarray = np.asarray(levels, dtype=np.float64)
        self.names = names
        self.n_draws = n_draws
        held = [np.sort(column[~np.isnan(column)]) for column in self.levels.T]
        self.distances_: np.ndarray = np.array([_distance(column) for column in held])
        variances = np.array([1.0 / len(column) for column in held])
        if n_draws is not None:
            variances += 1.0 / n_draws
        self.bands_: np.ndarray | None = kstwobign.ppf(LEVEL) * np.sqrt(variances)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        *,
        columns: Sequence[Any] | None = None,
        n_draws: int = 5000,
        random_state: RandomState = None,
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Compare X with draws of the estimator.

        Equal values, as of counts, are put in a random order, so that levels of a right model are
        uniform for them, too. Categories and missing cells have no order, and no level.

        Parameters
        ----------
        estimator : object
            Fitted, with ``score_samples`` and ``sample(n_samples, random_state=...)``.
        X : array-like of shape (n_samples, n_features)
            Rows that the estimator has not seen.
        columns : sequence of int or str, default=None
            The columns to show beside the log-density. None shows the first five of numbers.
        n_draws : int, default=5000
            How many rows to draw.
        random_state : int, RandomState instance or None, default=None
            Seed of the draws.
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : CalibrationDisplay
            The computed display.

        Raises
        ------
        ValueError
            If a column is named that does not exist or that holds categories.
        """
        X = X if hasattr(X, "columns") else np.asarray(X)
        drawn = estimator.sample(n_draws, random_state=random_state)
        (rows, draws), kinds = coded(X, drawn)
        names = column_names(estimator, X, rows.shape[1])
        numbers = [j for j, kind in enumerate(kinds) if kind is None]
        if columns is None:
            chosen = numbers[:5]
        else:
            chosen = positions(columns, names)
            wrong = [names[j] for j in chosen if j not in numbers]
            if wrong:
                raise ValueError(f"Column {wrong[0]!r} holds categories, which have no order.")
        rng = np.random.default_rng(0)
        scores, drawn_scores = (np.asarray(estimator.score_samples(t)) for t in (X, drawn))
        levels = [_levels(scores, drawn_scores, rng)]
        levels += [_levels(rows[:, j], draws[:, j], rng) for j in chosen]
        display = cls(
            np.column_stack(levels),
            names=["log-density", *(names[j] for j in chosen)],
            n_draws=n_draws,
        )
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None) -> Self:
        """Draw the curves, and the band that a right model stays in.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw.

        Returns
        -------
        self : CalibrationDisplay
            With ``ax_`` and ``figure_``.
        """
        plt = import_pyplot("CalibrationDisplay.plot")
        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        band = self.bands_.max()
        ax.axhspan(-band, band, color="0.92", label=f"{LEVEL:.0%} band of a right model")
        ax.axhline(0.0, color="0.5", linewidth=0.8)
        colors = [MARK_COLOR, *COLORS]
        for i, (column, name) in enumerate(zip(self.levels.T, self.names, strict=True)):
            at = np.sort(column[~np.isnan(column)])
            share = np.arange(1, len(at) + 1) / len(at)
            style = {"color": colors[i % len(colors)], "linewidth": 1.8 if i == 0 else 1.0}
            ax.step(at, share - at, where="post", label=name, **style)
        ax.set(xlim=(0, 1), xlabel="level: share of the model below")
        ax.set_ylabel("share of rows - level")
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        tidy(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _levels(values, draws, rng):
    """Share of the draws below each value, equal ones in random order; NaN where there is none."""
    draws = np.sort(draws[~np.isnan(draws)])
    below = np.searchsorted(draws, values, side="left")
    equal = np.searchsorted(draws, values, side="right") - below
    levels = (below + rng.uniform(size=len(values)) * (equal + 1)) / (len(draws) + 1)
    return np.where(np.isnan(values), np.nan, levels)


def _distance(levels):
    """Largest difference between the empirical distribution function and the diagonal."""
    steps = np.arange(len(levels) + 1) / len(levels)
    return max((steps[1:] - levels).max(), (levels - steps[:-1]).max())
