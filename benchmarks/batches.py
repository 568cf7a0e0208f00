"""Memory of scoring a table on disk, in batches by numpy, dask or polars.

    python benchmarks/batches.py
    python benchmarks/batches.py --sizes 100000 1000000 --engines polars

Each case is a process of its own, on one thread. "memory" is the highest anonymous resident memory
while rows are scored, over that before, in MB; pages of the file itself, which the system may drop,
do not count. "whole" reads the table at once. It runs on Linux.
"""

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from skebm import NCEDensity

BATCH, N_FEATURES = 100_000, 10
ENGINES = ("whole", "numpy", "dask", "polars")


def write(folder, n):
    """Normal rows as .npy and, where polars is there, as .parquet, part by part."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", float, (n, N_FEATURES))
    for start in range(0, n, BATCH):
        part = rows[start : start + BATCH]
        part[:] = rng.normal(size=part.shape)
    rows.flush()
    try:
        import polars
    except ImportError:
        return
    frame = polars.DataFrame(np.asarray(rows), schema=[f"x{i}" for i in range(N_FEATURES)])
    frame.write_parquet(folder / "rows.parquet", row_group_size=BATCH)


def score(est, folder, engine, n):
    out = np.lib.format.open_memmap(folder / "scores.npy", "w+", float, (n,))
    starts = range(0, n, BATCH)
    if engine == "whole":
        out[:] = est.score_samples(np.load(folder / "rows.npy"))
    elif engine == "numpy":
        for start in starts:
            score_part(est, folder / "rows.npy", folder / "scores.npy", start)
    elif engine == "dask":
        import dask

        part = dask.delayed(score_part)
        parts = [part(est, folder / "rows.npy", folder / "scores.npy", start) for start in starts]
        dask.compute(*parts, scheduler="synchronous")
    else:
        import polars

        rows = polars.scan_parquet(folder / "rows.parquet")
        for start in starts:
            part = rows.slice(start, BATCH).collect().to_numpy()
            out[start : start + BATCH] = est.score_samples(part)
    return out


def score_part(est, path, scores_path, start):
    rows = np.load(path, mmap_mode="r")[start : start + BATCH]
    np.load(scores_path, mmap_mode="r+")[start : start + len(rows)] = est.score_samples(rows)


def resident():
    """Anonymous resident memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def case(folder, engine, n, results):
    rng = np.random.default_rng(1)
    est = NCEDensity(energy_model=None, base="gaussian", random_state=0)
    est.fit(rng.normal(size=(1000, N_FEATURES)))
    est.score_samples(rng.normal(size=(1000, N_FEATURES)))
    before, seen, done = resident(), [], threading.Event()

    def watch():
        while not done.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    mean = float(score(est, folder, engine, n).mean())
    seconds = time.process_time() - started
    done.set()
    watcher.join()
    results.put((max(seen, default=before) - before, seconds, mean))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 3_000_000])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(f"{'rows':>10} {'engine':>8} {'memory, MB':>11} {'CPU s':>7} {'mean':>9}")
    for n in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, n)
            for engine in options.engines:
                results = spawn.Queue()
                process = spawn.Process(target=case, args=(folder, engine, n, results))
                process.start()
                memory, seconds, mean = results.get()
                process.join()
                print(f"{n:>10} {engine:>8} {memory:>11.0f} {seconds:>7.1f} {mean:>9.4f}")


if __name__ == "__main__":
    main()
