"""Training of neural energies on the members' rows: K nets side by side in one engine run."""

import math
from dataclasses import replace

import torch
from torch import nn

from skebm._engine import MemberBatches, train
from skebm.energies import (
    MLPEnergy,
    ModuleStack,
    PeriodicEmbedding,
    PiecewiseLinearEmbedding,
)

from ._members import Trained
from ._model import log_ratio
from ._threads import limit_threads

_MAX_NOISE_POOL = 200_000
_EVALUATION_SHARE = 0.1  # of the cost of training that judging may take
_LOOKS = 3  # at the held-out rows, at least, before patience ends
_EPOCHS, _STEPS = 100, 2000  # max_epochs="auto": whichever lasts longer


class EnergyAlone(nn.Module):
    """What is trained where a loss learns nothing beside the energy."""

    def __init__(self, energy):
        super().__init__()
        self.energy = energy


class EnergyWithPartition(nn.Module):
    """An energy and the learned log Z of its members, (K,)."""

    def __init__(self, energy, n_members):
        super().__init__()
        self.energy = energy
        self.log_partition = nn.Parameter(torch.zeros(n_members))


def build_energy(energy_model, members, hidden_layer_sizes, seed, kept):
    """Stack of K energies for a name or a user's module; f = 0 at the start.

    If `kept` is a model with such a stack of the same shape, training goes on from its weights.
    """
    energy = _new_energy(energy_model, members, hidden_layer_sizes, seed)
    old = {} if kept is None or kept.energy is None else kept.energy.state_dict()
    new = energy.state_dict()
    if {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}:
        energy.load_state_dict(old)
    return energy


