"""Adversarial training: a game for a bound on log Z, and a generator that settles on the model."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from skebm._engine import Budget, train
from skebm.bases import ImplicitGenerator
from skebm.energies import Network
from skebm.exceptions import DivergenceError
from skebm.models import CLIP, TiltedMixture
from skebm.objectives import gradient_penalties, variational_bound_terms

from .games import FLOW_EVERY, HEAD_START, play, views
from .tilted_task import TiltedTask
from .trained import Candidate, Trained

LEARNING_RATE = 1e-3

BUDGET = Budget(epochs=10, steps=400, patience_steps=200)
"""``max_epochs="auto"``. In few rows 10 epochs are 30 steps, less than a game needs to take a turn:
hence the least patience."""

GENERATOR_LEARNING_RATE = {"flow": 5e-4, "implicit": 1e-3}

BOUND_SAMPLES, BOUND_BLOCK = {"flow": 10_240, "implicit": 20_480}, 512
"""Samples of the generator, per member, behind the reported bound; those of a block share the
candidates for the posterior of an implicit generator, so that few blocks make a poor error."""

GENERATOR_STEPS, SETTLING_STEPS = 200, {"flow": 150, "implicit": 250}
"""Of a generator alone: an implicit one to the base before the game, all to the model after it."""

SETTLING_SAMPLES = {"flow": 256, "implicit": 1024}
"""Per step of these. A flow is near the model when the game ends, and comes little nearer."""

SETTLING_RATE = {"flow": 3e-4, "implicit": 2e-3}

SETTLING_GRADIENT_NORM = 100.0
"""Where gradients are clipped in these steps. Energies of sharp distributions make heavy tails,
with usual norms of ten and more, where a clip for the game would draw the generator away from the
model."""

SETTLED, STALLED, MAX_SETTLINGS, GAP_SAMPLES = 0.015, 0.75, 3, 4096
"""A flow takes these steps, so often at most, until its divergence from the model is below so many
nats, or is still such a share of what it was; and samples per member that tell."""


def train_adversarially(
    task: TiltedTask,
    network: Network,
    *,
    kind: str,
    generator_learning_rate: float | str,
    gradient_penalty: float,
) -> Trained:
    """Train energies in a game with generators for the bound on log Z.

    Parameters
    ----------
    task : TiltedTask
        On flows.
    network : Network
    kind : {"flow", "implicit"}
        Of generator.
    generator_learning_rate : float or "auto"
    gradient_penalty : float

    Returns
    -------
    Trained
        Its results: ``generator``, as the game leaves it. A flow that started as the base is a
        candidate.
    """
    if kind == "implicit":
        generator = ImplicitGenerator(task.n_features, len(task), rng=task.seeds.rng("generator"))
        # not in the game, whose early stopping would count these steps
        _follow(task, generator, None, GENERATOR_STEPS, kind, "generator, start", 0)
    else:
        generator = copy.deepcopy(task.flow).requires_grad_(True)
    automatic = isinstance(generator_learning_rate, str)

    def loss(game, y, z, log_base, weight, drawn):
        points, log_generator, log_base_there = drawn()
        both = torch.cat([z, points], dim=1).clamp(-CLIP, CLIP)
        sizes = [z.shape[1], points.shape[1]]
        penalty = 0.0
        if gradient_penalty > 0:
            f, penalties = gradient_penalties(game.energy, both)
            # at the samples, too: their mean of f has no end to how far it can be lowered, and no
            # generator follows an energy over cliffs
            at_data, at_drawn = penalties.split(sizes, dim=1)
            penalty = gradient_penalty * ((weight * at_data).mean(1) + at_drawn.mean(1))
        else:
            f = game.energy(both)
        f_data, f_drawn = f.split(sizes, dim=1)
        bound = variational_bound_terms(f_drawn, log_base_there, log_generator).mean(1)
        return -((weight * f_data).mean(1) - bound - penalty).sum()

    def plays(n_steps):
        return kind == "implicit" or (n_steps > HEAD_START and n_steps % FLOW_EVERY == 0)

    trained, _ = play(
        task, network, generator, loss, plays, learning_rate=LEARNING_RATE, budget=BUDGET,
        generator_learning_rate=(
            GENERATOR_LEARNING_RATE[kind] if automatic else generator_learning_rate
        ),
    )  # fmt: skip
    candidates = ()
    if kind == "flow" and task.tilts_its_proposal:
        flows = task.coordinates.distributions(generator)
        gain = task.held_log_prob(flows) - task.held_log_prob(task.bases)
        model = TiltedMixture(flows, flows, task.features, None)
        candidates = (Candidate(model, gain, "generator"),)
    return replace(trained, results={"generator": generator}, candidates=candidates)


class Settled(NamedTuple):
    """A generator that has followed the fitted model.

    Attributes
    ----------
    parts : tuple
        Of an implicit generator itself and its coordinates, of a flow the distributions of all
        members.
    is_implicit : bool
    bound, bound_std_error : Tensors of shape (K,)
        The lower bound on log Z that it gives, in nats, and its standard error.
    """

    parts: tuple[Any, ...]
    is_implicit: bool
    bound: torch.Tensor
    bound_std_error: torch.Tensor


def settled_generator(
    task: TiltedTask, trained: Trained, model: TiltedMixture, kind: str
) -> Settled:
    """Let the generator of a game follow the fitted model, and measure its bound on log Z.

    Parameters
    ----------
    task : TiltedTask
    trained : Trained
        By `train_adversarially`, or nothing.
    model : TiltedMixture
        On the CPU.
    kind : {"flow", "implicit"}

    Returns
    -------
    Settled
    """
    generator = trained.results.get("generator")
    is_implicit = generator is not None and kind == "implicit"
    if not is_implicit and task.tilts_its_proposal and model.is_untilted:
        # the model is a flow and its own generator: the bound is exact
        exact = torch.zeros(len(task), dtype=torch.float64)
        return Settled((list(model.bases),), False, exact, exact)
    if generator is None:  # nothing was trained
        flows = task.flow_distributions
        parts, draw = (list(flows),), partial(_draw_from_distributions, flows)
    else:
        task.progress.stage("generator")
        if is_implicit:
            _settle(task, generator, model, kind, 0)
            generator = _frozen(generator)
        else:
            generator = _settled_flow(task, generator, model)
        draw = partial(_draw_from_generator, generator, task.coordinates)
        parts = (generator, task.coordinates)
        parts = parts if is_implicit else (task.coordinates.distributions(generator),)
    terms = bound_terms(model, draw, task.seeds.rng("bound"), BOUND_SAMPLES[kind])
    error = terms.std(1) / terms.shape[1] ** 0.5
    return Settled(parts, is_implicit, terms.mean(1), error)


def _settled_flow(task, generator, model):
    """The best of several states of a flow that follows the model, the game's among them."""
    rng = task.seeds.rng("generator, gap")
    best = _frozen(generator)
    best_gap = _gap(model, best, task.coordinates, rng)
    for n_settled in range(MAX_SETTLINGS):
        if best_gap < SETTLED:
            break
        try:
            _settle(task, generator, model, "flow", n_settled)
        except DivergenceError:  # the best state so far is sound
            break
        settled = _frozen(generator)
        gap = _gap(model, settled, task.coordinates, rng)
        stalled = gap > STALLED * best_gap
        if gap < best_gap:
            best, best_gap = settled, gap
        if stalled:
            break
    return best


