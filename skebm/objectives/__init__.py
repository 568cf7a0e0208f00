"""Objectives: pure functions of tensors, one value per sample.

No state, no device, no ``.item()``; samples on the last axis, members of an ensemble in front.
"""

from skebm.objectives.contrastive import (
    nce_losses,
    ranking_nce_losses,
    self_normalized_losses,
)

__all__ = ["nce_losses", "ranking_nce_losses", "self_normalized_losses"]
