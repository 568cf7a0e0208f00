"""
Penguins with holes: filled once, and many times
================================================

A quarter of the measurements of 333 penguins is taken away. What fills the holes? A median fills
them with a number that belongs to no penguin. :class:`~skebm.DensityImputer` draws what may have
been there, given all other cells of the row, and draws it several times, so that the uncertainty
stays visible. :ref:`imputation` says what it can and cannot do.

The table comes with the package palmerpenguins (Horst, Hill and Gorman 2020).
"""

# %%
# A table with holes
# ------------------

import matplotlib.pyplot as plt
import numpy as np
from palmerpenguins import load_penguins
from sklearn.impute import SimpleImputer

from skebm import DensityImputer, NCEDensity

penguins = load_penguins().drop(columns="year").dropna()
penguins = penguins.reset_index(drop=True)
measures = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]

rng = np.random.default_rng(0)
holes = np.zeros(penguins.shape, dtype=bool)
at = [penguins.columns.get_loc(name) for name in measures]
holes[:, at] = rng.random((len(penguins), 4)) < 0.25
table = penguins.mask(holes)
lost = holes.any(axis=1)
print(f"{lost.sum()} of {len(table)} rows lack a cell")
table.head()

# %%
# Fill them
# ---------
# The imputer fits a density to the frame as it is. Text stays text, and lengths are tenths of a
# millimetre again. ``n_draws=19`` makes nineteen tables.

imputer = DensityImputer(NCEDensity(random_state=0), n_draws=19, random_state=0)
tables = imputer.fit(table).impute(table)
drawn = tables[0]
assert drawn.notna().all(axis=None)
assert drawn.dtypes.equals(table.dtypes)
drawn.head()

# %%
# On the left the table as it was, in the middle medians, on the right draws. Rows with a filled
# cell are dark. Medians are a cross that no group of penguins has; draws lie in the clouds of
# their species.

median = penguins.mask(holes)
median[measures] = SimpleImputer(strategy="median").fit_transform(table[measures])
shown = ["bill_length_mm", "bill_depth_mm"]
cell = holes[:, [penguins.columns.get_loc(name) for name in shown]].any(axis=1)

figure, axes = plt.subplots(
    1, 3, figsize=(10, 3.4), sharex=True, sharey=True, layout="constrained"
)
kinds = {"as it was": penguins, "medians": median, "draws": drawn}
for ax, (title, frame) in zip(axes, kinds.items(), strict=True):
    for species, color in zip(
        ["Adelie", "Chinstrap", "Gentoo"], ["C0", "C1", "C2"], strict=True
    ):
        own = (frame["species"] == species).to_numpy()
        x, y = (frame[name] for name in shown)
        ax.scatter(x[own & ~cell], y[own & ~cell], s=8, color=color, alpha=0.25)
        ax.scatter(x[own & cell], y[own & cell], s=8, color=color, label=species)
    ax.set_title(title)
    ax.set_xlabel("bill length [mm]")
axes[0].set_ylabel("bill depth [mm]")
axes[0].legend(fontsize=8)

spread = {
    title: np.corrcoef(frame[shown][frame["species"] == "Gentoo"].T)[0, 1]
    for title, frame in kinds.items()
}
print("correlation of bill length and depth of Gentoos:")
for title, value in spread.items():
    print(f"  {title:10} {value:.2f}")
assert abs(spread["draws"] - spread["as it was"]) < abs(
    spread["medians"] - spread["as it was"]
)

# %%
# How sure?
# ---------
# What was there lies between the least and the largest of nineteen draws with probability 18/20, if
# the draws are right.

draws = np.stack([frame[measures].to_numpy() for frame in tables])
missing, truth = holes[:, at], penguins[measures].to_numpy()
low, high = draws.min(axis=0), draws.max(axis=0)
inside = ((low <= truth) & (truth <= high))[missing].mean()
print(f"{inside:.0%} of {missing.sum()} lost cells lie within their draws")
assert 0.8 < inside < 0.98

some = np.flatnonzero(missing[:, 3])[:25]
figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
ax.vlines(range(25), low[some, 3], high[some, 3], color="0.6", label="19 draws")
ax.plot(truth[some, 3], "o", color="C3", markersize=4, label="what was there")
ax.set_xlabel("penguins whose body mass was taken away")
ax.set_ylabel("body mass [g]")
ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

# %%
# An analysis of filled tables
# ----------------------------
# How much heavier is a Gentoo whose flippers are a millimetre longer? Each table gives a slope and
# its variance. Rubin's rules pool them: the mean of the slopes, and the mean variance within a
# table plus (1 + 1/m) times the variance between tables.


def slope(frame):
    """Slope of mass over flipper length of Gentoos, and its variance."""
    own = frame[frame["species"] == "Gentoo"].dropna()
    x = own["flipper_length_mm"] - own["flipper_length_mm"].mean()
    y = own["body_mass_g"] - own["body_mass_g"].mean()
    b = (x * y).sum() / (x**2).sum()
    return b, ((y - b * x) ** 2).sum() / (len(own) - 2) / (x**2).sum()


slopes, variances = np.transpose([slope(frame) for frame in tables])
m = len(tables)
pooled = slopes.mean()
error = np.sqrt(variances.mean() + (1 + 1 / m) * slopes.var(ddof=1))
results = {
    "no cell lost": slope(penguins),
    "rows without holes": slope(table),
    "medians": slope(median),
    "pooled": (pooled, error**2),
}
for what, (value, variance) in results.items():
    print(f"{what:20} {value:5.1f} +- {np.sqrt(variance):.1f} g per mm")

whole, _ = results["no cell lost"]
assert abs(pooled - whole) < 2 * error

# %%
# The pooled error is that of the whole table and of what the holes took away. Medians give a
# slope too flat, with an error that claims that nothing was lost.
