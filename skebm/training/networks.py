"""Training of neural energies on the rows of a task: K nets side by side in one engine run."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from skebm._engine import Budget, MemberBatches, Opponent, evaluations_every, train
from skebm._threads import limit_threads
from skebm.energies import Network, StackedEnergy

from .convergence import warn_if_unfinished
from .tilted_task import TiltedTask
from .trained import Trained

BUDGET = Budget(epochs=100, steps=2000)
"""``max_epochs="auto"``: whichever lasts longer."""


class EnergyAlone(nn.Module):
    """What is trained where a loss learns nothing beside the energy."""

    def __init__(self, energy: Any):
        super().__init__()
        self.energy = energy


class EnergyWithPartition(nn.Module):
    """An energy and the learned log Z of its members, (K,)."""

    log_partition: torch.nn.Parameter

    def __init__(self, energy: Any, log_partition: torch.Tensor | None = None):
        super().__init__()
        self.energy = energy
        self.log_partition = nn.Parameter(torch.zeros(energy.n_members, dtype=torch.float32))
        if log_partition is not None:
            with torch.no_grad():
                self.log_partition.copy_(log_partition)


def energy_to_go_on_from(task: TiltedTask) -> StackedEnergy | None:
    """Networks of a warm start, without the trees that may correct them; None if there are none."""
    energy = None if task.start is None else task.start.energy
    energy = getattr(energy, "first", energy)
    return energy if isinstance(energy, StackedEnergy) else None


def build_energy(
    task: TiltedTask, network: Network, embedding: str | None, stage: str = "energy"
) -> StackedEnergy:
    """Stack of K energies, f = 0 at the start.

    If the task goes on from a model with such a stack of the same shape, from its weights.

    Parameters
    ----------
    task : TiltedTask
    network : Network
    embedding : str
        The method's own, where the network leaves the choice to it.
    stage : str, default="energy"
        Of the seeds.

    Returns
    -------
    StackedEnergy

    See Also
    --------
    train_networks : Trains what it returns.
    skebm.Network : The specification.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm import Network
    >>> from skebm._random import Seeds
    >>> from skebm.training import Columns, Recipe, Trained, fit_tilted, make_task
    >>> from skebm.training.networks import build_energy
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> def train(task):
    ...     energy = build_energy(task, Network(hidden_layer_sizes=(16,)), "periodic")
    ...     print(energy(task.pool_z.float()).shape)
    ...     return Trained.nothing(task)
    >>> fitted = fit_tilted(task, Recipe(train=train, base="gaussian"))
    torch.Size([2, 8192])
    """
    rows = [task.z[train] for train in task.train]
    weights = [task.weight[train] for train in task.train]
    seed = task.seeds.of(f"{stage}, network")
    energy = network.build(
        rows, embedding=embedding, seed=seed, weights=weights, layout=task.layout
    )
    kept, new = energy_to_go_on_from(task), energy.state_dict()
    old = {} if kept is None else kept.state_dict()
    if {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}:
        energy.load_state_dict(old)
    return energy


def train_networks(
    task: TiltedTask,
    module: Any,
    batch_loss: Callable,
    batches: MemberBatches,
    *,
    network: Network,
    learning_rate: float,
    evaluation_cost: float,
    budget: Budget = BUDGET,
    opponent: Opponent | None = None,
    judge: Callable[[Any], tuple[list[torch.Tensor], torch.Tensor]] | None = None,
) -> Trained:
    """Train the K energies of ``module.energy`` and judge them on held-out rows and pool.

    Parameters
    ----------
    task : TiltedTask
    module : nn.Module
        Whatever the loss learns; its ``energy`` maps (K, n, d) -> (K, n).
    batch_loss : callable
        ``batch_loss(module, batch)`` -> scalar tensor.
    batches : MemberBatches
        On the device.
    network : Network
        How to train: its weight decay, epochs, patience and callbacks.
    learning_rate : float
        The method's own, where the network leaves the choice to it.
    evaluation_cost : float
        Cost of judging as a share of the cost of an epoch; it decides how often that happens.
    budget : Budget
    opponent : Opponent, optional
        As in the engine.
    judge : callable, optional
        ``judge(module)`` -> the tilts at the held-out rows and at the pool, on the CPU, as `gain`
        of a task takes them; by default f.

    Returns
    -------
    Trained

    See Also
    --------
    build_energy : Makes the energies.
    Trained : What is returned.
    skebm.training.Recipe : Names the trainer.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm import Network
    >>> from skebm._random import Seeds
    >>> from skebm.objectives import nce_losses
    >>> from skebm.training import Columns, Recipe, fit_tilted, make_task
    >>> from skebm.training.networks import EnergyWithPartition, build_energy, train_networks
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> columns = Columns.learn(X, names=["a", "b"])
    >>> task = make_task(
    ...     X, np.ones(200), columns, n_members=2, validation_fraction=0.1, smoothing=0.0,
    ...     seeds=Seeds(0), device=torch.device("cpu"),
    ... )
    >>> network = Network(hidden_layer_sizes=(16,), max_epochs=4)
    >>> def train(task):
    ...     module = EnergyWithPartition(build_energy(task, network, "periodic"))
    ...     def rows(x, rng):
    ...         return (task.features(x).float().expand(len(task), -1, -1),)
    ...
    ...     def loss(module, batch):
    ...         f_data, f_noise = (module.energy(z) for z in batch)
    ...         data, noise = nce_losses(f_data, f_noise, module.log_partition)
    ...         return (data.mean(1) + noise.mean(1)).sum()
    ...
    ...     return train_networks(
    ...         task, module, loss,
    ...         task.batches(rows, "example", batch_size=50, noise=(task.pool_z.float(),)),
    ...         network=network, learning_rate=1e-3, evaluation_cost=1.0,
    ...     )
    >>> fitted = fit_tilted(task, Recipe(train=train, base="gaussian"))
    >>> fitted.attributes["history_"]["n_iter"]
    array([0, 1, 2, 3, 4])
    """
    device = task.device
    judge = _of_held_and_pool(task) if judge is None else judge

    def evaluate(module):
        return task.mean_gain(*judge(module)).item()

    every = evaluations_every(evaluation_cost)
    max_epochs = budget.max_epochs(network.max_epochs, len(batches))
    patience = budget.patience(network.patience, len(batches), every)
    stops_early = patience is not None
    if not stops_early:  # nothing is judged then but the start, and the end below
        module.to(device)
        with torch.no_grad():
            first_gain = evaluate(module)
    with limit_threads(task.n_threads):
        history = train(
            module, batch_loss, batches, evaluate if stops_early else None,
            learning_rate=network.setting("learning_rate", learning_rate),
            weight_decay=network.weight_decay, max_epochs=max_epochs, patience=patience,
            evaluate_every=every, callbacks=network.callbacks, device=device, opponent=opponent,
            progress=lambda state: task.progress.stage(
                "energy", state["epoch"], max_epochs, gain=f"{state['best_gain']:.3f} nats"
            ),
        )  # fmt: skip
    with torch.no_grad():
        held, pool = judge(module)
    warn_if_unfinished(history, max_epochs, patience, "energy_model=Network(max_epochs=...)")
    gain, epochs = history["validation_gain"], history["epoch"]
    if stops_early:
        best = int(epochs[torch.as_tensor(gain).nan_to_num(nan=-math.inf).argmax()])
    else:
        gain[0], best = first_gain, int(epochs[-1])
    return Trained(
        energy=module.energy.cpu().double().eval(),
        held=held,
        pool=pool,
        n_iter=best,
        history={"n_iter": epochs, "gain": gain, "train_loss": history["train_loss"]},
        log=history["log"],
    )


def _of_held_and_pool(task):
    """What judges f: its values at the held-out rows and at the pool."""
    held_z, lengths = padded([task.z[held] for held in task.held])
    held_z, pool_z = held_z.float().to(task.device), task.pool_z.float().to(task.device)

    def judge(module):
        f = in_blocks(module.energy, torch.cat([held_z, pool_z], dim=1)).cpu().double()
        held = [row[:n] for row, n in zip(f, lengths, strict=True)]
        return held, f[:, held_z.shape[1] :]

    return judge


def padded(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Stack (n_k, d) tensors of slightly different lengths, the last row repeated."""
    lengths = [len(t) for t in tensors]
    longest = max(lengths)
    return torch.stack(
        [torch.cat([t, t[-1:].expand(longest - len(t), -1)]) for t in tensors]
    ), lengths


def in_blocks(
    energy: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, size: int = 1024
) -> torch.Tensor:
    """Evaluate an energy, (K, n, d) -> (K, n), on so few rows at a time that they stay in cache."""
    return torch.cat([energy(block) for block in z.split(size, dim=1)], dim=1)
