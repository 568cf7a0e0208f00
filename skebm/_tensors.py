"""Tensors as tables: into numpy at the door, and back under scikit-learn's array API dispatch."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn import get_config

__all__ = ["results_like", "without_tensors"]


def without_tensors(X: Any) -> Any:
    """X itself, or an array where it is a tensor; numpy has no bfloat16, which becomes float32."""
    if not isinstance(X, torch.Tensor):
        return X
    return (X.float() if X.dtype == torch.bfloat16 else X).detach().cpu().numpy()


def results_like(X: Any) -> Callable[[Any], Any]:
    """What to make of an array that has been computed from X: a tensor on the device of X.

    So does scikit-learn, where X is a tensor and ``array_api_dispatch`` is on; otherwise an array
    stays an array.
    """
    if isinstance(X, torch.Tensor) and get_config()["array_api_dispatch"]:
        return lambda array: torch.from_numpy(array).to(X.device)
    return lambda array: array
