"""
Synthetic rows, and whether they can be told
============================================

``sample`` draws rows that look like those of the table: a frame of the same dtypes, with
categories, counts and zeros. How alike are they? A classifier that is trained to tell drawn rows
from rows of the table is a test. Here the table comes from a known distribution, so that fresh
rows of it show what the test says when nothing is to be told.
"""

# %%
# A table and draws
# -----------------

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from skebm import NCEDensity
from skebm.datasets import BayesianNetwork
from skebm.plotting import SamplesDisplay

truth = BayesianNetwork()
customers = truth.sample(1500, random_state=0)
density = NCEDensity(n_members=2, random_state=0).fit(customers)
drawn = density.sample(1500, random_state=0)
assert drawn.dtypes.equals(customers.dtypes)
drawn.head()

# %%

fresh = truth.sample(1500, random_state=1)
display = SamplesDisplay.from_estimator(
    density, fresh, columns=["region", "age", "spend", "visits"], random_state=0
)

# %%
# Two samples, one classifier
# ---------------------------
# Boosted trees see categories, margins and pairs of columns. Each row is judged by trees that have
# not seen it. An area under the ROC curve of one half means that they cannot tell.


def told_apart(one, other):
    """Area under the ROC curve of trees that tell rows of two tables apart."""
    rows = pd.concat([one, other], ignore_index=True)
    label = np.repeat([0, 1], [len(one), len(other)])
    trees = HistGradientBoostingClassifier(
        categorical_features="from_dtype", random_state=0
    )
    p = cross_val_predict(trees, rows, label, cv=5, method="predict_proba")
    return roc_auc_score(label, p[:, 1])


# Every column shuffled: the margins are right, and nothing else.
rng = np.random.default_rng(0)
shuffled = customers.apply(lambda column: rng.permutation(column))
shuffled = shuffled.astype(customers.dtypes)

areas = {
    "other rows of the truth": told_apart(
        fresh, truth.sample(1500, random_state=2)
    ),
    "drawn rows": told_apart(fresh, drawn),
    "shuffled columns": told_apart(fresh, shuffled),
}
for name, area in areas.items():
    print(f"{name:<24} {area:.3f}")

assert areas["drawn rows"] < 0.6
assert areas["drawn rows"] < areas["shuffled columns"] - 0.05

# %%
# Copies
# ------
# A model that has learned its rows by heart would pass this test. How many draws equal a row of the
# table, and how many rows of a fresh sample do? Age, spending and visits together are nearly never
# equal by chance.

numbers = ["age", "spend", "visits"]
seen = set(map(tuple, customers[numbers].to_numpy()))


def copies(rows):
    return np.mean([row in seen for row in map(tuple, rows[numbers].to_numpy())])


print(
    f"draws that equal a row: {copies(drawn):.2%}, fresh rows: {copies(fresh):.2%}"
)
assert copies(drawn) < 0.01
