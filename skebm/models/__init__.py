"""Models: what a fit ends with, torch modules on standardised columns that know no estimator."""

from skebm.models.conditional import Completions, Conditioner
from skebm.models.latent import LatentVariableModel, antithetic_noise
from skebm.models.tilted import (
    CLIP,
    FeatureMap,
    MarginalBin,
    ModesAndBackground,
    ModesTogether,
    ScaleAverage,
    TiltedMixture,
    feature_scores,
    log_ratio,
)

__all__ = [
    "CLIP",
    "Completions",
    "Conditioner",
    "FeatureMap",
    "LatentVariableModel",
    "MarginalBin",
    "ModesAndBackground",
    "ModesTogether",
    "ScaleAverage",
    "TiltedMixture",
    "antithetic_noise",
    "feature_scores",
    "log_ratio",
]
