"""What can go wrong while fitting, and while loading what was fitted."""

__all__ = ["DivergenceError", "InconsistentVersionWarning", "LowEffectiveSampleSizeWarning"]


class DivergenceError(ArithmeticError):
    """Training produced a loss that is not a finite number; the message says what to lower."""


class LowEffectiveSampleSizeWarning(UserWarning):
    """An importance-sampling estimate rests on too few samples for its error to be trusted."""


class InconsistentVersionWarning(UserWarning):
    """A fitted estimator was stored by another version of skebm than the one that loads it."""
