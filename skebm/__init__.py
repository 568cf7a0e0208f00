"""Energy-based density estimators in scikit-learn's style, over PyTorch."""

from skebm._version import __version__
from skebm.compose import DensityImputer
from skebm.energies import Boosting, Network
from skebm.estimators import (
    TRUSTED_TYPES,
    UNKNOWN,
    AdversarialEBM,
    ContrastiveDivergenceEBM,
    FlowContrastiveDensity,
    ImplicitVAE,
    NCEDensity,
    OutlierDetector,
    ScoreMatchingEBM,
)

__all__ = [
    "AdversarialEBM",
    "Boosting",
    "ContrastiveDivergenceEBM",
    "DensityImputer",
    "FlowContrastiveDensity",
    "ImplicitVAE",
    "NCEDensity",
    "Network",
    "OutlierDetector",
    "ScoreMatchingEBM",
    "TRUSTED_TYPES",
    "UNKNOWN",
    "__version__",
]
