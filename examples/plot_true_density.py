"""
A density beside the truth
==========================

The laws of :mod:`skebm.datasets` can be drawn from and know their exact log-density. So an estimate
can be judged against the truth rather than against another estimate. Here the law is made of
concentric rings, a shape that a mixture of a few Gaussians describes badly.
"""

# %%
# Data, and a fit at the defaults
# -------------------------------

import os

import numpy as np

from skebm import NCEDensity
from skebm.datasets import Rings

# A small setting for a quick check of the code; the numbers then mean little.
SMOKE = os.environ.get("SKEBM_SMOKE") == "1"

law = Rings()
X = law.sample(500 if SMOKE else 5000, random_state=0)
est = NCEDensity(
    random_state=0, **({"n_members": 2, "max_epochs": 3} if SMOKE else {})
).fit(X)
for value, error in zip(
    est.log_partition_, est.log_partition_std_error_, strict=True
):
    print(f"log Z of a member: {value:.4f} +- {error:.4f}")

# %%
# How far from the truth
# ----------------------
# The Kullback-Leibler divergence of the estimate from the truth is the mean of
# :math:`\log p_{\text{true}} - \log p` over rows of the law. Being a mean, it comes with a
# standard error. Fresh rows are used: the rows of the fit would flatter the estimate.

fresh = law.sample(10_000, random_state=1)
gap = law.log_density(fresh) - est.score_samples(fresh)
kl, kl_error = gap.mean(), gap.std() / np.sqrt(len(gap))
print(f"KL(truth to estimate) = {kl:.3f} +- {kl_error:.3f} nats")

# %%
# The two densities
# -----------------
# :class:`~skebm.plotting.DensityDisplay` evaluates both on one grid and gives them one colour
# scale.

from skebm.plotting import DensityDisplay

display = DensityDisplay.from_estimator(est, X, true_log_density=law.log_density)
_ = display.figure_.suptitle(f"KL(truth to estimate) = {kl:.3f} nats")

# %%
# Samples
# -------
# Rows drawn from the estimate should not be told apart from rows of the law.

from skebm.plotting import SamplesDisplay

_ = SamplesDisplay.from_estimator(est, fresh[:1000], random_state=0)

# %%
# Training
# --------
# The curve is the log-likelihood of rows held out of training. It starts at the base; the best
# state is kept.

from skebm.plotting import TrainingCurveDisplay

_ = TrainingCurveDisplay.from_estimator(est)
