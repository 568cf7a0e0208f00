"""Training that ended at its limit, and not because it had learned what there was."""

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from skebm._engine import unfinished_gain
from skebm._warnings import warn

TOLERANCE = 0.01
"""Nats per row by which the held-out likelihood may still rise at the end of a training."""


def warn_if_unfinished(
    history: dict[str, np.ndarray], max_epochs: int, patience: int | None, setting: str
) -> None:
    """Warn where training ended at `max_epochs` while held-out rows still gained.

    Without patience the user has said how long to train, and nothing is judged on the way.

    Parameters
    ----------
    history : dict
        ``epoch`` and ``validation_gain`` of the engine, or of stages of boosting.
    max_epochs : int
        What was allowed.
    patience : int or None
        Epochs that training would have waited for a better state.
    setting : str
        What to raise, such as "energy_model=Network(max_epochs=...)".
    """
    epochs = history["epoch"]
    if patience is None or epochs[-1] < max_epochs:
        return
    rise = unfinished_gain(epochs, history["validation_gain"], patience)
    if rise > TOLERANCE:
        warn(
            f"training ended at its limit of {max_epochs} while the held-out likelihood was still "
            f"rising, by {rise:.2g} nats per row in the last {min(patience, max_epochs)}; raise "
            f"{setting}.",
            ConvergenceWarning,
        )
