"""Whether draws of Markov chains, or of anything, can be believed.

The measures of chains are those of Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021),
"Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of
MCMC", Bayesian Analysis 16. They take draws as :func:`skebm.samplers.run` keeps them, of shape
(n_draws, n_chains, d), as arrays or tensors, and compute in float64 on the CPU.

The effective sample size of importance *weights* is in `skebm.partition`.
"""

from skebm.diagnostics._chains import (
    RankCounts,
    effective_sample_size,
    mcse,
    rank_data,
    split_r_hat,
)
from skebm.diagnostics._runs import RunSummary, summarize, to_datatree
from skebm.diagnostics._stein import SteinTest, kernel_stein_discrepancy

__all__ = [
    "RankCounts",
    "RunSummary",
    "SteinTest",
    "effective_sample_size",
    "kernel_stein_discrepancy",
    "mcse",
    "rank_data",
    "split_r_hat",
    "summarize",
    "to_datatree",
]
