"""Markov chains as pure functions, and the loop that runs any of them.

A kernel is a module with ``init(x, log_density) -> State``, ``step(state, log_density, generator,
...) -> (State, Info)`` and ``TARGET_ACCEPTANCE`` (None where there is no step size). Chains lie on
the leading axis; a state carries its log-density and gradient, so that nothing is computed twice.
"""

from skebm.samplers import _hmc as hmc
from skebm.samplers import _independence as independence
from skebm.samplers import _mala as mala
from skebm.samplers import _random_walk as random_walk
from skebm.samplers._run import Run, run
from skebm.samplers._state import Info, State

__all__ = ["Info", "Run", "State", "hmc", "independence", "mala", "random_walk", "run"]
