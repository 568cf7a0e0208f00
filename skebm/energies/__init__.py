"""Energies: torch modules for f, minus the residual energy, with f = 0 at the start.

Stacks of K members, (K, n, d) -> (K, n); with one member also (n, d) -> (n,).
"""

from skebm.energies._embeddings import PeriodicEmbedding, PiecewiseLinearEmbedding
from skebm.energies._networks import MLPEnergy
from skebm.energies._spectral import SpectralBound
from skebm.energies._stack import ModuleStack, StackedEnergy
from skebm.energies._trees import SoftTrees

__all__ = [
    "MLPEnergy",
    "ModuleStack",
    "PeriodicEmbedding",
    "PiecewiseLinearEmbedding",
    "SoftTrees",
    "SpectralBound",
    "StackedEnergy",
]
