"""
Quick start on a real table
===========================

Fit a density to a real table and use it: compare, find odd rows, draw new ones, draw a picture.

Run from anywhere::

    python examples/quickstart.py

The table is the Wisconsin breast cancer data bundled with scikit-learn: for 569 biopsies, mean,
standard error and worst value of ten measurements of the cell nuclei (radius, texture, ...). The
diagnosis is never shown to a model; it is only printed and coloured in afterwards.

Set the environment variable ``SKEBM_SMOKE=1`` for a run that checks the code in seconds and says
little about the data.
"""

import os
import time

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity
from sklearn.preprocessing import StandardScaler

from skebm import Boosting, NCEDensity

SMOKE = os.environ.get("SKEBM_SMOKE") == "1"
PICTURE = "quickstart.png"


def main():
    table = load_breast_cancer()
    X, names = table.data, list(table.feature_names)
    diagnosis = table.target_names[table.target]
    rows_train, rows_test = train_test_split(
        np.arange(len(X)), test_size=0.2, random_state=0
    )
    X_train, X_test = X[rows_train], X[rows_test]

    small = (
        {"n_members": 2, "energy_model": Boosting(max_iter=3)} if SMOKE else {}
    )
    start = time.perf_counter()
    est = NCEDensity(random_state=0, verbose=1, **small).fit(X_train)
    seconds = time.perf_counter() - start

    print(
        f"\nHeld-out log-density in nats per row ({len(X_test)} rows no model has seen)\n"
    )
    scores, errors = est.score_samples(X_test, return_std=True)
    report("NCEDensity", scores.mean(), seconds)
    print(
        f"    of which its base alone    {est.base_score_samples(X_test).mean():8.3f}"
    )
    print(f"    standard error from log Z  {errors.mean():8.3f}")
    for name, peer in PEERS.items():
        start = time.perf_counter()
        try:
            value = peer(X_train, X_test)
        except ImportError as error:
            print(f"  {name:<28} not shown: {error}")
        else:
            report(name, value, time.perf_counter() - start)

    oddest = np.argsort(scores)[:5]
    print("\nThe five oddest of these rows\n")
    print(f"{'row':>4} {'log p':>8} {'diagnosis':>10}" + header())
    for i in oddest:
        row = rows_test[i]
        print(
            f"{row:>4} {scores[i]:>8.1f} {diagnosis[row]:>10}"
            + cells(X[row], names)
        )

    print("\nFour new rows drawn from the model\n")
    print(f"{'':>24}" + header())
    for x in est.sample(4, random_state=0):
        print(f"{'':>24}" + cells(x, names))

    picture(est, X_test, diagnosis[rows_test], names)
    print(f"\nPicture written to {os.path.abspath(PICTURE)}")


def report(name, value, seconds):
    print(f"  {name:<28} {value:8.3f}   ({seconds:5.1f} s)")


SHOWN = ["mean radius", "mean texture", "mean smoothness", "worst concavity"]


def header():
    return "".join(f"{name:>16}" for name in SHOWN)


def cells(x, names):
    return "".join(f"{x[names.index(name)]:>16.4g}" for name in SHOWN)


def standardised(X_train, X_test):
    """Both tables in standard units, and what this adds to a log-density per row."""
    scaler = StandardScaler().fit(X_train)
    return (
        scaler.transform(X_train),
        scaler.transform(X_test),
        -np.log(scaler.scale_).sum(),
    )


def gaussian_mixture(X_train, X_test):
    """Number of components and shape of the covariances by held-out likelihood."""
    X_train, X_test, jacobian = standardised(X_train, X_test)
    grid = {
        "n_components": [1, 2] if SMOKE else [1, 2, 3, 4, 6, 8, 12, 16],
        "covariance_type": ["full", "diag"],
    }
    search = GridSearchCV(
        GaussianMixture(reg_covar=1e-5, random_state=0), grid, cv=5
    )
    return search.fit(X_train).score(X_test) + jacobian


def kernel_density(X_train, X_test):
    """Bandwidth by held-out likelihood; its ``score`` is a sum over rows."""
    X_train, X_test, jacobian = standardised(X_train, X_test)
    grid = {"bandwidth": np.geomspace(0.05, 2.0, 5 if SMOKE else 20)}
    search = GridSearchCV(KernelDensity(), grid, cv=5)
    return search.fit(X_train).score(X_test) / len(X_test) + jacobian


def spline_flow(X_train, X_test):
    """Neural spline flow as a careful user would train it: AdamW, early stopping on 10 %."""
    import torch

    try:
        import zuko
    except ImportError as error:
        raise ImportError(
            "zuko is not installed (pip install 'skebm[flows]')"
        ) from error

    X_train, X_test, jacobian = standardised(X_train, X_test)
    X_train, X_test = (
        torch.as_tensor(X, dtype=torch.float32) for X in (X_train, X_test)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(len(X_train))
        n_valid = len(order) // 10
        X_valid, X_fit = X_train[order[:n_valid]], X_train[order[n_valid:]]
        flow = zuko.flows.NSF(
            X_fit.shape[1], transforms=3, hidden_features=(64, 64)
        )
        optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
        best, best_state, waited = -np.inf, None, 0
        for _ in range(2 if SMOKE else 1000):
            for batch in X_fit[torch.randperm(len(X_fit))].split(256):
                loss = -flow().log_prob(batch).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                held_out = flow().log_prob(X_valid).mean().item()
            if held_out > best:
                best, waited = held_out, 0
                best_state = {
                    key: value.clone() for key, value in flow.state_dict().items()
                }
            else:
                waited += 1
            if waited == 20:
                break
        flow.load_state_dict(best_state)
        with torch.no_grad():
            return flow().log_prob(X_test).mean().item() + jacobian


PEERS = {
    "neural spline flow (zuko)": spline_flow,
    "Gaussian mixture": gaussian_mixture,
    "kernel density": kernel_density,
}


def picture(est, X_test, diagnosis_test, names):
    """Samples against data, anomaly scores, training curve."""
    import matplotlib

    matplotlib.use("Agg")  # a file is wanted, no window
    import matplotlib.pyplot as plt

    from skebm.plotting import (
        AnomalyScoreDisplay,
        SamplesDisplay,
        TrainingCurveDisplay,
    )

    figure = plt.figure(figsize=(13.0, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1.0])
    SamplesDisplay.from_estimator(
        est,
        X_test,
        columns=SHOWN,
        feature_names=names,
        random_state=0,
        ax=figure.add_subplot(grid[:, 0]),
    )
    scores = AnomalyScoreDisplay.from_estimator(
        est, X_test, diagnosis_test, ax=figure.add_subplot(grid[0, 1])
    )
    scores.ax_.set_title("Anomaly scores of the held-out rows", loc="left")
    curve = TrainingCurveDisplay.from_estimator(
        est, ax=figure.add_subplot(grid[1, 1])
    )
    curve.ax_.set_title("Training", loc="left")
    figure.suptitle("NCEDensity on the breast cancer table")
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
