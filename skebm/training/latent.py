"""Training of latent-variable models: decoder, encoder and score network in one engine run."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skebm._engine import Budget, Opponent, evaluations_every, train
from skebm._threads import limit_threads
from skebm.latents import ImplicitEncoder
from skebm.models import LatentVariableModel
from skebm.objectives import (
    calibrated_scores,
    draw_directions,
    entropy_surrogates,
    gaussian_divergences,
    sliced_score_network_losses,
    stein_scores,
)

from .acceptance import Decision, in_nats
from .convergence import warn_if_unfinished
from .latent_start import build_model, choose_n_components
from .task import Task
from .trained import Fitted

BUDGET = Budget(epochs=100, steps=6000, patience_steps=600)
"""``max_epochs="auto"``: whichever lasts longer."""

LEARNING_RATE = 2e-3

SOLO_STEPS = 2
"""Steps that the score network takes alone before each step of both: with none it lags behind."""

STEIN_DRAWS = 16
"""Latent vectors per row that Stein's estimate of the score is made from."""

TEMPERED = 0.6
"""Share of the steps in which the weight of the divergence from the prior goes to one."""

JUDGED_ROWS, JUDGED_DRAWS = 5_000, 32
"""Held-out rows, and draws for each, in an evaluation."""

STEP_COST = 6
"""Of a step on a row, in draws."""

COMPARED_ROWS = 2_000
"""Held-out rows, at most, on which training is compared with its start."""

NOT_TRAINED = Decision("start", 0.0, 0.0, "start alone: no network was trained")

ONE_SIDED = 1.645
"""Standard errors by which training has to beat its start."""


@dataclass(frozen=True)
class LatentSettings:
    """The fields of the estimator that make and train a latent-variable model, by their names."""

    n_components: int | str
    encoder: str
    likelihood: str
    kl_weight_start: float
    n_importance_samples: int
    encoder_model: Any
    decoder_model: Any
    hidden_layer_sizes: int | Sequence[int]
    learning_rate: float | str
    weight_decay: float
    batch_size: int
    max_epochs: int | str
    patience: int | None
    callbacks: Sequence[Any] | None


def fit_latent(task: Task, settings: LatentSettings) -> Fitted:
    """Fit a latent-variable model: start, training, comparison with the start, held-out scores.

    Parameters
    ----------
    task : Task
        Of one member.
    settings : LatentSettings

    Returns
    -------
    Fitted
    """
    task.progress.stage("factor analysis")
    model, goes_on = _start(task, settings)
    start = copy.deepcopy(model)
    # a decoder with nothing to learn has one likelihood, whatever the encoder: none to stop by
    learns = any(p.requires_grad for p in model.decoder.parameters())
    stops_early = settings.patience is not None and learns
    history, n_iter, decision = None, 0, NOT_TRAINED
    if settings.max_epochs != 0:
        history = train_latent(task, model, settings, stops_early)
        n_iter = int(history["epoch"][-1])
    model, start = model.cpu().double().eval(), start.double().eval()
    task.progress.stage("log-likelihood")
    if n_iter:
        decision = Decision("networks", math.nan, math.nan, "networks kept without a test")
    if n_iter and stops_early:
        n_iter = int(history["epoch"][np.nanargmax(history["validation_gain"])])
        # a decoder of the user has been fitted to nothing at the start
        fitted = isinstance(settings.decoder_model, str) or goes_on
        if not n_iter:
            decision = Decision("start", 0.0, 0.0, "start kept: training found no gain")
        elif fitted:
            gain, error = gain_over(task, model, start)
            told = in_nats(gain, error)
            if gain > ONE_SIDED * error:
                decision = Decision("networks", gain, error, f"networks accepted: {told}")
            else:
                decision = Decision("start", gain, error, f"start kept; networks rejected: {told}")
                model, n_iter = start, 0
    model.requires_grad_(False)
    model = model.to(task.model_device)
    return _finished(task, settings, model, history, n_iter, decision)


