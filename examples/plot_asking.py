"""
Penguins, asked: conditionals, a slice, and an odd row explained
================================================================

One fitted density of eight columns answers many questions: what are the other cells, given some;
how are two columns distributed, whatever the others are; and which cell makes a row odd. Nothing
is fitted again. :ref:`asking` has the mathematics.

The table comes with the package palmerpenguins (Horst, Hill and Gorman 2020).
"""

# %%
# One density of all columns
# --------------------------

import matplotlib.pyplot as plt
from palmerpenguins import load_penguins

from skebm import NCEDensity
from skebm.plotting import DensityDisplay, ExplanationDisplay

penguins = load_penguins().drop(columns="year")
density = NCEDensity(random_state=0).fit(penguins)
print(density.summary())

# %%
# Two columns, whatever the others are, and given one of them
# -----------------------------------------------------------
# On the left the species are three clouds. On the right it is given that the penguin is a Gentoo.
# These are densities of two columns, in which the five others are integrated out.

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
bill = ["bill_length_mm", "bill_depth_mm"]
options = {"features": bill, "grid_resolution": 40}
DensityDisplay.from_estimator(
    density, penguins, show_data=True, ax=axes[0], **options
)
DensityDisplay.from_estimator(
    density, penguins, given={"species": "Gentoo"}, ax=axes[1], **options
)
axes[0].set_title("all penguins")
axes[1].set_title("given that it is a Gentoo")

# %%
# Given some cells, what are the others?
# --------------------------------------
# How heavy is a female Gentoo, and how heavy a male one? The conditional density knows quantiles,
# and draws.

pair = {"species": ["Gentoo", "Gentoo"], "sex": ["female", "male"]}
given = density.condition(pair)
mass = given.quantile("body_mass_g", [0.05, 0.5, 0.95])
gentoo = penguins[penguins["species"] == "Gentoo"]
measured = gentoo.groupby("sex")["body_mass_g"].median()
for sex, (low, median, high) in zip(pair["sex"], mass, strict=True):
    print(
        f"{sex:6}  {median:.0f} g, nine in ten from {low:.0f} to {high:.0f};",
        end=" ",
    )
    print(f"median in the table {measured[sex]:.0f}")

assert abs(mass[0, 1] - measured["female"]) < 250
assert abs(mass[1, 1] - measured["male"]) < 250
assert mass[0, 1] < mass[1, 1]

# %%
# Each given row has its draws, one row after the other: three females, then three males. They have
# the dtypes of the table.

given.sample(3, random_state=0)

# %%
# What sex is it?
# ---------------
# Given all its other cells. Here the density has seen the rows; held out, it is right in 65 of 69
# penguins, and a classifier that was trained for the sex alone in 61 (``benchmarks/asking.py``).

known = penguins[penguins["sex"].notna()]
masses = density.category_probabilities(known, "sex")
(columns,) = [c for c in density.columns_ if c.name == "sex"]
guess = [columns.categories[i] for i in masses.argmax(axis=1)]
right = (known["sex"] == guess).mean()
print(f"{right:.0%} of the penguins with a sex")
assert right > 0.85

# %%
# Why is this row odd?
# --------------------
# One penguin gets the weight of another one, 1.6 kg more than its own. Its cells are compared with
# what they would be expected to be, given the others.

odd = penguins.loc[[30]].copy()
print(odd["body_mass_g"].item(), "g")
odd["body_mass_g"] += 1600.0
explanation = density.explain(odd)
ExplanationDisplay.from_explanation(explanation)

worst = explanation.of_row(0)[0]
print(
    f"{worst.columns[0]}: {worst.values[0]:.0f}, expected {worst.expected[0]:.0f};",
    end=" ",
)
print(f"{worst.excess:.1f} nats above the average surprise")
assert worst.columns == ("body_mass_g",)
assert worst.excess > 4

# %%
# And of the oddest penguins in the table? Out of fold, each is judged by a member that has not seen
# it. The heat map tells which of their cells are surprising: the cells of two that nobody measured
# agree with each other, that is, given that three measurements are missing nobody expects the
# fourth.

oddest = penguins.iloc[density.out_of_fold_decision_function_.argsort()[:12]]
explanation = density.explain(oddest)
ExplanationDisplay.from_explanation(
    explanation, row_names=[str(label) for label in oddest.index]
)
plt.show()

unmeasured = oddest["body_mass_g"].isna().to_numpy()
assert unmeasured.sum() == 2
assert explanation.excess[unmeasured].max() < 1.0
