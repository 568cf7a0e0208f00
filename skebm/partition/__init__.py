"""Measured normalising constants, each with its standard error."""

from skebm.partition._ais import annealed_importance_sampling
from skebm.partition._bridge import bridge_sampling
from skebm.partition._estimate import MIN_ESS_SHARE, estimate
from skebm.partition._importance import (
    LogPartition,
    adaptive_importance_sampling,
    importance_sampling,
)
from skebm.partition._marginal_likelihood import (
    Marginals,
    marginal_likelihoods,
    posterior_samples,
)
from skebm.partition._pilot import Tuning
from skebm.partition._row_streams import RowStreams
from skebm.partition._smc import ParticleRun, sequential_monte_carlo
from skebm.partition._weights import (
    ess,
    largest_power,
    rows_by_importance,
    systematic_resampling,
)

__all__ = [
    "MIN_ESS_SHARE",
    "LogPartition",
    "Marginals",
    "ParticleRun",
    "RowStreams",
    "Tuning",
    "adaptive_importance_sampling",
    "annealed_importance_sampling",
    "bridge_sampling",
    "ess",
    "estimate",
    "importance_sampling",
    "largest_power",
    "marginal_likelihoods",
    "posterior_samples",
    "rows_by_importance",
    "sequential_monte_carlo",
    "systematic_resampling",
]
