"""
Odd rows: thresholds, p-values, discoveries
===========================================

A detector that is fitted to good rows gives new ones a score. When is a score bad enough? This page
fits :class:`~skebm.OutlierDetector` to biopsies of benign lumps, shows it others among which some
are malignant, and counts false alarms in three ways: by a threshold, by p-values, and by
discoveries. What each of them promises is said in :ref:`p_values`.

The table is of 569 biopsies (Wolberg, Street and Mangasarian 1995), and comes with scikit-learn. We
take ten of its columns, the means over the nuclei of the cells.
"""

# %%
# The rows
# --------

import warnings

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer

from skebm import OutlierDetector
from skebm.plotting import AnomalyScoreDisplay

table = load_breast_cancer(as_frame=True)
X = table.data.filter(like="mean ")
benign, malignant = X[table.target == 1], X[table.target == 0]


def split(seed, n_odd=40):
    """250 benign rows to learn from; the others, and some malignant ones."""
    train = benign.sample(250, random_state=seed)
    odd = malignant.sample(n_odd, random_state=seed)
    new = pd.concat([benign.drop(train.index), odd])
    return train, new, np.where(new.index.isin(odd.index), "malignant", "benign")


train, new, kind = split(0)
train.describe().loc[["mean", "std"]].round(3)

# %%
# Fit
# ---
# The density of a row is what its oddest view says, and each view is a density of the same rows.

detector = OutlierDetector(random_state=0).fit(train)
print(detector.summary())

# %%
# Scores are log-densities, and the threshold is where one in twenty *new* benign rows is
# expected to lie below it. The two kinds are drawn as densities, each of its own.

display = AnomalyScoreDisplay.from_estimator(detector, new, kind)

# %%
# Another threshold
# -----------------
# Thresholds move without another fit.


def flagged(kind_of_row):
    return np.mean(detector.predict(new)[kind == kind_of_row] == -1)


for rate in (0.02, 0.05, 0.1, 0.2):
    detector.set_threshold(false_alarm_rate=rate)
    print(
        f"rate {rate}: flagged are {flagged('benign'):.0%} of the benign rows"
        f" and {flagged('malignant'):.0%} of the malignant ones"
    )

# %%
# More benign rows are flagged than promised: a threshold that comes from 250 rows, and is
# tried on 107, can be so far off. What is promised is a mean over many such tables (see below).
#
# p-values
# --------
# A p-value is the share of rows like the training rows that are as odd. Those of the benign rows
# are spread evenly, but for chance; most malignant rows have one near zero.

p_values = detector.p_values(new)
display = AnomalyScoreDisplay.from_estimator(
    detector, new, kind, response_method="p_values"
)

assert np.median(p_values[kind == "malignant"]) < 0.05
assert 0.3 < np.median(p_values[kind == "benign"]) < 0.7

# %%
# With 250 rows to compare with, no p-value is below 1 / 251:

print(f"{p_values.min():.5f}")
assert np.isclose(p_values.min(), 1 / 251)

# %%
# Discoveries
# -----------
# ``discoveries`` chooses rows of which a fifth, at most, is expected to be benign.

found = detector.discoveries(new, fdr=0.2)
print(pd.crosstab(kind, found, rownames=["kind"], colnames=["discovered"]))

# %%
# A single odd row among all others could not be discovered: its p-value would have to be below
# 0.2 / 108. The warning says so.

alone = new[kind == "benign"].iloc[:107]
alone = pd.concat([alone, 3.0 * malignant.sample(1, random_state=0)])
print(
    detector.p_values(alone.tail(1)), detector.discoveries(alone, fdr=0.2).sum()
)

# %%
# One split proves little
# -----------------------
# Promises are about means over training tables. So the whole is repeated with other benign rows
# to learn from.

# Where log Z of so few rows is rough, a warning says so; p-values are of ranks alone.

runs = []
for seed in range(20):
    train, new, kind = split(seed)
    with warnings.catch_warnings(action="ignore"):
        detector = OutlierDetector(random_state=seed).fit(train)
    p_values, found = detector.p_values(new), detector.discoveries(new, fdr=0.2)
    runs.append(
        {
            "benign with p <= 0.05": np.mean(p_values[kind == "benign"] <= 0.05),
            "malignant with p <= 0.05": np.mean(
                p_values[kind == "malignant"] <= 0.05
            ),
            "false among discoveries": np.mean(kind[found] == "benign")
            if found.any()
            else 0.0,
            "discovered of 40": np.sum(kind[found] == "malignant"),
        }
    )
runs = pd.DataFrame(runs)
print(pd.DataFrame({"mean": runs.mean(), "std. error": runs.sem()}).round(3))

# %%
# The false alarms are about one in twenty, and false discoveries below a fifth.

mean = runs.mean()
assert abs(mean["benign with p <= 0.05"] - 0.05) < 0.02
assert mean["false among discoveries"] < 0.2
assert mean["discovered of 40"] > 20

# %%
# Odd in which view?
# ------------------
# The lowest of the `view_scores` of a row is its score. "sharp" sees gaps between the rows, and
# "linear" what leaves the correlation of the columns.

views = pd.DataFrame(
    detector.view_scores(new), columns=detector.views_, index=new.index
)
pd.crosstab(
    kind[found], views[found].idxmin(axis=1), rownames=["kind"], colnames=["view"]
)
