"""Held-out log-density of latent-variable models beside densities without latent variables.

    python benchmarks/latent.py

Digits: 8 x 8 grey levels from 0 to 16; uniform noise fills the steps, and the sum is divided by 17,
so that a column lies in [0, 1]. Breast cancer: columns standardised by the training part. A quarter
of the rows is held out by ``train_test_split(X, test_size=0.25, random_state=seed)``. Printed are
the mean log-density of these rows in nats, with the standard error of that mean over rows, and bits
per column, -log2 p(x) / d: for digits in the units of grey levels, where it is an upper bound on
the bits that a pixel's grey level costs; lower is better.

PCA (probabilistic) and factor analysis: the number of components with the best log-density on a
tenth of the training rows; the Gaussian mixture likewise, see ``_peers.py``. Then a refit on all of
them. Of ImplicitVAE the standard error of log p(x) from its draws is printed too, as the mean over
rows: the log is low by half its square.
"""

import argparse
import math
import time
import warnings

import numpy as np
from _peers import PEERS
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.model_selection import train_test_split

from skebm import ImplicitVAE, NCEDensity

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48)

VAES = {
    "vae gaussian": {"encoder": "gaussian"},
    "vae": {},
    "vae stein": {"encoder": "stein"},
    "vae gaussian 12": {"encoder": "gaussian", "n_components": 12},
    "vae 12": {"n_components": 12},
}
METHODS = ["pca", "factors", "mixture", "vae gaussian", "vae", "vae stein", "nce"]


def load_digits_filled(seed):
    X = load_digits().data
    X = (X + np.random.default_rng(seed).random(X.shape)) / 17
    return (*train_test_split(X, test_size=0.25, random_state=seed), math.log2(17))


def load_cancer(seed):
    train, test = train_test_split(load_breast_cancer().data, test_size=0.25, random_state=seed)
    mean, scale = train.mean(0), train.std(0)
    return (train - mean) / scale, (test - mean) / scale, 0.0


# (train, test, log2 of the units that a column's bits are told in)
TABLES = {"digits": load_digits_filled, "breast_cancer": load_cancer}


def linear(make, X, seed):
    fit, held_out = train_test_split(X, test_size=0.1, random_state=seed)
    sizes = [k for k in SIZES if k < X.shape[1]]
    best = max(sizes, key=lambda k: make(k).fit(fit).score(held_out))
    return make(best).fit(X).score_samples, {"n_components": best}


def fit(method, X, seed):
    """A function from rows to (log-densities, standard errors or None), and what was chosen."""
    if method in VAES:
        est = ImplicitVAE(random_state=seed, **VAES[method]).fit(X)
        chosen = {"n_components": est.n_components_, "epochs": est.n_iter_}
        return lambda rows: est.score_samples(rows, return_std=True), chosen
    if method == "nce":
        log_density, chosen = NCEDensity(random_state=seed).fit(X).score_samples, {}
    elif method == "mixture":
        log_density, chosen = PEERS["gmm"](X, seed)
    else:
        log_density, chosen = linear({"pca": PCA, "factors": FactorAnalysis}[method], X, seed)
    return lambda rows: (log_density(rows), None), chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument(
        "--methods", nargs="+", choices=dict.fromkeys([*METHODS, *VAES]), default=METHODS
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of peers that did not converge
    titles = f"{'nats':>9s}{'+-':>6s}{'bits':>7s}{'draws':>7s}{'fit, s':>8s}{'score, s':>9s}"
    print(f"{'table':14s}{'seed':>4s} {'method':16s}{titles}  chosen  (CPU seconds)")
    for seed in arguments.seeds:
        for table in arguments.tables:
            train, test, log2_unit = TABLES[table](seed)
            for method in arguments.methods:
                times = [time.process_time()]
                log_density, chosen = fit(method, train, seed)
                times.append(time.process_time())
                value, error = log_density(test)
                times.append(time.process_time())
                mean = value.mean()
                bits = log2_unit - mean / math.log(2) / test.shape[1]
                print(
                    f"{table:14s}{seed:4d} {method:16s}{mean:9.3f}"
                    f"{value.std() / math.sqrt(len(value)):6.2f}{bits:7.3f}"
                    + (f"{'':7s}" if error is None else f"{error.mean():7.3f}")
                    + f"{times[1] - times[0]:8.1f}{times[2] - times[1]:9.1f}  {chosen}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
