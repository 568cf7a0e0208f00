"""How long fits, scores, games, searches and imports take, beside peers and earlier versions.

    python benchmarks/speed.py --data DIR [--rows fit score ...] [--before CHECKOUT]

Every row is a contest of two: they run in turn (A B A B ...) in one process, or each time in a
fresh one, and what is printed is the median of the ratios A / B with their range, and the medians
of both in seconds. It is processor time, on one thread, except for the row `threads`, which is wall
time. DIR holds `*.npz` with key `X`. Rows that compare with an earlier version of skebm need a
checkout of that version, and import it in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

HELD_OUT = 4_000
SCORED = 5_000


def contest(name, one, other, repeats, note=""):
    """Run two functions in turn; each returns seconds, or nothing, and is timed then."""
    pairs = [(_seconds(one), _seconds(other)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    first, second = (median(times) for times in zip(*pairs, strict=True))
    print(
        f"{name:44s} ratio {median(ratios):6.3f} ({min(ratios):.3f} to {max(ratios):.3f})   "
        f"{first:.3g} s / {second:.3g} s   {note}",
        flush=True,
    )


def _seconds(function, clock=time.process_time):
    start = clock()
    own = function()
    return own if isinstance(own, float) else clock() - start


def table(data, name, n):
    """Training and held-out rows, standardised by the training part."""
    X = np.load(Path(data) / f"{name}.npz")["X"].astype(float)
    X = X[np.random.RandomState(0).permutation(len(X))]
    n = min(n, 4 * len(X) // 5)
    center, scale = X[:n].mean(0), X[:n].std(0)
    X = (X - center) / scale
    return X[:n], X[n:][:HELD_OUT]


def enlarged(X, n):
    """More rows of nearly the same distribution: a table with some noise."""
    rng = np.random.RandomState(0)
    return X[rng.randint(len(X), size=n)] + 0.1 * rng.standard_normal((n, X.shape[1]))


# ---------------------------------------------------------------- rows


def fit(args):
    """A default fit beside a neural spline flow that is trained until it stops early."""
    from _peers import PEERS

    from skebm import NCEDensity

    cases = [("magic_gamma", n) for n in (1_000, 3_000, 10_000, 100_000)] + [("wine_red", 1_000)]
    for name, n in cases:
        X, held_out = table(args.data, name, n)
        if n > len(X) + HELD_OUT:
            X = enlarged(X, n)
        found = {}

        def ours(X=X, found=found):
            found["ours"] = NCEDensity(random_state=0).fit(X)

        def flow(X=X, found=found):
            found["flow"] = PEERS["nsf"](X, 0)[0]

        contest(f"fit: NCEDensity / NSF, {name}, {len(X)}", ours, flow, args.repeats)
        print(
            f"    held out: {found['ours'].score(held_out):.3f} nats, "
            f"flow {found['flow'](held_out).mean():.3f}",
            flush=True,
        )


THREADS = """
import sys, time, warnings
import numpy as np
from skebm import NCEDensity
warnings.simplefilter("ignore")
X = np.load(sys.argv[1])
start = time.perf_counter()
NCEDensity(random_state=0).fit(X)
print(time.perf_counter() - start)
"""


def threads(args):
    """A default fit on two threads beside one, wall time, in fresh processes.

    The number of threads has to be set before torch is imported: set later, its own libraries keep
    to it where a fit asks for one.
    """
    X, _ = table(args.data, "magic_gamma", 3_000)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npy"
        np.save(path, X)

        def on(n_threads):
            output = subprocess.run(
                [sys.executable, "-c", THREADS, path],
                env=os.environ | {"OMP_NUM_THREADS": str(n_threads)},
                check=True, capture_output=True,
            ).stdout  # fmt: skip
            return float(output)

        contest("threads: two / one, 3,000 rows", partial(on, 2), partial(on, 1), args.repeats)


def search(args):
    """A grid search of 12 candidates and 5 folds with `memory` beside one without."""
    from sklearn.model_selection import GridSearchCV

    from skebm import Boosting, NCEDensity

    X = table(args.data, "magic_gamma", 2_000)[0][:, :8]
    grid = {
        "energy_model__max_leaf_nodes": [7, 15, 31],
        "recalibration": [True, False],
        "n_partition_samples": ["auto", 10_000],
    }
    scores = {}

    def run(with_memory):
        with tempfile.TemporaryDirectory() as folder:
            est = NCEDensity(
                energy_model=Boosting(), random_state=0, memory=folder if with_memory else None
            )
            found = GridSearchCV(est, grid, cv=5, refit=False).fit(X)
        scores[with_memory] = found.cv_results_["mean_test_score"]

    contest("search: memory / none", partial(run, True), partial(run, False), args.repeats)
    print(f"    same scores: {np.array_equal(scores[True], scores[False])}", flush=True)


def score(args):
    """score_samples beside IsolationForest and KernelDensity; bases apart; one row."""
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import KernelDensity

    from skebm import NCEDensity

    for n in (1_000, 3_000, 10_000):
        X, held_out = table(args.data, "magic_gamma", n)
        rows = np.tile(held_out, (2, 1))[:SCORED]
        ours = NCEDensity(random_state=0).fit(X)
        forest = IsolationForest(random_state=0).fit(X)
        ours.score_samples(rows[:10])
        for part, function in (("", ours.score_samples), ("bases of ", ours.base_score_samples)):
            contest(
                f"score: {part}NCEDensity / IsolationForest, {n}",
                partial(function, rows), partial(forest.score_samples, rows), 2 * args.repeats + 1,
            )  # fmt: skip
        one = [_seconds(partial(ours.score_samples, rows[:1])) for _ in range(50)]
        print(f"    one row: {1e3 * median(one):.2f} ms", flush=True)
    kernel = KernelDensity(bandwidth=0.3).fit(X)
    contest(
        "score: NCEDensity / KernelDensity, 10,000",
        partial(ours.score_samples, rows), partial(kernel.score_samples, rows), args.repeats,
    )  # fmt: skip


def methods(args):
    """Default fits of the other methods beside NCEDensity."""
    import skebm

    X, held_out = table(args.data, "magic_gamma", args.n)
    for name in ("ContrastiveDivergenceEBM", "FlowContrastiveDensity", "AdversarialEBM"):
        found = {}

        def fitted(name, found=found):
            found[name] = getattr(skebm, name)(random_state=0).fit(X)

        contest(
            f"methods: {name} / NCEDensity, {len(X)}",
            partial(fitted, name), partial(fitted, "NCEDensity"), args.repeats,
        )  # fmt: skip
        scores = ", ".join(f"{key} {est.score(held_out):.3f}" for key, est in found.items())
        print(f"    held out: {scores} nats", flush=True)


EARLIER = """
import json, sys, time, warnings
import numpy as np, torch, skebm
torch.set_num_threads(1)
warnings.simplefilter("ignore")
X, held_out = np.load(sys.argv[1]).values()
est = getattr(skebm, sys.argv[2])(random_state=0)
start = time.process_time()
est.fit(X)
fitted = time.process_time()
values, error = est.score_samples(held_out, return_std=True)
print(json.dumps([fitted - start, time.process_time() - fitted, values.mean(), error.mean()]))
"""


def earlier(args):
    """Fits and scores of all methods beside an earlier version, in fresh processes."""
    if args.before is None:
        return
    here = Path(__file__).parents[1]
    X, held_out = table(args.data, "magic_gamma", args.n)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npz"
        np.savez(path, X, held_out[:500])

        def measure(name, root):
            output = subprocess.run(
                [sys.executable, "-c", EARLIER, path, name],
                env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True,
            ).stdout  # fmt: skip
            return json.loads(output.splitlines()[-1])

        for name in args.estimators:
            pairs = [(measure(name, here), measure(name, args.before)) for _ in range(args.repeats)]
            for k, what in enumerate(("fit", "score")):
                ratios = [a[k] / b[k] for a, b in pairs]
                print(
                    f"earlier: {what} of {name}, {len(X)} rows: ratio {median(ratios):.3f} "
                    f"({min(ratios):.3f} to {max(ratios):.3f}); {pairs[-1][0][k]:.3g} s / "
                    f"{pairs[-1][1][k]:.3g} s",
                    flush=True,
                )
            now, before = pairs[-1]
            print(
                f"    held out {now[2]:.3f} +- {now[3]:.3f}, before {before[2]:.3f} +- "
                f"{before[3]:.3f} nats",
                flush=True,
            )


def imports(args):
    """``import skebm`` beside ``import torch, sklearn, skorch``, in fresh processes."""

    def load(what):
        code = f"import time; import {what}; print(time.process_time())"
        output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return float(output.stdout)

    contest(
        "imports: skebm / torch, sklearn, skorch",
        partial(load, "skebm"), partial(load, "torch, sklearn, skorch"), 7 * args.repeats,
    )  # fmt: skip


ROWS = {
    function.__name__: function
    for function in (fit, threads, score, search, methods, earlier, imports)
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n", type=int, default=10_000, help="rows of `methods` and `earlier`")
    parser.add_argument("--before", help="checkout of an earlier version, for `earlier`")
    parser.add_argument(
        "--estimators", nargs="+",
        default=["NCEDensity", "ContrastiveDivergenceEBM", "FlowContrastiveDensity",
                 "AdversarialEBM", "ImplicitVAE"],
    )  # fmt: skip
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"one thread, medians of {args.repeats} pairs, torch {torch.__version__}", flush=True)
    for name in args.rows:
        ROWS[name](args)


if __name__ == "__main__":
    main()
