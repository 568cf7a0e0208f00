"""Energy-based density estimators in scikit-learn's style, over PyTorch."""

import importlib
from typing import Any

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

_ROOMS = [
    "bases",
    "compose",
    "datasets",
    "derivatives",
    "diagnostics",
    "energies",
    "estimators",
    "exceptions",
    "latents",
    "models",
    "objectives",
    "partition",
    "plotting",
    "samplers",
    "training",
]


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS]


def __getattr__(name: str) -> Any:
    """Import a room when it is first asked for."""
    if name in _ROOMS:
        return importlib.import_module(f"skebm.{name}")
    raise AttributeError(f"module 'skebm' has no attribute {name!r}")
