"""How time and memory of `NCEDensity` grow with rows, columns and members.

    python benchmarks/curves.py                     # measure what the CSV has not, and draw
    python benchmarks/curves.py --against rows      # one panel alone
    python benchmarks/curves.py --draw              # only draw
    python benchmarks/curves.py --cost              # of not looking at all of 1,000,000 rows

Every point is a fresh process on one thread: a default fit to a memory-mapped file of rows of
Neal's funnel, then `score_samples` of 10,000 fresh rows. It takes processor time. "anon" is the
highest anonymous resident memory in the fit, in MiB, "peak" that of the process by the system
(`ru_maxrss`), which also counts the pages of the file that were read and libraries that others may
share; "before" is anonymous memory before the fit. "KL" is the mean exact log-density of the fresh
rows minus their mean score, with its standard error. A point that takes longer than `--limit`
seconds of processor time is given up, and so are those beyond it in its panel. It runs on Linux.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from batches import resident

from skebm.datasets import Funnel

ROWS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 10_000_000)
COLUMNS = (2, 5, 10, 20, 50, 100, 200)
MEMBERS = (1, 2, 4, 8)
POINTS = {
    "rows": [(n, 10, 4) for n in ROWS],
    "columns": [(2_000, d, 4) for d in COLUMNS],
    "members": [(2_000, 10, k) for k in MEMBERS],
}
FITTED_BY = {"rows": 300_000, "columns": np.inf, "members": np.inf}
"""Exponents are of the points up to these: beyond, a fit looks at 400,000 rows of the table."""

FRESH, PART = 10_000, 500_000
STATIC = Path(__file__).parents[1] / "docs" / "_static"
FIELDS = ("rows", "columns", "members", "fit_s", "score_us", "peak_mib", "anon_mib", "before_mib",
          "kl", "kl_std_error")  # fmt: skip


def write(path, n, d):
    rows = np.lib.format.open_memmap(path, "w+", float, (n, d))
    for i, start in enumerate(range(0, n, PART)):
        part = rows[start : start + PART]
        part[:] = Funnel(d).sample(len(part), random_state=i + 1)
    rows.flush()


def take(path, n_members, limit):
    """Measure one point; in a process of its own."""
    import torch

    from skebm import NCEDensity

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    X = np.load(path, mmap_mode="r")
    # what is imported late, and a first call of everything, are no part of the fit
    NCEDensity(random_state=0).fit(X[:200, :2])
    before, seen, done = resident(), [], threading.Event()

    def watch():
        while not done.wait(0.02):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    est = NCEDensity(n_members=n_members, random_state=0).fit(X)
    fit = time.process_time() - start
    done.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    distribution = Funnel(X.shape[1])
    fresh = distribution.sample(FRESH, random_state=0)
    start = time.process_time()
    scores = est.score_samples(fresh)
    score = time.process_time() - start
    lost = distribution.log_density(fresh) - scores
    point = (*X.shape, n_members, fit, 1e6 * score / FRESH, peak, max(seen), before)
    print(json.dumps([*point, lost.mean(), lost.std() / FRESH**0.5]))


def cost():
    """Fit 1,000,000 rows, and as many as a fit looks at, and compare them on fresh rows."""
    import torch

    from skebm import NCEDensity
    from skebm.estimators import _reader

    torch.set_num_threads(1)
    scores, fresh = [], Funnel(10).sample(FRESH, random_state=0)
    with tempfile.TemporaryDirectory() as folder:
        write(f"{folder}/rows.npy", 1_000_000, 10)
        X = np.load(f"{folder}/rows.npy", mmap_mode="r")
        for limit in (_reader.MAX_ROWS, len(X)):
            _reader.MAX_ROWS = limit
            start = time.process_time()
            scores.append(NCEDensity(random_state=0).fit(X).score_samples(fresh))
            print(f"looks at {limit} rows: {time.process_time() - start:.1f} s", flush=True)
    lost = scores[1] - scores[0]
    print(f"cost: {lost.mean():.5f} ({lost.std() / FRESH**0.5:.5f}) nats")


def read(path):
    if not path.exists():
        return []
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def found(points, point):
    return [p for p in points if (p["rows"], p["columns"], p["members"]) == point]


def measure(against, path, limit):
    for n, d, n_members in POINTS[against]:
        points = read(path)
        if not found(points, (n, d, n_members)):
            with tempfile.TemporaryDirectory() as folder:
                write(f"{folder}/rows.npy", n, d)
                command = [sys.executable, __file__, "--take", f"{folder}/rows.npy", str(n_members)]
                done = subprocess.run([*command, "--limit", str(limit)], stdout=subprocess.PIPE)
            if done.returncode:
                print(f"{n} x {d}, {n_members} members: given up, and what is beyond it")
                return
            values = json.loads(done.stdout)
            rounded = [float(f"{v:.4g}") if i > 2 else v for i, v in enumerate(values)]
            points.append(dict(zip(FIELDS, rounded, strict=True)))
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(
                    {k: int(v) if k in FIELDS[:3] else v for k, v in p.items()} for p in points
                )
        (p,) = found(read(path), (n, d, n_members))
        print(
            f"{n:>9} x {d:<4} {n_members} members: fit {p['fit_s']:6.1f} s, "
            f"score {p['score_us']:6.1f} us a row, peak {p['peak_mib']:6.0f} MiB, anon "
            f"{p['anon_mib']:6.0f} MiB (before {p['before_mib']:.0f}), "
            f"KL {p['kl']:.4f} ({p['kl_std_error']:.4f})",
            flush=True,
        )


def draw(points, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4.8), layout="constrained")
    curves = {
        "fit, s": lambda p: p["fit_s"],
        "score, µs a row": lambda p: p["score_us"],
        "memory of the fit, MiB": lambda p: p["anon_mib"] - p["before_mib"],
    }
    letters = {"rows": "n", "columns": "d", "members": "K"}
    for panel, (against, wanted) in zip(panels, POINTS.items(), strict=True):
        shown = [p for point in wanted for p in found(points, point)]
        if len(shown) < 2:
            continue
        x = np.array([p[against] for p in shown])
        fitted = x <= FITTED_BY[against]
        for (name, of), style in zip(curves.items(), ("o-", "s--", "^:"), strict=True):
            y = np.array([of(p) for p in shown])
            exponent = np.polyfit(np.log(x[fitted]), np.log(y[fitted]), 1)[0]
            label = f"{name}: {letters[against]}$^{{{exponent:.2f}}}$"
            panel.loglog(x, y, style, label=label)
        n, d, n_members = wanted[0]
        fixed = {
            "rows": f"{n:,} rows",
            "columns": f"{d} columns",
            "members": f"{n_members} members",
        }
        panel.set(
            xlabel=f"{against} {letters[against]}",
            title=", ".join(text for name, text in fixed.items() if name != against),
        )
        if against != "rows":
            panel.set_xticks(x, [f"{v:.0f}" for v in x])
            panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--csv", type=Path, default=STATIC / "curves.csv")
    parser.add_argument("--picture", type=Path, default=STATIC / "curves.png")
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--cost", action="store_true", help="of not looking at all rows")
    parser.add_argument("--limit", type=int, default=150, help="seconds of processor time, a point")
    parser.add_argument("--take", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.take:
        take(args.take[0], int(args.take[1]), args.limit)
        return
    if args.cost:
        cost()
        return
    for against in () if args.draw else args.against:
        measure(against, args.csv, args.limit)
    draw(read(args.csv), args.picture)


if __name__ == "__main__":
    main()
