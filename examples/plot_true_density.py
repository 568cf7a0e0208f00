"""
A density beside the truth
==========================

The distributions of :mod:`skebm.datasets` can be drawn from and know their exact log-density.
So an estimate can be judged against the truth rather than against another estimate. Here the
truth is made of concentric rings, a shape that a few Gaussians describe badly.
"""

# %%
# Data, and a fit at the defaults
# -------------------------------

import numpy as np

from skebm import NCEDensity
from skebm.datasets import Rings

rings = Rings()
X = rings.sample(3000, random_state=0)
est = NCEDensity(random_state=0).fit(X)

# %%
# How far from the truth
# ----------------------
# The Kullback-Leibler divergence of the estimate from the truth is the mean of
# :math:`\log p_{\text{true}} - \log p` over rows of the true distribution. Being a mean, it
# comes with a standard error. Fresh rows are used: the rows of the fit would flatter the estimate.

fresh = rings.sample(10_000, random_state=1)


def divergence(est):
    gap = rings.log_density(fresh) - est.score_samples(fresh)
    return gap.mean(), gap.std() / np.sqrt(len(gap))


kl, kl_error = divergence(est)
print(f"KL(truth to estimate) = {kl:.3f} +- {kl_error:.3f} nats")

# %%
# The two densities
# -----------------
# :class:`~skebm.plotting.DensityDisplay` evaluates both on one grid and gives them one
# colour scale.

from skebm.plotting import DensityDisplay

display = DensityDisplay.from_estimator(
    est, X, true_log_density=rings.log_density
)
_ = display.figure_.suptitle(f"KL(truth to estimate) = {kl:.3f} nats")

# %%
# Samples
# -------
# Rows drawn from the estimate, among rows of the distribution that it has not seen.

from skebm.plotting import SamplesDisplay

_ = SamplesDisplay.from_estimator(est, fresh[:1000], random_state=0)

# %%
# From a poor base
# ----------------
# The default base does much of this work. How much, and whether the tilt was needed at all,
# the estimator tells: ``n_iter_`` is 0 where the base alone was as good.

print(f"n_iter_ = {est.n_iter_}")
base_mean = est.base_score_samples(fresh).mean()
print(f"base {base_mean:.3f}, with tilt {est.score(fresh):.3f} nats per row")

# %%
# With a single Gaussian as base, by contrast, the tilt has to find everything but mean and
# covariance.

bare = NCEDensity(base="gaussian", random_state=0).fit(X)
kl, kl_error = divergence(bare)
print(f"n_iter_ = {bare.n_iter_}")
base_mean = bare.base_score_samples(fresh).mean()
print(f"base {base_mean:.3f}, with tilt {bare.score(fresh):.3f} nats per row")
print(f"KL(truth to estimate) = {kl:.3f} +- {kl_error:.3f} nats")

display = DensityDisplay.from_estimator(
    bare, X, true_log_density=rings.log_density
)
_ = display.figure_.suptitle(
    f"Gaussian base: KL(truth to estimate) = {kl:.3f} nats"
)

# %%
# The log-likelihood of rows held out of training starts at the base and rises as the tilt
# learns; the best state is kept.

from skebm.plotting import TrainingCurveDisplay

_ = TrainingCurveDisplay.from_estimator(bare)
