"""Training by contrastive divergence: chains that follow the energy while it is learned."""

import copy
from dataclasses import replace

import numpy as np
import torch

from skebm._engine import Budget
from skebm.bases import MAX_FIT_ROWS
from skebm.energies import Network
from skebm.models import TiltedMixture
from skebm.objectives import contrastive_divergence_losses

from .chains import Chains, Moves, Walkers, fit_stand_in
from .networks import EnergyAlone, build_energy, train_networks
from .tilted_task import TiltedTask
from .trained import Trained

BUDGET = Budget(epochs=30, steps=1000)
"""``max_epochs="auto"``. The learning rate must have come down before the energy overfits, because
no row ever stops to pull, as it does in noise-contrastive estimation."""

LEARNING_RATE = 1e-3

BUFFER_SIZE = 512
"""Persistent chains per member: more than a step learns from, so that steps share fewer of them."""

MOVED_EVERY = 2
"""Persistent chains take steps of the sampler in every so many steps of training, of whose time
those would be most. Jumps, which do more where the base is good, are offered in all."""

N_RESERVES = 5
"""Times that draws of the base are made: 40,960 per member, which are then offered again."""

MAX_COPIED = 400_000
"""Rows in all copies with fresh jitter, where columns have ties."""


def train_by_contrastive_divergence(
    task: TiltedTask, network: Network, *, moves: Moves, persistent: bool, buffer: np.ndarray | None
) -> Trained:
    """Train a stack of K energies: up at the rows, down at chains that follow them.

    Parameters
    ----------
    task : TiltedTask
    network : Network
    moves : Moves
    persistent : bool
        Whether chains go on from where they were, or start at the rows every time.
    buffer : ndarray of shape (K, BUFFER_SIZE, n_columns) or None
        Where the chains of a former fit were, in the units of X.

    Returns
    -------
    Trained
        Its results: ``diagnostics`` and ``stand_in`` and, of persistent chains, ``buffer``, rows on
        standardised columns.
    """
    # as in score matching: what states do to values is broad
    energy = build_energy(task, network, None if task.layout.n_states else "periodic")
    module = EnergyAlone(energy).to(task.device)
    chains = _follow(task, energy, moves)
    walkers = _persistent(task, chains, buffer) if persistent else None
    weight = task.row_weight().expand(len(task), -1)

    def data(x, rng):
        z = task.features.transform(x)[0]
        if persistent:  # the rows themselves are not moved
            return z.float().to(task.device).expand(len(task), *z.shape), weight
        return *chains.at(z.expand(len(task), *z.shape)), weight

    batches = task.batches(
        data, "energy", batch_size=network.batch_size, copies=task.copies(MAX_COPIED)
    )

    def batch_loss(module, batch):
        z, *log_weight, w = batch
        module.eval()  # chains follow f itself: no dropout
        with torch.no_grad():
            if persistent:
                due = chains.jump_share == 0 or len(chains.record) % MOVED_EVERY == 0
                moved = chains.advance_some(walkers, z.shape[1], moves=due)  # pyright: ignore[reportArgumentType]
                moved_weight = 1.0
            else:
                moved, moved_weight = chains.advance(Walkers(z, *log_weight)), w
        module.train()
        f = module.energy(task.features.clip(torch.cat([z, moved.z], dim=1)))
        data, negative = contrastive_divergence_losses(
            *f.split([z.shape[1], moved.z.shape[1]], dim=1)
        )
        return ((w * data).mean(1) + (moved_weight * negative).mean(1)).sum()

    trained = train_networks(
        task, module, batch_loss, batches, network=network, learning_rate=LEARNING_RATE,
        budget=BUDGET,
        # in forward passes per row: six for the step, and two for every gradient of a chain
        evaluation_cost=task.n_judged / ((6 + 2 * moves.n_steps / MOVED_EVERY) * task.n_train),
    )  # fmt: skip
    diagnostics = chains.rates(last=0.25) | {"r_hat": np.nan}
    if persistent and trained.n_iter > 0:
        energy.float().to(task.device)
        diagnostics["r_hat"] = chains.r_hat()
        energy.cpu().double()
    results = {"diagnostics": diagnostics, "stand_in": chains.target.stand_in.cpu().double()}
    if persistent:
        z = walkers.z.cpu().double()
        results["buffer"] = [task.features.transform.inverse(points) for points in z]
    return replace(trained, results=results)


def _follow(task, energy, moves):
    """Chains under the model as it is trained."""
    model = TiltedMixture(task.bases, task.proposals, task.features, energy)
    if task.device.type not in ("cpu", "mps"):  # doubles are not for every device
        model = copy.deepcopy(model).to(task.device)
        model.energy = energy
    step_size = max(1, task.layout.n_values) ** (-1.0 / 3.0) if moves.adapts else moves.step_size
    rng = task.seeds.rng("stand-in")
    x = task.pool.flatten(0, 1)
    x = x[torch.randperm(len(x), generator=rng)[:MAX_FIT_ROWS]]
    chains = Chains(
        model, fit_stand_in(x, task.features, rng), moves,
        step_size=torch.full((len(task),), step_size), dtype=torch.float32,
        rng=task.seeds.rng("chains", device=task.device), n_reserves=N_RESERVES,
    )  # fmt: skip
    energy.eval()
    if chains.adapts:
        with torch.no_grad():
            chains.warm_up()
    return chains


def _persistent(task, chains, buffer):
    """Persistent chains: where a former fit left them, or draws of the base."""
    shape = (len(task), BUFFER_SIZE, len(task.columns.varying))
    if task.start is None or buffer is None or buffer.shape != shape:
        return chains.start(BUFFER_SIZE)
    x = torch.as_tensor(np.stack([task.columns.standardize(rows) for rows in buffer]))
    return chains.at(torch.stack([task.features.transform(rows)[0] for rows in x]))
