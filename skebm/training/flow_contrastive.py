"""Training by flow-contrastive estimation: a game, a refinement, a correction by trees."""

import copy
import math
from dataclasses import replace

import numpy as np
import torch

from skebm._engine import Budget
from skebm.energies import Boosting, Network
from skebm.models import CLIP, TiltedMixture
from skebm.objectives import nce_losses

from .classifiers import MANY_ROWS, train_classifiers
from .distributions import halves
from .games import FLOW_EVERY, HEAD_START, MAX_COPIED, play
from .noise_contrastive import train_against_noise
from .tilted_task import TiltedTask
from .trained import Candidate, Trained

LEARNING_RATE = 3e-3

FLOW_EFFORT = 0.4
"""Of the training of flows by maximum likelihood: what they lack, the energy learns sooner."""

GAME = Budget(epochs=4, steps=160, patience_steps=200)
"""``max_epochs="auto"``. In few rows 4 epochs are 12 steps, less than a game needs to take a turn:
hence the least patience."""

REFINEMENT = Budget(epochs=5, steps=600, patience_steps=200)
"""The same of the stage after the game, which goes on from its energy. Against a flow at rest a
step costs half as much, and brings more."""

TIE = 0.01
"""Nats by which trees on the base alone have to be better than those on the energy. A mean of
members gains more from networks than from trees, and single members are what is judged."""

ACCURACY_MEMORY = 0.9
"""Of the moving average of the discriminator's accuracy, per step."""

STAGES = (
    "flow", "flow_after_game", "energy_after_game", "energy_refined", "energy_boosted",
    "flow_boosted",
)  # fmt: skip


def train_by_flow_contrast(
    task: TiltedTask,
    network: Network,
    *,
    generator_learning_rate: float,
    accuracy_threshold: float,
    refinement: bool,
    correction: Boosting | None,
) -> Trained:
    """Train energies in a game with copies of the flows, then against those, then by trees.

    Parameters
    ----------
    task : TiltedTask
        On flows.
    network : Network
    generator_learning_rate : float
    accuracy_threshold : float
        The flow takes a step whenever the discriminator is at least so accurate.
    refinement : bool
        Whether the energy learns once more, against the flow at rest.
    correction : Boosting or None

    Returns
    -------
    Trained
        Its results: ``flows``, distributions of all members after the game, and ``stages``, gains
        over the base by name, in nats per row. The flows are a candidate where they started as the
        base.
    """
    flow = copy.deepcopy(task.flow).requires_grad_(True)
    best = _play(task, network, flow, generator_learning_rate, accuracy_threshold)
    flows = task.coordinates.distributions(flow)
    gain = task.held_log_prob(flows) - task.held_log_prob(task.bases)
    stages = {
        "flow_after_game": task.mean(gain).item(),
        "energy_after_game": task.mean_gain(best.held, best.pool).item(),
    }
    keeps_best = network.patience is not None
    if refinement:
        # where only the confining distribution has mass, f is learned, too
        noise = flows if task.tilts_its_proposal else halves(flows, task.bases)
        refined = train_against_noise(
            task, network, noise=noise, noise_ratio=1.0, start=best, budget=REFINEMENT,
            stage="refinement", copies=task.copies(MAX_COPIED),
        )  # fmt: skip
        best, stages["energy_refined"] = _better(task, best, refined, keeps_best)
    if correction is not None:
        starts = {"energy_boosted": best}
        few = task.n_rows <= MANY_ROWS
        if few and correction.early_stopping and task.mean_gain(best.held, best.pool) > 0:
            # in many columns, what the networks learned of few rows spoils it for the trees
            starts["flow_boosted"] = Trained.nothing(task)
        for stage, first in starts.items():
            boosted = train_classifiers(task, correction, stage=stage, start=first)
            # what the classifiers take for one is the integral of what they correct
            boosted = replace(boosted, log_partition=task.log_partition(first.pool))
            margin = TIE if stage == "flow_boosted" else 0.0
            keeps_best = correction.early_stopping
            best, stages[stage] = _better(task, best, boosted, keeps_best, margin)
    candidates = ()
    if task.tilts_its_proposal:
        model = TiltedMixture(flows, flows, task.features, None)
        candidates = (Candidate(model, gain, "flow"),)
    return replace(best, results={"flows": flows, "stages": stages}, candidates=candidates)


def _play(task, network, flow, generator_learning_rate, accuracy_threshold):
    accuracy = torch.zeros((), dtype=torch.float32, device=task.device)

    def loss(game, y, z, log_base, weight, drawn):
        nonlocal accuracy
        points, log_flow, log_base_there = drawn()
        f = game.energy(torch.cat([z, points], dim=1).clamp(-CLIP, CLIP))
        f_data, f_flow = f.split([z.shape[1], points.shape[1]], dim=1)
        of_data = log_base + f_data - game.generator.log_prob(y)
        of_flow = log_base_there + f_flow - log_flow
        data, drawn_ones = nce_losses(of_data, of_flow, game.log_partition)
        with torch.no_grad():
            c = game.log_partition[:, None]
            right = ((of_data > c).float().mean() + (of_flow < c).float().mean()) / 2
            accuracy = ACCURACY_MEMORY * accuracy + (1 - ACCURACY_MEMORY) * right
        return ((weight * data).mean(1) + drawn_ones.mean(1)).sum()

    def plays(n_steps):
        due = n_steps > HEAD_START and n_steps % FLOW_EVERY == 0
        return due and bool(accuracy >= accuracy_threshold)

    trained, game = play(
        task, network, flow, loss, plays, learning_rate=LEARNING_RATE,
        generator_learning_rate=generator_learning_rate, budget=GAME,
    )  # fmt: skip
    losses = trained.history["train_loss"] / len(task)
    trained.history["jensen_shannon"] = math.log(2.0) - 0.5 * losses
    return replace(trained, log_partition=game.log_partition.detach().cpu().double())


def _better(task, before, after, keeps_best, margin=0.0):
    """The better one of two energies (the second unless `keeps_best`), and its gain.

    The second has to be better by more than `margin`, in nats. It has the history and the log of
    both.
    """
    history, n_before = _one_after_the_other(before.history, after.history)
    gain = task.mean_gain(after.held, after.pool).item()
    level = task.mean_gain(before.held, before.pool).item()
    whole = {"history": history, "log": before.log + after.log}
    if keeps_best and gain <= level + margin:
        return replace(before, **whole), level
    return replace(after, n_iter=n_before + after.n_iter, **whole), gain


def _one_after_the_other(first, second):
    """Histories of two stages of training as one, and the epochs of the first."""
    n_first = int(first["n_iter"][-1])
    rest = second | {"n_iter": n_first + second["n_iter"]}
    nothing = np.full(len(second["gain"]), np.nan)
    whole = {
        name: np.concatenate([values, rest.get(name, nothing)[1:]])
        for name, values in first.items()
    }
    return whole, n_first
