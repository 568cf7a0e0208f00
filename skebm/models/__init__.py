"""Models: what a fit ends with, torch modules on standardised columns that know no estimator."""

from skebm.models.latent import LatentVariableModel, antithetic_noise
from skebm.models.tilted import (
    CLIP,
    FeatureMap,
    MarginalBin,
    ModesAndBackground,
    ModesTogether,
    TiltedMixture,
    feature_scores,
    log_ratio,
)
from skebm.models.views import CommonScale, LowestView

__all__ = [
    "CLIP",
    "CommonScale",
    "FeatureMap",
    "LatentVariableModel",
    "LowestView",
    "MarginalBin",
    "ModesAndBackground",
    "ModesTogether",
    "TiltedMixture",
    "antithetic_noise",
    "feature_scores",
    "log_ratio",
]
