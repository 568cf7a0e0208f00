"""What the scores of rows that a model has not seen promise of new rows: p-values, thresholds."""

from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from skebm._typing import FloatArray
from skebm._warnings import warn


@dataclass(frozen=True)
class Calibration:
    """Scores of rows under members that have not seen them, beside which new rows are put.

    A new row counts as one row. If it comes from where the rows of calibration come from, its
    p-value is at most alpha with probability at most alpha: exactly where there is one judge, which
    was fixed before it saw them (Vovk, Gammerman and Shafer 2005), and about so where every fold
    has a judge that learned from the other folds (Vovk 2015: mostly near alpha; Barber et al. 2021:
    at worst near 2 alpha).

    Attributes
    ----------
    scores : ndarray of shape (n,)
        The lower, the odder.
    weight : ndarray of shape (n,)
        How many rows each stands for beside a new one; see `calibration_weight`.
    judges : ndarray of shape (n,), int
        Which member a score is by.
    """

    scores: FloatArray
    weight: FloatArray
    judges: NDArray[np.int_]

    @property
    def least(self) -> float:
        """The smallest p-value that there can be."""
        return 1.0 / (1.0 + self.weight.sum())

    def p_values(
        self, scores: FloatArray, random: np.random.RandomState | None = None
    ) -> FloatArray:
        """Share of rows, a new one among them, that are at least as odd as the new one.

        Parameters
        ----------
        scores : ndarray of shape (n_members, n_new)
            Of new rows under every member; each is compared with the scores by that member.
        random : RandomState, optional
            Breaks ties at random, so that p-values are uniform on their steps and not above; by
            default rows with the score of the new one count as odder.

        Returns
        -------
        ndarray of shape (n_new,)
            In (0, 1].
        """
        n_new = scores.shape[1]
        mark = np.ones(n_new) if random is None else random.random_sample(n_new)
        odder = np.zeros(n_new)
        for k in np.unique(self.judges):
            own = self.judges == k
            levels, place = np.unique(self.scores[own], return_inverse=True)
            # ranks between which lie marks, uniform on [0, 1), which decide among equal scores
            ranks = place + (0.0 if random is None else random.random_sample(len(place)))
            order = np.argsort(ranks)
            mass = np.concatenate([[0.0], np.cumsum(self.weight[own][order])])
            below = np.searchsorted(levels, scores[k])
            tied = levels[below.clip(max=len(levels) - 1)] == scores[k]
            odder += mass[np.searchsorted(ranks[order], below + np.where(tied, mark, 0.0))]
        return (1.0 + odder) / (1.0 + self.weight.sum())

    def own_p_values(self) -> FloatArray:
        """P-value of every row of the calibration: its rank among those that share its judge.

        Returns
        -------
        ndarray of shape (n,)
            In (0, 1].
        """
        p_values = np.empty(len(self.scores))
        for k in np.unique(self.judges):
            own = self.judges == k
            levels, place = np.unique(self.scores[own], return_inverse=True)
            mass = np.bincount(place, self.weight[own], minlength=len(levels))
            p_values[own] = (np.cumsum(mass) / mass.sum())[place]
        return p_values

    def threshold(self, level: float) -> float:
        """The score below which new rows lie with probability at most `level`.

        Parameters
        ----------
        level : float
            In (0, 1).

        Returns
        -------
        float
            With one judge, a score below it is one whose p-value is at most `level`. Minus
            infinity where there is none.
        """
        levels, place = np.unique(self.scores, return_inverse=True)
        odder = np.cumsum(np.bincount(place, self.weight, minlength=len(levels)))
        p_values = (1.0 + odder) / (1.0 + self.weight.sum())
        if self.least > level:
            return -np.inf
        return float(levels[np.argmax(p_values > level)])


def calibration_weight(weight: FloatArray, groups: NDArray[np.int_] | None = None) -> FloatArray:
    """How many rows every row of a calibration stands for, beside a new one.

    Parameters
    ----------
    weight : ndarray of shape (n,)
        Positive.
    groups : ndarray of shape (n,), int, optional
        What may be told from another, so that chance does not choose between rows, but between
        groups, and then between the rows of one.

    Returns
    -------
    ndarray of shape (n,)
        Without groups as the weights, with the sum (sum w)^2 / sum w^2: rows of the weighted
        distribution, as a new one is, have the mean weight sum w^2 / sum w, and that is one here.
        With groups these count one each, and weights share a group among its rows (Lee, Barber and
        Willett 2023).
    """
    if groups is None:
        return weight * weight.sum() / np.square(weight).sum()
    return weight / np.bincount(groups, weight)[groups]


def discovered(p_values: FloatArray, fdr: float, least: float) -> NDArray[np.bool_]:
    """Rows that the rule of Benjamini and Hochberg chooses.

    Parameters
    ----------
    p_values : ndarray of shape (n,)
    fdr : float
        Expected share of false discoveries, in (0, 1).
    least : float
        The smallest p-value that there can be.

    Returns
    -------
    ndarray of shape (n,), bool

    Warns
    -----
    UserWarning
        If nothing is chosen, and a single row could not have been.
    """
    if not isinstance(fdr, Real) or not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr!r} must be a number between 0 and 1.")
    found, n = false_discovery_control(p_values, method="bh") <= fdr, len(p_values)
    if not found.any() and least > fdr / n:
        warn(
            f"no discoveries, and there could not have been fewer than {at_least(n * least / fdr)} "
            f"among {n} rows: p-values are at least {least:.2g}, because rows are compared "
            f"with {1 / least - 1:.0f}. Ask about fewer rows, raise fdr, or fit more rows."
        )
    return found


def at_least(value: float) -> int:
    """The smallest integer that is not below, but for a rounding error."""
    return int(np.ceil(value - 1e-9))
