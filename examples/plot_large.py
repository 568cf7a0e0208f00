"""
A table larger than memory
==========================

A fit looks at a sample of a large table, and scores are computed batch by batch. Here a table lies
on disk, is opened as a memory map, fitted and scored, and the time for it is counted.
"""

# %%
# A table on disk
# ---------------
# Half a million rows of five skewed columns, of which the exact density is known.

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from skebm import Boosting, NCEDensity
from skebm.datasets import GammaCopula

copula = GammaCopula()
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "rows.npy"
np.save(path, copula.sample(500_000, random_state=0))
rows = np.load(path, mmap_mode="r")
print(f"{path.stat().st_size / 1e6:.0f} MB on disk")

# %%
# Fit
# ---
# More rows than 400,000 are not looked at, and bases are fitted on 20,000 at most. Fewer trees than
# by default keep this page short. The estimate is near the truth all the same.

start = time.process_time()
density = NCEDensity(
    n_members=1, energy_model=Boosting(max_iter=20), random_state=0
).fit(rows)
print(f"fit: {time.process_time() - start:.0f} processor seconds")

fresh = copula.sample(10_000, random_state=1)
gap = copula.log_density(fresh) - density.score_samples(fresh)
error = gap.std() / len(gap) ** 0.5
print(f"divergence from the truth {gap.mean():.4f} +- {error:.4f} nats")
assert gap.mean() < 0.05

# %%
# Score in batches
# ----------------
# A score does not depend on the rows around it, so that batches give what the whole would. Memory
# is that of one batch.

n, size = 100_000, 20_000
scores = np.empty(n)
start = time.process_time()
for i in range(0, n, size):
    scores[i : i + size] = density.score_samples(rows[i : i + size])
seconds = time.process_time() - start
print(f"{1e6 * seconds / n:.0f} microseconds a row")
assert np.allclose(scores[:1000], density.score_samples(rows[:1000]))

figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.hist(scores, bins=120, color="#8a94a6")
ax.axvline(density.offset_, color="#b3261e", linestyle="--", label="threshold")
ax.set(xlabel="log-density (nats)", ylabel="rows")
ax.legend(frameon=False)
below = (scores < density.offset_).mean()
print(f"{below:.1%} of the rows lie below the threshold")
assert 0.03 < below < 0.07
folder.cleanup()

# %%
# On a cluster the loop over batches is a list of tasks, and a search is one of joblib's:
# :doc:`/large` has both.
