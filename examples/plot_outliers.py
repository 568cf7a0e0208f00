"""
The views of an outlier detector
================================

:class:`~skebm.OutlierDetector` looks at a row in several ways, and lets the one decide that finds
it oddest. Here is a table with three odd rows, and what each view makes of them.
"""

# %%
# A table
# -------
# Two clusters of rows whose columns go together, a gap between them, and three rows that were
# slipped in: one in the gap, one off the line that the columns follow, and one outside of
# everything.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from skebm import OutlierDetector

rng = np.random.default_rng(0)
along = rng.normal(size=600) + 6.0 * rng.integers(2, size=600)
X = along[:, None] + rng.normal(0.0, 0.4, (600, 2))
ODD = {
    "in the gap": [3.3, 2.7],
    "off the line": [5.0, 1.6],
    "outside": [12.0, 11.0],
}
X[:3] = list(ODD.values())

# %%
# The bad rows are in the table itself, so that the rows are scored out of fold: each by a member
# of the model that has not learned from it.

detector = OutlierDetector(training="contaminated", random_state=0).fit(X)
order = detector.out_of_fold_scores_.argsort()
ranks = {
    kind: int(np.flatnonzero(order == i)[0]) + 1 for i, kind in enumerate(ODD)
}
print(ranks)

# %%
# Which view made them odd
# ------------------------
# ``view_scores`` has the log-density of every view, on a scale on which they can be compared. The
# share of the rows that are odder still says more than nats.

scores, every = detector.view_scores(X[:3]), detector.view_scores(X)
share = (every[:, None] < scores).mean(axis=0)
pd.DataFrame(share.round(3), index=pd.Index(ODD), columns=detector.views_)

# %%
# The views
# ---------
# Dark is likely; the line is the score that one in twenty rows lies below, in each view. The last
# panel is the lowest of the views, which is the density of the detector, with its threshold.

side = np.linspace(-5.0, 14.0, 120)
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
of_grid = np.c_[detector.view_scores(grid), detector.score_samples(grid)]
lines = [*np.quantile(every, 0.05, axis=0), detector.offset_]
fig, axes = plt.subplots(
    1, 4, figsize=(11, 3), sharex=True, sharey=True, layout="constrained"
)
for ax, z, line, name in zip(
    axes, of_grid.T, lines, [*detector.views_, "lowest"], strict=True
):
    z = z.reshape(len(side), -1)
    ax.contourf(side, side, np.maximum(z, -14.0), levels=12, cmap="Blues")
    ax.contour(side, side, z, levels=[line], colors="k", linewidths=0.8)
    ax.scatter(*X[3:].T, s=1, color="tab:orange")
    for kind, (x, y) in ODD.items():
        ax.scatter(x, y, marker="x", color="tab:red")
        right = x > 10.0
        ax.annotate(
            kind,
            (x, y),
            xytext=(-6 if right else 6, 6),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0},
        )
    ax.set(title=name, aspect="equal")
plt.show()

# %%
# The row in the gap is seen by one view alone, the others look across. All three are among the rows
# that the detector labels.

assert (detector.out_of_fold_decision_function_[:3] < 0).all()
assert share[0, 0] < 0.05 < share[0, 1:].min()
