"""What the displays share: the import of matplotlib, the colours, the names of columns."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

DATA_COLOR = "#3b4a63"
MODEL_COLOR = "#e07b39"
MARK_COLOR = "#b3261e"


def import_pyplot(caller: str) -> Any:
    """Return ``matplotlib.pyplot``, or say who needs it and how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib, which is not installed. "
            "Install it with: pip install 'skebm[plot]'"
        ) from error
    return plt


def to_array(X: ArrayLike) -> np.ndarray:
    """X as a 2-D float array; data frames and tensors included."""
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2:
        raise ValueError(f"Expected a table of shape (n_samples, n_features), got {X.shape}.")
    return X


def column_names(estimator: Any, X: Any = None, n_features: int | None = None) -> list:
    """Names of the columns: those of X, else those seen in ``fit``, else x0, x1, ..."""
    names = getattr(X, "columns", None)
    if names is None:
        names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        names = [f"x{j}" for j in range(n_features)]  # pyright: ignore[reportArgumentType]
    return [str(name) for name in names]


def tidy(ax: Any) -> None:
    """Leave the two spines that carry the scales."""
    ax.spines[["top", "right"]].set_visible(False)
