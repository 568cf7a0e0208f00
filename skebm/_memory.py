"""What fits share: results that a joblib.Memory keeps under all that they depend on."""

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import joblib
import numpy as np
import torch

from ._version import __version__

KNOWN = ("skebm", "sklearn", "torch")
"""Packages whose functions and objects are known by their names, and by what they hold."""

_VERSIONS = (__version__, *map(version, ("scikit-learn", "torch", "numpy")))


def key_of(*parts: Any) -> str | None:
    """Name of what follows from some values, the same in every process.

    Parameters
    ----------
    *parts : plain values, arrays, tensors, and objects of the packages in `KNOWN`

    Returns
    -------
    str or None
        Of the versions of these packages, too. None where a value has no such name, such as a
        function of the user: its name says nothing about what it does.
    """
    try:
        return joblib.hash(_described((_VERSIONS, parts)))
    except TypeError:
        return None


def remembered(memory: Any, key: str | None, compute: Callable[[], Any]) -> Any:
    """Return ``compute()``, or what it returned before under the same key.

    Parameters
    ----------
    memory : joblib.Memory or alike, or None
        Where results are kept; one that cannot be read there is computed again, with a warning.
    key : str or None
        None: nothing is kept.
    compute : callable
    """
    if memory is None or key is None:
        return compute()
    return memory.cache(_computed, ignore=["compute"])(key, compute)


def _computed(key, compute):
    return compute()


def _described(value):
    """Plain values that say all about another one; joblib hashes them by what they are."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return str(value.device), _described(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
        return value.dtype.str, np.shape(value), joblib.hash(np.ascontiguousarray(value))
    if isinstance(value, torch.device | torch.dtype):
        return str(value)
    if isinstance(value, dict):
        return type(value).__name__, [(_described(k), _described(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [_described(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(_described, value), key=repr)
    if isinstance(value, functools.partial):
        return "partial", _described((value.func, value.args, value.keywords))
    if inspect.isfunction(value) or isinstance(value, type):
        return _name(value)
    if hasattr(value, "__dict__"):
        return _name(type(value)), _described(vars(value))
    raise TypeError(f"{value!r} is not known by what it holds.")


def _name(value):
    """Where a function or class of a known package is found."""
    package, name = value.__module__.split(".")[0], value.__qualname__
    if package not in KNOWN or "<" in name:
        raise TypeError(f"{value!r} may be another one under the same name.")
    return f"{value.__module__}.{name}"