def _new_energy(energy_model, members, hidden_layer_sizes, seed):
    n_members, n_features = len(members), members.z.shape[1]
    if not isinstance(energy_model, str):
        return ModuleStack(energy_model, n_features, n_members, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [members.z[train] for train, _ in members.splits]
    if energy_model == "periodic":
        embedding = PeriodicEmbedding(n_features, n_members, generator=generator)
    else:
        embedding = PiecewiseLinearEmbedding(rows)
    return MLPEnergy(
        n_features, n_members, hidden_layer_sizes=hidden_layer_sizes, embedding=embedding,
        generator=generator,
    )  # fmt: skip


def train_networks(
    members, module, batch_loss, batches, *, evaluation_cost, learning_rate, weight_decay,
    max_epochs, patience, early_stopping, callbacks, device, progress, opponent=None,
):  # fmt: skip
    """Train the K energies of ``module.energy`` and judge them on held-out rows and pool.

    Parameters
    ----------
    members : Members
    module : nn.Module
        Whatever the loss learns; its ``energy`` maps (K, n, d) -> (K, n).
    batch_loss : callable
        ``batch_loss(module, batch)`` -> scalar tensor.
    batches : MemberBatches
        On the device.
    evaluation_cost : float
        Cost of judging as a share of the cost of an epoch; it decides how often that happens.
    learning_rate, weight_decay, patience, callbacks, device, progress, opponent
        As in the engine.
    max_epochs : int or None
        None is 100, or as many as make 2,000 steps.
    early_stopping : bool
        Whether the state that is best on the held-out rows is kept.

    Returns
    -------
    Trained
    """
    held_z, lengths = padded([members.z[held] for _, held in members.splits])
    held_z, pool_z = held_z.float().to(device), members.pool_z.float().to(device)

    def judge(module):
        f = in_blocks(module.energy, torch.cat([held_z, pool_z], dim=1)).cpu().double()
        held = [row[:n] for row, n in zip(f, lengths, strict=True)]
        return held, f[:, held_z.shape[1] :]

    evaluate_every = max(1, round(evaluation_cost / _EVALUATION_SHARE))
    if max_epochs is None:
        max_epochs = max(_EPOCHS, math.ceil(_STEPS / len(batches)))
    if not early_stopping:  # nothing is judged then but the start, and the end below
        module.to(device)
        with torch.no_grad():
            first_gain = members.mean_gain(*judge(module)).item()
    with limit_threads(members.n_threads):
        history = train(
            module,
            batch_loss,
            batches,
            (lambda m: members.mean_gain(*judge(m)).item()) if early_stopping else None,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_epochs=max_epochs,
            patience=max(patience, _LOOKS * evaluate_every) if early_stopping else None,
            evaluate_every=evaluate_every,
            callbacks=callbacks,
            device=device,
            opponent=opponent,
            progress=lambda state: progress.stage(
                "energy", state["epoch"], max_epochs, gain=f"{state['best_gain']:.3f} nats"
            ),
        )
    with torch.no_grad():
        held, pool = judge(module)
    gain = history["validation_gain"]
    best = int(history["epoch"][-1])
    if not early_stopping:
        gain[0] = first_gain
    else:
        best = int(history["epoch"][torch.as_tensor(gain).nan_to_num(nan=-math.inf).argmax()])
    return Trained(
        energy=module.energy.cpu().double().eval(),
        held=held,
        pool=pool,
        n_iter=best,
        history={"n_iter": history["epoch"], "gain": gain, "train_loss": history["train_loss"]},
    )


def if_auto(value, otherwise):
    """`otherwise` where a parameter is "auto"."""
    return otherwise if isinstance(value, str) and value == "auto" else value


def few_copies(make, n_copies):
    """Return ``make(generator)``, called anew `n_copies` times, and then one of those again.

    For data of an epoch that is dear to make: a few copies are enough to learn from.
    """
    copies = []

    def draw(generator):
        if len(copies) < n_copies:
            copies.append(make(generator))
            return copies[-1]
        return copies[int(torch.randint(n_copies, (), generator=generator))]

    return draw


def rows_judged(members):
    """How many rows an evaluation looks at, per member."""
    return max(len(held) for _, held in members.splits) + members.pool.shape[1]


def train_against_noise(
    members, energy, loss, *, learns_partition, noise_ratio, batch_size, refresh, device,
    stage="energy", log_partition=None, **options
):  # fmt: skip
    """Train a stack of K energies against samples of the noise.

    Parameters
    ----------
    members : Members
    energy : nn.Module
        (K, n, d) -> (K, n).
    loss : callable
        ``loss(log_ratio_data, log_ratio_noise, log_partition)`` -> per-sample losses of the data
        (K, B) and of the noise (K, nu B) or None, where the log-ratios are
        log base + f - log noise.
    learns_partition : bool
        Whether `log_partition` is learned by the loss.
    noise_ratio : float
        Noise samples per row.
    batch_size : int
    refresh : callable or None
        ``refresh(generator)`` -> rows like ``members.x`` with fresh jitter, called every epoch.
    device : torch.device
    stage : str, default="energy"
        Of the seeds.
    log_partition : Tensor of shape (K,), optional
        What the learned log Z starts from; 0 by default.
    **options
        Of :func:`train_networks`.

    Returns
    -------
    Trained
    """
    n_members = len(members)
    module = EnergyWithPartition(energy, n_members).to(device)
    if log_partition is not None:
        with torch.no_grad():
            module.log_partition.copy_(log_partition)
    weight = (members.weight / members.weight.mean()).float()

    def data_tensors(x):
        ratio = log_ratio(members.bases, members.noise, x.expand(n_members, *x.shape))
        z = members.features(x).float()
        shared = (z.expand(n_members, *z.shape), ratio.float(), weight.expand(n_members, -1))
        return tuple(t.to(device) for t in shared)

    n_train = max(len(train) for train, _ in members.splits)
    n_pool = min(max(20_000, math.ceil(4 * noise_ratio * n_train)), _MAX_NOISE_POOL)
    own = members.seeds.generators(f"{stage}, noise", n_members)
    noise = torch.stack([p.sample(n_pool, g) for p, g in zip(members.noise, own, strict=True)])
    noise_z = torch.stack([members.features(rows) for rows in noise]).float().to(device)
    noise_log_ratio = log_ratio(members.bases, members.noise, noise).float()
    fixed = data_tensors(members.x)
    batches = MemberBatches(
        fixed if refresh is None else lambda generator: data_tensors(refresh(generator)),
        [train for train, _ in members.splits],
        (noise_z, noise_log_ratio.to(device)),
        batch_size=batch_size,
        noise_ratio=noise_ratio,
        generator=members.seeds.generator(f"{stage}, batches"),
    )

    def batch_loss(module, batch):
        z, ratio, w, rival_z, rival_ratio = batch
        f = module.energy(torch.cat([z, rival_z], dim=1))
        f_data, f_noise = f.split([z.shape[1], rival_z.shape[1]], dim=1)
        data, rivals = loss(ratio + f_data, rival_ratio + f_noise, module.log_partition)
        value = (w * data).mean(1)
        if rivals is not None:
            value = value + rivals.mean(1)
        return value.sum()

    # an evaluation is a forward pass; a training step costs about three
    cost = rows_judged(members) / (3 * (1 + noise_ratio) * n_train)
    trained = train_networks(
        members, module, batch_loss, batches, evaluation_cost=cost, device=device, **options
    )
    if not learns_partition:
        return trained
    return replace(trained, log_partition=module.log_partition.detach().cpu().double())


def padded(tensors):
    """Stack (n_k, d) tensors of slightly different lengths, the last row repeated."""
    lengths = [len(t) for t in tensors]
    longest = max(lengths)
    return torch.stack(
        [torch.cat([t, t[-1:].expand(longest - len(t), -1)]) for t in tensors]
    ), lengths


def in_blocks(energy, z, size=1024):
    """Evaluate an energy, (K, n, d) -> (K, n), on so few rows at a time that they stay in cache."""
    return torch.cat([energy(block) for block in z.split(size, dim=1)], dim=1)
