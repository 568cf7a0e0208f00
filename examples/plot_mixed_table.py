"""
Penguins: a table with categories and holes
===========================================

For each of 344 penguins the table of the Palmer Station says species, island, sex and year, and
four measurements; some cells are empty. :class:`~skebm.NCEDensity` takes the frame as it is:
nothing is encoded, and nothing is imputed. This page asks the density which species a penguin
has, looks for odd rows, and draws new ones. What such a density means is said in
:ref:`mixed`.

The table comes with the package palmerpenguins (Horst, Hill and Gorman 2020).
"""

# %%
# The table
# ---------

import numpy as np
import pandas as pd
from palmerpenguins import load_penguins
from sklearn.model_selection import KFold, cross_val_predict, train_test_split

from skebm import NCEDensity
from skebm.plotting import AnomalyScoreDisplay, SamplesDisplay

penguins = load_penguins()
train, test = train_test_split(penguins, test_size=0.25, random_state=0)
penguins.head()

# %%
# Two penguins have no measurements, and these and nine others have no sex:

penguins.isna().sum()

# %%
# Fit
# ---
# How was each column taken? Text is a category, and the rest are numbers, of which draws lie on
# the grid that the column has (``step``). Missing cells are a state where there are any.

density = NCEDensity(random_state=0).fit(train)
print(density.summary())

report = pd.DataFrame(density.columns_).set_index("name")
report[["kind", "categories", "missing", "step", "bounds"]]

# %%
# Which species?
# --------------
# A log-density of all columns knows every conditional one. Put each species in its place in turn,
# and normalise: that is the probability of the species given all other cells of the row, whether
# these are there or missing. The rows are held out.


def conditional(density, rows, column, categories):
    """Probability of each category given the other cells, (n_rows, n_categories)."""
    log_p = np.stack(
        [density.score_samples(rows.assign(**{column: c})) for c in categories],
        axis=1,
    )
    return np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))


species = ["Adelie", "Chinstrap", "Gentoo"]
p_species = conditional(density, test, "species", species)
right = np.array(species)[p_species.argmax(axis=1)] == test["species"]
print(f"{right.sum()} of {len(test)} species are right")

known = test[test["sex"].notna()]
p_male = conditional(density, known, "sex", ["female", "male"])[:, 1]
right_sex = (p_male > 0.5) == (known["sex"] == "male")
print(f"{right_sex.sum()} of {len(known)} sexes are right")

assert right.mean() > 0.95
assert right_sex.mean() > 0.8

# %%
# Odd rows
# --------
# Every penguin is scored by a model that has not seen it. ``decision_function`` is the right
# score where rows lack values: it does not depend on whether a bill is measured in millimetres or
# in inches.

folds = KFold(5, shuffle=True, random_state=0)
model = NCEDensity(random_state=0)
odd = cross_val_predict(model, penguins, cv=folds, method="decision_function")
measured = penguins["body_mass_g"].notna()
unsexed = penguins["sex"].isna() & measured
penguins.assign(score=odd.round(1)).sort_values("score").head(6)

# %%
# The oddest are the two that nobody measured: a state that two rows of 344 show has a small
# probability. Then comes a Chinstrap female with a bill of 58 mm, 7 mm longer than that of any
# other of her kind. Those without a sex, and with all measurements, are no group of odd ones: some
# lie above the threshold, which is 0, and some below.

what = np.select([~measured, unsexed], ["no measurements", "no sex"], "complete")
display = AnomalyScoreDisplay(
    odd, threshold=0.0, labels=what, score_name="log-density above the threshold"
).plot()

oddest = penguins.index[np.argsort(odd)]
assert set(oddest[:2]) == set(penguins.index[~measured])
females = penguins[penguins["sex"] == "female"]
assert oddest[2] == females["bill_length_mm"].idxmax()
assert 0 < (odd[unsexed] > 0).sum() < unsexed.sum()

# %%
# New penguins
# ------------
# Draws are a frame with the columns and dtypes of the table. Years are years, lengths are tenths of
# a millimetre, and some cells are missing.

draws = density.sample(2000, random_state=0)
assert draws.dtypes.equals(penguins.dtypes)
draws.head()

# %%
# Categories are shown as bars, and spread a little where they meet another column.

shown = ["species", "sex", "bill_length_mm", "flipper_length_mm"]
display = SamplesDisplay.from_estimator(
    density, penguins, columns=shown, random_state=0
)

# %%
# What never occurs in the table is made rare, and not impossible. Chinstraps and Gentoos live on
# one island each, and measurements are all there or all missing; in some draws they are not.

homes = set(zip(penguins["species"], penguins["island"], strict=True))
moved = [
    home not in homes
    for home in zip(draws["species"], draws["island"], strict=True)
]
empty = draws[
    ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
]
empty = empty.isna().sum(axis=1)
print(f"on an island without their species: {np.mean(moved):.1%} of the draws")
print(f"all measurements missing: {(empty == 4).mean():.1%}")
print(f"some of them missing: {empty.between(1, 3).mean():.1%}")
print(f"sex missing: {draws['sex'].isna().mean():.1%}, of the penguins", end=" ")
print(f"{penguins['sex'].isna().mean():.1%}")

assert 0 < np.mean(moved) < 0.1
assert empty.between(1, 3).mean() < 0.05
assert abs(draws["sex"].isna().mean() - penguins["sex"].isna().mean()) < 0.03

# %%
# Rows without holes may be asked for. They are drawn under this condition, and not filled in.

complete = density.sample(1000, random_state=0, complete=True)
assert complete.notna().all(axis=None)
