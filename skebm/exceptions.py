"""What can go wrong while fitting."""

__all__ = ["DivergenceError", "LowEffectiveSampleSizeWarning"]


class DivergenceError(ArithmeticError):
    """Training produced a loss that is not a finite number; the message says what to lower."""


class LowEffectiveSampleSizeWarning(UserWarning):
    """An importance-sampling estimate rests on too few samples for its error to be trusted."""
