"""Noise-contrastive training of neural energies."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from skebm._engine import Budget
from skebm._typing import Distribution
from skebm.energies import Network
from skebm.models import log_ratio
from skebm.objectives import nce_losses, ranking_nce_losses, self_normalized_losses

from .networks import (
    BUDGET,
    EnergyWithPartition,
    build_energy,
    train_networks,
)
from .tilted_task import TiltedTask
from .trained import Trained

MAX_NOISE_POOL = 200_000
"""Noise samples per member, at most."""

NOISE_RATIO, LEARNING_RATE = 2.0, 3e-3
"""By default: noise samples per row, and of AdamW."""


def train_against_noise(
    task: TiltedTask,
    network: Network,
    *,
    objective: str = "nce",
    noise_ratio: float | str = "auto",
    noise: Sequence[Distribution] | None = None,
    start: Trained | None = None,
    budget: Budget = BUDGET,
    stage: str = "energy",
    copies: int | None = None,
) -> Trained:
    """Train a stack of K energies against samples of the noise.

    Parameters
    ----------
    task : TiltedTask
    network : Network
    objective : {"nce", "ranking", "self_normalized"}, default="nce"
    noise_ratio : float or "auto", default="auto"
        Noise samples per row.
    noise : list of K distributions, optional
        The task's by default.
    start : Trained, optional
        Energies and their learned log Z that the training goes on from; f = 0 by default.
    budget : Budget
    stage : str, default="energy"
        Of the seeds.
    copies : int, optional
        Of rows with fresh jitter, as in `Task.batches`.

    Returns
    -------
    Trained
    """
    n_members, noise = len(task), task.noise if noise is None else noise
    noise_ratio = NOISE_RATIO if isinstance(noise_ratio, str) else noise_ratio
    if start is None:
        energy, log_partition = build_energy(task, network, "piecewise_linear", stage), None
    else:
        energy, log_partition = copy.deepcopy(start.energy).float().train(), start.log_partition
    energy.requires_grad_(True)
    module = EnergyWithPartition(energy, log_partition).to(task.device)
    loss = {
        "nce": partial(nce_losses, noise_ratio=noise_ratio),
        "ranking": _ranking,
        "self_normalized": self_normalized_losses,
    }[objective]
    weight = task.row_weight().expand(n_members, -1)

    def data(x, rng):
        ratio = log_ratio(task.bases, noise, x.expand(n_members, *x.shape)).float()
        z = task.features(x).float().to(task.device)
        return z.expand(n_members, *z.shape), ratio.to(task.device), weight

    n_pool = min(max(20_000, math.ceil(4 * noise_ratio * task.n_train)), MAX_NOISE_POOL)
    own = task.seeds.rngs(f"{stage}, noise", n_members)
    drawn = torch.stack([p.sample(n_pool, g) for p, g in zip(noise, own, strict=True)])
    noise_z = torch.stack([task.features(rows) for rows in drawn]).float()
    noise_log_ratio = log_ratio(task.bases, noise, drawn).float()
    batches = task.batches(
        data, stage, batch_size=network.batch_size, noise_ratio=noise_ratio, copies=copies,
        noise=(noise_z.to(task.device), noise_log_ratio.to(task.device)),
    )  # fmt: skip

    def batch_loss(module, batch):
        z, ratio, w, noise_z, noise_ratio = batch
        f = module.energy(torch.cat([z, noise_z], dim=1))
        f_data, f_noise = f.split([z.shape[1], noise_z.shape[1]], dim=1)
        of_data, of_noise = loss(ratio + f_data, noise_ratio + f_noise, module.log_partition)
        value = (w * of_data).mean(1)
        if of_noise is not None:
            value = value + of_noise.mean(1)
        return value.sum()

    trained = train_networks(
        task, module, batch_loss, batches, network=network, learning_rate=LEARNING_RATE,
        # an evaluation is a forward pass; a training step costs about three
        evaluation_cost=task.n_judged / (3 * (1 + noise_ratio) * task.n_train), budget=budget,
    )  # fmt: skip
    if objective == "ranking":  # which learns no log Z
        return trained
    return replace(trained, log_partition=module.log_partition.detach().cpu().double())


def _ranking(log_ratio_data, log_ratio_noise, log_partition):
    """Ranking losses; every row of a batch competes with all noise rows of the batch."""
    return ranking_nce_losses(log_ratio_data, log_ratio_noise.unsqueeze(-2)), None
