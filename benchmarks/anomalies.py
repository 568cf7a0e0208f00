"""Anomaly ranking of OutlierDetector beside its peers, on tables with labelled anomalies.

    python benchmarks/anomalies.py --data DIR --out anomalies.json
    python benchmarks/anomalies.py --report anomalies.json

DIR holds .npz files with keys X and y (1 = anomaly); of each at most 4,000 rows are used, drawn
stratified. One-class: fit on a random half of the normals, test on the other half and all
anomalies. Unsupervised: fit and test on everything. Inputs are standardised by the training rows.
Every method has one setting per protocol. Entries that a file already holds are skipped.
"""

import argparse
import time
import warnings
from pathlib import Path

import _results
import numpy as np
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KernelDensity, LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from threadpoolctl import threadpool_limits

PROTOCOLS = ("one-class", "unsupervised")
MAX_ROWS = 4_000
LOST = 0.05
"""A table is lost where AUROC is lower by so much."""

N_BOOTSTRAP = 10_000


# Each method takes training rows, test rows and a seed, and returns scores, high for anomalies.
# X_test is None when the training rows are to be scored: neighbours then leave out the row itself.
def skebm(X, X_test, seed):
    from skebm import OutlierDetector

    training = "contaminated" if X_test is None else "clean"
    detector = OutlierDetector(training=training, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant columns, and of log Z, which ranks no rows
        detector.fit(X)
        scores = detector.out_of_fold_scores_ if X_test is None else detector.score_samples(X_test)
    return -scores


def knn(X, X_test, seed):
    return NearestNeighbors(n_neighbors=5).fit(X).kneighbors(X_test)[0][:, -1]


def dte_np(X, X_test, seed):
    """Non-parametric diffusion time (Livernoche et al. 2024): mean distance of 5 neighbours."""
    return NearestNeighbors(n_neighbors=5).fit(X).kneighbors(X_test)[0].mean(1)


def lof(X, X_test, seed):
    model = LocalOutlierFactor(novelty=True).fit(X)
    return -(model.negative_outlier_factor_ if X_test is None else model.score_samples(X_test))


def _of_sklearn(build):
    def score(X, X_test, seed):
        return -build(seed).fit(X).score_samples(X if X_test is None else X_test)

    return score


def _of_pyod(module, name):
    def score(X, X_test, seed):
        from importlib import import_module

        model = getattr(import_module(f"pyod.models.{module}"), name)().fit(X)
        return model.decision_scores_ if X_test is None else model.decision_function(X_test)

    return score


METHODS = {
    "skebm": skebm,
    "IForest": _of_sklearn(lambda seed: IsolationForest(random_state=seed)),
    "LOF": lof,
    "KNN": knn,
    "DTE-NP": dte_np,
    "OCSVM": _of_sklearn(lambda seed: OneClassSVM()),
    "ECOD": _of_pyod("ecod", "ECOD"),
    "COPOD": _of_pyod("copod", "COPOD"),
    "PCA": _of_pyod("pca", "PCA"),
    "GMM(5)": _of_sklearn(lambda seed: GaussianMixture(5, random_state=seed)),
    "KDE": _of_sklearn(lambda seed: KernelDensity(bandwidth="scott")),
}


def load_case(path, protocol):
    """Training rows, test rows (None: the training rows) and the labels of the scored rows."""
    table = np.load(path)
    X, y = table["X"].astype(float), table["y"].astype(int).ravel()
    if len(X) > MAX_ROWS:
        X, _, y, _ = train_test_split(X, y, train_size=MAX_ROWS, stratify=y, random_state=0)
    if protocol == "unsupervised":
        return StandardScaler().fit_transform(X), None, y
    X_train, X_rest = train_test_split(X[y == 0], test_size=0.5, random_state=0)
    X_test = np.vstack([X_rest, X[y == 1]])
    labels = np.r_[np.zeros(len(X_rest), int), np.ones((y == 1).sum(), int)]
    scaler = StandardScaler().fit(X_train)
    return scaler.transform(X_train), scaler.transform(X_test), labels


def run(path, protocol, method, seed):
    X_train, X_test, y = load_case(path, protocol)
    start = time.perf_counter()
    score = METHODS[method](X_train, X_test, seed)
    return {
        "auroc": roc_auc_score(y, score),
        "average_precision": average_precision_score(y, score),
        "seconds": time.perf_counter() - start,
        "shape": X_train.shape,
    }


def report(entries):
    """Markdown: AUROC by protocol and table (mean over seeds), then means of AUROC and AP."""
    values = {}
    for key, entry in entries.items():
        table, protocol, method, _ = key.split("|")
        values.setdefault((protocol, table), {}).setdefault(method, []).append(entry)
    done = {key.split("|")[2] for key in entries}
    present = [m for m in METHODS if m in done]
    lines = []
    for protocol in PROTOCOLS:
        # Means are only comparable over tables that every method has finished.
        tables = sorted(t for p, t in values if p == protocol)
        whole = [t for t in tables if len(values[protocol, t]) == len(present)]
        lines += [[protocol, *present], ["---"] * (len(present) + 1)]

        def mean(table, method, field, protocol=protocol):
            runs = values[protocol, table].get(method, [])
            return np.mean([r[field] for r in runs]) if runs else np.nan

        rows = {t: [mean(t, m, "auroc") for m in present] for t in tables}
        for field, label in (("auroc", "AUROC"), ("average_precision", "AP")):
            rows[f"mean {label} of {len(whole)} tables"] = [
                np.mean([mean(t, m, field) for t in whole]) if whole else np.nan for m in present
            ]
        for label, row in rows.items():
            top = np.nanmax(row) if not np.isnan(row).all() else np.nan
            text = ["" if np.isnan(v) else f"{v:.3f}" for v in row]
            lines.append(
                [label, *(f"**{s}**" if v == top else s for v, s in zip(row, text, strict=True))]
            )
        lines += [[], *_differences(present, np.array([rows[t] for t in whole])), []]
    return "\n".join("| " + " | ".join(line) + " |" if line else "" for line in lines)


def _differences(present, auroc):
    """Lines on what the first method gains over each other one, table by table."""
    lines = [["skebm minus", "mean AUROC", "95 % of bootstrapped means", f"lost by over {LOST}"]]
    lines.append(["---"] * 4)
    draws = np.random.default_rng(0).integers(len(auroc), size=(N_BOOTSTRAP, len(auroc)))
    for j, name in enumerate(present[1:], start=1):
        gain = auroc[:, 0] - auroc[:, j]
        low, high = np.quantile(gain[draws].mean(axis=1), [0.025, 0.975])
        n_lost = f"{(gain < -LOST).sum()} of {len(gain)}"
        lines.append([name, f"{gain.mean():+.3f}", f"{low:+.3f} to {high:+.3f}", n_lost])
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="directory of .npz tables (keys X and y)")
    parser.add_argument("--names", nargs="+", help="only these tables")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="anomalies.json")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print these files and stop")
    args = parser.parse_args()
    if args.report:
        print(report(_results.load(args.report)))
        return
    if args.data is None:
        parser.error("--data is needed: a directory of .npz tables with keys X and y")

    import torch

    torch.set_num_threads(args.threads)
    paths = sorted(Path(args.data).glob("*.npz"), key=lambda path: path.stat().st_size)
    with threadpool_limits(args.threads):
        for seed in args.seeds:
            for path in paths:
                if args.names is not None and path.stem not in args.names:
                    continue
                for protocol in args.protocols:
                    for method in args.methods:
                        key = f"{path.stem}|{protocol}|{method}|{seed}"
                        if key in _results.load([args.out]):
                            continue
                        entry = run(path, protocol, method, seed)
                        _results.add(args.out, key, entry)
                        print(
                            f"{key:50s} AUROC {entry['auroc']:.3f}"
                            f"  AP {entry['average_precision']:.3f}  {entry['seconds']:.1f} s",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
