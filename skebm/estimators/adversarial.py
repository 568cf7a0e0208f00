"""Adversarial training with a bound on log Z."""

import copy
import math
from functools import partial
from numbers import Real

import numpy as np
import torch

from skebm._engine import train
from skebm._sklearn_compat import Interval, StrOptions
from skebm.bases import ImplicitGenerator
from skebm.exceptions import DivergenceError
from skebm.objectives import gradient_penalties, variational_bound_terms

from ._flow_based import HEAD_START, FlowBasedDensity, FlowDensity, sampling_generator
from ._model import CLIP
from ._neural import if_auto
from ._threads import limit_threads
from ._tilted import MAX_COPIES

BOUND_SAMPLES, BOUND_BLOCK = 20_480, 512
"""Samples of the generator, per member, behind the reported bound; those of a block share the
candidates for the posterior of an implicit generator, so that few blocks make a poor error."""

GENERATOR_STEPS, SETTLING_STEPS = 200, 250
"""Of a generator alone: an implicit one to the base before the game, all to the model after it."""

SETTLING_SAMPLES, SETTLING_RATE = 1024, {"flow": 3e-4, "implicit": 2e-3}

SETTLING_GRADIENT_NORM = 100.0
"""Where gradients are clipped in these steps. Energies of sharp laws make heavy tails, with usual
norms of ten and more, where a clip for the game would draw the generator away from the model."""

SETTLED, STALLED, MAX_SETTLINGS, GAP_SAMPLES = 0.015, 0.9, 3, 4096
"""A flow takes these steps, so often at most, until its divergence from the model is below so many
nats, or is still such a share of what it was; and samples per member that tell."""

GENERATOR_MALA_STEPS = 100


def draw_from_laws(laws, n, generator):
    """n standardised rows of every law, (K, n, d), and their log-densities, (K, n)."""
    x = [law.sample(n, generator) for law in laws]
    return torch.stack(x), torch.stack([q.log_prob(r) for q, r in zip(laws, x, strict=True)])


def draw_from_rival(rival, coordinates, n, generator):
    """The same of the generators of all members."""
    y, log_rival = rival.rsample(n, generator)
    x, log_det = coordinates.inverse(y)
    return x, log_rival + log_det


