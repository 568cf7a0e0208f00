"""Why rows are odd, cell by cell."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from ._common import DATA_COLOR, MARK_COLOR, import_pyplot, tidy

MOST_BARS = 12
"""Columns of a row that are drawn, the oddest ones."""

MOST_ROWS, MOST_COLUMNS = 40, 30
"""Rows and columns of a heat map that have labels."""

FULL_COLORS = (5.0, 20.0)
"""Excess, in nats, from which a cell of a heat map has the darkest colour: that of the oddest cell,
within these limits."""


class ExplanationDisplay:
    """How surprising the cells of rows are: bars for one row, a heat map for several.

    Use :meth:`from_estimator` or :meth:`from_explanation`; the constructor takes arrays that are
    already computed.

    Parameters
    ----------
    excess : ndarray of shape (n_samples, n_columns)
        Surprise of every cell above what it is on average there, in nats.
    names : list of str
        Of the columns.
    cells : list of list of str, default=None
        What every cell shows, and what would have been expected, for the bars.
    row_names : list of str, default=None
        Numbers by default.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Where it was drawn.
    figure_ : matplotlib Figure
        The figure it belongs to.

    See Also
    --------
    AnomalyScoreDisplay : How odd whole rows are.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.plotting import ExplanationDisplay
    >>> display = ExplanationDisplay(np.array([[-0.4, 7.0, 0.1]]), ["age", "income", "region"])
    >>> len(display.plot().ax_.patches)
    3
    """

    excess: np.ndarray
    names: list[str]
    cells: list[list[str]] | None
    row_names: list[str] | None
    ax_: Any
    figure_: Any

    def __init__(
        self,
        excess: np.ndarray,
        names: list[str],
        *,
        cells: list[list[str]] | None = None,
        row_names: list[str] | None = None,
    ):
        self.excess, self.names, self.cells = np.asarray(excess), names, cells
        self.row_names = row_names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: ArrayLike,
        *,
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Explain rows and draw the explanation.

        Parameters
        ----------
        estimator : object
            Fitted, with `explain`.
        X : table of shape (n_samples, n_features)
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : ExplanationDisplay
        """
        index = getattr(X, "index", None)
        row_names = None if index is None or callable(index) else [str(label) for label in index]
        return cls.from_explanation(
            estimator.explain(X), row_names=row_names, plot=plot, ax=ax, **plot_params
        )

    @classmethod
    def from_explanation(
        cls,
        explanation: Any,
        *,
        row_names: list[str] | None = None,
        plot: bool = True,
        ax: Any = None,
        **plot_params: Any,
    ) -> Self:
        """Draw what `explain` has returned.

        Parameters
        ----------
        explanation : Explanation
        row_names : list of str, default=None
        plot : bool, default=True
            Whether to draw at once, or only to compute.
        ax : matplotlib Axes, default=None
            Passed to :meth:`plot`.
        **plot_params : dict
            Passed to :meth:`plot`.

        Returns
        -------
        display : ExplanationDisplay
        """
        names = [" & ".join(map(_name, group)) for group in explanation.columns]
        cells = []
        for i in range(len(explanation.excess)):
            shown = {s.columns: _shown(s) for s in explanation.of_row(i)}
            cells.append([shown[group] for group in explanation.columns])
        display = cls(explanation.excess, names, cells=cells, row_names=row_names)
        return display.plot(ax=ax, **plot_params) if plot else display

    def plot(self, ax: Any = None, *, row: int | None = None, cmap: Any = "OrRd") -> Self:
        """Draw bars of one row, the oddest cell on top, or a heat map of all rows.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw.
        row : int, default=None
            Which row to draw as bars; None is a heat map, or bars where there is one row.
        cmap : str or Colormap, default="OrRd"
            Colours of the heat map, from 0 to the oddest cell, at least 5 and at most 20 nats.

        Returns
        -------
        self : ExplanationDisplay
            With ``ax_`` and ``figure_``.
        """
        plt = import_pyplot("ExplanationDisplay.plot")
        if row is None and len(self.excess) == 1:
            row = 0
        n_shown = min(len(self.names), MOST_BARS)
        if ax is None:
            size = (6.0, 0.9 + 0.36 * n_shown)
            if row is None:
                size = (2.5 + 0.45 * len(self.names), 1.6 + 0.22 * min(len(self.excess), 60))
            _, ax = plt.subplots(figsize=size, layout="constrained")
        if row is None:
            self._heat_map(ax, cmap)
        else:
            self._bars(ax, row, n_shown)
        self.ax_, self.figure_ = ax, ax.figure
        return self

    def _bars(self, ax, row, n_shown):
        excess = self.excess[row]
        order = np.argsort(-excess, kind="stable")[:n_shown][::-1]
        colors = [MARK_COLOR if value > 0 else DATA_COLOR for value in excess[order]]
        ax.barh(np.arange(n_shown), excess[order], color=colors, height=0.7)
        shown = self.names if self.cells is None else self.cells[row]
        ax.set_yticks(np.arange(n_shown), [shown[j] for j in order])
        ax.axvline(0.0, color="black", linewidth=0.8)
        ax.set_xlabel("surprise above the average (nats)")
        if n_shown < len(self.names):
            ax.set_title(f"the oddest {n_shown} of {len(self.names)} columns", loc="left", size=10)
        tidy(ax)

    def _heat_map(self, ax, cmap):
        darkest = float(np.clip(np.nanmax(self.excess), *FULL_COLORS))
        image = ax.imshow(self.excess, aspect="auto", cmap=cmap, vmin=0.0, vmax=darkest)
        if len(self.names) <= MOST_COLUMNS:
            ax.set_xticks(range(len(self.names)), self.names, rotation=45, ha="right")
        if len(self.excess) <= MOST_ROWS:
            names = self.row_names or list(map(str, range(len(self.excess))))
            ax.set_yticks(range(len(names)), names)
        ax.set_ylabel("row")
        label = "surprise above the average (nats)"
        ax.figure.colorbar(image, ax=ax, label=label, extend="max").outline.set_visible(False)


def _name(column):
    """A column of an array is a number."""
    return column if isinstance(column, str) else f"x{column}"


def _shown(surprise):
    """The cells of a row beside what would have been expected."""
    triples = zip(surprise.columns, surprise.values, surprise.expected, strict=True)
    return "\n".join(
        f"{_name(column)} = {_cell(value)}  (expected {_cell(expected)})"
        for column, value, expected in triples
    )


def _cell(value):
    if value is None or value != value:  # noqa: PLR0124
        return "missing"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
