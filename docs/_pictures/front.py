"""The picture of the front page and of README: ``python docs/_pictures/front.py``.

Species, length and depth of the bills of penguins are fitted as they are. Panel two sums the
density over the species; panel three asks which penguins a model finds odd that has not seen them.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from palmerpenguins import load_penguins

from skebm import NCEDensity

COLORS = {"Adelie": "#e07b39", "Chinstrap": "#8a63c9", "Gentoo": "#2a9d8f"}
INKS = {"light": "#24292f", "dark": "#ced6dd"}
STATIC = Path(__file__).parents[1] / "_static"

table = load_penguins()[["species", "bill_length_mm", "bill_depth_mm"]].dropna()
density = NCEDensity(random_state=0).fit(table)
draws = density.sample(len(table), random_state=0)
odd = density.fit_predict(table) == -1

lengths, depths = np.meshgrid(np.linspace(30, 62, 240), np.linspace(12, 23, 240))
grid = {"bill_length_mm": lengths.ravel(), "bill_depth_mm": depths.ravel()}
log_density = np.logaddexp.reduce(
    [density.score_samples(pd.DataFrame({"species": s, **grid})) for s in COLORS]
).reshape(lengths.shape)


def points(ax, rows, **style):
    for species, color in COLORS.items():
        x = rows[rows["species"] == species]
        ax.scatter(x["bill_length_mm"], x["bill_depth_mm"], s=9, color=color, lw=0, **style)


for theme, ink in INKS.items():
    plt.rcParams.update(dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor"], ink))
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.1), sharex=True, sharey=True, layout="tight")
    points(axes[0], table)
    levels = log_density.max() + np.array([-5.5, -4.5, -3.5, -2.5, -1.7, -1.0, -0.5, 0.0])
    colors = "Purples" if theme == "light" else "magma"
    axes[1].contourf(lengths, depths, log_density, levels, cmap=colors)
    axes[1].contour(
        lengths, depths, log_density, levels, colors=ink, linewidths=0.3, linestyles="solid"
    )
    points(axes[2], table[~odd], alpha=0.25)
    points(axes[2], table[odd])
    axes[2].scatter(
        *table[odd].iloc[:, 1:].to_numpy().T, s=60, facecolor="none", edgecolor="#d1242f"
    )
    points(axes[3], draws)
    titles = ["a table", "its density", f"odd rows: {odd.sum()} of {len(table)}", "new rows"]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=13)
        ax.set(xlim=(30, 62), ylim=(12, 23), xticks=[], yticks=[], xlabel="bill length")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("bill depth")
    for species, y in zip(COLORS, (0.14, 0.08, 0.02), strict=True):
        place = {"transform": axes[0].transAxes, "fontsize": 8}
        axes[0].text(0.02, y, species, color=COLORS[species], **place)
    figure.savefig(STATIC / f"front-{theme}.png", dpi=160, transparent=True)
    plt.close(figure)
