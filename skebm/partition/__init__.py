"""Measured normalising constants, each with its standard error."""

from skebm.partition._importance import (
    LogPartition,
    adaptive_importance_sampling,
    importance_sampling,
)

__all__ = ["LogPartition", "adaptive_importance_sampling", "importance_sampling"]
