r"""
Base, tilt and members in one picture
=====================================

Every estimator of this package models

.. math:: \log p(x) = \log q(x) + f(x) - \log Z .

The *base* :math:`q` is a distribution that is easy to fit, to evaluate and to draw from. The
*tilt* :math:`f` is a learnt correction that starts at zero. The number :math:`\log Z` makes the
product integrate to one. This page draws the three.
"""

# %%
# The base
# --------
# Any fitted density of scikit-learn can be the base. Here it is deliberately a poor one, four
# Gaussians for two moons, so that there is something left to correct. (The default base is far
# better: see :ref:`base_and_members`.)

import matplotlib.pyplot as plt
import numpy as np
from sklearn.mixture import GaussianMixture

from skebm import NCEDensity
from skebm.datasets import TwoMoons

moons = TwoMoons()
X = moons.sample(4000, random_state=0)
base = GaussianMixture(4, random_state=0).fit(X)

# %%
# The tilt
# --------
# With one base for all members, the tilt is what the model adds to the log-density of the base.

est = NCEDensity(base=base, random_state=0).fit(X)

low, high = X.min(axis=0) - 0.3, X.max(axis=0) + 0.3
xx0, xx1 = np.meshgrid(
    np.linspace(low[0], high[0], 150), np.linspace(low[1], high[1], 150)
)
grid = np.column_stack([xx0.ravel(), xx1.ravel()])
log_q = est.base_score_samples(grid).reshape(xx0.shape)
log_p = est.score_samples(grid).reshape(xx0.shape)
tilt = log_p - log_q  # f - log Z

fig, axes = plt.subplots(
    1, 4, figsize=(15, 3.9), sharex=True, sharey=True, layout="constrained"
)
peak = np.exp(max(log_q.max(), log_p.max()))
density = {
    "cmap": "BuPu",
    "vmin": 0.0,
    "vmax": peak,
    "shading": "gouraud",
    "rasterized": True,
}
axes[0].pcolormesh(xx0, xx1, np.exp(log_q), **density)
axes[0].set_title("base  q")
# Where neither distribution has mass, the tilt is of no consequence: leave it white.
shown = np.where(np.maximum(log_q, log_p) > np.log(peak) - 8.0, tilt, np.nan)
image = axes[1].pcolormesh(
    xx0, xx1, shown, cmap="RdBu_r", vmin=-4.0, vmax=4.0, rasterized=True
)
axes[1].set_title("tilt  f - log Z  (nats)")
fig.colorbar(image, ax=axes[1], shrink=0.8).outline.set_visible(False)
axes[2].pcolormesh(xx0, xx1, np.exp(log_p), **density)
axes[2].set_title("model  p = q exp(f) / Z")
axes[3].pcolormesh(
    xx0, xx1, np.exp(moons.log_density(grid)).reshape(xx0.shape), **density
)
axes[3].set_title("truth")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %%
# Red says "more than the base thinks", blue "less": the tilt bends four straight Gaussians into two
# arcs. Measured on fresh rows, in nats per row:

fresh = moons.sample(5000, random_state=1)
print(f"base  {est.base_score_samples(fresh).mean():.3f}")
print(f"model {est.score(fresh):.3f}")
print(f"truth {moons.log_density(fresh).mean():.3f}")

# %%
# The members
# -----------
# The default is not one such model but the mean of four, each trained on three quarters of
# the rows and judged on the last quarter. Below, this is done by hand for one column. Where
# rows are scarce, the members disagree; the logarithm being concave, the log-likelihood of
# their mean is never below the mean of theirs.

from sklearn.model_selection import KFold

from skebm.datasets import Claw

claw = Claw()
X = claw.sample(300, random_state=3)
line = np.linspace(-3.0, 3.0, 400)[:, None]
members = []
for train, _ in KFold(4, shuffle=True, random_state=0).split(X):
    member = NCEDensity(n_members=1, random_state=0).fit(X[train])
    members.append(member.score_samples(line))
mean = np.logaddexp.reduce(members, axis=0) - np.log(len(members))

weight = np.exp(claw.log_density(line)) * (
    line[1] - line[0]
)  # of the truth, on the line
print(
    "members   ",
    *(f"{weight @ member:.3f}" for member in members),
    "nats per row",
)
print("their mean", f"{weight @ mean:.3f}")
print("truth     ", f"{weight @ claw.log_density(line):.3f}")

fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for i, member in enumerate(members):
    label = "members" if i == 0 else None
    ax.plot(
        line,
        np.exp(member),
        color="#e07b39",
        linewidth=0.8,
        alpha=0.7,
        label=label,
    )
ax.plot(line, np.exp(mean), color="#3b4a63", linewidth=2.0, label="their mean")
ax.plot(
    line,
    np.exp(claw.log_density(line)),
    color="black",
    linestyle=":",
    label="truth",
)
ax.plot(
    X[:, 0],
    np.full(len(X), -0.015),
    "|",
    color="#3b4a63",
    alpha=0.4,
    markersize=6,
)
ax.set_xlabel("x")
ax.set_ylabel("density")
ax.set_xlim(-3.0, 3.0)
ax.spines[["top", "right"]].set_visible(False)
_ = ax.legend(frameon=False)
