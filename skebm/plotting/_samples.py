"""Rows drawn from a model, against data."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from skebm._typing import RandomState

from ._common import (
    DATA_COLOR,
    MODEL_COLOR,
    above,
    coded,
    column_names,
    import_pyplot,
    positions,
    tidy,
)


class SamplesDisplay:
    """Data and rows drawn from an estimator, column by column and pair by pair.

    Use :meth:`from_estimator` to draw from an estimator; the constructor takes arrays that are
    already computed.

    Parameters
    ----------
    data : ndarray of shape (n_samples, n_columns)
        The data, only the columns to show.
    samples : ndarray of shape (n_draws, n_columns)
        Rows of the model, the same columns.
    names : sequence of str
        The names of the columns.
    levels : sequence of (sequence or None), default=None
        The categories of each column whose numbers are their codes; None for columns of numbers.
    n_features : int, default=None
        Number of columns of the table, if only some are shown; the legend says so.

    Attributes
    ----------
    ax_ : matplotlib Axes or ndarray of Axes
        One Axes for one or two columns, else (n_columns, n_columns) Axes of which those above
        the diagonal are None.
    figure_ : matplotlib Figure
        The figure they belong to.

    See Also
    --------
    DensityDisplay : The density of an estimator with two features.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.plotting import SamplesDisplay
    >>> rng = np.random.default_rng(0)
    >>> data, samples = rng.normal(size=(2, 100, 2))
    >>> display = SamplesDisplay(data, samples, names=["width", "height"]).plot()
    >>> display.ax_.get_xlabel()
    'width'
    """

    ax_: Any
    figure_: Any

    def __init__(
        self,
        data: np.ndarray,
        samples: np.ndarray,
        *,
        names: Sequence[Any],
        levels: Sequence[Sequence[Any] | None] | None = None,
        n_features: int | None = None,
    ):
        self.data = data
        self.samples = samples
        self.names = names
        self.levels: Sequence[Sequence[Any] | None] = (
            [None] * len(names) if levels is None else levels
        )
        self.n_features = n_features

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        *,
        columns: Sequence[Any] | None = None,
        projection: Any = None,
        feature_names: Sequence[Any] | None = None,
        n_samples: int | None = None,
        random_state: RandomState = None,
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Draw rows from ``estimator.sample`` and show them against X.

        Parameters
        ----------
        estimator : object
            Fitted, with ``sample(n_samples, random_state=...)`` returning one table.
        X : array-like of shape (n_samples, n_features)
            The data to compare with, best rows the estimator has not seen.
        columns : sequence of int or str, default=None
            The columns to show. None shows the first three, and the legend says so where there are
            more.
        projection : {"pca"}, default=None
            Show instead the two leading principal components of X, of its columns divided by
            their standard deviations.
        feature_names : sequence of str, default=None
            Names of all columns; None takes those of X, else those seen in ``fit``.
        n_samples : int, default=None
            How many rows to draw; None draws as many as X has.
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
        display : SamplesDisplay
            The computed display.
        """
        X = X if hasattr(X, "columns") else np.asarray(X)
        drawn = estimator.sample(n_samples or np.shape(X)[0], random_state=random_state)
        (data, samples), levels = coded(X, drawn)
        names = (
            column_names(estimator, X, data.shape[1])
            if feature_names is None
            else [str(name) for name in feature_names]
        )
        if projection == "pca":
            if columns is not None:
                raise ValueError("columns and projection exclude each other; give one of them.")
            if np.isnan(data).any() or any(levels):
                raise ValueError("projection='pca' needs numbers in all cells.")
            data, samples = _principal_plane(data, samples)
            levels, n_features = None, None
            names = ["first principal component", "second principal component"]
        elif projection is not None:
            raise ValueError(f"projection must be 'pca' or None, got {projection!r}.")
        else:
            chosen = (
                list(range(min(3, len(names)))) if columns is None else positions(columns, names)
            )
            n_features = len(names) if columns is None and len(chosen) < len(names) else None
            data, samples = data[:, chosen], samples[:, chosen]
            names, levels = [names[j] for j in chosen], [levels[j] for j in chosen]
        display = cls(data, samples, names=names, levels=levels, n_features=n_features)
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None, *, max_points: int = 1000, bins: int = 30) -> Self:
        """Draw histograms for one column, a scatter for two, all pairs for more.

        Categories are drawn as bars, and spread a little in a scatter; missing cells are left out.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw. Its place is divided when there are more than two columns.
        max_points : int, default=1000
            At most so many rows of each kind in a scatter, evenly spaced ones.
        bins : int, default=30
            Bins of the histograms.

        Returns
        -------
        self : SamplesDisplay
            With ``ax_`` and ``figure_``.
        """
        plt = import_pyplot("SamplesDisplay.plot")
        k = len(self.names)
        if ax is None:
            side = 4.4 if k <= 2 else 2.1 * k
            _, ax = plt.subplots(figsize=(side, side), layout="constrained")
        if k == 1:
            self._histogram(ax, 0, bins)
            ax.set_xlabel(self.names[0])
            above(ax, *self._handles())
            self.ax_ = ax
        elif k == 2:
            self._scatter(ax, 0, 1, max_points)
            ax.set_xlabel(self.names[0])
            ax.set_ylabel(self.names[1])
            above(ax, *self._handles())
            self.ax_ = ax
        else:
            self.ax_ = self._grid(ax, max_points, bins)
        self.figure_ = ax.figure
        return self

    def _grid(self, ax, max_points, bins):
        """Scatter below the diagonal, histograms on it, nothing above."""
        k = len(self.names)
        places = ax.get_subplotspec().subgridspec(k, k)
        ax.set_axis_off()
        axes = np.full((k, k), None, dtype=object)
        for row in range(k):
            for column in range(row + 1):
                panel = ax.figure.add_subplot(places[row, column])
                if row == column:
                    self._histogram(panel, row, bins)
                else:
                    self._scatter(panel, column, row, max_points)
                    panel.sharex(axes[column, column])
                panel.tick_params(labelsize=7)
                if row == k - 1:
                    panel.set_xlabel(self.names[column], fontsize=8)
                else:
                    panel.tick_params(labelbottom=False)
                if column == 0 and row > 0:
                    panel.set_ylabel(self.names[row], fontsize=8)
                elif row != column:
                    panel.tick_params(labelleft=False)
                axes[row, column] = panel
        corner = axes[0, 0].get_subplotspec().get_topmost_subplotspec().get_position(ax.figure)
        handles, labels = self._handles()
        shown = None if self.n_features is None else f"{k} of {self.n_features} columns"
        ax.figure.legend(
            handles, labels, title=shown, frameon=False, handletextpad=0.2,
            loc="upper right", bbox_to_anchor=(corner.x1, corner.y1),
        )  # fmt: skip
        return axes

    def _scatter(self, ax, first, second, max_points):
        kinds = [(_thin(rows, max_points), color) for rows, color, _ in self._kinds()]
        points = np.concatenate([rows[:, [first, second]] for rows, _ in kinds])
        colors = np.repeat([color for _, color in kinds], [len(rows) for rows, _ in kinds])
        # In mixed order: drawn one after the other, the model would hide the data.
        rng = np.random.default_rng(0)
        order = rng.permutation(len(points))
        for axis, j in ((ax.xaxis, first), (ax.yaxis, second)):
            levels = self.levels[j]
            if levels is not None:
                points[:, int(j == second)] += rng.uniform(-0.25, 0.25, len(points))
                axis.set_ticks(range(len(levels)), labels=[str(level) for level in levels])
        ax.scatter(*points[order].T, s=7, c=colors[order], alpha=0.6, linewidths=0, rasterized=True)
        tidy(ax)

    def _handles(self):
        """What a legend shows, and its words."""
        from matplotlib.lines import Line2D

        style = {"linestyle": "", "marker": "o", "markersize": 5}
        kinds = self._kinds()
        handles = [Line2D([], [], color=color, **style) for _, color, _ in kinds]
        return handles, [label for _, _, label in kinds]

    def _histogram(self, ax, column, bins):
        both = np.concatenate([self.data[:, column], self.samples[:, column]])
        if self.levels[column] is not None:
            self._bars(ax, column)
            return
        edges = np.histogram_bin_edges(both[~np.isnan(both)], bins=bins)
        for rows, color, _ in self._kinds():
            ax.hist(
                rows[~np.isnan(rows[:, column]), column],
                bins=edges,
                density=True,
                histtype="stepfilled",
                facecolor=(color, 0.25),
                edgecolor=color,
                linewidth=1.0,
            )
        ax.set_yticks([])
        tidy(ax)
        ax.spines["left"].set_visible(False)

    def _bars(self, ax, column):
        """Shares of the categories of a column, side by side."""
        levels: Any = self.levels[column]
        for i, (rows, color, _) in enumerate(self._kinds()):
            codes = rows[~np.isnan(rows[:, column]), column].astype(int)
            shares = np.bincount(codes, minlength=len(levels)) / max(len(codes), 1)
            places = np.arange(len(levels)) + 0.4 * (i - 0.5)
            ax.bar(places, shares, width=0.4, facecolor=(color, 0.25), edgecolor=color)
        ax.set_xticks(range(len(levels)), labels=[str(level) for level in levels])
        ax.set_yticks([])
        tidy(ax)
        ax.spines["left"].set_visible(False)

    def _kinds(self):
        return (self.data, DATA_COLOR, "data"), (self.samples, MODEL_COLOR, "model")


def _thin(rows, n_most):
    """At most ``n_most`` rows, evenly spaced: rows are often sorted by class or component."""
    if len(rows) <= n_most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, n_most).astype(int)]


def _principal_plane(data, samples):
    """Both tables on the two leading principal components of the standardised data."""
    if data.shape[1] < 2:
        raise ValueError("projection='pca' needs at least two features, X has one.")
    mean, scale = data.mean(axis=0), data.std(axis=0)
    scale[scale == 0.0] = 1.0
    _, _, directions = np.linalg.svd((data - mean) / scale, full_matrices=False)
    return tuple((rows - mean) / scale @ directions[:2].T for rows in (data, samples))
