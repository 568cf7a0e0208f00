"""
Comparing models, with an error for every difference
====================================================

Which of several densities is best, and by more than chance? The same folds serve all of them, and
differences are taken row by row: rows differ more than models do, and that cancels.
"""

# %%
# Held-out log-densities of six models
# ------------------------------------
# Six measurements of the nuclei of 569 biopsies.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold
from sklearn.neighbors import KernelDensity
from sklearn.preprocessing import PowerTransformer, StandardScaler

from skebm import NCEDensity
from skebm.compose import DensityPipeline

X = load_breast_cancer().data[:, :6]


def behind(transformer, density):
    return DensityPipeline([("transform", transformer), ("density", density)])


mixture = GaussianMixture(4, reg_covar=1e-3, random_state=0)
models = {
    "one Gaussian": behind(StandardScaler(), GaussianMixture()),
    "four Gaussians": behind(StandardScaler(), mixture),
    "four, after powers": behind(PowerTransformer(), mixture),
    "kernels": behind(StandardScaler(), KernelDensity(bandwidth=0.3)),
    "NCEDensity, base alone": NCEDensity(
        energy_model=None, n_members=2, random_state=0
    ),
    "NCEDensity": NCEDensity(n_members=2, random_state=0),
}
folds = list(KFold(3, shuffle=True, random_state=0).split(X))
scores = {name: np.empty(len(X)) for name in models}
for name, model in models.items():
    for train, test in folds:
        scores[name][test] = model.fit(X[train]).score_samples(X[test])

# %%
# Paired and unpaired
# -------------------
# The standard error of the difference of two means, row by row, beside the one that forgets that
# the rows were the same.

reference = scores["one Gaussian"]
n = len(X)
print(f"{'':<24}{'gain':>8}{'paired':>9}{'unpaired':>10}")
for name, values in scores.items():
    gain = values - reference
    paired = gain.std(ddof=1) / n**0.5
    unpaired = ((values.var(ddof=1) + reference.var(ddof=1)) / n) ** 0.5
    print(f"{name:<24}{gain.mean():8.2f}{paired:9.2f}{unpaired:10.2f}")

gain = scores["four, after powers"] - reference
error = gain.std(ddof=1) / n**0.5
assert gain.mean() > 2 * error

# %%
# Every pair
# ----------
# A cell says by how much the model of its row is above that of its column, in nats per row, and
# whether that is more than two standard errors (bold).

names = list(models)
figure, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
gains = np.array([[(scores[a] - scores[b]).mean() for b in names] for a in names])
errors = np.array(
    [[(scores[a] - scores[b]).std(ddof=1) / n**0.5 for b in names] for a in names]
)
limit = np.quantile(abs(gains), 0.9)
ax.imshow(gains, cmap="PuOr", vmin=-limit, vmax=limit)
for i in range(len(names)):
    for j in range(len(names)):
        if i != j:
            sure = abs(gains[i, j]) > 2 * errors[i, j]
            dark = abs(gains[i, j]) > 0.65 * limit
            ax.text(
                j, i, f"{gains[i, j]:+.2f}", ha="center", va="center", fontsize=8,
                weight="bold" if sure else "normal", color="w" if dark else "k",
            )  # fmt: skip
ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
_ = ax.set_yticks(range(len(names)), names)

best = names[gains.mean(axis=1).argmax()]
assert best.startswith("NCEDensity")
assert (gains[-1] > 2 * errors[-1])[:4].all()

# %%
# The best is above all densities of scikit-learn by more than chance, and whether the tilt adds
# something to its base the same table says. What compares, and what does not, is in
# :doc:`/comparing`.
