"""
The score of a density
======================

Score matching fits the gradient of the log-density, the *score*: an arrow at every point that
leads uphill. Here :class:`~skebm.ScoreMatchingEBM` starts from a single Gaussian, so that nearly
all of the shape is learnt from the arrows, and the distribution is one whose score is known.
"""

# %%
# Data, and a fit
# ---------------
# Two moons, with a base that knows only their mean and covariance. A base this poor leaves a lot
# to learn, which a larger learning rate does sooner.

import numpy as np

from skebm import Network, ScoreMatchingEBM
from skebm.datasets import TwoMoons

moons = TwoMoons()
X = moons.sample(3000, random_state=0)
est = ScoreMatchingEBM(
    base="gaussian",
    energy_model=Network(learning_rate=3e-3),
    random_state=0,
).fit(X)
print(f"method_ = {est.method_}, sigma_ = {est.sigma_.round(3)}")

# %%
# How much better than its base, and how far from the truth, on fresh rows:

fresh = moons.sample(10_000, random_state=1)
kl = (moons.log_density(fresh) - est.score_samples(fresh)).mean()
print(f"base {est.base_score_samples(fresh).mean():.3f} nats per row")
print(f"fit  {est.score(fresh):.3f} nats per row, KL(truth to fit) = {kl:.3f}")

# %%
# Density, score and samples
# --------------------------
# The density is normalised after training; the arrows are
# :meth:`~skebm.ScoreMatchingEBM.stein_score`, drawn where the true distribution has mass. The
# middle has the arrows of the true density, by finite differences.

import matplotlib.pyplot as plt

low, high = X.min(0) - 0.4, X.max(0) + 0.4
across, up = np.linspace(low[0], high[0], 160), np.linspace(low[1], high[1], 120)
grid = np.stack(np.meshgrid(across, up), axis=-1)
density = np.exp(est.score_samples(grid.reshape(-1, 2))).reshape(grid.shape[:2])
truth = np.exp(moons.log_density(grid.reshape(-1, 2))).reshape(grid.shape[:2])
top = truth.max()

coarse = np.stack(np.meshgrid(across[4::8], up[4::8]), axis=-1).reshape(-1, 2)
coarse = coarse[moons.log_density(coarse) > np.log(0.02 * top)]
step = 1e-4
true_score = np.column_stack(
    [
        (moons.log_density(coarse + move) - moons.log_density(coarse - move))
        / (2 * step)
        for move in step * np.eye(2)
    ]
)
score = est.stein_score(coarse)

figure, axes = plt.subplots(
    1, 3, figsize=(12, 3.6), sharex=True, sharey=True, layout="constrained"
)
shown = {
    "extent": (low[0], high[0], low[1], high[1]),
    "origin": "lower",
    "aspect": "auto",
}
for ax, values, arrows, title in (
    (axes[0], density, score, "fitted density and score"),
    (axes[1], truth, true_score, "true density and score"),
):
    ax.imshow(values, cmap="Blues", vmin=0.0, vmax=top, **shown)
    ax.quiver(
        *coarse.T, *arrows.T, color="0.15", angles="xy", scale=220, width=0.004
    )
    ax.set_title(title)
drawn = est.sample(1500, random_state=0)
axes[2].scatter(
    *fresh[:1500].T, s=4, color="#3b4a63", alpha=0.5, label="rows of the truth"
)
axes[2].scatter(
    *drawn.T, s=4, color="#e07b39", alpha=0.5, label="drawn from the fit"
)
figure.legend(loc="outside lower right", ncols=2, markerscale=3, frameon=False)
axes[2].set_title("samples")
for ax in axes:
    ax.set(xlabel="first column", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
_ = axes[0].set_ylabel("second column")

# %%
# How well the arrows agree, weighted by where the rows are: the relative error of the score. It is
# much larger than the divergence suggests: a gradient is harder to learn than a density.

true_at_rows = np.column_stack(
    [
        (moons.log_density(fresh + move) - moons.log_density(fresh - move))
        / (2 * step)
        for move in step * np.eye(2)
    ]
)
error = np.linalg.norm(est.stein_score(fresh) - true_at_rows) / np.linalg.norm(
    true_at_rows
)
print(f"relative error of the score: {error:.2f}")

# %%
# The curve that decides
# ----------------------
# Training is stopped by the likelihood of held-out rows, normalised at each look. The score
# matching loss, on the right axis, is no guide: it may go on falling when the likelihood has
# turned.

from skebm.plotting import TrainingCurveDisplay

_ = TrainingCurveDisplay.from_estimator(est)
