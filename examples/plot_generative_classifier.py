"""
A classifier that knows what it has not seen
============================================

One density per class, and Bayes' rule: the probability of a class is its share times its density,
normalised. Unlike a classifier that only draws borders, it can also say that a row is like none of
the classes.
"""

# %%
# Two densities and Bayes' rule
# -----------------------------

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from sklearn.model_selection import train_test_split

from skebm import NCEDensity


class GenerativeClassifier(ClassifierMixin, BaseEstimator):
    """A density for every class, by Bayes' rule."""

    def __init__(self, density):
        self.density = density

    def fit(self, X, y):
        self.classes_, counts = np.unique(y, return_counts=True)
        self.log_shares_ = np.log(counts / len(y))
        self.densities_ = [
            clone(self.density).fit(X[y == c]) for c in self.classes_
        ]
        return self

    def log_joint(self, X):
        scores = [density.score_samples(X) for density in self.densities_]
        return np.column_stack(scores) + self.log_shares_

    def log_density(self, X):
        """Log-density of the rows, whatever their class."""
        return np.logaddexp.reduce(self.log_joint(X), axis=1)

    def predict_proba(self, X):
        return np.exp(self.log_joint(X) - self.log_density(X)[:, None])

    def predict(self, X):
        return self.classes_[self.log_joint(X).argmax(axis=1)]


data = load_breast_cancer()
X, y = data.data[:, :10], data.target
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
generative = GenerativeClassifier(NCEDensity(n_members=2, random_state=0))
generative.fit(X_train, y_train)
forest = RandomForestClassifier(random_state=0).fit(X_train, y_train)

# %%
# As a classifier
# ---------------

for name, model in {"generative": generative, "random forest": forest}.items():
    p = np.clip(model.predict_proba(X_test)[:, 1], 1e-6, 1 - 1e-6)
    print(
        f"{name:<14} accuracy {accuracy_score(y_test, p > 0.5):.3f},"
        f" log loss {log_loss(y_test, p):.3f}"
    )
assert generative.score(X_test, y_test) > 0.9

# %%
# What neither class looks like
# -----------------------------
# Rows with columns from different patients: every cell is an ordinary number, but not together. The
# forest is asked for a class and gives one, sometimes without doubt. The density of both classes
# together says that these rows are odd.

rng = np.random.default_rng(0)
strange = rng.permuted(X_test, axis=0)
is_strange = np.repeat([False, True], len(X_test))
both = np.concatenate([X_test, strange])

surprise = -generative.log_density(both)
doubt = 1 - forest.predict_proba(both).max(axis=1)
areas = {
    "density": roc_auc_score(is_strange, surprise),
    "doubt of the forest": roc_auc_score(is_strange, doubt),
}
for name, area in areas.items():
    print(f"strange rows found by {name}: area under the ROC curve {area:.3f}")
assert areas["density"] > areas["doubt of the forest"]
assert areas["density"] > 0.95

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
panels = [
    (left, -surprise, "log-density of a row, whatever its class (nats)"),
    (right, 1 - doubt, "largest probability of a class, forest"),
]
for ax, values, label in panels:
    edges = np.histogram_bin_edges(np.clip(values, -120, None), bins=40)
    for kind, name in ((False, "rows of patients"), (True, "shuffled columns")):
        chosen = np.clip(values[is_strange == kind], -120, None)
        ax.hist(chosen, bins=edges, alpha=0.5, label=name)
    ax.set(xlabel=label, ylabel="rows")
_ = left.legend(frameon=False)
