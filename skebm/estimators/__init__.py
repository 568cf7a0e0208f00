"""Estimators: one file each; what they share starts with an underscore."""

from skebm.estimators.contrastive_divergence import ContrastiveDivergenceEBM
from skebm.estimators.nce import NCEDensity
from skebm.estimators.score_matching import ScoreMatchingEBM

__all__ = ["ContrastiveDivergenceEBM", "NCEDensity", "ScoreMatchingEBM"]
