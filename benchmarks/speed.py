"""How long fits, scores, games, searches and imports take, beside peers and earlier versions.

    python benchmarks/speed.py --data DIR [--rows fit score ...] [--before CHECKOUT]
    python benchmarks/speed.py --data DIR --record   # the contests of the site, into results

Every row is a contest of two: they run in turn (A B A B ...) in one process, or each time in a
fresh one, and what is printed is the median of the ratios A / B with their range, and the medians
of both in seconds. It is processor time, on one thread, except for the row `threads`, which is wall
time and wants an idle machine. DIR holds `*.npz` with key `X`. Rows that compare with an earlier
version of skebm need a checkout of that version, and import it in a process of its own.
"""

import argparse
import csv
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
RESULTS = Path(__file__).parent / "results" / "speed.csv"
FIELDS = ("contest", "one", "peer", "table", "rows", "seconds", "peer_seconds", "ratio",
          "ratio_low", "ratio_high", "goal", "held_out", "peer_held_out", "note", "seeds",
          "command", "commit", "machine")  # fmt: skip
GOALS = {"threads": 0.6, "search": 0.4, "imports": 1.1}
"""Ratios that are aimed at."""


def contest(one, peer, first, second, repeats, **particulars):
    """Run two functions in turn; each returns seconds, or nothing, and is timed then.

    Returns
    -------
    dict
        A row of the results, but for where it comes from.
    """
    pairs = [(_seconds(first), _seconds(second)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    seconds, peer_seconds = (median(times) for times in zip(*pairs, strict=True))
    figures = {
        "seconds": seconds, "peer_seconds": peer_seconds, "ratio": median(ratios),
        "ratio_low": min(ratios), "ratio_high": max(ratios),
    }  # fmt: skip
    figures = {name: f"{value:.3g}" for name, value in figures.items()}
    return {"one": one, "peer": peer, **figures, **particulars}


def show(name, row):
    """Print a row, pair by pair of its fields."""
    peer = {
        key: f" / {row[key]}" for key in ("peer", "peer_seconds", "peer_held_out") if key in row
    }
    text = f"{name}: {row['one']}{peer.get('peer', '')}, {row.get('rows', '')}:"
    if "ratio" in row:
        text += f" ratio {row['ratio']} ({row['ratio_low']} to {row['ratio_high']})"
    text += f"   {row['seconds']}{peer.get('peer_seconds', '')} s"
    if "held_out" in row:
        text += f"   held out {row['held_out']}{peer['peer_held_out']} nats"
    print(text, row.get("note", ""), flush=True)


def record(rows, args):
    """Put these rows into the results, in place of all that their contests had there."""
    head = subprocess.run(
        ["git", "rev-parse", "--short=9", "HEAD"], cwd=RESULTS.parent, check=True,
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    names = {row["contest"] for row in rows}
    command = f"python benchmarks/speed.py --data DIR --record --repeats {args.repeats}"
    with RESULTS.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["contest"] not in names]
    own = {"seeds": 0, "command": command, "commit": head, "machine": args.machine}
    order = list(ROWS).index
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            sorted(kept + [row | own for row in rows], key=lambda row: order(row["contest"]))
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

        row = contest("NCEDensity", "NSF", ours, flow, args.repeats, table=name, rows=len(X))
        yield row | {
            "held_out": f"{found['ours'].score(held_out):.3f}",
            "peer_held_out": f"{found['flow'](held_out).mean():.3f}",
        }


THREADS = """
import sys, time, warnings
import joblib, numpy as np
from skebm import NCEDensity
warnings.simplefilter("ignore")
X = np.load(sys.argv[1])
with joblib.parallel_config(*sys.argv[2:3], n_jobs=2 if sys.argv[2:] else None):
    NCEDensity(random_state=0).fit(X[:500])  # imports, and starts processes
    start = time.perf_counter()
    NCEDensity(random_state=0).fit(X)
    print(time.perf_counter() - start)
"""


def threads(args):
    """A default fit on two threads, or processes, beside one, wall time, in fresh processes.

    The number of threads has to be set before torch is imported: set later, its own libraries keep
    to it where a fit asks for one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npy"

        def on(n_threads, *backend):
            output = subprocess.run(
                [sys.executable, "-c", THREADS, path, *backend],
                env=os.environ | {"OMP_NUM_THREADS": str(n_threads)},
                check=True, capture_output=True,
            ).stdout  # fmt: skip
            return float(output)

        for n in (1_000, 3_000, 10_000):
            X, _ = table(args.data, "magic_gamma", n)
            np.save(path, X)
            for what, two in (
                ("two threads", partial(on, 2)), ("two processes", partial(on, 1, "loky"))
            ):  # fmt: skip
                yield contest(
                    what, "one thread", two, partial(on, 1), args.repeats,
                    table="magic_gamma", rows=len(X),
                )  # fmt: skip


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

    row = contest(
        "memory", "none", partial(run, True), partial(run, False), args.repeats,
        table="magic_gamma", rows=len(X),
    )  # fmt: skip
    same = np.array_equal(scores[True], scores[False])
    yield row | {"note": "the same scores" if same else "other scores"}


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
        where = {"table": "magic_gamma", "rows": len(X)}
        for what, function in (
            ("NCEDensity", ours.score_samples), ("its bases", ours.base_score_samples)
        ):  # fmt: skip
            yield contest(
                what, "IsolationForest", partial(function, rows),
                partial(forest.score_samples, rows), 2 * args.repeats + 1, **where,
            )  # fmt: skip
        one = [_seconds(partial(ours.score_samples, rows[:1])) for _ in range(50)]
        yield {"one": "NCEDensity, a single row", "seconds": f"{median(one):.3g}", **where}
    kernel = KernelDensity(bandwidth=0.3).fit(X)
    yield contest(
        "NCEDensity", "KernelDensity", partial(ours.score_samples, rows),
        partial(kernel.score_samples, rows), args.repeats, **where,
    )  # fmt: skip


def methods(args):
    """Default fits of the other methods beside NCEDensity."""
    import skebm

    X, held_out = table(args.data, "magic_gamma", args.n)
    for name in ("ContrastiveDivergenceEBM", "FlowContrastiveDensity", "AdversarialEBM"):
        found = {}

        def fitted(name, found=found):
            found[name] = getattr(skebm, name)(random_state=0).fit(X)

        row = contest(
            name, "NCEDensity", partial(fitted, name), partial(fitted, "NCEDensity"),
            args.repeats, table="magic_gamma", rows=len(X),
        )  # fmt: skip
        yield row | {
            "held_out": f"{found[name].score(held_out):.3f}",
            "peer_held_out": f"{found['NCEDensity'].score(held_out):.3f}",
        }


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
    here = Path(__file__).parents[1]
    X, held_out = table(args.data, "magic_gamma", args.n)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.npz"
        np.savez(path, X, held_out[:500])
        found = {}

        def measure(name, root, k):
            output = subprocess.run(
                [sys.executable, "-c", EARLIER, path, name],
                env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True,
            ).stdout  # fmt: skip
            *seconds, mean, error = json.loads(output.splitlines()[-1])
            found[root] = f"{mean:.3f} +- {error:.3f}"
            return seconds[k]

        for name in args.estimators:
            for k, what in enumerate(("fit", "score")):
                row = contest(
                    f"{what} of {name}", "before", partial(measure, name, here, k),
                    partial(measure, name, args.before, k), args.repeats,
                    table="magic_gamma", rows=len(X),
                )  # fmt: skip
                yield row | {"held_out": found[here], "peer_held_out": found[args.before]}


def imports(args):
    """``import skebm`` beside ``import torch, sklearn, skorch``, in fresh processes."""
    names = "skebm", "torch, sklearn, skorch"
    with tempfile.TemporaryDirectory() as folder:
        # compiled to a cache, as an installed package is
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = folder

        def load(what):
            code = f"import time; import {what}; print(time.process_time())"
            command = [sys.executable, "-c", code]
            return float(subprocess.run(command, check=True, capture_output=True, env=env).stdout)

        for name in names:
            load(name)
        yield contest(*names, *(partial(load, name) for name in names), 7 * args.repeats)


ROWS = {
    function.__name__: function
    for function in (fit, threads, score, search, methods, earlier, imports)
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="all, by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n", type=int, default=10_000, help="rows of `methods` and `earlier`")
    parser.add_argument("--before", help="checkout of an earlier version, for `earlier`")
    parser.add_argument("--record", action="store_true", help="into benchmarks/results/speed.csv")
    parser.add_argument("--machine", default="virtual machine, 2 cores, no GPU, one thread")
    parser.add_argument(
        "--estimators", nargs="+",
        default=["NCEDensity", "ContrastiveDivergenceEBM", "FlowContrastiveDensity",
                 "AdversarialEBM", "ImplicitVAE"],
    )  # fmt: skip
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print(f"one thread, medians of {args.repeats} pairs, torch {torch.__version__}", flush=True)
    for name in args.rows or ROWS:
        if name == "earlier" and args.before is None:
            continue
        rows = []
        for row in ROWS[name](args):
            show(name, row)
            rows.append({"contest": name, "goal": GOALS.get(name, ""), **row})
        if args.record and name != "earlier":  # that is of a checkout nobody else has
            record(rows, args)


if __name__ == "__main__":
    main()
