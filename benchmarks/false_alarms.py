"""What OutlierDetector promises of new rows, beside what happens, on known distributions.

    python benchmarks/false_alarms.py --out false_alarms.json
    python benchmarks/false_alarms.py --report false_alarms.json

In every repetition a detector is fitted to n rows of a distribution of `skebm.datasets`, out of
fold or with rows set aside (``calibration_fraction=0.3``), and meets 2,000 new rows of it:

- "flagged": the share that `predict` calls outliers, after ``set_threshold(false_alarm_rate=...)``;
- "p-values": the share whose p-value is at most the rate;
- "of training rows": the share that `predict` calls outliers where the threshold leaves 5 % of the
  out-of-fold scores of training rows below, ``set_threshold(contamination=0.05)``.

Then it meets 200 rows of which 20 are planted, by normal noise of 3 standard deviations on every
column, and makes ``discoveries(fdr=0.1)``. "false" is the mean share of unplanted rows among them;
"found" is the number of planted rows among them over that of the true density, whose p-values come
from 100,000 draws. Means over repetitions, with standard errors. Entries that a file already holds
are skipped.
"""

import argparse
import time
import warnings

import _results
import numpy as np
from scipy.stats import false_discovery_control
from threadpoolctl import threadpool_limits

from skebm.datasets import DISTRIBUTIONS

CASES = ("banana", "multivariate_t", "gamma_copula", "gaussian_mixture", "sheared_gaussian")
SETTINGS = {"out of fold": {}, "set aside": {"calibration_fraction": 0.3}}
RATES = (0.01, 0.05, 0.1)
N_NEW, N_TOLD, N_PLANTED, NOISE, FDR = 2000, 200, 20, 3.0, 0.1
N_TRUTH = 100_000


def truth(distribution):
    """Increasing log-densities of draws, and the standard deviations of the columns."""
    draws = distribution.sample(N_TRUTH, random_state=12345)
    return np.sort(distribution.log_density(draws)), draws.std(axis=0)


def repetition(distribution, known, n, setting, seed):
    from skebm import OutlierDetector

    levels, scale = known
    generator = np.random.default_rng(seed)
    seeds = generator.integers(2**31, size=3)
    start = time.process_time()
    X = distribution.sample(n, random_state=int(seeds[0]))
    detector = OutlierDetector(**SETTINGS[setting], random_state=seed).fit(X)
    seconds = time.process_time() - start
    new = distribution.sample(N_NEW, random_state=int(seeds[1]))
    p_values, scores = detector.p_values(new), detector.score_samples(new)
    entry = {"seconds": seconds, "p_values": [np.mean(p_values <= rate) for rate in RATES]}
    # what `predict` does, with rows scored once
    entry["in_sample"] = np.mean(scores < detector.set_threshold(contamination=0.05).offset_)
    entry["flagged"] = []
    for rate in RATES:
        try:
            offset = detector.set_threshold(false_alarm_rate=rate).offset_
        except ValueError:  # too few rows for such a promise
            offset = np.nan
        entry["flagged"].append(np.mean(scores < offset) if np.isfinite(offset) else np.nan)
    told = distribution.sample(N_TOLD, random_state=int(seeds[2]))
    told[:N_PLANTED] += NOISE * scale * generator.normal(size=(N_PLANTED, told.shape[1]))
    found = detector.discoveries(told, fdr=FDR)
    below = np.searchsorted(levels, distribution.log_density(told), side="right")
    best = false_discovery_control((1 + below) / (1 + N_TRUTH)) <= FDR
    for name, rows in (("ours", found), ("best", best)):
        entry[f"{name}_false"] = rows[N_PLANTED:].sum() / max(rows.sum(), 1)
        entry[f"{name}_found"] = int(rows[:N_PLANTED].sum())
    return entry


def report(entries):
    """Markdown: one line per distribution, number of rows and setting."""
    groups = {}
    for key, entry in entries.items():
        groups.setdefault(tuple(key.split("|")[:3]), []).append(entry)
    head = ["distribution", "n", "compared with rows", "repetitions"]
    head += [f"flagged at {rate}" for rate in RATES] + [f"p-values at {rate}" for rate in RATES]
    head += ["of training rows, 0.05", f"false, {FDR}", "false, truth", "found", "CPU s"]
    lines = [head, ["---"] * len(head)]

    def mean(values):
        values = np.array(values, dtype=float)
        return f"{values.mean():.3f} ± {values.std() / np.sqrt(len(values)):.3f}"

    for (case, n, setting), runs in sorted(groups.items(), key=lambda g: (g[0][0], int(g[0][1]))):
        line = [case, n, setting, str(len(runs))]
        for field in ("flagged", "p_values"):
            line += [mean([r[field][i] for r in runs]) for i in range(len(RATES))]
        line += [mean([r[field] for r in runs]) for field in ("in_sample", "ours_false")]
        line.append(mean([r["best_false"] for r in runs]))
        share = sum(r["ours_found"] for r in runs) / sum(r["best_found"] for r in runs)
        line += [f"{share:.2f}", f"{np.mean([r['seconds'] for r in runs]):.1f}"]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--names", nargs="+", choices=DISTRIBUTIONS, default=CASES)
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 500, 2000])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="false_alarms.json")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print these files and stop")
    args = parser.parse_args()
    if args.report:
        print(report(_results.load(args.report)))
        return

    import torch

    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", UserWarning)  # of discoveries that too few rows do not allow
    known = {name: truth(DISTRIBUTIONS[name]) for name in args.names}
    with threadpool_limits(args.threads):
        for seed in range(args.repetitions):
            for name in args.names:
                for n in args.rows:
                    for setting in args.settings:
                        key = f"{name}|{n}|{setting}|{seed}"
                        if key not in _results.load([args.out]):
                            run = repetition(DISTRIBUTIONS[name], known[name], n, setting, seed)
                            _results.add(args.out, key, run)
                            print(f"{key:44s} {run['flagged']}  {run['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
