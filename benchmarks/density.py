"""Held-out log-density of our estimators beside their peers, on tables and known distributions.

    python benchmarks/density.py --data DIR --out results.json
    python benchmarks/density.py --report results.json

Tables are split by ``train_test_split(X, test_size=0.2, random_state=seed)`` and standardised by
the training part; values are nats per row in those units. Distributions of ``skebm.datasets`` are
drawn with n training rows (random_state = seed) and 10,000 fresh test rows; values are in their own
units, and ``truth`` is the mean of the exact log-density, so that truth - value estimates KL.
Entries that a file already holds are skipped.
"""

import argparse
import time
from pathlib import Path

import _results
import numpy as np
from _peers import PEERS
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from skebm.datasets import DISTRIBUTIONS

# "skebm" is NCEDensity at its defaults; the others only when asked for.
OURS = {
    "skebm": ("NCEDensity", {}),
    "skebm mlp": ("NCEDensity", {"energy_model": "mlp"}),
    "skebm periodic": ("NCEDensity", {"energy_model": "periodic"}),
    "skebm score": ("ScoreMatchingEBM", {}),
    "skebm sliced": ("ScoreMatchingEBM", {"method": "sliced"}),
    "skebm denoising": ("ScoreMatchingEBM", {"method": "denoising"}),
    "skebm divergence": ("ContrastiveDivergenceEBM", {}),
    "skebm divergence gaussian": ("ContrastiveDivergenceEBM", {"base": "gaussian"}),
    "skebm on flow": ("NCEDensity", {"base": "flow", "energy_model": "periodic"}),
    "skebm flow contrastive": ("FlowContrastiveDensity", {}),
    "skebm adversarial": ("AdversarialEBM", {}),
    "skebm adversarial implicit": ("AdversarialEBM", {"generator": "implicit"}),
    "skebm vae": ("ImplicitVAE", {}),
    "skebm vae stein": ("ImplicitVAE", {"encoder": "stein"}),
    "skebm vae gaussian": ("ImplicitVAE", {"encoder": "gaussian"}),
}
METHODS = [*PEERS, *OURS]
BUNDLED = {"breast_cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}
N_TEST = 10_000


def list_cases(data, sizes, names):
    """Pairs (name, n): training size of a distribution, or 0 for a table; the cheap ones first."""
    tables = {name: load().data.shape for name, load in BUNDLED.items()}
    if data is not None:
        tables |= {path.stem: np.load(path)["X"].shape for path in Path(data).glob("*.npz")}
    cost = {(name, 0): int(0.8 * n) * d for name, (n, d) in tables.items()}
    cost |= {
        (name, n): n * truth.n_features for name, truth in DISTRIBUTIONS.items() for n in sizes
    }
    return [c for c in sorted(cost, key=cost.get) if names is None or c[0] in names]


def load_case(name, n, seed, data):
    """Training rows, test rows (both raw) and the exact log-density of the latter or None."""
    if n:
        truth = DISTRIBUTIONS[name]
        X_test = truth.sample(N_TEST, random_state=10_000 + seed)
        return truth.sample(n, random_state=seed), X_test, truth.log_density(X_test)
    if name in BUNDLED:
        X = BUNDLED[name]().data
        # A code such as diabetes' "sex" has no density.
        X = X[:, [len(np.unique(column)) >= 30 for column in X.T]]
    else:
        X = np.load(Path(data) / f"{name}.npz")["X"]
    return *train_test_split(X, test_size=0.2, random_state=seed), None


def fit_skebm(X, seed, name, options):
    """One of our estimators."""
    import skebm

    est = getattr(skebm, name)(random_state=seed, **options).fit(X)
    if not hasattr(est, "log_partition_"):  # its errors belong to rows
        return est, {}
    info = {
        "log_partition_std_error": np.ravel(est.log_partition_std_error_).tolist(),
        "effective_sample_size": np.ravel(est.effective_sample_size_).tolist(),
    }
    return est, info


def run(name, n, method, seed, data):
    """One fit: a dict of numbers for the file."""
    X_train, X_test, truth = load_case(name, n, seed, data)
    mean, scale = X_train.mean(0), X_train.std(0)
    # Distributions are reported in their own units, tables in standardised ones.
    offset = -np.log(scale).sum() if n else 0.0
    X_train, X_test = (X_train - mean) / scale, (X_test - mean) / scale

    start = time.perf_counter(), time.process_time()
    if method in OURS:
        est, info = fit_skebm(X_train, seed, *OURS[method])
        log_density = est.score_samples
    else:
        est, (log_density, info) = None, PEERS[method](X_train, seed)
    fitted = time.perf_counter(), time.process_time()
    value = log_density(X_test) + offset
    entry = {
        "log_density": value.mean(),
        "std_error": value.std() / np.sqrt(len(value)),
        "fit_seconds": fitted[0] - start[0],
        "fit_cpu_seconds": fitted[1] - start[1],
        "score_seconds": time.perf_counter() - fitted[0],
        "shape": X_train.shape,
        **info,
    }
    if truth is not None:
        entry["truth"] = truth.mean()
        entry["kl"] = (truth - value).mean()
        entry["kl_std_error"] = (truth - value).std() / np.sqrt(len(value))
    if hasattr(est, "base_score_samples"):
        entry["base_log_density"] = est.base_score_samples(X_test).mean() + offset
    return entry


def _nats(value):
    # A masked autoregressive flow can be astronomically wrong on one test row.
    return f"{value:.3f}" if value > -1e4 else f"{value:.0e}"


def report(entries):
    """Markdown table; each row averages the seeds that all its methods have."""
    cases = {}
    for key, entry in entries.items():
        name, n, method, seed = key.split("|")
        cases.setdefault((name, int(n)), {}).setdefault(method, {})[int(seed)] = entry
    present = [m for m in METHODS if any(m in c for c in cases.values())]
    header = ["case (n, d)", "truth", *present, "skebm - best peer", "skebm - base, worst seed"]
    lines = [header + [f"{m}, s" for m in present], ["---"] * (len(header) + len(present))]
    # Tables first, then distributions by size.
    for name, n in sorted(cases, key=lambda case: (case[1], case[0])):
        methods = cases[name, n]
        seeds = set.intersection(*(set(by_seed) for by_seed in methods.values()))
        if not seeds:
            continue

        def mean(method, field, seeds=seeds, methods=methods):
            return float(np.mean([methods[method][s][field] for s in seeds]))

        value = {m: mean(m, "log_density") for m in present if m in methods}
        any_method = next(iter(value))
        first = methods[any_method][min(seeds)]
        row = [f"{name} ({first['shape'][0]}, {first['shape'][1]})"]
        row.append(f"{mean(any_method, 'truth'):.3f}" if n else "")
        top = max(value, key=value.get)
        for m in present:
            text = _nats(value[m]) if m in value else ""
            row.append(f"**{text}**" if m == top else text)
        peers = [v for m, v in value.items() if m not in OURS]
        both = "skebm" in value and peers
        row.append(f"{value['skebm'] - max(peers):+.3f}" if both else "")
        ours = methods.get("skebm", {}).values()
        gains = [e["log_density"] - e["base_log_density"] for e in ours]
        row.append(f"{min(gains):+.3f}" if gains else "")
        row += [f"{mean(m, 'fit_seconds'):.1f}" if m in value else "" for m in present]
        lines.append(row)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="directory of .npz tables (key X), beside the bundled ones")
    parser.add_argument("--names", nargs="+", help="only these tables and distributions")
    parser.add_argument("--n", nargs="+", type=int, default=[1000, 10_000], help="training rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*PEERS, "skebm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="density.json")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print these files and stop")
    args = parser.parse_args()
    if args.report:
        print(report(_results.load(args.report)))
        return

    import torch

    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        for seed in args.seeds:
            for name, n in list_cases(args.data, args.n, args.names):
                for method in args.methods:
                    key = f"{name}|{n}|{method}|{seed}"
                    if key in _results.load([args.out]):
                        continue
                    entry = run(name, n, method, seed, args.data)
                    _results.add(args.out, key, entry)
                    kl = f"  KL {entry['kl']:.4f}" if n else ""
                    print(
                        f"{key:40s} {entry['log_density']:9.4f} +- {entry['std_error']:.4f}"
                        f"  fit {entry['fit_seconds']:.1f} s"
                        f"  score {entry['score_seconds']:.1f} s{kl}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
