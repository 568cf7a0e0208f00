"""What the engine adds to a bare torch loop, and what stacking members saves.

    python benchmarks/engine.py

One thread, process CPU time, the contestants in turn (A B A B ...), medians of their ratios.

- *step*: training without validation, against a loop written by hand that does the same arithmetic
  (fused AdamW, clipping, averaged weights, learning-rate schedule, shuffling).
- *validation*: training with the held-out gain measured every epoch, against the same loop without.
- *plain loop*: against a loop with AdamW and shuffling only; the difference is what clipping and
  averaging cost.
- *stack*: K members trained together, against K members trained one after the other.
"""

import argparse
import math
import time
from functools import partial
from statistics import median

import torch

from skebm._engine import MemberBatches, train
from skebm.energies import MLPEnergy, PiecewiseLinearEmbedding
from skebm.objectives import nce_losses

N_ROWS, N_FEATURES, BATCH_SIZE, NOISE_RATIO = 16_000, 10, 256, 1.0
SETTINGS = {"learning_rate": 3e-3, "weight_decay": 1e-3}


def make_problem(n_members, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(N_ROWS, N_FEATURES, generator=rng)
    z[:, 0] *= 0.5 + (z[:, 1] > 0)
    noise = torch.randn(n_members, 2 * N_ROWS, N_FEATURES, generator=rng)
    rows = [torch.arange(N_ROWS)[torch.arange(N_ROWS) % 4 != k % 4] for k in range(n_members)]
    held_out = torch.stack([z[k % 4 :: 4] for k in range(n_members)])
    module = MLPEnergy(
        N_FEATURES,
        n_members,
        hidden_layer_sizes=(width,),
        embedding=PiecewiseLinearEmbedding([z[r] for r in rows]),
        rng=rng,
    )
    module.log_partition = torch.nn.Parameter(torch.zeros(n_members))
    return module, z.expand(n_members, -1, -1), rows, noise, held_out, rng


def nce(module, batch):
    data, noise = batch
    f = module(torch.cat([data, noise], 1)).split([data.shape[1], noise.shape[1]], 1)
    of_data, of_noise = nce_losses(*f, module.log_partition, NOISE_RATIO)
    return (of_data.mean(-1) + of_noise.mean(-1)).sum()


def with_engine(problem, n_epochs, validate=False):
    module, z, rows, noise, held_out, rng = problem

    def evaluate(module):  # a quarter of the rows is held out, and as many noise rows measure Z
        n = held_out.shape[1]
        rows = torch.cat([held_out, noise[:, :n]], 1)
        f = torch.cat([module(chunk) for chunk in rows.split(512, 1)], 1).double()
        return (f[:, :n].mean(-1) - f[:, n:].logsumexp(-1) + math.log(n)).mean()

    batches = MemberBatches(
        (z,), rows, (noise,), batch_size=BATCH_SIZE, noise_ratio=NOISE_RATIO, rng=rng
    )
    train(module, nce, batches, evaluate if validate else None, max_epochs=n_epochs, **SETTINGS)


def with_bare_loop(problem, n_epochs, plain=False):
    """What a careful user would write for one member."""
    module, z, rows, noise, _, rng = problem
    z, noise, rows = z[0, rows[0]], noise[0], rows[0]
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(
        parameters, SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"], fused=True
    )
    n_batches = round(len(z) / BATCH_SIZE)
    size = len(z) // n_batches
    n_steps = n_epochs * n_batches
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / 100) * 0.5 * (1 + math.cos(math.pi * t / n_steps))
    )
    averages = [p.detach().clone() for p in parameters]
    for _ in range(n_epochs):
        z_epoch = z[torch.randperm(len(z), generator=rng)]
        drawn = torch.randint(len(noise), (n_batches * size,), generator=rng)
        noise_epoch = noise[drawn]
        for start in range(0, n_batches * size, size):
            part = slice(start, start + size)
            optimizer.zero_grad()
            loss = nce(module, (z_epoch[None, part], noise_epoch[None, part]))
            loss.backward()
            if not plain:
                torch.nn.utils.clip_grad_norm_(parameters, 2.0)
            optimizer.step()
            if not plain:
                scheduler.step()
                torch._foreach_lerp_(averages, [p.data for p in parameters], 0.01)
            loss.item()  # to record it


def in_turn(problem, n_epochs, n_members):
    for _ in range(n_members):
        with_engine(problem, n_epochs)


def seconds(function, *args, **kwargs):
    start = time.process_time()
    function(*args, **kwargs)
    return time.process_time() - start


def median_ratio(contestant, reference, n_repeats):
    contestant(), reference()  # warm up
    return median(seconds(contestant) / seconds(reference) for _ in range(n_repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--members", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    one = make_problem(1, args.width)

    def engine():
        with_engine(one, args.epochs)

    def engine_with_validation():
        with_engine(one, args.epochs, validate=True)

    def bare():
        with_bare_loop(one, args.epochs)

    def plain():
        with_bare_loop(one, args.epochs, plain=True)

    print(f"step / bare loop           {median_ratio(engine, bare, args.repeats):.3f}")
    ratio = median_ratio(engine_with_validation, bare, args.repeats)
    print(f"with validation / bare     {ratio:.3f}")
    print(f"step / plain loop          {median_ratio(engine, plain, args.repeats):.3f}")
    for width in (32, 64, args.width):
        stacked = make_problem(args.members, width)
        single = make_problem(1, width)
        ratio = median_ratio(
            partial(with_engine, stacked, args.epochs),
            partial(in_turn, single, args.epochs, args.members),
            max(3, args.repeats // 2),
        )
        print(f"{args.members} stacked / {args.members} in turn, width {width:4d}  {ratio:.3f}")


if __name__ == "__main__":
    main()