def _start(task, settings):
    """The model to start from, and whether it is that of the last fit."""
    (split,), start = task.splits, task.start
    n_components = settings.n_components
    if isinstance(n_components, str):
        n_components = (
            choose_n_components(task.x, task.weight, split, task.layout)
            if start is None
            else start.n_components
        )
    train_rows = split[0]
    model = build_model(
        task.x[train_rows], task.weight[train_rows], n_components, settings, task.seeds, task.layout
    )
    if start is None:
        return model, False
    old, new = start.state_dict(), model.state_dict()
    goes_on = {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    if goes_on:
        model.load_state_dict(old)
    return model, goes_on


def _finished(task, settings, model, history, n_iter, decision):
    columns, seed, (held,) = task.columns, task.seeds.seed, task.held
    device = next(model.parameters()).device
    if history is None:  # nothing was trained
        found, _ = model.log_prob(
            task.x[held].to(device), seed, n_samples=settings.n_importance_samples
        )
        found = found.cpu()
        history = {
            "epoch": np.zeros(1, dtype=int),
            "validation_gain": np.atleast_1d(np.average(found, weights=task.weight[held])),
            "train_loss": np.full(1, np.nan),
            "log": [],
        }
    factor = columns.log_factors_of(task.given[held].numpy())
    mean_factor = np.average(factor, weights=task.weight[held])
    attributes = {
        "n_iter_": n_iter,
        "accepted_": decision.accepted,
        "held_out_gain_": decision.gain,
        "held_out_gain_std_error_": decision.std_error,
        "_summary": decision.text,
        "n_components_": model.n_components,
        "history_": {
            "n_iter": history["epoch"],
            "held_out_log_likelihood": history["validation_gain"] + mean_factor,
            "train_loss": history["train_loss"],
        },
    }
    if history["log"]:
        attributes["training_log_"] = history["log"]
    if settings.likelihood == "gaussian":
        variance = np.zeros(len(columns.varying))
        likelihood = model.likelihood.of_values if columns.states else model.likelihood
        learned = likelihood.variance.cpu().numpy()
        variance[columns.varying] = learned * columns.scale**2
        attributes["noise_variance_"] = variance
    scores = np.full(task.n_rows, np.nan)
    measured, _ = model.log_prob(
        task.given[held].to(device), seed, n_samples=settings.n_importance_samples
    )
    scores[held.numpy()] = measured.cpu().numpy() + factor
    return Fitted(model, scores, task.judges, attributes)


def train_latent(
    task: Task, model: LatentVariableModel, settings: LatentSettings, stops_early: bool
) -> dict[str, np.ndarray]:
    """Train all networks in place by the evidence lower bound.

    Parameters
    ----------
    task : Task
    model : LatentVariableModel
    settings : LatentSettings
    stops_early : bool
        Whether the state that is best on the held-out rows is kept.

    Returns
    -------
    dict
        The engine's history; its gains are held-out log-likelihoods, in nats per row.
    """
    device, seeds = task.device, task.seeds
    row_weight, automatic = task.row_weight(), isinstance(settings.learning_rate, str)
    learning_rate: Any = LEARNING_RATE if automatic else settings.learning_rate

    def data(x, _):
        return x.float().to(device)[None], row_weight[None]

    batches = task.batches(data, "latent", batch_size=settings.batch_size)
    n_batches = len(batches)
    max_epochs = BUDGET.max_epochs(settings.max_epochs, n_batches)
    noise = seeds.rng("noise", device=device)
    tempered_steps, n_done = TEMPERED * max_epochs * n_batches, 0
    learns_score = getattr(model.encoder, "score_network", None) is not None

    def loss(model, batch):
        nonlocal n_done
        rows, w = batch[0][0], batch[1][0]
        kl_weight = settings.kl_weight_start ** max(0.0, 1.0 - n_done / tempered_steps)
        n_done += 1
        value = (w * negative_bounds(model, rows, noise, kl_weight)).mean()
        if learns_score:
            # the score network raises the loss: minus its own, which is not reported
            own = (w * score_network_losses(model.encoder, rows, noise)).mean()
            value = value - (own - own.detach())
        return value

    opponent = None
    if learns_score:
        solo_loss = _solo_loss(task, row_weight, batches.batch_size, noise)
        opponent = Opponent(
            model.encoder.score_network, learning_rate, n_solo_steps=SOLO_STEPS, solo_loss=solo_loss
        )
    judged = task.held[0][:JUDGED_ROWS]
    held_x, held_weight = task.x[judged].float().to(device), task.weight[judged]
    held_weight = held_weight / held_weight.sum()

    def level(model):
        # a bound will do, and the encoder is to be good enough for it
        found = model.log_likelihoods(
            held_x, seeds.seed, at_modes=False, n_samples=JUDGED_DRAWS, n_adaptation=0
        )
        return (held_weight @ found.value.cpu()).item()

    model.to(device)
    # a draw is a forward pass of the decoder
    every = evaluations_every(len(judged) * JUDGED_DRAWS / (STEP_COST * task.n_train))
    # at another temperature the bound on the likelihood is not what training is after
    waits = stops_early and settings.kl_weight_start == 1.0
    patience = BUDGET.patience(settings.patience, n_batches, every) if waits else None
    with limit_threads(task.n_threads), torch.enable_grad():
        history = train(
            model, loss, batches, level if stops_early else None,
            learning_rate=learning_rate,
            weight_decay=settings.weight_decay, max_epochs=max_epochs,
            patience=patience,
            evaluate_every=every, callbacks=settings.callbacks, device=device, opponent=opponent,
            progress=lambda state: task.progress.stage(
                "networks", state["epoch"], max_epochs, held_out=f"{state['best_gain']:.3f} nats"
            ),
        )  # fmt: skip
    warn_if_unfinished(history, max_epochs, patience, "max_epochs")
    return history


def _solo_loss(task, row_weight, n_rows, noise):
    """What the score network raises in its steps alone, on rows of its own choice."""
    candidates, x = task.train[0].to(task.device), task.x.float().to(task.device)

    def loss(model):
        picked = torch.randint(len(candidates), (n_rows,), generator=noise, device=task.device)
        picked = candidates[picked]
        losses = score_network_losses(model.encoder, x[picked], noise)
        return -(row_weight[picked] * losses).mean()

    return loss


def gain_over(
    task: Task, model: LatentVariableModel, start: LatentVariableModel
) -> tuple[float, float]:
    """Mean held-out log-likelihood after training minus that before, and its standard error.

    Parameters
    ----------
    task : Task
    model, start : LatentVariableModel
        After training, and before.

    Returns
    -------
    gain, std_error : float
        In nats per row; the error is that of the rows and of the integrals.
    """
    rows = task.held[0][:COMPARED_ROWS]
    x, weight = task.x[rows], task.weight[rows]
    models = [copy.deepcopy(m).double().eval() for m in (model, start)]
    new, old = (m.log_likelihoods(x, task.seeds.seed) for m in models)
    share = weight / weight.sum()
    gains = new.value - old.value
    mean = share @ gains
    error = share.square() @ ((gains - mean).square() + new.std_error**2 + old.std_error**2)
    return mean.item(), error.sqrt().item()


def negative_bounds(
    model: LatentVariableModel, x: torch.Tensor, rng: torch.Generator, kl_weight: float
) -> torch.Tensor:
    """Minus the evidence lower bound of rows, (n, d) -> (n,), to be lowered.

    The entropy of an implicit encoder has the right gradient; its value is that of a Gaussian one.
    """
    encoder = model.encoder
    location, log_scale = encoder(x)
    implicit = isinstance(encoder, ImplicitEncoder)
    stein = implicit and encoder.score_network is None
    n_draws = STEIN_DRAWS if stein else 1
    noise = encoder.noise(len(x), n_draws, rng=rng)
    u = encoder.standardized(x, noise)
    z = location[:, None] + log_scale.exp()[:, None] * u
    fit = model.log_likelihood(x[:, None], z).mean(1)
    if not implicit:
        return kl_weight * gaussian_divergences(location, log_scale) - fit
    if stein:
        score = stein_scores(u)
    else:
        score = calibrated_scores(encoder.score(x, u.detach()), u)
    of_u = entropy_surrogates(u, score).mean(1)
    of_u = of_u - of_u.detach() + 0.5 * u.shape[-1] * (1.0 + math.log(2 * math.pi))
    divergence = -model.log_prior(z).mean(1) - log_scale.sum(-1) - of_u
    return kl_weight * divergence - fit


def score_network_losses(
    encoder: ImplicitEncoder, x: torch.Tensor, rng: torch.Generator
) -> torch.Tensor:
    """Sliced score matching of the score network on one fresh draw per row, (n, d) -> (n,)."""
    with torch.no_grad():
        u = encoder.standardized(x, encoder.noise(len(x), 1, rng=rng))
    directions = draw_directions(u, rng)
    return sliced_score_network_losses(lambda v: encoder.score(x, v), u, directions).squeeze(-1)
