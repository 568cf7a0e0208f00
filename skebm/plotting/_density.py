"""A density in the plane, beside the true one where it is known."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from time import perf_counter
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike

from skebm._containers import like
from skebm._warnings import warn

from ._common import DATA_COLOR, column_names, import_pyplot, tidy, to_array
from ._slices import TwoColumns

FINEST, COARSEST, SECONDS = 200, 30, 20.0
"""Points per axis at most and at least, and the time that they may take, where it is left to us."""

PROBES = (16, 256)
"""Rows that an estimator is timed on; the second where it seems slow, as a first call may."""


class DensityDisplay:
    """Density of a fitted estimator in two columns, on a grid.

    Use :meth:`from_estimator` to evaluate an estimator; the constructor takes arrays that are
    already computed.

    Parameters
    ----------
    xx0 : ndarray of shape (n_rows, n_columns)
        First coordinate at the points of the grid, as from :func:`numpy.meshgrid`.
    xx1 : ndarray of shape (n_rows, n_columns)
        Second coordinate.
    log_density : ndarray of shape (n_rows, n_columns)
        Log-density of the estimator in nats.
    true_log_density : ndarray of shape (n_rows, n_columns), default=None
        The log-density of the distribution that made the data, where it is known.
    data : ndarray of shape (n_samples, 2), default=None
        Rows to draw over the density.
    feature_names : sequence of two str, default=("x0", "x1")
        Labels of the axes.

    Attributes
    ----------
    ax_ : matplotlib Axes or ndarray of two Axes
        Where the density was drawn; with a true density, [truth, estimate].
    figure_ : matplotlib Figure
        The figure they belong to.
    surfaces_ : list of QuadMesh
        What was drawn, in the order of the axes.

    See Also
    --------
    SamplesDisplay : Rows drawn from the estimator, against data.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.mixture import GaussianMixture
    >>> from skebm.plotting import DensityDisplay
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> display = DensityDisplay.from_estimator(GaussianMixture(2).fit(X), X, plot=False)
    >>> display.log_density.shape
    (200, 200)
    """

    ax_: Any
    figure_: Any
    surfaces_: list[Any]

    def __init__(
        self,
        xx0: np.ndarray,
        xx1: np.ndarray,
        log_density: np.ndarray,
        *,
        true_log_density: np.ndarray | None = None,
        data: np.ndarray | None = None,
        feature_names: Sequence[Any] = ("x0", "x1"),
    ):
        self.xx0 = xx0
        self.xx1 = xx1
        self.log_density = log_density
        self.true_log_density = true_log_density
        self.data = data
        self.feature_names = feature_names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        *,
        features: Sequence[Any] | None = None,
        given: Mapping[Any, Any] | None = None,
        true_log_density: Any = None,
        grid_resolution: int | Literal["auto"] = "auto",
        margin: float = 0.15,
        show_data: bool = False,
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Evaluate ``estimator.score_samples`` on a grid around X and draw it.

        Parameters
        ----------
        estimator : object
            Fitted, with ``score_samples`` (log-density per row).
        X : array-like of shape (n_samples, 2), or (n_samples, n_features) with `features`
            Data that sets the range of the grid.
        features : sequence of two hashables, default=None
            Columns to draw, of an estimator of more than two: names in a frame, numbers in an
            array. The others are integrated out, by 128 completions of every point.
        given : mapping, default=None
            Cells of other columns, as of :meth:`skebm.NCEDensity.condition`: what is drawn is the
            density of the two given these, a slice through all of it if they are all the others.
        true_log_density : callable, default=None
            Log-density of the true distribution, from (n, 2) to (n,): for instance the
            ``log_density`` of a distribution of :mod:`skebm.datasets`.
        grid_resolution : int or "auto", default="auto"
            Points per axis. "auto" is 200; for estimators that are too slow for it, such as
            ImplicitVAE with an integral for every row, it is as many as are expected to take
            twenty seconds, at least 30, and a warning says so.
        margin : float, default=0.15
            How far the grid goes beyond the data, as a share of their range.
        show_data : bool, default=False
            Whether to draw the rows of X over the density.
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes or sequence of two Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : DensityDisplay
            The computed display.
        """
        names = None
        if features is not None:
            estimator = TwoColumns(estimator, features, given)
            names, X = list(map(str, features)), estimator.rows(X)
        elif given is not None:
            raise ValueError("given needs features, the two columns that are drawn.")
        data = to_array(X)
        if data.shape[1] != 2:
            raise ValueError(
                f"DensityDisplay draws two columns, and X has {data.shape[1]}: name two of them in "
                "features. SamplesDisplay shows more."
            )
        if not len(data):
            raise ValueError(
                "X has no row with two numbers, which would set the range of the grid."
            )
        low, high = data.min(axis=0), data.max(axis=0)
        pad = np.where(high > low, margin * (high - low), 0.5)  # something around a single value
        low, high = low - pad, high + pad
        if isinstance(grid_resolution, str) and grid_resolution == "auto":
            grid_resolution = _affordable(estimator, X, low, high)
        elif not isinstance(grid_resolution, Integral) or grid_resolution < 2:
            raise ValueError(
                f'grid_resolution={grid_resolution!r} must be "auto" or an integer of at least 2.'
            )
        axes = [np.linspace(a, b, grid_resolution) for a, b in zip(low, high, strict=True)]
        xx0, xx1 = np.meshgrid(*axes)
        grid = np.column_stack([xx0.ravel(), xx1.ravel()])
        display = cls(
            xx0,
            xx1,
            np.asarray(estimator.score_samples(like(X, grid))).reshape(xx0.shape),
            true_log_density=(
                None
                if true_log_density is None
                else np.asarray(true_log_density(grid)).reshape(xx0.shape)
            ),
            data=data if show_data else None,
            feature_names=names or column_names(estimator, X, 2),
        )
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(
        self, ax: Any = None, *, log: bool = False, cmap: Any = "BuPu", floor: float = 12.0
    ) -> Self:
        """Draw the density, and the true one on the left of it where it is known.

        Both panels share one colour scale.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of two Axes, default=None
            Where to draw; two are needed when the true density is known.
        log : bool, default=False
            Draw the log-density in nats instead of the density.
        cmap : str or Colormap, default="BuPu"
            Colours.
        floor : float, default=12.0
            With ``log=True``, how many nats below the peak the colours still tell apart.

        Returns
        -------
        self : DensityDisplay
            With ``ax_``, ``figure_`` and ``surfaces_``.
        """
        plt = import_pyplot("DensityDisplay.plot")
        panels = [("estimate", self.log_density)]
        if self.true_log_density is not None:
            panels.insert(0, ("truth", self.true_log_density))
        if ax is None:
            figure, ax = plt.subplots(
                1,
                len(panels),
                figsize=(4.4 * len(panels), 4.0),
                sharex=True,
                sharey=True,
                squeeze=False,
                layout="constrained",
            )
        axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(axes) != len(panels):
            raise ValueError(f"Expected {len(panels)} axes, one per density, got {len(axes)}.")

        peak = max(float(np.max(values)) for _, values in panels)
        limits = (peak - floor, peak) if log else (0.0, np.exp(peak))
        self.surfaces_ = []
        for axis, (name, values) in zip(axes, panels, strict=True):
            surface = axis.pcolormesh(
                self.xx0,
                self.xx1,
                values if log else np.exp(values),
                cmap=cmap,
                vmin=limits[0],
                vmax=limits[1],
                shading="gouraud",
                rasterized=True,
            )
            if self.data is not None:
                axis.scatter(*self.data.T, s=4, color=DATA_COLOR, alpha=0.5, linewidths=0)
            # The picture is the grid: points drawn over it must not widen the axes.
            axis.set_xlim(self.xx0.min(), self.xx0.max())
            axis.set_ylim(self.xx1.min(), self.xx1.max())
            axis.set_xlabel(self.feature_names[0])
            if len(panels) > 1:
                axis.set_title(name)
            tidy(axis)
            self.surfaces_.append(surface)
        axes[0].set_ylabel(self.feature_names[1])
        axes[0].figure.colorbar(
            self.surfaces_[-1],
            ax=list(axes),
            label="log-density (nats)" if log else "density",
            shrink=0.9,
        ).outline.set_visible(False)
        self.figure_ = axes[0].figure
        self.ax_ = axes if len(axes) > 1 else axes[0]
        return self


def _affordable(estimator, X, low, high):
    """Points per axis that there is time for; warns where they are fewer than `FINEST`."""
    rows = np.random.default_rng(0).uniform(low, high, (max(PROBES), 2))
    for n in PROBES:
        start = perf_counter()
        estimator.score_samples(like(X, rows[:n]))
        seconds = (perf_counter() - start) / n
        if seconds * FINEST**2 <= SECONDS:
            return FINEST
    resolution = max(COARSEST, int((SECONDS / seconds) ** 0.5))
    warn(
        f"the grid has {resolution} x {resolution} points, because score_samples of "
        f"{type(estimator).__name__} takes {1000.0 * seconds:.3g} ms a row. With "
        f"grid_resolution={FINEST} it has {FINEST} x {FINEST}, which would take about "
        f"{seconds * FINEST**2 / 60.0:.2g} minutes."
    )
    return resolution
