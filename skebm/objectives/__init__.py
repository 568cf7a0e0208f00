"""Objectives: pure functions of tensors, one value per sample.

No state, no device, no ``.item()``; samples on the last axis, members of an ensemble in front.
"""

from skebm.objectives.adversarial import gradient_penalties, variational_bound_terms
from skebm.objectives.contrastive import (
    nce_losses,
    ranking_nce_losses,
    self_normalized_losses,
)
from skebm.objectives.divergence import contrastive_divergence_losses
from skebm.objectives.score_matching import (
    denoising_score_matching_losses,
    draw_directions,
    score_matching_losses,
    sliced_score_matching_losses,
)
from skebm.objectives.variational import (
    calibrated_scores,
    entropy_surrogates,
    gaussian_divergences,
    sliced_score_network_losses,
    stein_scores,
)

__all__ = [
    "calibrated_scores",
    "contrastive_divergence_losses",
    "denoising_score_matching_losses",
    "draw_directions",
    "entropy_surrogates",
    "gaussian_divergences",
    "gradient_penalties",
    "nce_losses",
    "ranking_nce_losses",
    "score_matching_losses",
    "self_normalized_losses",
    "sliced_score_matching_losses",
    "sliced_score_network_losses",
    "stein_scores",
    "variational_bound_terms",
]
