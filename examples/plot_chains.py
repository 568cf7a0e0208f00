"""
Chains on a learned energy
==========================

Contrastive divergence fits a density with Markov chains, and they can be watched. Here
:class:`~skebm.ContrastiveDivergenceEBM` learns eight Gaussians on a circle from a base
that is a single Gaussian. Then chains of :mod:`skebm.samplers` run on what it found.
"""

# %%
# Data, and a fit
# ---------------
# One member, so that there is one energy to look at, and a larger learning rate, since a
# base this poor leaves a lot to learn.

import numpy as np

from skebm import ContrastiveDivergenceEBM, Network
from skebm.datasets import EightGaussians

network = Network(learning_rate=3e-3)

gaussians = EightGaussians()
X = gaussians.sample(2000, random_state=0)
est = ContrastiveDivergenceEBM(
    base="gaussian", energy_model=network, n_members=1, random_state=0
).fit(X)

fresh = gaussians.sample(10_000, random_state=1)
truth = gaussians.log_density(fresh)
kl_base = (truth - est.base_score_samples(fresh)).mean()
kl = (truth - est.score_samples(fresh)).mean()
print(f"KL(truth to base) = {kl_base:.3f} nats")
print(f"KL(truth to fit)  = {kl:.3f} nats")

# %%
# What the chains did while f was learned: whether their steps had the right length, how
# many jumps to fresh draws of the base the model accepted, and whether they mixed.

for name in ("step_size", "acceptance_rate", "restart_acceptance_rate", "r_hat"):
    print(f"{name:24} {np.mean(est.chain_diagnostics_[name]):.2f}")

# %%
# From the base
# -------------
# A sampler takes any function of rows. One with ``value_and_gradient`` saves it from
# asking autograd, and the estimator has all that this needs. 400 chains start at draws of
# the base, and MALA moves them; as in training, but for the jumps. Under them, the
# log-density of the fit, two nats from shade to shade.

import torch

from skebm.samplers import ParallelTempering, mala, run


class Fitted:
    """The log-density of the fit and its gradient, for rows in the units of X."""

    def __call__(self, x):
        return torch.from_numpy(est.score_samples(x.numpy()))

    def value_and_gradient(self, x):
        return self(x), torch.from_numpy(est.stein_score(x.numpy(), smoothing=0))


def frames(start, steps):
    """Where 100 steps of MALA lead, with looks in between."""
    chains = run(
        mala, start, Fitted(), rng, n_steps=100, n_keep=100, step_size=0.35
    )
    after = {
        f"after {n} step{'s' * (n > 1)}": chains.samples[n - 1] for n in steps
    }
    return {"start": start, **after}


rng = torch.Generator().manual_seed(0)
base_rows = np.random.default_rng(0).multivariate_normal(
    X.mean(0), np.cov(X.T), size=400
)
from_base = frames(torch.from_numpy(base_rows), (1, 5, 20, 100))

# %%

import matplotlib.pyplot as plt

ticks = np.linspace(-5, 5, 150)
grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
height = est.score_samples(grid).reshape(len(ticks), -1)
top = height.max()
shades = {"cmap": "Blues", "vmin": top - 18, "vmax": top + 8, "extend": "min"}


def draw(ax, rows, title, color="C3"):
    ax.contourf(ticks, ticks, height, np.arange(top - 16, top + 1, 2), **shades)
    ax.scatter(*rows.T, s=6, color=color, linewidths=0)
    ax.set(title=title, aspect="equal", xlim=(-5, 5), ylim=(-5, 5))
    ax.set(xticks=[-4, 0, 4], yticks=[-4, 0, 4])


figure, axes = plt.subplots(
    2, 3, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained"
)
for ax, (title, rows) in zip(axes.flat, from_base.items(), strict=False):
    draw(ax, rows, title)
