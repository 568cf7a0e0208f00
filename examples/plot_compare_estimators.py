"""
Eleven models of six distributions
==================================

A picture for a first choice. Eleven models learn six distributions of the plane from 1,000 rows
each; above every picture stand how far the density is from the truth, and how long the fit took.
"""

# %%
# The distributions
# -----------------
# Those of :mod:`skebm.datasets` know their exact log-density. So the Kullback-Leibler divergence
# of an estimate from the truth is a mean over fresh rows, with a standard error.

import numpy as np

from skebm.datasets import DISTRIBUTIONS

names = [
    "two_moons", "eight_gaussians", "rings", "pinwheel", "spirals", "checkerboard",
]  # fmt: skip
distributions = [DISTRIBUTIONS[name] for name in names]
rows = {d.name: d.sample(1000, random_state=0) for d in distributions}
fresh = {d.name: d.sample(5000, random_state=1) for d in distributions}

# %%
# The methods
# -----------
# :class:`~sklearn.neighbors.KernelDensity` and :class:`~sklearn.mixture.GaussianMixture` choose
# bandwidth and number of components by cross-validation. The flow is
# :class:`~skebm.FlowContrastiveDensity` without its energy.
# :class:`~sklearn.ensemble.IsolationForest` has a score, and no density.
#
# NCEDensity is shown as it comes. It corrects a base of mixtures, kernel densities and flows; so do
# ScoreMatchingEBM and ContrastiveDivergenceEBM, which have nearly the same density then. To show
# what each *method* learns, all three also start from a single Gaussian, with one member. Games of
# 30 epochs without trees after them, and 300 epochs of ImplicitVAE with its Gaussian encoder keep
# the page quick; the defaults take longer.

from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from skebm import (
    AdversarialEBM,
    ContrastiveDivergenceEBM,
    FlowContrastiveDensity,
    ImplicitVAE,
    NCEDensity,
    Network,
    ScoreMatchingEBM,
)

tilt = {"base": "gaussian", "n_members": 1, "random_state": 0}
flow = {"n_members": 1, "random_state": 0}
short = Network(max_epochs=30)
methods = {
    "KernelDensity": GridSearchCV(
        KernelDensity(), {"bandwidth": np.geomspace(0.03, 1.0, 20)}
    ),
    "GaussianMixture": GridSearchCV(
        GaussianMixture(random_state=0), {"n_components": [1, 2, 4, 8, 16, 32]}
    ),
    "flow alone": FlowContrastiveDensity(energy_model=None, **flow),
    "IsolationForest": IsolationForest(random_state=0),
    "NCEDensity": NCEDensity(random_state=0),
    "NCEDensity from a Gaussian": NCEDensity(**tilt),
    "ScoreMatchingEBM from a Gaussian": ScoreMatchingEBM(**tilt),
    "ContrastiveDivergenceEBM from a Gaussian": ContrastiveDivergenceEBM(**tilt),
    "FlowContrastiveDensity": FlowContrastiveDensity(energy_model=short, **flow),
    "AdversarialEBM": AdversarialEBM(energy_model=short, **flow),
    "ImplicitVAE": ImplicitVAE(
        encoder="gaussian", max_epochs=300, random_state=0
    ),
}

# %%
# Fit and measure
# ---------------
# Seconds are processor seconds of the fit. Every density is evaluated on a grid as well, for the
# picture.

import time
import warnings


def grid_of(name, n_ticks=70):
    low, high = rows[name].min(axis=0), rows[name].max(axis=0)
    pad = 0.1 * (high - low)
    x, y = np.linspace(low - pad, high + pad, n_ticks).T
    return x, y, np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


results, surfaces = [], {}
for distribution in distributions:
    name = distribution.name
    x, y, grid = grid_of(name)
    truth = distribution.log_density(fresh[name])
    surfaces[name, "truth"] = distribution.log_density(grid)
    for method, model in methods.items():
        start = time.process_time()
        with warnings.catch_warnings():  # that training ended at its limit
            warnings.simplefilter("ignore")
            model.fit(rows[name])
        seconds = time.process_time() - start
        gap = truth - model.score_samples(fresh[name])
        if method == "IsolationForest":
            gap = np.full(len(gap), np.nan)
        surfaces[name, method] = model.score_samples(grid)
        results.append(
            {
                "distribution": name,
                "method": method,
                "kl": gap.mean(),
                "kl_std_error": gap.std() / np.sqrt(len(gap)),
                "fit_cpu_s": seconds,
            }
        )

# %%
# A divergence is never negative. A density whose log Z is far too small would look better than the
# truth, and be found out here; the tolerance is that of a mean over 5,000 rows.

densities = [row for row in results if row["method"] != "IsolationForest"]
assert all(row["kl"] > -3 * row["kl_std_error"] for row in densities)

# %%
# The score of an isolation forest ranks rows, and that is all. Taken for a log-density it would
# sum to far more than one over the part of the plane that is drawn.

for name in names:
    x, y, _ = grid_of(name)
    mass = np.exp(surfaces[name, "IsolationForest"]).sum()
    assert mass * (x[1] - x[0]) * (y[1] - y[0]) > 2

# %%
# The picture
# -----------
# One line per method, one column per distribution, and one scale of colours in every column, that
# of the truth. In the line of IsolationForest, whose scores are shown, it is the scale of the
# scores.

import matplotlib.pyplot as plt

found = {(row["distribution"], row["method"]): row for row in results}
figure, axes = plt.subplots(
    len(methods) + 1, len(names), figsize=(9, 17), layout="constrained"
)
for column, name in zip(axes.T, names, strict=True):
    x, y, _ = grid_of(name)
    peak = np.exp(surfaces[name, "truth"].max())
    for ax, method in zip(column, ["truth", *methods], strict=True):
        surface = surfaces[name, method].reshape(len(y), len(x))
        is_density = method != "IsolationForest"
        image = np.exp(surface) if is_density else surface
        limits = {"vmin": 0, "vmax": peak} if is_density else {}
        ax.pcolormesh(
            x, y, image, cmap="BuPu", shading="gouraud", rasterized=True, **limits
        )
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if method != "truth":
            row = found[name, method]
            kl = f"KL {row['kl']:.2f}" if is_density else "no density"
            ax.set_title(f"{kl}, {row['fit_cpu_s']:.1f} s", fontsize=9, pad=3)
    column[0].set_title(name.replace("_", " "), fontsize=11)
for line, method in zip(axes, ["truth", *methods], strict=True):
    label = method.replace("Divergence", "\nDivergence")
    label = label.replace("FlowContrastive", "FlowContrastive\n").replace(
        " from", "\nfrom"
    )
    line[0].set_ylabel(label, fontsize=9)

# %%
# In a table
# ----------
# Means over the six distributions, the nearest to the truth first.


def mean(method, key):
    return np.mean([found[name, method][key] for name in names])


normalised = [method for method in methods if method != "IsolationForest"]
for method in sorted(normalised, key=lambda method: mean(method, "kl")):
    kl, seconds = mean(method, "kl"), mean(method, "fit_cpu_s")
    print(f"{method:<40} KL {kl:.3f} nats, {seconds:5.1f} s")
