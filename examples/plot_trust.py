"""
Can I trust it?
===============

A density that is known, and a model that says of itself how good it is: is it normalised, is its
gain real, and do held-out rows lie where it says that they do?
"""

# %%
# Normalised
# ----------

import numpy as np

from skebm import NCEDensity
from skebm.datasets import GammaCopula, Pinwheel
from skebm.plotting import CalibrationDisplay, StagesDisplay

pinwheel = Pinwheel()
X = pinwheel.sample(1000, random_state=0)
fresh = pinwheel.sample(4000, random_state=1)
est = NCEDensity(base="gaussian", n_members=2, random_state=0).fit(X)

log_density, error = est.score_samples(fresh, return_std=True)
print(
    f"standard error of log Z, member by member: {est.log_partition_std_error_}"
)
print(f"effective sample size: {est.effective_sample_size_.round()}")

side = np.linspace(-6, 6, 300)
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
integral = np.exp(est.score_samples(grid)).sum() * (side[1] - side[0]) ** 2
print(
    f"integral over the plane: {integral:.4f}, said to be 1 +- {error.mean():.4f}"
)
assert abs(integral - 1) < 4 * error.mean() + 0.005

# %%
# Calibrated
# ----------
# The *level* of a row is the share of the model below it. Of rows that come from the model, one in
# twenty lies below the level 0.05, and so on: the curves stay near zero. The first curve orders
# rows by their log-density, and so says how often any threshold will be crossed. Beside a model
# with the default base stands a single Gaussian with the same mean and covariance.

import matplotlib.pyplot as plt

right = NCEDensity(n_members=2, random_state=0).fit(X)
wrong = NCEDensity(base="gaussian", energy_model=None, random_state=0).fit(X)
figure, axes = plt.subplots(
    2, 1, figsize=(7, 5.6), sharex=True, layout="constrained"
)
displays = [
    CalibrationDisplay.from_estimator(model, fresh[:1000], random_state=0, ax=ax)
    for model, ax in zip((right, wrong), axes, strict=True)
]
axes[0].set(title="NCEDensity", xlabel="")
axes[1].set_title("one Gaussian")
good, bad = (display.distances_ / display.bands_ for display in displays)
print("largest difference, as a share of the band:", good.round(2), bad.round(2))
assert (good < 1.5).all()
assert bad[0] > 3

# %%
# In more columns the same holds. The threshold of ``predict`` promises that 5 % of new rows fall
# below it.

copula = GammaCopula()
table, new = (
    copula.sample(n, random_state=i) for i, n in enumerate((1500, 4000))
)
model = NCEDensity(n_members=2, random_state=0).fit(table)
display = CalibrationDisplay.from_estimator(model, new, random_state=0)
_ = display.ax_.set_title("five skewed columns")
share = (model.predict(new) == -1).mean()
print(f"below the threshold: {share:.1%} of new rows")
assert 0.03 < share < 0.07

# %%
# A gain that is real
# -------------------
# The tilt was kept for its gain on held-out rows, which have also chosen when to stop. On new rows
# it gains as much, within the errors.

display = StagesDisplay.from_estimator(est, fresh)
assert abs(display.gains[1] - display.gains[2]) < 3 * np.hypot(
    *display.errors[1:]
)
