"""The picture and the table of the page "Which one?": ``python docs/_pictures/compare.py``.

The picture is that of the example, ``examples/plot_compare_estimators.py``, which is run as it
stands; the table is what it has measured. What the page says of them is checked here.
"""

import csv
import runpy
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "docs" / "_static"

page = runpy.run_path(str(ROOT / "examples" / "plot_compare_estimators.py"))
results = page["results"]
with open(STATIC / "compare.csv", "w", newline="") as file:
    table = csv.DictWriter(file, results[0])
    table.writeheader()
    for row in results:
        numbers = {name: f"{value:.4g}" for name, value in row.items() if value != str(value)}
        table.writerow(row | numbers)
page["figure"].savefig(STATIC / "compare.webp", dpi=110, pil_kwargs={"quality": 88})

names = page["names"]
kl = {m: np.array([page["found"][name, m]["kl"] for name in names]) for m in page["methods"]}
seconds = {
    m: np.array([page["found"][name, m]["fit_cpu_s"] for name in names]) for m in page["methods"]
}
del kl["IsolationForest"]
ours = [m for m in kl if m not in ("KernelDensity", "GaussianMixture", "flow alone")]
assert min(ours, key=lambda m: seconds[m].mean()) == "NCEDensity from a Gaussian"
means = {m: values.mean() for m, values in kl.items()}
assert min(means, key=lambda m: means[m]) == "NCEDensity"


def nearest_on(name):
    return min(kl, key=lambda m: kl[m][names.index(name)])


assert nearest_on("checkerboard") == "ContrastiveDivergenceEBM from a Gaussian"
assert all(nearest_on(name) == "NCEDensity" for name in names if name != "checkerboard")
assert (kl["AdversarialEBM"] == kl["flow alone"]).all()
assert all((kl["ImplicitVAE"] > values).all() for m, values in kl.items() if m != "ImplicitVAE")
