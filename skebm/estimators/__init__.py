"""Estimators: one file each; what they share starts with an underscore."""

from skebm.estimators.adversarial import AdversarialEBM
from skebm.estimators.contrastive_divergence import ContrastiveDivergenceEBM
from skebm.estimators.flow_contrastive import FlowContrastiveDensity
from skebm.estimators.implicit_vae import ImplicitVAE
from skebm.estimators.nce import NCEDensity
from skebm.estimators.score_matching import ScoreMatchingEBM

__all__ = [
    "AdversarialEBM",
    "ContrastiveDivergenceEBM",
    "FlowContrastiveDensity",
    "ImplicitVAE",
    "NCEDensity",
    "ScoreMatchingEBM",
]
