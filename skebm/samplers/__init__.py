"""Markov chains as pure functions, and the loop that runs any of them.

A kernel is a module with ``init(x, log_density) -> State``, ``step(state, log_density, rng,
...) -> (State, Info)`` and ``TARGET_ACCEPTANCE`` (None where there is no step size). Chains lie on
the leading axis; a state carries its log-density and gradient, so that nothing is computed twice.
:class:`ParallelTempering` makes such a kernel of another one.

A log-density is any callable (n, d) -> (n,), each value from its row alone. It may offer
``value_and_gradient(x) -> (value, gradient)``, of shapes (n,) and (n, d), without a graph, in
tensors that no later call writes to (as :func:`skebm.derivatives.value_and_gradient` does); kernels
that need a gradient then ask there, and otherwise use autograd.
"""

from skebm.samplers import _delayed_acceptance as delayed_acceptance
from skebm.samplers import _hmc as hmc
from skebm.samplers import _independence as independence
from skebm.samplers import _mala as mala
from skebm.samplers import _random_walk as random_walk
from skebm.samplers import _ula as ula
from skebm.samplers._delayed_acceptance import DelayedInfo
from skebm.samplers._geometric import geometric_path
from skebm.samplers._parallel_tempering import ParallelTempering, TemperedInfo, TemperedState
from skebm.samplers._run import Run, run
from skebm.samplers._state import Info, State

__all__ = [
    "DelayedInfo",
    "Info",
    "ParallelTempering",
    "Run",
    "State",
    "TemperedInfo",
    "TemperedState",
    "delayed_acceptance",
    "geometric_path",
    "hmc",
    "independence",
    "mala",
    "random_walk",
    "run",
    "ula",
]