@torch.no_grad()
def bound_terms(model, draw, generator, n_samples):
    """Terms whose means are lower bounds on the log Z of all members, (K, n_samples).

    Parameters
    ----------
    model : TiltedMixture
    draw : callable
        ``draw(n, generator)`` -> rows of the generators, (K, n, d), and their log-densities.
    generator : torch.Generator
    n_samples : int
        Whole blocks.
    """
    terms = []
    for _ in range(n_samples // BOUND_BLOCK):
        x, log_generator = draw(BOUND_BLOCK, generator)
        log_base = torch.stack([q.log_prob(r) for q, r in zip(model.bases, x, strict=True)])
        f = torch.zeros_like(log_generator) if model.is_untilted else model.tilt(x)
        terms.append(variational_bound_terms(f, log_base, log_generator))
    return torch.cat(terms, dim=1)


class ImplicitSampler:
    """Draws of an implicit generator: those of all members in equal parts.

    Parameters
    ----------
    columns : Columns
    rival : ImplicitGenerator
    coordinates : Coordinates
    """

    def __init__(self, columns, rival, coordinates):
        self._columns, self._rival, self._coordinates = columns, rival, coordinates

    def sample(self, n_samples=1, random_state=None):
        """Draw rows, (n_samples, n_features)."""
        generator = sampling_generator(n_samples, random_state)
        n_members = self._rival.n_members
        with torch.no_grad(), limit_threads(1):
            y = self._rival.sample(-(-n_samples // n_members), generator)
            x = self._coordinates.inverse(y)[0].flatten(0, 1)
            x = x[torch.randperm(len(x), generator=generator)[:n_samples]]
            return self._columns.restore(x.numpy())


class AdversarialEBM(FlowBasedDensity):
    r"""Normalised density from a game of an energy with a generator: no chains, no noise to choose.

    .. math:: \log p(x) = \log q_0(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    q_0 is a normalizing flow fitted by maximum likelihood. The energy raises f at the rows and
    lowers it at samples of a generator g, which follows the model: it raises

    .. math:: E_g [f + \log q_0] + H(g) \le \log Z,

    a bound on log Z that is tight where g is the model [1]_. As in :class:`~skebm.NCEDensity`,
    log Z is measured afterwards, the estimator is the mean of `n_members` cross-fitted members, and
    f is kept only if the held-out likelihood gains by more than two standard errors, so the result
    is not below its base. By the same rule a generator that is a flow, and has become a better
    density than both, is the model in their place.

    Parameters
    ----------
    generator : {"flow", "implicit"}, default="flow"
        "flow": starts as q_0; its entropy is exact. "implicit": a network of noise, z = g(u) +
        sigma eps, quick to sample; its entropy is estimated from below, with the posterior of u
        sampled by importance (:class:`skebm.bases.ImplicitGenerator`): for few columns.
    generator_learning_rate : float or "auto", default="auto"
        "auto" is 5e-4 for flows and 1e-3 for implicit generators.
    gradient_penalty : float, default=0.05
        Weight of the mean of the squared gradient of f, at the rows and at the samples of the
        generator. With less of it f cuts deeper, until the generator cannot follow any more.
    flow : str, zuko flow or callable, default="coupling"
        What the base, and a generator that is a flow, are: "coupling", or with zuko installed one
        of "nsf", "maf", "nice" and "gf", a flow of zuko without context, or a callable that makes
        one from n_features.
    base : {"flow"} or None, default="flow"
        None is the pure energy-based model, exp(f) / Z with a confining Gaussian of three standard
        deviations.
    energy_model : str, torch.nn.Module or callable, default="auto"
        "periodic" ("auto"): network on periodic embeddings of the columns. "mlp": network on
        piecewise-linear embeddings. A module (instance, or a class or factory called with
        n_features), (n, n_features) -> (n,) or (n, 1), which is copied and never trained itself.
        Energies see Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Of the energies.
    learning_rate : float or "auto", default="auto"
        Of the energies; "auto" is 1e-3.
    weight_decay : float, default=1e-3
        Of AdamW, for the energies.
    batch_size : int, default=256
        Rows, and samples of the generator, per member and step.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most; "auto" is 20, or 700 steps if that is more. 0 is the flow
        alone.
    early_stopping : bool, default=True
        Whether to stop by, and keep the best state on, held-out normalised likelihood.
    validation_fraction : float, default=0.1
        Rows held out when `n_members` is 1. With more members every row is held out once.
    patience : int, default=20
        Epochs without improvement before training stops, but at least 200 steps.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below .01 nats, and
        anneals where the effective sample size stays below one per cent.
    smoothing : float, "scott" or "multiscale", default=0.0
        As in :class:`~skebm.NCEDensity`.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` calls outliers. "auto" takes the threshold from
        out-of-fold scores instead, so that 5 % of *new* rows of the same law fall below it.
    callbacks : list of skorch callbacks, default=None
        Called in the game.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps".
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps flow and columns, and goes on from the trained energies.
        The generator starts anew, and settles on the model at the end all the same.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    generator_ : object
        The generator after the game, with `sample` in the units of X; a flow also has
        `score_samples` and `score`.
    log_partition_bound_ : ndarray of shape (n_members,)
        The lower bound on log Z of the fitted model that the generator gives, in nats. How far it
        lies below `log_partition_` is the divergence from the generator to the model (and, for
        implicit generators, what their entropy is underestimated by).
    log_partition_bound_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z; inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base) and ``train_loss`` (minus the value of the game and the
        penalty; no likelihood, because the bound moves).
    n_iter_ : int
        Epochs of the state kept; 0 if none was accepted.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of every training row (of positive weight) under the member that has not seen
        it; NaN for rows that were never held out.
    model_ : torch.nn.Module
        The fitted density on standardised columns.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    FlowContrastiveDensity : A game with a discriminator; usually the better density.
    NCEDensity : No game at all; usually the better density still.

    References
    ----------
    .. [1] Grathwohl, W., Kelly, J., Hashemi, M., Norouzi, M., Swersky, K. and Duvenaud, D. (2021).
           No MCMC for me: amortized sampling for fast and stable training of energy-based models.
           ICLR.

    Examples
    --------
    >>> from skebm import AdversarialEBM
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = AdversarialEBM(n_members=1, max_epochs=5, random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.generator_.sample(3, random_state=0).shape
    (3, 2)
    """

    _parameter_constraints: dict = {
        **FlowBasedDensity._parameter_constraints,
        "generator": [StrOptions({"flow", "implicit"})],
        "generator_learning_rate": [
            StrOptions({"auto"}),
            Interval(Real, 0, None, closed="neither"),
        ],
        "gradient_penalty": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        *,
        generator="flow",
        generator_learning_rate="auto",
        gradient_penalty=0.05,
        flow="coupling",
        base="flow",
        energy_model="auto",
        n_members=4,
        hidden_layer_sizes=(128, 128),
        learning_rate="auto",
        weight_decay=1e-3,
        batch_size=256,
        max_epochs="auto",
        early_stopping=True,
        validation_fraction=0.1,
        patience=20,
        n_partition_samples="auto",
        smoothing=0.0,
        contamination="auto",
        callbacks=None,
        device="auto",
        random_state=None,
        warm_start=False,
        verbose=0,
    ):
        self.generator = generator
        self.generator_learning_rate = generator_learning_rate
        self.gradient_penalty = gradient_penalty
        self.flow = flow
        self.base = base
        self.energy_model = energy_model
        self.n_members = n_members
        self.hidden_layer_sizes = hidden_layer_sizes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.n_partition_samples = n_partition_samples
        self.smoothing = smoothing
        self.contamination = contamination
        self.callbacks = callbacks
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose

    def _train(self, members, refresh, device, kept, progress):
        flow, coordinates = self._start
        implicit = self.generator == "implicit"
        if implicit:
            rival = ImplicitGenerator(
                flow.n_features, len(members), generator=members.seeds.generator("generator")
            )
            # not in the game, whose early stopping would count these steps
            self._settle(members, rival, None, GENERATOR_STEPS, "generator, start", 0, device)
        else:
            rival = copy.deepcopy(flow).requires_grad_(True)

        def loss(game, y, z, log_base, weight, drawn):
            points, log_rival, log_base_there = drawn()
            z = z.clamp(-CLIP, CLIP)
            f = game.energy(torch.cat([z, points.clamp(-CLIP, CLIP)], dim=1))
            f_data, f_rival = f.split([z.shape[1], points.shape[1]], dim=1)
            bound = variational_bound_terms(f_rival, log_base_there, log_rival).mean(1)
            value = (weight * f_data).mean(1) - bound
            if self.gradient_penalty > 0:
                # at the samples, too: their mean of f has no end to how far it can be lowered, and
                # no generator follows an energy over cliffs
                both = torch.cat([z, points.clamp(-CLIP, CLIP)], dim=1)
                at_data, at_rival = gradient_penalties(game.energy, both).split(
                    [z.shape[1], points.shape[1]], dim=1
                )
                penalty = (weight * at_data).mean(1) + at_rival.mean(1)
                value = value - self.gradient_penalty * penalty
            return -value.sum()

        trained, *_ = self._play(
            members, rival, loss, lambda n_steps: implicit or n_steps > HEAD_START,
            learning_rate=if_auto(self.learning_rate, 1e-3),
            rival_learning_rate=if_auto(self.generator_learning_rate, 1e-3 if implicit else 5e-4),
            refresh=refresh, device=device, kept=kept, progress=progress,
        )  # fmt: skip
        if not implicit:
            self._trained = copy.deepcopy(rival), coordinates
        self._rival = rival, coordinates
        return trained

    def _tilt(self, members, kept, refresh, device, progress):
        model, trained, accepted = super()._tilt(members, kept, refresh, device, progress)
        if not hasattr(self, "_rival"):
            return model, trained, accepted
        implicit = self.generator == "implicit"
        if not implicit and self.base is not None and model.is_untilted:
            del self._rival  # the model is a flow, and its own generator
            return model, trained, accepted
        # what the game leaves behind has followed an energy that still moved
        progress.stage("generator")
        rival, coordinates = self._rival

        def settle(n_settled):
            with torch.enable_grad():
                self._settle(
                    members, rival, model, SETTLING_STEPS, "generator, settling", n_settled, device
                )

        def frozen():
            return copy.deepcopy(rival).cpu().double().requires_grad_(False)

        if implicit:
            settle(0)
            self._rival = frozen(), coordinates
            return model, trained, accepted
        best = frozen()
        generator = members.seeds.generator("generator, gap")
        best_gap = self._gap(model, best, coordinates, generator)
        for n_settled in range(MAX_SETTLINGS):
            if best_gap < SETTLED:
                break
            try:
                settle(n_settled)
            except DivergenceError:  # the best state so far is sound
                break
            settled = frozen()
            gap = self._gap(model, settled, coordinates, generator)
            stalled = gap > STALLED * best_gap
            if gap < best_gap:
                best, best_gap = settled, gap
            if stalled:
                break
        self._rival = best, coordinates
        return model, trained, accepted

    def _settle(self, members, rival, model, n_steps, stage, n_settled, device):
        """Let the generator alone follow a model, or the bases."""
        log_base, features = self._views(members, device)
        energy = None
        if model is not None and not model.is_untilted:
            energy = copy.deepcopy(model.energy).float().to(device).requires_grad_(False)
            temperature = model.temperature.item()
        rival.to(device).requires_grad_(True)
        generator = members.seeds.generator(stage, n_settled, device)

        def loss(rival, batch):
            y, log_rival = rival.rsample(SETTLING_SAMPLES, generator)
            f = 0.0 if energy is None else temperature * energy(features(y).clamp(-CLIP, CLIP))
            return -variational_bound_terms(f, log_base(y), log_rival).mean(1).sum()

        train(
            rival, loss, [(torch.empty(0),)] * n_steps,
            learning_rate=SETTLING_RATE[self.generator], weight_decay=0.0, max_epochs=1,
            max_gradient_norm=SETTLING_GRADIENT_NORM, device=device,
        )  # fmt: skip

    @staticmethod
    def _gap(model, rival, coordinates, generator):
        """Largest divergence of a member's flow from its model, in nats: log Z minus its bound."""
        draw = partial(draw_from_rival, rival, coordinates)
        terms = bound_terms(model, draw, generator, GAP_SAMPLES)
        log_partition = terms.logsumexp(1) - math.log(terms.shape[1])
        return (log_partition - terms.mean(1)).max().item()

    def _report(self, members, trained, accepted, partition):
        super()._report(members, trained, accepted, partition)
        for name in ("_stages", "_trained"):
            self.__dict__.pop(name, None)
        rival = self.__dict__.pop("_rival", None)
        if rival is None:  # the model is a flow, or nothing was trained
            laws = self.model_.bases if self.base is not None else self._flow_laws(members)
            laws = [copy.deepcopy(law).cpu() for law in laws]
            self.generator_ = FlowDensity(self._columns, laws)
            laws = [copy.deepcopy(law).to(self._device) for law in laws]
            draw = partial(draw_from_laws, laws)
        else:
            if self.generator == "flow":
                self.generator_ = FlowDensity(self._columns, rival[1].laws(rival[0]))
            else:
                self.generator_ = ImplicitSampler(self._columns, *rival)
            draw = partial(draw_from_rival, *(copy.deepcopy(p).to(self._device) for p in rival))
        terms = bound_terms(self.model_, draw, members.seeds.generator("bound"), BOUND_SAMPLES)
        self.log_partition_bound_ = terms.mean(1).cpu().numpy()
        error = terms.std(1) / terms.shape[1] ** 0.5
        self.log_partition_bound_std_error_ = error.cpu().numpy()

    def sample(self, n_samples=1, random_state=None, *, n_steps=None, start="base"):
        """Draw new rows from the model.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        n_steps : int, default=None
            Steps of the Metropolis-adjusted Langevin algorithm under the model, from the start. By
            default 100 from an implicit generator, whose draws nothing else corrects, and 0
            otherwise.
        start : {"base", "generator"}, default="base"
            "base": rows that the base proposes, kept by their importance. "generator": rows that
            the generator proposes; those of a flow are kept by their importance, too, those of an
            implicit generator have no density and are taken as they are.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In random order. For the draws of the generator as they are, see `generator_`.
        """
        if start not in ("base", "generator"):
            raise ValueError(f"start={start!r} must be 'base' or 'generator'.")
        implicit = start == "generator" and isinstance(
            getattr(self, "generator_", None), ImplicitSampler
        )
        if n_steps is None:
            n_steps = GENERATOR_MALA_STEPS if implicit else 0
        if start == "base":
            return super().sample(n_samples, random_state, n_steps=n_steps)
        generator = self._sampling_generator(random_state, n_samples=n_samples, n_steps=n_steps)
        seed = generator.initial_seed()
        if implicit:
            rows = self.generator_.sample(n_samples, seed)
        else:
            rows = self._rows_by_importance(n_samples, np.random.RandomState(seed % 2**32))
        x, _ = self._tensor(rows)
        with limit_threads(1):
            x = self._walk(x, n_steps, generator)
        return self._columns.restore(x.cpu().numpy())

    def _rows_by_importance(self, n, rng):
        """Rows of a generator that is a flow, kept as `sample` keeps those of the base."""
        kept, missing, cap = [], n, None
        while missing > 0:
            rows = self.generator_.sample(max(1024, int(1.1 * missing * (cap or 2.0))), rng)
            log_weights = self._score(rows) - self.generator_.score_samples(rows)
            weights = np.exp(log_weights - log_weights.max())
            weights /= weights.mean()
            cap = min(weights.max(), MAX_COPIES) if cap is None else cap
            copies = np.floor(weights / cap + rng.random_sample(len(rows))).astype(int)
            kept.append(rows.repeat(copies, axis=0)[:missing])
            missing -= len(kept[-1])
        return rng.permutation(np.concatenate(kept))
