from skebm.energies import Boosting, Network
from skebm.estimators import (
    ContrastiveDivergenceEBM,
    NCEDensity,
    ScoreMatchingEBM,
    FlowContrastiveDensity,
    AdversarialEBM,
)


class ImplicitVAE:
    pass


__all__ = [
    "Boosting",
    "Network",
    "NCEDensity",
    "ScoreMatchingEBM",
    "ContrastiveDivergenceEBM",
    "FlowContrastiveDensity",
    "AdversarialEBM",
    "ImplicitVAE",
]
