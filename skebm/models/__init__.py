"""Models: what a fit ends with, torch modules on standardised columns that know no estimator."""

from skebm.models.centred import CentredEnergy, StateDraws
from skebm.models.completions import N_REPLICATES, Completions, restricted
from skebm.models.conditional import Conditioner
from skebm.models.latent import LatentVariableModel, antithetic_noise
from skebm.models.latent_conditional import LatentConditioner
from skebm.models.sweeps import N_CANDIDATES, Sweeps
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
    "CentredEnergy",
    "CommonScale",
    "Completions",
    "Conditioner",
    "FeatureMap",
    "LatentConditioner",
    "LatentVariableModel",
    "LowestView",
    "MarginalBin",
    "N_CANDIDATES",
    "N_REPLICATES",
    "ModesAndBackground",
    "ModesTogether",
    "StateDraws",
    "Sweeps",
    "TiltedMixture",
    "antithetic_noise",
    "feature_scores",
    "log_ratio",
    "restricted",
]
