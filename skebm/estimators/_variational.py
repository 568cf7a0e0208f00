"""Training of latent-variable models: decoder, encoder and score network in one engine run."""

import copy
import math
from functools import partial

import torch
from torch import nn

from skebm._engine import MemberBatches, Opponent, train
from skebm.latents import (
    FULL_NOISE_SHARE,
    AffinePlus,
    BernoulliLikelihood,
    GaussianEncoder,
    GaussianLikelihood,
    ImplicitEncoder,
    LatentVariableModel,
    factor_analysis,
    perceptron,
    user_network,
)
from skebm.objectives import (
    calibrated_scores,
    draw_directions,
    entropy_surrogates,
    gaussian_divergences,
    sliced_score_network_losses,
    stein_scores,
)
from skebm.partition import RowStreams, marginal_likelihoods

from ._threads import limit_threads

EPOCHS, STEPS = 100, 6000
"""``max_epochs="auto"``: whichever lasts longer."""

PATIENCE_STEPS = 600
"""Steps that patience lasts for, at least."""

SOLO_STEPS = 2
"""Steps that the score network takes alone before each step of both: with none it lags behind."""

STEIN_DRAWS = 16
"""Latent vectors per row that Stein's estimate of the score is made from."""

TEMPERED = 0.6
"""Share of the steps in which the weight of the divergence from the prior goes to one."""

JUDGED_ROWS, JUDGED_DRAWS = 5_000, 32
"""Held-out rows, and draws for each, in an evaluation."""

STEP_COST, EVALUATION_SHARE, LOOKS = 6, 0.1, 3
"""Cost of a step on a row, in draws; share of the time that judging may take; evaluations, at
least, before patience ends."""

MOMENT_DRAWS, MOMENT_ELEMENTS = 128, 2**22
"""Draws of the encoder that give the moments of a first proposal; numbers made at once for them."""

ONE_SIDED = 1.645
"""Standard errors by which training has to beat its start."""

CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of components that "auto" chooses from: curved, they do the work of more."""

PLANES = 4
"""Fewest of them, where there are as many columns: a curved surface needs more than a plane."""


class LatentNetworks(nn.Module):
    """A latent-variable model and its encoder.

    Parameters
    ----------
    model : LatentVariableModel
    encoder : GaussianEncoder or ImplicitEncoder
    """

    def __init__(self, model, encoder):
        super().__init__()
        self.model, self.encoder = model, encoder

    def moments(self, x, generator):
        """Approximate posterior means and covariances of rows, (n, k) and (n, k, k)."""
        noise = antithetic_noise(self.encoder, MOMENT_DRAWS, generator, x.dtype)
        n_rows = max(1, MOMENT_ELEMENTS // (MOMENT_DRAWS * (x.shape[1] + noise.shape[1])))
        parts = [self.encoder.moments(rows, noise) for rows in x.split(n_rows)]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    @torch.no_grad()
    def marginals(self, x, seed, **options):
        """Measured log-likelihoods of rows, (n, d) -> Marginals."""
        generator = torch.Generator(x.device).manual_seed(seed)
        location, covariance = self.moments(x, generator)

        def log_joint(rows, z):
            return self.model.log_joint(x[rows][:, None], z.to(x.dtype))

        return marginal_likelihoods(
            log_joint, location.double(), covariance.double(), RowStreams(x, seed), **options
        )


def antithetic_noise(encoder, n, generator, dtype):
    """Noise in pairs of opposite signs, (n, n_noise): what is odd in it averages out."""
    half = encoder.noise(-(-n // 2), generator=generator, dtype=dtype)
    return torch.cat([half, -half])[:n]


def choose_n_components(x, weight, split):
    """Number of factors whose factor analysis has the best held-out likelihood."""
    train_rows, held = split
    d, best, chosen = x.shape[1], -math.inf, 1
    for k in CANDIDATES:
        if k > d or k >= len(train_rows):
            break
        factors = factor_analysis(x[train_rows], weight[train_rows], k)
        level = (weight[held] @ factors.log_prob(x[held])).item()
        if level > best:
            best, chosen = level, k
    return max(chosen, min(d, PLANES))


def build_networks(
    x, weight, n_components, *, binary, likelihood, encoder, score_estimator, encoder_model,
    decoder_model, hidden_layer_sizes, seeds,
):  # fmt: skip
    """Networks that start as factor analysis, with its exact posterior as the encoder.

    Modules of the user replace the decoder, or the encoder's location and scale, as they are.

    Parameters
    ----------
    x : Tensor of shape (n, d)
        Rows to start from.
    weight : Tensor of shape (n,)
    n_components : int
    binary : bool
        Whether all values are 0 or 1, for the Bernoulli likelihood.
    likelihood, encoder, score_estimator, encoder_model, decoder_model, hidden_layer_sizes
        As of the estimator.
    seeds : Seeds

    Returns
    -------
    LatentNetworks
    """
    d, k = x.shape[1], n_components
    factors = factor_analysis(x, weight, k)
    center, loadings = factors.center, factors.loadings
    posterior_weight, posterior_bias, posterior_scale = factors.posterior()
    if likelihood == "bernoulli":
        p = center.clamp(0.01, 0.99)
        center, loadings = p.logit(), loadings / (p * (1 - p))[:, None]
        law = BernoulliLikelihood(binary)
    elif isinstance(decoder_model, str):
        law = GaussianLikelihood(factors.variance.float())
    else:
        # little noise: with much of it z is of no use at first, and may stay so
        total = factors.variance + loadings.square().sum(1)
        law = GaussianLikelihood((FULL_NOISE_SHARE * total).float())
    make = partial(perceptron, hidden_layer_sizes=hidden_layer_sizes)
    if isinstance(decoder_model, str):
        decoder = AffinePlus(loadings, center, make(k, d, seed=seeds.of("decoder")))
    else:
        decoder = user_network(decoder_model, "decoder_model", k, d, seed=seeds.of("decoder"))
        # nothing is known of what its components mean
        posterior_weight, posterior_bias = torch.zeros(k, d), torch.zeros(k)
        posterior_scale = torch.ones(k)
    if isinstance(encoder_model, str):
        network = AffinePlus(
            torch.cat([posterior_weight, torch.zeros(k, d)]),
            torch.cat([posterior_bias, posterior_scale.log()]),
            make(d, 2 * k, seed=seeds.of("encoder")),
        )
    else:
        network = user_network(encoder_model, "encoder_model", d, 2 * k, seed=seeds.of("encoder"))
    if encoder == "gaussian":
        coder = GaussianEncoder(network, k)
    else:
        score = (
            make(d + k, k, seed=seeds.of("score network")) if score_estimator == "sliced" else None
        )
        coder = ImplicitEncoder(
            network, k, make(d + 2 * k, k, seed=seeds.of("encoder, bent")), score
        )
    return LatentNetworks(LatentVariableModel(decoder, law, k), coder)


def negative_bounds(networks, x, generator, kl_weight, *, score_estimator):
    """Minus the evidence lower bound of rows, (n, d) -> (n,), to be lowered.

    The entropy of an implicit encoder has the right gradient; its value is that of a Gaussian one.
    """
    model, encoder = networks.model, networks.encoder
    location, log_scale = encoder(x)
    implicit = isinstance(encoder, ImplicitEncoder)
    n_draws = STEIN_DRAWS if implicit and score_estimator == "stein" else 1
    noise = encoder.noise(len(x), n_draws, generator=generator)
    u = encoder.standardized(x, noise)
    z = location[:, None] + log_scale.exp()[:, None] * u
    fit = model.log_likelihood(x[:, None], z).mean(1)
    if not implicit:
        return kl_weight * gaussian_divergences(location, log_scale) - fit
    if score_estimator == "stein":
        score = stein_scores(u)
    else:
        score = calibrated_scores(encoder.score(x, u.detach()), u)
    of_u = entropy_surrogates(u, score).mean(1)
    of_u = of_u - of_u.detach() + 0.5 * u.shape[-1] * (1.0 + math.log(2 * math.pi))
    divergence = -model.log_prior(z).mean(1) - log_scale.sum(-1) - of_u
    return kl_weight * divergence - fit


def score_network_losses(encoder, x, generator):
    """Sliced score matching of the score network on one fresh draw per row, (n, d) -> (n,)."""
    with torch.no_grad():
        u = encoder.standardized(x, encoder.noise(len(x), 1, generator=generator))
    directions = draw_directions(u, generator)
    return sliced_score_network_losses(lambda v: encoder.score(x, v), u, directions).squeeze(-1)


def train_latent(
    networks, x, weight, split, *, score_estimator, kl_weight_start, refresh, seeds,
    learning_rate, weight_decay, batch_size, max_epochs, patience, early_stopping, callbacks,
    device, n_threads, progress,
):  # fmt: skip
    """Train all networks in place by the evidence lower bound.

    Parameters
    ----------
    networks : LatentNetworks
    x : Tensor of shape (n, d)
    weight : Tensor of shape (n,)
    split : (train, held_out) index tensors
    refresh : callable or None
        ``refresh(generator)`` -> rows like `x` with fresh jitter, called every epoch.
    seeds : Seeds
    max_epochs : int or None
        None is 100, or as many as make 6,000 steps.
    **others
        As of the estimator and the engine.

    Returns
    -------
    dict of arrays
        The engine's history; its gains are held-out log-likelihoods, in nats per row.
    """
    train_rows, held = split
    row_weight = (weight / weight.mean()).float().to(device)[None]

    def tensors(x):
        return x.float().to(device)[None], row_weight

    fixed = tensors(x)
    batches = MemberBatches(
        fixed if refresh is None else lambda generator: tensors(refresh(generator)),
        [train_rows], batch_size=batch_size, generator=seeds.generator("batches"),
    )  # fmt: skip
    n_batches = len(batches)
    if max_epochs is None:
        max_epochs = max(EPOCHS, math.ceil(STEPS / n_batches))
    noise = seeds.generator("noise", device=device)
    tempered_steps, n_done = TEMPERED * max_epochs * n_batches, 0
    encoder = networks.encoder
    learns_score = getattr(encoder, "score_network", None) is not None

    def loss(networks, batch):
        nonlocal n_done
        rows, w = batch[0][0], batch[1][0]
        kl_weight = kl_weight_start ** max(0.0, 1.0 - n_done / tempered_steps)
        n_done += 1
        bounds = negative_bounds(networks, rows, noise, kl_weight, score_estimator=score_estimator)
        value = (w * bounds).mean()
        if learns_score:
            # the score network raises the loss: minus its own, which is not reported
            own = (w * score_network_losses(networks.encoder, rows, noise)).mean()
            value = value - (own - own.detach())
        return value

    candidates = train_rows.to(device)

    def solo_loss(networks):
        picked = torch.randint(len(candidates), (batches.batch_size,), generator=noise,
                               device=device)  # fmt: skip
        picked = candidates[picked]
        losses = score_network_losses(networks.encoder, fixed[0][0, picked], noise)
        return -(row_weight[0, picked] * losses).mean()

    opponent = None
    if learns_score:
        opponent = Opponent(
            encoder.score_network, learning_rate, n_solo_steps=SOLO_STEPS, solo_loss=solo_loss
        )
    judged = held[:JUDGED_ROWS]
    held_x, held_weight = x[judged].float().to(device), weight[judged] / weight[judged].sum()

    def level(networks):
        found = networks.marginals(held_x, seeds.seed, n_samples=JUDGED_DRAWS, n_adaptation=0)
        return (held_weight @ found.value.cpu()).item()

    networks.to(device)
    # a draw is a forward pass of the decoder
    cost = len(judged) * JUDGED_DRAWS / (STEP_COST * len(train_rows))
    evaluate_every = max(1, round(cost / EVALUATION_SHARE))
    patience = max(patience, LOOKS * evaluate_every, math.ceil(PATIENCE_STEPS / n_batches))
    # at another temperature the bound on the likelihood is not what training is after
    waits = early_stopping and kl_weight_start == 1.0
    with limit_threads(n_threads), torch.enable_grad():
        return train(
            networks, loss, batches,
            level if early_stopping else None,
            learning_rate=learning_rate, weight_decay=weight_decay, max_epochs=max_epochs,
            patience=patience if waits else None, evaluate_every=evaluate_every,
            callbacks=callbacks, device=device, opponent=opponent,
            progress=lambda state: progress.stage(
                "networks", state["epoch"], max_epochs, held_out=f"{state['best_gain']:.3f} nats"
            ),
        )  # fmt: skip


def beats(networks, start, x, weight, seed):
    """Whether networks raise the mean log-likelihood of rows, by a test at a level of 5 %.

    Returns
    -------
    bool
    """
    new, old = (copy.deepcopy(n).double().eval().marginals(x, seed) for n in (networks, start))
    share = weight / weight.sum()
    gains = new.value - old.value
    mean = share @ gains
    error = share.square() @ ((gains - mean).square() + new.std_error**2 + old.std_error**2)
    return bool(mean > ONE_SIDED * error.sqrt())
