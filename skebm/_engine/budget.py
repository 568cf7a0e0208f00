"""How long to train, and how often to judge."""

import math
from dataclasses import dataclass

import numpy as np

EVALUATION_SHARE = 0.1
"""Share of the time of training that judging may take."""

LOOKS = 3
"""Evaluations, at least, before patience ends."""


@dataclass(frozen=True)
class Budget:
    """How long to train by default: epochs or steps, whichever lasts longer.

    Few rows make short epochs: counted in epochs alone, training would end where it has hardly
    begun.

    Attributes
    ----------
    epochs, steps : int
    patience_steps : int, default=0
        Steps that patience lasts for, at least.
    """

    epochs: int
    steps: int
    patience_steps: int = 0

    def max_epochs(self, asked: int | str | None, n_batches: int) -> int:
        """Epochs of `n_batches` steps, at most: as asked for, unless that is "auto" or None."""
        if asked is None or isinstance(asked, str):
            return max(self.epochs, math.ceil(self.steps / n_batches))
        return asked

    def patience(self, asked: int | None, n_batches: int, evaluate_every: int = 1) -> int | None:
        """Epochs without improvement before training stops: as asked for, or more; None: never."""
        if asked is None:
            return None
        return max(asked, LOOKS * evaluate_every, math.ceil(self.patience_steps / n_batches))


def unfinished_gain(epochs: np.ndarray, gains: np.ndarray, patience: int) -> float:
    """Gain that the last `patience` epochs have brought, which patience would have waited for.

    Parameters
    ----------
    epochs, gains : ndarray of shape (n_evaluations,)
        When held-out rows were judged, and how; NaN where they were not.
    patience : int

    Returns
    -------
    float
        In the units of the gains; 0 where the best one is older.
    """
    known = ~np.isnan(gains)
    epochs, gains = epochs[known], gains[known]
    earlier = gains[epochs <= max(0, epochs[-1] - patience)]
    return max(0.0, float(gains.max() - earlier.max()))


def evaluations_every(cost: float) -> int:
    """Epochs from one evaluation to the next, where one costs this share of an epoch."""
    return max(1, round(cost / EVALUATION_SHARE))
