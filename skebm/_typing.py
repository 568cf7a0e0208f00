"""Names of types that several rooms use."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Distribution", "FloatArray", "Kernel", "LogDensity", "Modules", "RandomState"]

FloatArray: TypeAlias = NDArray[np.float64]

RandomState: TypeAlias = int | np.random.RandomState | None
"""What scikit-learn takes for `random_state`."""

LogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""Rows to their log-densities, (n, d) -> (n,)."""

Distribution: TypeAlias = Any
"""A module with `n_features`, ``log_prob(x)`` and ``sample(n, rng)``.

There is no type for "a module that has these methods, too", and what a module holds loses its type.
"""

Modules: TypeAlias = Any
"""An `nn.ModuleList` of modules with methods of their own: it says of none what it is."""

Kernel: TypeAlias = Any
"""A module of `skebm.samplers`, or an object, with `init`, `step` and `TARGET_ACCEPTANCE`.

The keyword arguments of `step` differ from kernel to kernel.
"""
