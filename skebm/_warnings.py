"""Warnings that point at the line of the user, however deep in the package they arise."""

import sys
import warnings

_PACKAGES = ("skebm", "sklearn", "torch", "contextlib")
"""Those whose frames are passed over: the package, and what may stand between it and its user."""


def warn(message, category=UserWarning):
    """Warn, with the place of the innermost call from outside of the package.

    Parameters
    ----------
    message : str
    category : type, default=UserWarning
    """
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and _is_ours(frame):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=depth)


def _is_ours(frame):
    return frame.f_globals.get("__name__", "").split(".")[0] in _PACKAGES