def _frozen(generator):
    return copy.deepcopy(generator).cpu().double().requires_grad_(False)


def _settle(task, generator, model, kind, n_settled):
    with torch.enable_grad():
        _follow(
            task, generator, model, SETTLING_STEPS[kind], kind, "generator, settling", n_settled
        )


def _follow(task, generator, model, n_steps, kind, stage, n_settled):
    """Train the generator alone: it follows a model, or the bases."""
    log_base, features = views(task)
    energy, factor = None, 1.0
    if model is not None and not model.is_untilted:
        energy = copy.deepcopy(model.energy).float().to(task.device).requires_grad_(False)
        factor = model.inverse_temperature.item()
    generator.to(task.device).requires_grad_(True)
    samples = task.seeds.rng(stage, n_settled, task.device)

    def loss(generator, batch):
        y, log_generator = generator.rsample(SETTLING_SAMPLES[kind], samples)
        f = 0.0 if energy is None else factor * energy(features(y).clamp(-CLIP, CLIP))
        return -variational_bound_terms(f, log_base(y), log_generator).mean(1).sum()

    train(
        generator, loss, [(torch.empty(0),)] * n_steps, learning_rate=SETTLING_RATE[kind],
        weight_decay=0.0, max_epochs=1, max_gradient_norm=SETTLING_GRADIENT_NORM,
        device=task.device,
    )  # fmt: skip


def _gap(model, flow, coordinates, rng):
    """Largest divergence of a member's flow from its model, in nats: log Z minus its bound."""
    draw = partial(_draw_from_generator, flow, coordinates)
    terms = bound_terms(model, draw, rng, GAP_SAMPLES)
    log_partition = terms.logsumexp(1) - math.log(terms.shape[1])
    return (log_partition - terms.mean(1)).max().item()


def _draw_from_distributions(distributions, n, rng):
    """n standardised rows of every distribution, (K, n, d), and their log-densities, (K, n)."""
    x = [q.sample(n, rng) for q in distributions]
    pairs = zip(distributions, x, strict=True)
    return torch.stack(x), torch.stack([q.log_prob(rows) for q, rows in pairs])


def _draw_from_generator(generator, coordinates, n, rng):
    """The same of the generators of all members."""
    y, log_generator = generator.rsample(n, rng)
    x, log_det = coordinates.inverse(y)
    return x, log_generator + log_det


@torch.no_grad()
def bound_terms(
    model: TiltedMixture, draw: Callable, rng: torch.Generator, n_samples: int
) -> torch.Tensor:
    """Terms whose means are lower bounds on the log Z of all members, (K, n_samples).

    Parameters
    ----------
    model : TiltedMixture
    draw : callable
        ``draw(n, rng)`` -> rows of the generators, (K, n, d), and their log-densities.
    rng : torch.Generator
    n_samples : int
        Whole blocks.
    """
    terms = []
    for _ in range(n_samples // BOUND_BLOCK):
        x, log_generator = draw(BOUND_BLOCK, rng)
        log_base = torch.stack([q.log_prob(r) for q, r in zip(model.bases, x, strict=True)])
        f = torch.zeros_like(log_generator) if model.is_untilted else model.tilt(x)
        terms.append(variational_bound_terms(f, log_base, log_generator))
    return torch.cat(terms, dim=1)
