"""Draws of Markov chains, in the order in which they came and by their ranks."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from skebm.diagnostics import rank_data

from ._common import import_pyplot, tidy


class ChainsDisplay:
    """Trace and ranks of the draws of each chain, column by column.

    Chains that have found the same distribution wander over the same range (left), and every rank
    among all draws is met as often by each of them (right). A chain that is stuck shows as a level
    of its own, and as a peak of its ranks.

    Parameters
    ----------
    samples : array-like or Tensor of shape (n_draws, n_chains, d)
        Draws as :func:`skebm.samplers.run` keeps them.
    names : sequence of str, default=None
        Names of the columns; None is x0, x1, ...

    Attributes
    ----------
    samples : ndarray of shape (n_draws, n_chains, d)
        The draws.
    ax_ : ndarray of Axes of shape (n_shown, 2)
        Traces and ranks.
    figure_ : matplotlib Figure
        The figure they belong to.

    See Also
    --------
    skebm.diagnostics.summarize : The same in numbers.
    skebm.diagnostics.rank_data : The ranks.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.plotting import ChainsDisplay
    >>> samples = np.random.default_rng(0).normal(size=(200, 4, 1))
    >>> display = ChainsDisplay(samples).plot()
    >>> display.ax_.shape
    (1, 2)
    """

    ax_: Any
    figure_: Any

    def __init__(self, samples: ArrayLike, *, names: Sequence[Any] | None = None):
        self.samples: np.ndarray = np.asarray(samples, dtype=np.float64)
        if self.samples.ndim != 3:
            raise ValueError(
                "samples must have the shape (n_draws, n_chains, d), "
                f"got one of {self.samples.ndim} dimensions."
            )
        self.names: Sequence[Any] = (
            [f"x{j}" for j in range(self.samples.shape[2])] if names is None else names
        )

    def plot(
        self, ax: Any = None, *, columns: Sequence[int] | None = None, n_bins: int = 20
    ) -> Self:
        """Draw traces and ranks.

        Parameters
        ----------
        ax : ndarray of matplotlib Axes of shape (n_shown, 2), default=None
            Where to draw.
        columns : sequence of int, default=None
            The columns to show. None shows the first three, and the title says so where there are
            more.
        n_bins : int, default=20
            Number of ranges of ranks.

        Returns
        -------
        self : ChainsDisplay
            With ``ax_`` and ``figure_``.
        """
        plt = import_pyplot("ChainsDisplay.plot")
        n_draws, n_chains, d = self.samples.shape
        shown = list(range(min(3, d))) if columns is None else list(columns)
        if ax is None:
            figure, ax = plt.subplots(
                len(shown), 2, figsize=(8.0, 0.6 + 1.8 * len(shown)), squeeze=False,
                sharex="col", layout="constrained", width_ratios=[1.7, 1.0],
            )  # fmt: skip
            if len(shown) < d:
                figure.suptitle(f"{len(shown)} of {d} columns", fontsize=10)
        self.ax_ = np.asarray(ax, dtype=object)
        ranks = rank_data(self.samples, n_bins)
        edges = np.linspace(0.0, 1.0, n_bins + 1)
        colors = plt.cm.viridis(np.linspace(0.0, 0.85, n_chains))
        for (trace, rank), j in zip(self.ax_, shown, strict=True):
            for chain in range(n_chains):
                trace.plot(self.samples[:, chain, j], color=colors[chain], lw=0.6, alpha=0.8)
                rank.stairs(ranks.counts[chain, :, j], edges, color=colors[chain], alpha=0.9)
            rank.axhline(ranks.expected, color="0.4", linewidth=0.9, linestyle="--")
            trace.set_ylabel(self.names[j])
            rank.set_ylim(bottom=0)
            tidy(trace)
            tidy(rank)
        self.ax_[0, 0].set_title(f"{n_chains} chains, as drawn", fontsize=10)
        self.ax_[0, 1].set_title("their ranks among all draws", fontsize=10)
        self.ax_[-1, 0].set_xlabel("draw")
        self.ax_[-1, 1].set_xlabel("rank, as a share")
        self.figure_ = self.ax_[0, 0].figure
        return self
