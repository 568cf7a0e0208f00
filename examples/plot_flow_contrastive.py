"""
A game between an energy and a flow
===================================

:class:`~skebm.FlowContrastiveDensity` lets a normalizing flow and an energy play: the
energy learns to tell rows from samples of the flow, the flow learns to be mistaken for
the rows. Here they meet on a checkerboard, which is hard for a flow: it is smooth, and has
to stretch one blob over eight squares.
"""

# %%
# Data, and a fit
# ---------------
# Two members make two folds, and half the time of the default. The flow is one of affine
# couplings, from the package zuko, as in the paper of flow contrastive estimation. It is
# quick and bends little. (The default, of spline couplings, bends much more. It leaves the
# energy less to do, and is not always the better start: here it ends farther from the
# truth.)

import numpy as np

from skebm import FlowContrastiveDensity
from skebm.datasets import Checkerboard

board = Checkerboard()
X = board.sample(2000, random_state=0)
est = FlowContrastiveDensity(flow="nice", n_members=2, random_state=0).fit(X)

# %%
# What every stage gave: gain in log-likelihood of held-out rows over the flow, in nats per row.
# Errors, of two standard errors, are known for what was accepted, and for new rows.

from skebm.plotting import StagesDisplay

_ = StagesDisplay.from_estimator(est, board.sample(4000, random_state=2))

# %%
# Three densities from one fit
# ----------------------------
# The flow as it was before the game is the base of the energy. ``flow_`` is the flow after
# it. The estimator itself is the energy. Below each, its divergence from the truth: the
# mean of :math:`\log p_{\text{true}} - \log p` over fresh rows.

import matplotlib.pyplot as plt

densities = {
    "truth": board.log_density,
    "flow alone": est.base_score_samples,
    "flow after the game": est.flow_.score_samples,
    "energy": est.score_samples,
}
fresh = board.sample(10_000, random_state=1)
ticks = np.linspace(-2.5, 2.5, 200)
grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)

figure, axes = plt.subplots(
    1, 4, figsize=(11, 3.3), sharex=True, sharey=True, layout="constrained"
)
for ax, (name, log_density) in zip(axes, densities.items(), strict=True):
    height = np.exp(log_density(grid)).reshape(len(ticks), -1)
    ax.pcolormesh(
        ticks, ticks, height, vmin=0, vmax=0.2, cmap="Blues", rasterized=True
    )
    kl = (board.log_density(fresh) - log_density(fresh)).mean()
    below = "" if name == "truth" else f"\nKL = {kl:.3f} nats"
    ax.set(
        title=name + below, aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2]
    )

# %%
# The flow fills the corners between the squares, before the game and after it: what it
# cannot draw, a game does not teach it. The energy has no such limits. It cuts the squares
# out of the flow. (Its fine lines along the axes are those of the boosted trees.)
#
# How far apart data and flow were
# --------------------------------
# The value of the game says how much of the Jensen-Shannon divergence between data and
# flow the discriminator sees, on training rows. At first it sees nothing, as f starts at
# zero. Then f learns, and the curve comes near the divergence that there is. That can be
# had here, where the truth is known: it is the mean of the divergences of truth and flow
# from a half-and-half mixture of both. (``flow_`` is the mean of two flows, each of which
# plays by itself and is a little farther away.)

from scipy.special import logsumexp


def jensen_shannon(flow_log_density, flow_rows):
    """Divergence between truth and flow, from rows of both."""
    total = 0.0
    for own, rows in ((board.log_density, fresh), (flow_log_density, flow_rows)):
        both = [board.log_density(rows), flow_log_density(rows)]
        middle = logsumexp(both, axis=0) - np.log(2)
        total += 0.5 * (own(rows) - middle).mean()
    return total


after = jensen_shannon(
    est.flow_.score_samples, est.flow_.sample(10_000, random_state=0)
)
history = est.history_
figure, ax = plt.subplots(figsize=(6, 3.3), layout="constrained")
ax.plot(history["n_iter"], history["jensen_shannon"], label="seen in training")
ax.axhline(after, color="0.3", ls=":", label="of the flow after the game")
ax.set(xlabel="epochs of the game", ylabel="Jensen-Shannon divergence (nats)")
_ = ax.legend(loc="lower right")
print(f"JS(truth, flow after the game) = {after:.3f} nats")

# %%
# The constant
# ------------
# log Z was learned as a part of the game, and is then measured with samples of the base.
# Only the measured one is used. (They are not of quite the same energy: f is recalibrated
# between the two.)

if hasattr(est, "log_partition_learned_"):
    print("learned  ", est.log_partition_learned_.round(3))
print("measured ", est.log_partition_.round(3))
print("std error", est.log_partition_std_error_.round(3))
