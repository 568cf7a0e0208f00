"""
Pipelines, units and a grid search
==================================

A logarithm may suit a column better than the column itself. A search over such steps needs
log-densities in one unit; :class:`~skebm.compose.DensityPipeline` has them in the units of X.
"""

# %%
# What a plain pipeline compares
# ------------------------------
# Incomes and times are often log-normal. Both searches below try a scaler, powers and a logarithm
# before the same Gaussian mixture.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler, PowerTransformer, StandardScaler

from skebm import NCEDensity
from skebm.compose import DensityPipeline, InvertibleFunctionTransformer

rng = np.random.default_rng(0)
Z = rng.multivariate_normal([3, 0], [[0.8, 0.5], [0.5, 0.6]], size=2000)
X, fresh = np.exp(Z[:1000]), np.exp(Z[1000:])


def log_derivative(X):
    """Logarithm of d log(x) / dx, column by column."""
    return -np.log(X)


steps = {
    "as it is": "passthrough",
    "StandardScaler": StandardScaler(),
    "MinMaxScaler": MinMaxScaler(),
    "powers": PowerTransformer(),
    "logarithm": InvertibleFunctionTransformer(np.log, np.exp, log_derivative),
}
stages = [("step", None), ("density", GaussianMixture(2, random_state=0))]
scores = {}
for kind in (Pipeline, DensityPipeline):
    search = GridSearchCV(kind(stages), {"step": list(steps.values())}, cv=5).fit(
        X
    )
    scores[kind.__name__] = search.cv_results_["mean_test_score"]
    print(f"{kind.__name__:<16} prefers {list(steps)[search.best_index_]}")

figure, axes = plt.subplots(
    1, 2, figsize=(9, 3), sharey=True, layout="constrained"
)
for ax, (kind, values) in zip(axes, scores.items(), strict=True):
    colors = ["#5b3b8c" if v == max(values) else "#b9b3c9" for v in values]
    ax.barh(list(steps), values - values[0], color=colors)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set(
        title=kind, xlabel="held-out score, minus that of the columns as they are"
    )

# %%
# The plain pipeline compares numbers of different units, and prefers whatever makes numbers small.
# In the units of X the logarithm is best: it is how the rows were made. The truth is known here.

assert max(scores["Pipeline"]) == scores["Pipeline"][2]
assert max(scores["DensityPipeline"]) == scores["DensityPipeline"][4]

from scipy.stats import multivariate_normal

normal = multivariate_normal([3, 0], [[0.8, 0.5], [0.5, 0.6]])
truth = (normal.logpdf(np.log(fresh)) - np.log(fresh).sum(axis=1)).mean()
best = search.best_estimator_.score(fresh)
print(f"truth {truth:.3f}, best pipeline {best:.3f} nats per row")
assert abs(truth - best) < 0.05

# %%
# Without a pipeline
# ------------------
# ``NCEDensity`` makes each column nearly normal by itself, and needs no step before it. Knowing the
# logarithm is still worth something.

density = NCEDensity(n_members=2, random_state=0).fit(X)
print(f"NCEDensity on X as it is {density.score(fresh):.3f}")
behind = DensityPipeline(
    [("log", steps["logarithm"]), ("density", clone(density))]
)
print(f"NCEDensity on log X      {behind.fit(X).score(fresh):.3f}")
mixture = GaussianMixture(2, random_state=0).fit(X)
print(f"GaussianMixture on X     {mixture.score(fresh):.3f}")
assert density.score(fresh) > mixture.score(fresh) + 0.1
assert density.score(fresh) > truth - 0.1
