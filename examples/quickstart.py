"""
Quick start on a real table
===========================

Fit a density to a real table, compare it with others, find odd rows, draw new ones.

The table is the Wisconsin breast cancer data of scikit-learn: for 569 biopsies, mean, standard
error and worst value of ten measurements of the cell nuclei. The diagnosis is never shown to a
model; it only colours a picture.
"""

# %%
# Fit
# ---

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity
from sklearn.preprocessing import StandardScaler

from skebm import NCEDensity
from skebm.compose import DensityPipeline
from skebm.plotting import AnomalyScoreDisplay, SamplesDisplay

table = load_breast_cancer(as_frame=True)
diagnosis = table.target.map(dict(enumerate(table.target_names)))
train, test = train_test_split(table.data, test_size=0.2, random_state=0)

density = NCEDensity(random_state=0).fit(train)
print(density.summary())

# %%
# Evaluate and compare
# --------------------
# The mean log-density of rows that no model has seen, in nats per row and in the units of the
# table; the larger, the better. A Gaussian mixture and a kernel density need scaled columns, and
# a search for their settings; :class:`~skebm.compose.DensityPipeline` brings their log-densities
# back to the units of the table.


def tuned(model, grid):
    """Scale, and choose settings by held-out likelihood."""
    pipeline = DensityPipeline([("scale", StandardScaler()), ("density", model)])
    grid = {f"density__{name}": values for name, values in grid.items()}
    return GridSearchCV(pipeline, grid, cv=3).fit(train).best_estimator_


mixture = GaussianMixture(reg_covar=1e-5, random_state=0)
others = {
    "Gaussian mixture": tuned(mixture, {"n_components": [1, 2, 3, 4, 6]}),
    "kernel density": tuned(
        KernelDensity(), {"bandwidth": np.geomspace(0.1, 2, 10)}
    ),
}
scores = density.score_samples(test)
print(f"NCEDensity        {scores.mean():8.2f}")
print(f"  its base alone  {density.base_score_samples(test).mean():8.2f}")
for name, other in others.items():
    theirs = other.score_samples(test)
    gain = scores - theirs
    print(
        f"{name:<17} {theirs.mean():8.2f}, below by {gain.mean():.2f}"
        f" +- {gain.std() / len(gain) ** 0.5:.2f}"
    )
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5

# %%
# Odd rows
# --------
# The lower the density, the odder the row. New rows of the same kind fall below the threshold
# once in twenty times; malignant nuclei, of which there are fewer, do so more often.

display = AnomalyScoreDisplay.from_estimator(density, test, diagnosis[test.index])
odd = density.predict(test) == -1
malignant = diagnosis[test.index] == "malignant"
assert odd[malignant].mean() > odd[~malignant].mean()

shown = ["mean radius", "mean texture", "mean smoothness", "worst concavity"]
test[shown].assign(log_density=scores, diagnosis=diagnosis).nsmallest(
    5, "log_density"
)

# %%
# New rows
# --------
# Draws come as a frame with the same columns. Here they are among rows that the model has not
# seen.

drawn = density.sample(4, random_state=0)
assert drawn.dtypes.equals(train.dtypes)
drawn[shown]

# %%

display = SamplesDisplay.from_estimator(
    density, test, columns=shown, random_state=0
)
plt.savefig("quickstart.png")

# sphinx_gallery_thumbnail_number = 2
