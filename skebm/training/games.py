"""Games of energies with generators: two players, one loss.

A generator is a network that draws rows; it raises the loss that the energies lower.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from skebm._engine import Budget, Opponent
from skebm.bases import JUDGED_AT_ONCE
from skebm.energies import Network

from .networks import (
    EnergyWithPartition,
    build_energy,
    energy_to_go_on_from,
    train_networks,
)
from .tilted_task import TiltedTask
from .trained import Trained

HEAD_START = 50
"""Steps that the energy takes before the generator takes its first."""

FLOW_EVERY = 2
"""Steps of the energy for one of a flow, which costs as much as two."""

STEP_COST = 20
"""Of a step of the game, in evaluations of the energy on its rows."""

MAX_COPIED = 20_000
"""Rows in all copies with fresh jitter, where columns have ties: flows are dear to evaluate."""


def views(
    task: TiltedTask,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Differentiable functions of points y in the coordinates of the flows, (K, n, d).

    Parameters
    ----------
    task : TiltedTask
        On flows.

    Returns
    -------
    log_base : callable
        Log-densities of the bases in those coordinates, (K, n).
    features : callable
        The same points as the energies see them, (K, n, d), not clipped.
    """
    device = task.device
    flow, coordinates = (copy.deepcopy(p).to(device) for p in (task.flow, task.coordinates))
    transform = copy.deepcopy(task.features.transform).to(device)

    def features(y):
        x = coordinates.columns(y)
        return transform(x.flatten(0, 1))[0].view_as(x).to(y.dtype)

    if task.tilts_its_proposal:
        return flow.requires_grad_(False).log_prob, features
    bases = [copy.deepcopy(q).to(device) for q in task.bases]

    def log_base(y):
        x, log_det = coordinates.inverse(y)
        values = [q.log_prob(rows) for q, rows in zip(bases, x, strict=True)]
        return (torch.stack(values) - log_det).to(y.dtype)

    return log_base, features


def log_partition_to_go_on_from(task: TiltedTask) -> torch.Tensor | None:
    """log Z of a warm start whose networks the energies go on from; None if there are none."""
    return None if energy_to_go_on_from(task) is None else task.start.log_partition


def play(
    task: TiltedTask,
    network: Network,
    generator: Any,
    loss: Callable,
    plays: Callable[[int], bool],
    *,
    learning_rate: float,
    generator_learning_rate: float,
    budget: Budget,
) -> tuple[Trained, Any]:
    """Train energies against the generators of all members.

    Parameters
    ----------
    task : TiltedTask
        On flows.
    network : Network
    generator : nn.Module
        With ``rsample(n, rng)``; it raises the loss. It is trained in place, and frozen and
        on the CPU afterwards.
    loss : callable
        ``loss(game, y, z, log_base, weight, drawn)`` -> scalar tensor: rows in the coordinates of
        the flows and of the energies, (K, B, d) each, log-densities of the bases and weights of the
        rows, (K, B) each, and a function that draws from the generator: points z, and their
        log-densities under the generator and under the bases.
    plays : callable
        ``plays(n_steps)`` -> bool: whether the generator takes a step.
    learning_rate : float
        Of the energies, where the network leaves the choice to the method.
    generator_learning_rate : float
    budget : Budget
        ``max_epochs="auto"``.

    Returns
    -------
    trained : Trained
    game : nn.Module
        `energy`, `log_partition` and `generator`.
    """
    device = task.device
    log_base, features = views(task)
    energy = build_energy(task, network, "periodic", "game")
    game = EnergyWithPartition(energy, log_partition_to_go_on_from(task))
    game.generator = generator
    game.to(device)
    weight = task.row_weight().expand(len(task), -1)

    def data(x, _):
        y = task.coordinates(x).float().to(device)
        z = task.features.transform(x)[0].float().to(device)
        with torch.no_grad():
            logs = [log_base(points) for points in y.split(JUDGED_AT_ONCE, dim=1)]
        return y, z.expand_as(y), torch.cat(logs, dim=1), weight

    batches = task.batches(
        data, "game", batch_size=network.batch_size, copies=task.copies(MAX_COPIED)
    )
    samples = task.seeds.rng("game, samples", device=device)
    n_steps, moves = 0, False

    def batch_loss(game, batch):
        nonlocal n_steps, moves
        n_steps += 1
        moves = plays(n_steps)
        generator.requires_grad_(moves)  # half of a step's time is the way back through it

        def drawn():
            y, log_generator = game.generator.rsample(batch[0].shape[1], samples)
            return features(y), log_generator, log_base(y)

        return loss(game, *batch, drawn)

    trained = train_networks(
        task, game, batch_loss, batches, network=network, learning_rate=learning_rate,
        budget=budget, evaluation_cost=task.n_judged / (STEP_COST * task.n_train),
        opponent=Opponent(generator, generator_learning_rate, lambda: moves),
    )  # fmt: skip
    generator.cpu().requires_grad_(False)
    return trained, game
