"""The densities that skebm is compared with, fitted as a careful user would.

Each ``fit_*`` takes standardised training rows and a seed and returns (log_density, info):
a function from rows to nats, and a dict of what was chosen.
"""

import copy
import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold, train_test_split
from sklearn.neighbors import KernelDensity


def fit_gmm(X, seed):
    """Gaussian mixture: components and covariance by held-out likelihood, refitted on all rows."""
    fit, held_out = train_test_split(X, test_size=0.1, random_state=seed)
    best, choice = -np.inf, None
    for n_components in (1, 2, 4, 8, 16, 32):
        for covariance_type in ("full", "diag"):
            if n_components > len(fit) // 2:
                continue
            setting = dict(n_components=n_components, covariance_type=covariance_type)
            value = _mixture(fit, setting, seed).score(held_out)
            if value > best:
                best, choice = value, setting
    return _mixture(X, choice, seed).score_samples, choice


def _mixture(X, setting, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(**setting, max_iter=200, random_state=seed).fit(X)


def fit_kde(X, seed, max_search=4000):
    """Gaussian kernel density, bandwidth by 5-fold cross-validation.

    Above ``max_search`` rows the bandwidth is chosen on a subsample and reduced at the usual rate
    n^(-1 / (d + 4)); the density itself always uses all rows.
    """
    rng = np.random.RandomState(seed)
    part = X[rng.permutation(len(X))[:max_search]]
    search = GridSearchCV(
        KernelDensity(),
        {"bandwidth": np.geomspace(0.02, 1.5, 13)},
        cv=KFold(5, shuffle=True, random_state=seed),
        refit=False,
    ).fit(part)
    rate = (len(part) / len(X)) ** (1 / (X.shape[1] + 4))
    bandwidth = float(search.best_params_["bandwidth"] * rate)
    return KernelDensity(bandwidth=bandwidth).fit(X).score_samples, {"bandwidth": bandwidth}


def fit_nsf(X, seed, max_seconds=240.0):
    """Neural spline flow (Durkan et al. 2019) of zuko: 3 autoregressive transforms, 8 bins."""
    import zuko

    return _fit_flow(
        lambda d: zuko.flows.NSF(d, transforms=3, hidden_features=(64, 64), bins=8),
        X,
        seed,
        max_seconds,
    )


def fit_maf(X, seed, max_seconds=240.0):
    """Masked autoregressive flow (Papamakarios et al. 2017) of zuko: 5 transforms."""
    import zuko

    return _fit_flow(
        lambda d: zuko.flows.MAF(d, transforms=5, hidden_features=(64, 64)), X, seed, max_seconds
    )


def _fit_flow(build, X, seed, max_seconds, max_epochs=300, patience=20):
    """AdamW 1e-3, batches of 256, 10 % validation, best validation state kept.

    ``max_seconds`` counts processor time, so that a busy machine does not shorten training.
    """
    import torch

    torch.manual_seed(seed)
    fit, held_out = train_test_split(X, test_size=0.1, random_state=seed)
    fit, held_out = (torch.as_tensor(a, dtype=torch.float32) for a in (fit, held_out))
    flow = build(X.shape[1])
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3)
    best, best_state, best_epoch = -np.inf, copy.deepcopy(flow.state_dict()), -1
    start, out_of_time = time.process_time(), False
    for epoch in range(max_epochs):
        flow.train()
        for rows in torch.randperm(len(fit)).split(256):
            optimizer.zero_grad()
            (-flow().log_prob(fit[rows]).mean()).backward()
            optimizer.step()
        flow.eval()
        with torch.no_grad():
            value = flow().log_prob(held_out).mean().item()
        if value > best:
            best, best_state, best_epoch = value, copy.deepcopy(flow.state_dict()), epoch
        out_of_time = time.process_time() - start > max_seconds
        if out_of_time or epoch - best_epoch >= patience or not np.isfinite(value):
            break
    flow.load_state_dict(best_state)

    def log_density(X):
        with torch.no_grad():
            parts = torch.as_tensor(X, dtype=torch.float32).split(1024)
            return torch.cat([flow().log_prob(x) for x in parts]).double().numpy()

    return log_density, {"epochs": epoch + 1, "out_of_time": out_of_time}


PEERS = {"gmm": fit_gmm, "kde": fit_kde, "nsf": fit_nsf, "maf": fit_maf}
