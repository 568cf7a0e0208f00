"""
A model that is stored, watched and fitted again
================================================

A fitted density goes into a file, scores new rows in another process, and says when the rows that
come in are no longer those that it has learned.
"""

# %%
# Store and load
# --------------

import pickle

import matplotlib.pyplot as plt
import numpy as np

from skebm import NCEDensity
from skebm.datasets import BayesianNetwork

shop = BayesianNetwork()
customers = shop.sample(1000, random_state=0)
density = NCEDensity(n_members=2, random_state=0).fit(customers)
stored = pickle.dumps(density)
print(f"{len(stored) / 1e3:.0f} kB")

loaded = pickle.loads(stored)
fresh = shop.sample(500, random_state=1)
assert (loaded.score_samples(fresh) == density.score_samples(fresh)).all()

# %%
# Watch
# -----
# Twenty weeks of 200 customers. From the eleventh week on, one customer in five has forgotten to be
# asked for the age, which is then missing, and prices rise by half. Of the rows of an ordinary week
# 5 % lie below the threshold, give or take.

weeks = []
for week in range(20):
    rows = shop.sample(200, random_state=100 + week)
    if week >= 10:
        rng = np.random.default_rng(week)
        rows["spend"] = 1.5 * rows["spend"]
        rows.loc[rng.random(200) < 0.2, "age"] = np.nan
    weeks.append(rows)

import warnings

with warnings.catch_warnings():
    # Each call says that "age" has missing cells now, which fit had not met.
    warnings.simplefilter("ignore")
    below = [(loaded.predict(rows) == -1).mean() for rows in weeks]

error = (0.05 * 0.95 / 200) ** 0.5
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.axhspan(0.05 - 3 * error, 0.05 + 3 * error, color="0.92")
ax.axhline(0.05, color="0.5", linewidth=0.8)
ax.plot(range(1, 21), below, "o-", color="#5b3b8c", markersize=4)
ax.set(xlabel="week", ylabel="share below the threshold", ylim=(0, None))
_ = ax.set_xticks(range(1, 21, 2))

assert max(below[:10]) < 0.05 + 4 * error
assert min(below[10:]) > 0.05 + 4 * error

# %%
# Fit again
# ---------
# The same settings, by :func:`~sklearn.base.clone`, on the weeks since the change.

import pandas as pd
from sklearn.base import clone

renewed = clone(loaded).fit(pd.concat(weeks[10:19], ignore_index=True))
last = weeks[19]
share = (renewed.predict(last) == -1).mean()
print(f"last week below the threshold: {below[19]:.0%} before, {share:.0%} now")
assert share < 0.05 + 4 * error
