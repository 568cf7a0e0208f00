"""What a step of contrastive divergence costs beside ebmkit's: chains, loss, gradient, optimiser.

    python benchmarks/divergence.py

One step moves 256 chains from a replay buffer by ten steps of Langevin dynamics and learns from
them and 256 rows; the energy is a perceptron with three hidden layers of 128 SiLU units on d
columns. One thread, process CPU time, the contestants in turn (A B A B ...), medians.

- *ours*: training in ``ContrastiveDivergenceEBM(sampler="ula", n_steps=10)``, one member on a
  Gaussian base; with restarts, the decision on every move and the adapted step size. Chains
  are moved in every step, which otherwise is every second. *mala* is the same with
  ``sampler="mala"``.
- *ebmkit*: ``ebm.Trainer`` with ``ContrastiveDivergence(LangevinDynamics(steps=10), buffer=...)``.
"""

import argparse
import time
import warnings
from statistics import median
from unittest import mock

import torch
from torch import nn

from skebm import ContrastiveDivergenceEBM, Network
from skebm.training import contrastive_divergence, networks

N_ROWS, N_CHAINS, WIDTH = 256 * 16, 256, 128


def make_network(d):
    layers, width = [], d
    for _ in range(3):
        layers += [nn.Linear(width, WIDTH), nn.SiLU()]
        width = WIDTH
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def make_rows(d):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(N_ROWS, d, generator=rng).sinh()


def ours(d, n_steps, sampler="ula"):
    """CPU seconds of the training loop alone, per step."""
    seconds = []

    def timed(*arguments, **options):
        start = time.process_time()
        history = train(*arguments, **options)
        seconds.append(time.process_time() - start)
        return history

    n_batches = round(0.9 * N_ROWS / 256)
    n_epochs = max(1, n_steps // n_batches)
    network = Network(make_network, batch_size=256, max_epochs=n_epochs, patience=None)
    train, networks.train = networks.train, timed
    try:
        with mock.patch.object(contrastive_divergence, "MOVED_EVERY", 1):
            ContrastiveDivergenceEBM(
                sampler=sampler, n_steps=10, base="gaussian", energy_model=network, n_members=1,
                n_partition_samples=100, device="cpu", random_state=0,
            ).fit(make_rows(d).numpy())  # fmt: skip
    finally:
        networks.train = train
    return seconds[0] / (n_epochs * n_batches)


def mala(d, n_steps):
    return ours(d, n_steps, "mala")


def ebmkit(d, n_steps):
    import ebm

    network = make_network(d)

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).squeeze(-1)

    loss = ebm.ContrastiveDivergence(
        ebm.LangevinDynamics(step_size=0.01, steps=10),
        buffer=ebm.ReplayBuffer(N_CHAINS, (d,)),
    )
    trainer = ebm.Trainer(Energy(), loss, device="cpu")
    rows = make_rows(d)
    start = time.process_time()
    trainer.fit(rows, steps=n_steps, batch_size=256, verbose=False)
    return (time.process_time() - start) / n_steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dimensions", nargs="+", type=int, default=[2, 10])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of fits that are meant to be short
    contestants = {"ours": ours, "mala": mala, "ebmkit": ebmkit}
    try:
        import ebm  # noqa: F401
    except ImportError:
        del contestants["ebmkit"]
        print("ebmkit is not installed")
    print(f"{'d':>5s}" + "".join(f"{name + ', ms':>14s}" for name in contestants), end="")
    print("".join(f"{name + '/ebmkit':>14s}" for name in ("ours", "mala")))
    for d in arguments.dimensions:
        times = {name: [] for name in contestants}
        for _ in range(arguments.repeats + 1):
            for name, step in contestants.items():
                times[name].append(1e3 * step(d, arguments.steps))
        times = {name: measured[1:] for name, measured in times.items()}  # the first warms up
        print(f"{d:5d}" + "".join(f"{median(t):14.2f}" for t in times.values()), end="")
        if "ebmkit" in times:
            for name in ("ours", "mala"):
                pairs = zip(times[name], times["ebmkit"], strict=True)
                print(f"{median(a / b for a, b in pairs):14.3f}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
