"""Estimators: one file each; what they share starts with an underscore."""

from skebm.estimators.nce import NCEDensity

__all__ = ["NCEDensity"]
