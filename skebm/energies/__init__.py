"""Energies: torch modules for f, minus the residual energy, with f = 0 at the start.

Stacks of K members, (K, n, d) -> (K, n); with one member also (n, d) -> (n,). `Network` and
`Boosting` specify an energy before there are rows to build it from.
"""

from skebm.energies._choice import EnergyModel, EnergyModelMixin, resolve_energy_model
from skebm.energies._combine import ClassifierEnergy, CorrectedEnergy, MemberEnergies, logit
from skebm.energies._embeddings import PeriodicEmbedding, PiecewiseLinearEmbedding
from skebm.energies._networks import MLPEnergy
from skebm.energies._specifications import Boosting, Network
from skebm.energies._stack import ModuleStack, StackedEnergy
from skebm.energies._trees import SoftTrees

__all__ = [
    "ClassifierEnergy",
    "CorrectedEnergy",
    "MemberEnergies",
    "logit",
    "Boosting",
    "EnergyModel",
    "EnergyModelMixin",
    "MLPEnergy",
    "ModuleStack",
    "Network",
    "PeriodicEmbedding",
    "PiecewiseLinearEmbedding",
    "SoftTrees",
    "StackedEnergy",
    "resolve_energy_model",
]
