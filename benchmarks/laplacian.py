"""What exact score matching costs with the forward Laplacian, against one backward pass per column.

    python benchmarks/laplacian.py
    python benchmarks/laplacian.py --plot laplacian.png
    python benchmarks/laplacian.py --sliced --energy

One step is the loss 1/2 |grad f|^2 + lap f, averaged over 256 rows, and its gradient in the
parameters, for a perceptron with three hidden layers of 128 SiLU units on d columns. One thread,
process CPU time, the contestants in turn (A B C A B C ...), medians.

- *ours*: ``skebm.derivatives.derivatives``.
- *loop*: a second backward pass per column, written by hand.
- *ebmkit*: ``ebm.ExactScoreMatching`` (the same loop inside); left out if it is not installed.
- *memory*: peak resident memory of a fresh process that takes three steps, less that of one that
  evaluates the network and its gradient.
- *sliced*: one random direction, 1/2 |grad f|^2 + v^T hess f v, against double backward.
- *energy*: the step of ``MLPEnergy`` with periodic embedding and four members, against the plain
  evaluation with its gradient in the parameters.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from skebm.derivatives import derivatives
from skebm.energies import MLPEnergy, PeriodicEmbedding

DIMENSIONS, N_ROWS, WIDTH = (2, 10, 43, 100, 784), 256, 128


def make_problem(d):
    torch.manual_seed(0)
    layers, width = [], d
    for _ in range(3):
        layers += [nn.Linear(width, WIDTH), nn.SiLU()]
        width = WIDTH
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1)), torch.randn(N_ROWS, d)


def ours(energy, z):
    _, gradient, laplacian = derivatives(energy, z)
    (0.5 * gradient.square().sum(-1) + laplacian).mean().backward()


def loop(energy, z):
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(z).sum(), z, create_graph=True)
    loss = 0.5 * gradient.square().sum(-1)
    for j in range(z.shape[1]):
        (row,) = torch.autograd.grad(gradient[:, j].sum(), z, create_graph=True)
        loss = loss + row[:, j]
    loss.mean().backward()


def ebmkit(energy, z):
    from ebm import ExactScoreMatching

    # its energy is minus our f
    ExactScoreMatching()(lambda z: -energy(z).squeeze(-1), z).loss.backward()


def first_order(energy, z):
    energy(z).mean().backward()


def ours_sliced(energy, z):
    _, gradient, curvature = derivatives(energy, z, torch.randn(1, *z.shape))
    (0.5 * gradient.square().sum(-1) + curvature).mean().backward()


def double_backward(energy, z):
    z, v = z.clone().requires_grad_(), torch.randn_like(z)
    (gradient,) = torch.autograd.grad(energy(z).sum(), z, create_graph=True)
    (product,) = torch.autograd.grad((gradient * v).sum(), z, create_graph=True)
    (0.5 * gradient.square().sum(-1) + (product * v).sum(-1)).mean().backward()


STEPS = {f.__name__: f for f in (ours, loop, ebmkit, first_order, ours_sliced, double_backward)}


def milliseconds(contestants, energy, z, n_repeats):
    """Median CPU time of each, and the median ratio of each to the first."""
    times = {name: [] for name in contestants}
    for _ in range(n_repeats + 1):
        for name in contestants:
            for parameter in energy.parameters():
                parameter.grad = None
            start = time.process_time()
            STEPS[name](energy, z)
            times[name].append(1e3 * (time.process_time() - start))
    times = {name: measured[1:] for name, measured in times.items()}  # the first warms up
    first = times[contestants[0]]
    ratios = {
        name: median(a / b for a, b in zip(first, measured, strict=True))
        for name, measured in times.items()
    }
    return {name: median(measured) for name, measured in times.items()}, ratios


def peak_mebibytes(name, d):
    """Peak resident memory of a process that takes three steps."""
    command = [sys.executable, __file__, "--take", name, str(d)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def take(name, d):
    energy, z = make_problem(d)
    for _ in range(3):
        STEPS[name](energy, z)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def table(contestants, n_repeats, dimensions):
    print(f"{'d':>5s}" + "".join(f"{name + ', ms':>14s}" for name in contestants), end="")
    print("".join(f"{'ours / ' + name:>16s}" for name in contestants[1:]), end="")
    print("".join(f"{name + ', MiB':>14s}" for name in contestants))
    results = {}
    for d in dimensions:
        energy, z = make_problem(d)
        few = 3 if d > 200 else n_repeats
        results[d], ratios = milliseconds(contestants, energy, z, few)
        baseline = peak_mebibytes("first_order", d)
        memory = [peak_mebibytes(name, d) - baseline for name in contestants]
        print(f"{d:5d}" + "".join(f"{results[d][name]:14.2f}" for name in contestants), end="")
        print("".join(f"{ratios[name]:16.3f}" for name in contestants[1:]), end="")
        print("".join(f"{m:14.0f}" for m in memory), flush=True)
    return results


def sliced(n_repeats, dimensions):
    for d in dimensions:
        contestants = ["ours_sliced", "double_backward"]
        times, ratios = milliseconds(contestants, *make_problem(d), 5 * n_repeats)
        ms, ratio = " / ".join(f"{t:.2f}" for t in times.values()), ratios["double_backward"]
        print(f"sliced, d = {d:3d}: ours / double backward {ms} ms, {ratio:.3f}")


def of_energy(n_repeats, d, n_members=4):
    rng = torch.Generator().manual_seed(0)
    embedding = PeriodicEmbedding(d, n_members, rng=rng)
    energy = MLPEnergy(d, n_members, embedding=embedding, rng=rng)
    with torch.no_grad():
        energy.output += 0.1 * torch.randn(energy.output.shape, generator=rng)
    z = torch.randn(n_members, N_ROWS, d, generator=rng)
    times, ratios = milliseconds(["ours", "first_order"], energy, z, n_repeats)
    ms, ratio = " / ".join(f"{t:.2f}" for t in times.values()), ratios["first_order"]
    print(f"MLPEnergy, periodic, K = {n_members}, d = {d}: exact / plain {ms} ms, {ratio:.2f}")


def plot(results, file):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "ours": "forward Laplacian (skebm)",
        "loop": "one backward pass per column",
        "ebmkit": "ebmkit, ExactScoreMatching",
    }
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for (name, label), style in zip(labels.items(), ("o-", "s--", "^:"), strict=True):
        if name in next(iter(results.values())):
            axes.loglog(results.keys(), [r[name] for r in results.values()], style, label=label)
    axes.set(
        xlabel="columns d",
        ylabel="CPU time of one training step (ms)",
        title=f"Exact score matching: 3 x {WIDTH} SiLU units, {N_ROWS} rows",
    )
    axes.set_xticks(list(results), [str(d) for d in results])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dimensions", type=int, nargs="+", default=DIMENSIONS)
    parser.add_argument("--sliced", action="store_true", help="only the sliced loss")
    parser.add_argument("--energy", action="store_true", help="only MLPEnergy")
    parser.add_argument("--plot", metavar="FILE", help="draw cost against dimension as PNG")
    parser.add_argument("--take", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.take:
        take(args.take[0], int(args.take[1]))
        return
    everything = not (args.sliced or args.energy)
    if everything:
        contestants = ["ours", "loop"]
        try:
            import ebm  # noqa: F401

            contestants.append("ebmkit")
        except ImportError:
            print("ebmkit is not installed")
        results = table(contestants, args.repeats, args.dimensions)
        if args.plot:
            plot(results, args.plot)
    if everything or args.sliced:
        sliced(args.repeats, (10, 100))
    if everything or args.energy:
        for d in (2, 10, 43):
            of_energy(args.repeats, d)


if __name__ == "__main__":
    main()