draw(axes[1, 2], X[:400], "rows of the data", color="0.25")
_ = figure.suptitle(f"MALA on the fit, KL(truth to fit) = {kl:.3f} nats")

# %%
# From far away
# -------------
# A few of these chains are astray after a hundred steps. Far out, hardly a row or a chain
# has been in training, and little has told f what to be. It has bumps, which are of no
# account to the density, as the base leaves next to no mass there. But a chain that comes
# to one may stay on it. Here all chains start there.

angle = 2 * np.pi * torch.rand(400, generator=rng, dtype=torch.float64)
ring = 4.2 * torch.stack([angle.cos(), angle.sin()], dim=1)
figure, axes = plt.subplots(
    1, 3, figsize=(9, 3.4), sharey=True, layout="constrained"
)
for ax, (title, rows) in zip(axes, frames(ring, (20, 100)).items(), strict=True):
    draw(ax, rows, title)

# %%
# From one mode
# -------------
# Chains that start everywhere say little about how they travel. Here all of them start in
# one mode. MALA leaves it now and then, for its neighbours. Parallel tempering runs
# hotter copies of each chain as well, eight in all, which cross more easily, and
# exchanges positions: a step costs eight times as much. On the right, how far the shares
# of the modes are from one eighth each, and how far they are in as many rows of the data's
# distribution.

n_steps = 200
one_mode = torch.zeros(200, 2, dtype=torch.float64)
one_mode[:, 0] = gaussians.radius
options = {"n_steps": n_steps, "n_keep": n_steps, "step_size": 0.35}
runs = {
    name: run(kernel, one_mode, Fitted(), rng, **options)
    for name, kernel in {
        "MALA": mala,
        "parallel tempering": ParallelTempering(),
    }.items()
}


def unevenness(rows, weights=None):
    """Total variation between the shares of the modes and one eighth each."""
    mode = (
        np.round(np.arctan2(rows[:, 1], rows[:, 0]) / (np.pi / 4)).astype(int) % 8
    )
    shares = np.bincount(mode, weights, minlength=8)
    return 0.5 * np.abs(shares / shares.sum() - 1 / 8).sum()


figure, axes = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
for ax, color, (name, chains) in zip(
    axes, ("C3", "C2"), runs.items(), strict=False
):
    draw(ax, chains.samples[-1], f"{name}, after {n_steps} steps", color)
    curve = [
        unevenness(rows) for rows in (one_mode.numpy(), *chains.samples.numpy())
    ]
    axes[2].plot(curve, color=color, label=name)
by_chance = np.mean([unevenness(rows) for rows in fresh.reshape(50, 200, 2)])
axes[2].axhline(by_chance, color="0.3", ls=":", label="200 rows of the truth")
axes[2].set(xlabel="steps", ylabel="total variation", ylim=(0, 1))
axes[2].set_title("shares of the modes")
_ = axes[2].legend()

# %%
# `skebm.diagnostics.summarize` says the same in numbers: R-hat far from 1 means chains that
# disagree.

from skebm.diagnostics import summarize

for name, chains in runs.items():
    print(name)
    print(summarize(chains), end="\n\n")

# %%
# The first column of four of the chains of MALA: each stays where it is for long, so that each has
# ranks of its own.

from skebm.plotting import ChainsDisplay

few = runs["MALA"].samples[:, ::50, :1]
_ = ChainsDisplay(few, names=["first column"]).plot()

# %%
# The estimator needs no such ladder here: its base covers all modes, so that
# :meth:`~skebm.ContrastiveDivergenceEBM.sample` starts chains at rows of the base that are
# picked by their importance, and lets them jump while they move. Its rows share the modes
# as the density does, which is summed over the grid here: how far both are from even is
# an error of the fit.

drawn = est.sample(10_000, random_state=0)
print(f"drawn rows:  total variation {unevenness(drawn):.3f}")
print(
    f"the density: total variation {unevenness(grid, np.exp(height).ravel()):.3f}"
)
