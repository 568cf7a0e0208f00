"""What the measures take: draws of chains, as arrays or tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

MIN_DRAWS = 4
"""Halves of fewer draws have no variance."""

BLOCK = 1 << 22
"""Numbers worked on at a time: a few dozen MB for each intermediate array."""


def as_array(values: ArrayLike, name: str) -> np.ndarray:
    """Numbers as an array of their own dtype; all finite."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    values = np.asarray(values)
    astray = np.count_nonzero(~np.isfinite(values))
    if astray:
        raise ValueError(f"{name} must be finite, but {astray} of {values.size} values are not.")
    return values


def as_draws(samples: ArrayLike) -> tuple[np.ndarray, bool]:
    """Draws of shape (n_draws, n_chains, d), and whether the last axis was added."""
    x = as_array(samples, "samples")
    if x.ndim not in (2, 3) or 0 in x.shape[1:]:
        raise ValueError(
            f"samples must have shape (n_draws, n_chains) or (n_draws, n_chains, d), got {x.shape}."
        )
    if len(x) < MIN_DRAWS:
        raise ValueError(f"samples must hold at least {MIN_DRAWS} draws per chain, got {len(x)}.")
    return (x[:, :, None], True) if x.ndim == 2 else (x, False)


def by_columns(statistic: Callable[[np.ndarray], Any], samples: ArrayLike) -> float | np.ndarray:
    """(n_draws, n_chains, k) -> (k,), for as many columns at a time as memory should hold."""
    x, single = as_draws(samples)
    width = max(1, BLOCK // (x.shape[0] * x.shape[1]))
    blocks = [x[:, :, j : j + width] for j in range(0, x.shape[2], width)]
    # what is not defined comes out as nan or inf, and is documented so
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.concatenate([statistic(block.astype(np.float64)) for block in blocks])
    return float(values[0]) if single else values
