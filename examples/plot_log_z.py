r"""
log Z, measured four ways
=========================

The density of an energy-based model is :math:`e^{g(x)} / Z`, and :math:`Z` an integral over all of
space. Where the integral is known in closed form, four ways to measure it can be judged:
importance sampling, annealed importance sampling, sequential Monte Carlo and bridge sampling.
"""

# %%
# An integral that is known
# -------------------------
# A Gaussian, narrower than the proposal in every column, in growing numbers of columns: the more
# columns, the less they overlap. Its density is multiplied such that log Z is 3.

import matplotlib.pyplot as plt
import numpy as np
import torch

from skebm.bases import GaussianMixtureBase
from skebm.partition import (
    annealed_importance_sampling,
    bridge_sampling,
    importance_sampling,
    sequential_monte_carlo,
)

LOG_Z = 3.0


def gaussian(d, scale):
    """A Gaussian as a mixture of one component."""
    return GaussianMixtureBase(
        [1.0], np.zeros((1, d)), scale**2 * np.eye(d)[None]
    )


def measure(d, seed=0):
    """log Z of the same density by four methods, with about as many draws each."""
    rng = torch.Generator().manual_seed(seed)
    model, proposal = gaussian(d, 0.5), gaussian(d, 1.0)

    def log_density(x):
        return model.log_prob(x) + LOG_Z

    def log_ratio(x):
        return log_density(x) - proposal.log_prob(x)

    draws, exact = proposal.sample(20_000, rng), model.sample(10_000, rng)
    return {
        "importance sampling": importance_sampling(log_ratio(draws)),
        "bridge sampling": bridge_sampling(
            log_ratio(draws[:10_000]), log_ratio(exact)
        ),
        "annealed": annealed_importance_sampling(
            log_density, proposal, rng, n_particles=256, n_temperatures=40
        ),
        "sequential Monte Carlo": sequential_monte_carlo(
            log_density, proposal, rng, n_particles=128, n_runs=8, n_moves=2
        ).partition,
    }


# %%
# Errors, and what is said of them
# --------------------------------
# A point is the measured value minus the true one, with two standard errors as the method states
# them. The proposal covers the density in all cases, but its share shrinks with the columns.

columns = [2, 10, 40]
results = {d: measure(d) for d in columns}
figure, axes = plt.subplots(
    1, len(columns), figsize=(10, 3.2), sharey=True, layout="constrained"
)
for ax, d in zip(axes, columns, strict=True):
    names = list(results[d])
    gap = [results[d][name].value - LOG_Z for name in names]
    error = [2 * results[d][name].std_error for name in names]
    ax.errorbar(gap, names, xerr=error, fmt="o", capsize=3, color="#5b3b8c")
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set(title=f"{d} columns", xlabel="measured minus true log Z (nats)")

print(f"{'columns':>8} {'method':<24} {'log Z':>7} {'error':>7} {'ESS':>8}")
for d in columns:
    for name, z in results[d].items():
        print(f"{d:>8} {name:<24} {z.value:7.3f} {z.std_error:7.3f} {z.ess:8.0f}")

# %%
# In two columns all four are right within hundredths. In forty, importance sampling rests on a
# handful of draws; its effective sample size says so, and then its standard error is not to be
# believed. The other three stay within three of their standard errors. Bridge sampling needs exact
# draws of the model; the two that go from the proposal to the model through temperatures do not. An
# estimator begins with the first, and anneals where the effective sample size is too small.

for d in columns:
    for name, z in results[d].items():
        if name != "importance sampling" or z.ess > 0.01 * z.n_samples:
            assert abs(z.value - LOG_Z) < 3 * z.std_error
assert results[40]["importance sampling"].ess < 0.01 * 20_000
assert results[40]["sequential Monte Carlo"].std_error < 0.2
