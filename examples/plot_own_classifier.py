"""
A classifier of your own as energy
==================================

Noise-contrastive estimation is classification: rows of the table against rows drawn from the base.
So any classifier of scikit-learn can be the tilt. Its logit is f, and it is kept if that raises the
likelihood of held-out rows.
"""

# %%
# A random forest on a real table
# -------------------------------

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from skebm import NCEDensity
from skebm.datasets import Banana

X = load_diabetes().data
train, test = train_test_split(X, test_size=0.25, random_state=0)
forest = RandomForestClassifier(
    n_estimators=200, min_samples_leaf=10, random_state=0
)
est = NCEDensity(energy_model=forest, n_members=2, random_state=0).fit(train)
print(est.summary())
gain = est.score_samples(test) - est.base_score_samples(test)
error = gain.std() / len(gain) ** 0.5
print(f"new rows: gain {gain.mean():.2f} +- {error:.2f} nats per row")
assert est.accepted_ == "tilt"
assert gain.mean() > 3 * error

# %%
# How sure may it be?
# -------------------
# Leaves of few rows make a classifier sure of itself, and a density with needles. The held-out
# likelihood says how far to go, and what is in excess is rejected.

sizes = [2, 5, 20, 50]
gains = []
for size in sizes:
    forest = RandomForestClassifier(
        n_estimators=50, min_samples_leaf=size, random_state=0
    )
    model = NCEDensity(
        base="gmm", energy_model=forest, n_members=2, random_state=0
    ).fit(train)
    difference = model.score_samples(test) - model.base_score_samples(test)
    gains.append((difference.mean(), difference.std() / len(test) ** 0.5))

figure, ax = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
mean, errors = np.transpose(gains)
ax.errorbar(sizes, mean, yerr=2 * errors, fmt="o-", capsize=3)
ax.axhline(0, color="0.5", linewidth=0.8)
ax.set(
    xscale="log", xlabel="min_samples_leaf", ylabel="gain over the base (nats)"
)
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
assert (mean > -2 * errors).all()

# %%
# A parametric tilt
# -----------------
# With a linear classifier on polynomials, the model is an exponential family on top of the base:
# log p is log q plus a polynomial. A banana is a Gaussian bent by a square, so that a polynomial
# of degree four can say most of it.

banana = Banana()
rows, fresh = (
    banana.sample(n, random_state=i) for i, n in enumerate((1000, 5000))
)
polynomial = make_pipeline(
    PolynomialFeatures(4), StandardScaler(), LogisticRegression(max_iter=500)
)
bent = NCEDensity(
    base="gaussian", energy_model=polynomial, n_members=2, random_state=0
).fit(rows)
print(bent.summary())
truth = banana.log_density(fresh).mean()
for name, value in {
    "one Gaussian": bent.base_score_samples(fresh).mean(),
    "with a polynomial": bent.score(fresh),
    "truth": truth,
}.items():
    print(f"{name:<18} {value:.3f}")
assert bent.score(fresh) > bent.base_score_samples(fresh).mean() + 1
