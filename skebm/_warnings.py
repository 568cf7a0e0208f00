"""Warnings that point at the line of the user, however deep in the package they arise."""

import sys
import warnings

_PASSED_THROUGH = ("skebm", "sklearn", "joblib", "torch", "contextlib")
"""The package, and what may stand between it and its user."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, with the place of the innermost call from outside of the package.

    Parameters
    ----------
    message : str
    category : type, default=UserWarning
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_passed_through(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_passed_through(frame):
    return frame.f_globals.get("__name__", "").split(".")[0] in _PASSED_THROUGH
