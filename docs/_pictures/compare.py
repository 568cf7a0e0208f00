"""The picture and the table of the page "Which one?": ``python docs/_pictures/compare.py``.

Ten methods learn four distributions of the plane from 1,000 rows each, at their defaults but for
two members in place of four, and the Gaussian encoder of ImplicitVAE. The divergence from the
truth is measured on 10,000 fresh rows, and time is processor seconds of the fit on one thread. It
takes a quarter of an hour; what is done lies in the folder given as ``--cache``, so that a second
call goes on.
"""

import argparse
import csv
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
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
    ScoreMatchingEBM,
)
from skebm.datasets import Checkerboard, Pinwheel, Rings, TwoMoons

STATIC = Path(__file__).parents[1] / "_static"
DISTRIBUTIONS = [TwoMoons(), Rings(), Pinwheel(), Checkerboard()]
SEED, N_ROWS, N_FRESH, GRID = 0, 1000, 10_000, 90

METHODS = {
    "KernelDensity": GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.03, 1.0, 20)}),
    "GaussianMixture": GridSearchCV(
        GaussianMixture(random_state=SEED), {"n_components": [1, 2, 4, 8, 12, 16, 24, 32]}
    ),
    "coupling flow": FlowContrastiveDensity(energy_model=None, n_members=2, random_state=SEED),
    "IsolationForest": IsolationForest(random_state=SEED),
    "NCEDensity": NCEDensity(n_members=2, random_state=SEED),
    "ScoreMatchingEBM": ScoreMatchingEBM(n_members=2, random_state=SEED),
    "ContrastiveDivergenceEBM": ContrastiveDivergenceEBM(n_members=2, random_state=SEED),
    "FlowContrastiveDensity": FlowContrastiveDensity(n_members=2, random_state=SEED),
    "AdversarialEBM": AdversarialEBM(n_members=2, random_state=SEED),
    "ImplicitVAE": ImplicitVAE(encoder="gaussian", random_state=SEED),
}


def axes_of(distribution):
    rows = distribution.sample(N_ROWS, random_state=SEED)
    low, high = rows.min(axis=0), rows.max(axis=0)
    pad = 0.1 * (high - low)
    return [np.linspace(a, b, GRID) for a, b in zip(low - pad, high + pad, strict=True)]


def measure(name, distribution):
    """Divergence with its standard error, seconds, and the surface on the grid."""
    rows = distribution.sample(N_ROWS, random_state=SEED)
    fresh = distribution.sample(N_FRESH, random_state=SEED + 1)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = METHODS[name].fit(rows)
    seconds = time.process_time() - start
    gap = distribution.log_density(fresh) - model.score_samples(fresh)
    if name == "IsolationForest":  # its score is no density
        gap = np.full(N_FRESH, np.nan)
    grid = np.stack(np.meshgrid(*axes_of(distribution)), axis=-1).reshape(-1, 2)
    surface = model.score_samples(grid).reshape(GRID, GRID)
    numbers = [gap.mean(), gap.std() / N_FRESH**0.5, seconds]
    return {"numbers": np.array(numbers), "surface": surface}


def draw(results):
    figure, axes = plt.subplots(
        len(DISTRIBUTIONS), len(METHODS) + 1, figsize=(18, 7.6), layout="constrained"
    )
    for line, distribution in zip(axes, DISTRIBUTIONS, strict=True):
        x, y = axes_of(distribution)
        grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        truth = distribution.log_density(grid).reshape(GRID, GRID)
        peak = np.exp(truth.max())
        style = {"cmap": "BuPu", "shading": "gouraud", "rasterized": True}
        line[0].pcolormesh(x, y, np.exp(truth), vmin=0, vmax=peak, **style)
        for ax, name in zip(line[1:], METHODS, strict=True):
            kl, _, seconds = results[distribution.name, name]["numbers"]
            surface = results[distribution.name, name]["surface"]
            if np.isnan(kl):
                ax.pcolormesh(x, y, surface, **style)
                ax.set_title(f"no density, {seconds:.1f} s", fontsize=9)
            else:
                ax.pcolormesh(x, y, np.exp(surface), vmin=0, vmax=peak, **style)
                ax.set_title(f"KL {kl:.3f}, {seconds:.0f} s", fontsize=9)
        line[0].set_ylabel(distribution.name.replace("_", " "), fontsize=11)
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, name in zip(axes[0], ["truth", *METHODS], strict=True):
        long = name.replace("Divergence", "Divergence\n").replace("Contrastive", "Contrastive\n")
        long = long.replace("\nDivergence\nEBM", "\nDivergenceEBM")
        ax.set_title(f"{long}\n{ax.get_title()}", fontsize=9)
    figure.savefig(STATIC / "compare.webp", dpi=100, pil_kwargs={"quality": 88})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    cache = parser.parse_args().cache
    cache.mkdir(exist_ok=True)
    results = {}
    for distribution in DISTRIBUTIONS:
        for name in METHODS:
            path = cache / f"{distribution.name}-{name}.npz"
            if not path.exists():
                np.savez(path, **measure(name, distribution))
            results[distribution.name, name] = dict(np.load(path))
    with open(STATIC / "compare.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["distribution", "method", "kl", "kl_std_error", "fit_cpu_s", "seed"])
        for (distribution, name), result in results.items():
            numbers = [f"{value:.4g}" for value in result["numbers"]]
            table.writerow([distribution, name, *numbers, SEED])
    draw(results)


if __name__ == "__main__":
    main()
