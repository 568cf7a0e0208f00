"""What a step of the samplers costs, against ebmkit and torchebm.

    python benchmarks/samplers.py
    python benchmarks/samplers.py --chains 100 --dimensions 2 10 43

The log-density is a perceptron with three hidden layers of 128 SiLU units on d columns. One
thread, process CPU time per step, the contestants in turn (A B C A B C ...), medians, and the
median of the ratios to a peer. Peers that are not installed are left out.

- *ours*: our kernels on the plain callable.
- *ebmkit*: ``ebm.samplers``. Its step is eps = step_size^2 / 2 in our terms; its MALA keeps no
  gradient from one step to the next.
- *torchebm*: ``torchebm.samplers``, which has no MALA.

HMC takes ten leapfrog steps. All run at the same step size, from the same points, and every kernel
reports the acceptance of each chain, ULA too, where the peers report none.
"""

import argparse
import math
import time
from importlib.util import find_spec
from statistics import median

import torch
from torch import nn

from skebm.samplers import hmc, mala, random_walk, ula

WIDTH, STEP_SIZE, N_LEAPFROG = 128, 0.1, 10
KERNELS = {"mala": mala, "ula": ula, "hmc": hmc, "random_walk": random_walk}


def make_network(d):
    torch.manual_seed(0)
    layers, width = [], d
    for _ in range(3):
        layers += [nn.Linear(width, WIDTH), nn.SiLU()]
        width = WIDTH
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def ours(name, log_density, x):
    """A function that takes n steps with one of our kernels."""
    kernel, rng = KERNELS[name], torch.Generator().manual_seed(0)
    options = {"n_leapfrog_steps": N_LEAPFROG} if name == "hmc" else {}
    start = kernel.init(x, log_density)

    def steps(n):
        state = start
        for _ in range(n):
            state, _ = kernel.step(state, log_density, rng, step_size=STEP_SIZE, **options)

    return steps


def ebmkit(name, network, x):
    from ebm.samplers import HMC, MALA, LangevinDynamics

    def energy(x):
        return -network(x).squeeze(-1)

    eps = STEP_SIZE**2 / 2
    sampler = {
        "mala": lambda: MALA(eps),
        "ula": lambda: LangevinDynamics(eps),
        "hmc": lambda: HMC(STEP_SIZE, leapfrog_steps=N_LEAPFROG),
    }[name]()
    return lambda n: sampler.sample(energy, x, steps=n)


def torchebm(name, network, x):
    from torchebm.core import BaseModel
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    class Energy(BaseModel):
        def forward(self, x):
            return -network(x).squeeze(-1)

    if name == "hmc":
        sampler = HamiltonianMonteCarlo(
            Energy(), step_size=STEP_SIZE, n_leapfrog_steps=N_LEAPFROG, device="cpu"
        )
    else:
        # x' = x - eps grad E + sqrt(2 eps) noise_scale xi
        sampler = LangevinDynamics(Energy(), step_size=STEP_SIZE**2 / 2, device="cpu")
    return lambda n: sampler.sample(x=x, n_steps=n)


def contestants(name, network, x):
    def plain(x):
        return network(x).squeeze(-1)

    runs = {"ours": ours(name, plain, x)}
    if name != "random_walk" and find_spec("ebm"):
        runs["ebmkit"] = ebmkit(name, network, x)
    if name in ("hmc", "ula") and find_spec("torchebm"):
        runs["torchebm"] = torchebm(name, network, x)
    return runs


def microseconds(runs, n_steps, n_repeats):
    """CPU times per step of each contestant, one for each round."""
    times = {name: [] for name in runs}
    for _ in range(n_repeats + 1):
        for name, steps in runs.items():
            start = time.process_time()
            steps(n_steps)
            times[name].append(1e6 * (time.process_time() - start) / n_steps)
    return {name: measured[1:] for name, measured in times.items()}  # the first warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--chains", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("ours", "ebmkit", "torchebm")
    print(f"{'':>23s}" + f"{'microseconds per step':^30s}" + f"{'ours / peer':^20s}")
    print(f"{'kernel':>11s}{'n':>6s}{'d':>6s}" + "".join(f"{c:>10s}" for c in columns), end="")
    print("".join(f"{c:>10s}" for c in columns[1:]))
    for name in args.kernels:
        for n in args.chains:
            for d in args.dimensions:
                runs = contestants(name, make_network(d), torch.randn(n, d))
                n_steps = math.ceil((2000 if name == "hmc" else 20_000) / (n + 100))
                times = microseconds(runs, n_steps, args.repeats)
                print(f"{name:>11s}{n:6d}{d:6d}", end="")
                for c in columns:
                    print(f"{median(times[c]):10.0f}" if c in times else f"{'':>10s}", end="")
                for peer in columns[1:]:
                    pairs = zip(times["ours"], times.get(peer, ()), strict=False)
                    ratio = f"{median(a / b for a, b in pairs):.2f}" if peer in times else ""
                    print(f"{ratio:>10s}", end="")
                print(flush=True)


if __name__ == "__main__":
    main()
