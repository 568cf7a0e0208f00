"""Games with a generator: what every stage gives, beside flows and NCE, and whether log Z is right.

    python benchmarks/games.py --data DIR --seeds 0
    python benchmarks/games.py --methods adversarial --names rings --seeds 0 1 2 3 4 5 6 7 8 9

Cases, splits and units are those of ``density.py``. Held-out log-densities in nats per row (larger
is better), minus the exact one of the same rows where it is known: then they are minus the
divergence.

- *contrastive*: ``FlowContrastiveDensity`` at its defaults. ``flow``: as maximum likelihood left
  it; ``after``: after the game; ``energy``: the estimator. ``longer``: a flow by maximum likelihood
  alone, of the same kind and with the same early stopping, with as many times more steps and
  patience as make its processor time that of the estimator. ``nce``: ``NCEDensity(base="flow")``.
  ``energy - best``: of the last two and ``flow``, with the standard error of the paired difference.
  Seconds are of the processor, of the estimator / the longer flow / NCE.
- *adversarial*, *implicit*: ``AdversarialEBM`` with either generator; ``flow``: its base.

In two columns log Z is compared with quadrature, on a grid of 600 x 600 points, members one by one
(largest difference): ``measured``, and ``learned`` (before recalibration). ``bound``: measured
log Z minus the bound, the smallest and the largest of the members, and the largest standard error.
"""

import argparse
import math
import time
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from density import list_cases, load_case
from threadpoolctl import threadpool_limits

from skebm import AdversarialEBM, FlowContrastiveDensity, NCEDensity
from skebm.bases import _flow_training

N_GRID, MARGIN = 600, 1.5


@torch.no_grad()
def log_integrals(est, X, recalibrated=True):
    """log Z of every member by the trapezoidal rule, relative to that of its base."""
    model = est.model_
    if not recalibrated:
        model = type(model)(model.bases, model.proposals, model.features, model.energy)
    x = est._columns.standardize(X)
    axes = [np.linspace(c.min() - MARGIN, c.max() + MARGIN, N_GRID) for c in x.T]
    points = torch.as_tensor(np.stack(np.meshgrid(*axes), -1).reshape(-1, 2))
    base, tilted = [], []
    for rows in points.split(8192):
        log_base = torch.stack([q.log_prob(rows) for q in model.bases])
        base.append(log_base)
        tilted.append(log_base + model.tilt(rows.expand(len(log_base), -1, -1)))
    return (torch.cat(tilted, 1).logsumexp(1) - torch.cat(base, 1).logsumexp(1)).numpy()


def longer_flow(X, seed, seconds):
    """Flow by maximum likelihood alone that takes about so many processor seconds."""
    factor, est = 1.0, None
    for _ in range(2):  # a first fit tells what a step costs
        budget = _flow_training.FLOW_BUDGET
        options = {
            "FLOW_BUDGET": replace(
                budget,
                steps=math.ceil(factor * budget.steps),
                patience_steps=math.ceil(factor * budget.patience_steps),
            ),
            "FLOW_PATIENCE": math.ceil(factor * _flow_training.FLOW_PATIENCE),
        }
        start = time.process_time()
        with mock.patch.multiple(_flow_training, **options):
            est = FlowContrastiveDensity(energy_model=None, random_state=seed).fit(X)
        factor *= seconds / (time.process_time() - start)
    return est, time.process_time() - start


def timed(estimator, X):
    start = time.process_time()
    return estimator.fit(X), time.process_time() - start


def contrastive(X, X_test, seed, level):
    est, seconds = timed(FlowContrastiveDensity(random_state=seed), X)
    scores = {
        "flow": est.base_score_samples(X_test),
        "after": est.flow_.score_samples(X_test),
        "energy": est.score_samples(X_test),
    }
    flow, flow_seconds = longer_flow(X, seed, seconds)
    scores["longer"] = flow.score_samples(X_test)
    nce, nce_seconds = timed(NCEDensity(base="flow", random_state=seed), X)
    scores["nce"] = nce.score_samples(X_test)
    text = "  ".join(f"{name} {value.mean() - level:8.3f}" for name, value in scores.items())
    best = max(("flow", "longer", "nce"), key=lambda name: scores[name].mean())
    margins = scores["energy"] - scores[best]
    error = margins.std() / math.sqrt(len(margins))
    text += f"  energy - best {margins.mean():+.3f} (+- {error:.3f})"
    text += f"  s {seconds:.0f} / {flow_seconds:.0f} / {nce_seconds:.0f}"
    if X.shape[1] == 2 and est.n_iter_:
        measured = np.abs(est.log_partition_ - log_integrals(est, X)).max()
        learned = np.abs(est.log_partition_learned_ - log_integrals(est, X, False)).max()
        text += f"  |log Z - quadrature|: measured {measured:.4f}  learned {learned:.4f}"
    return text + "\n    stages " + "  ".join(f"{k} {v:.3f}" for k, v in est.stages_.items())


def adversarial(X, X_test, seed, level, generator="flow"):
    est, seconds = timed(AdversarialEBM(generator=generator, random_state=seed), X)
    gap = est.log_partition_ - est.log_partition_bound_
    flow, energy = est.base_score_samples(X_test).mean(), est.score_samples(X_test).mean()
    text = f"flow {flow - level:8.3f}  energy {energy - level:8.3f}  s {seconds:.0f}"
    text += f"  bound {gap.min():.4f} to {gap.max():.4f}"
    text += f" (+- {est.log_partition_bound_std_error_.max():.4f})"
    if X.shape[1] == 2 and est.n_iter_:
        measured = np.abs(est.log_partition_ - log_integrals(est, X)).max()
        text += f"  |log Z - quadrature| {measured:.4f}"
    return text


def implicit(X, X_test, seed, level):
    return adversarial(X, X_test, seed, level, "implicit")


METHODS = {f.__name__: f for f in (contrastive, adversarial, implicit)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="directory of .npz tables (key X), beside the bundled ones")
    parser.add_argument("--names", nargs="+", help="only these tables and distributions")
    parser.add_argument(
        "--n", nargs="*", type=int, default=[1000], help="training rows of distributions"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with threadpool_limits(1):
        for method in args.methods:
            for seed in args.seeds:
                for name, n in list_cases(args.data, args.n, args.names):
                    X, X_test, truth = load_case(name, n, seed, args.data)
                    if not n:
                        mean, scale = X.mean(0), X.std(0)
                        X, X_test = (X - mean) / scale, (X_test - mean) / scale
                    level = truth.mean() if n else 0.0
                    text = METHODS[method](X, X_test, seed, level)
                    print(f"{method:12s} {name:16s} {n:6d} seed {seed}  {text}", flush=True)


if __name__ == "__main__":
    main()
