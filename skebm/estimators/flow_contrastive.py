"""Flow-contrastive estimation."""

import copy
import math
from dataclasses import replace
from functools import partial
from numbers import Real

import numpy as np
import torch

from skebm._sklearn_compat import Interval
from skebm.objectives import nce_losses

from ._classifiers import (
    MANY_ROWS,
    CorrectedEnergy,
    MemberEnergies,
    boosting_settings,
    train_classifiers,
)
from ._flow_based import HEAD_START, FlowBasedDensity, FlowDensity, held_out_log_likelihood
from ._members import Trained
from ._model import CLIP
from ._neural import if_auto, train_against_noise
from ._tilted import halves

ACCURACY_MEMORY = 0.9
"""Of the moving average of the discriminator's accuracy, per step."""

NOISE_RATIO = 2
"""Samples of the frozen flow per row, in the refinement."""

STAGES = (
    "flow", "flow_after_game", "energy_after_game", "energy_refined", "energy_boosted",
    "flow_boosted",
)  # fmt: skip


class FlowContrastiveDensity(FlowBasedDensity):
    r"""Normalised density by flow-contrastive estimation: an energy and a flow in one game.

    .. math:: \log p(x) = \log q_0(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    A normalizing flow is fitted by maximum likelihood, and is the base q_0. Then a copy of it, the
    noise q, plays against the energy: a discriminator

    .. math:: D(x) = \sigma\left(\log q_0(x) + f(x) - c - \log q(x)\right)

    tells rows from samples of the flow, with c a learned log Z [1]_. The energy raises

    .. math:: V = E_{\mathrm{data}} \log D + E_q \log(1 - D),

    which draws p to the data; the flow lowers it, which draws q to the data, so that its samples
    are always the hard ones. Then the energy learns once more, from zero, against the flow at rest,
    and boosted trees correct the better one of both, or the base. Of all stages, the flows among
    them, the state that is best on held-out rows is kept.

    Parameters
    ----------
    flow : str, zuko flow or callable, default="coupling"
        "coupling": coupling flow of rational-quadratic splines, quick in both directions. With zuko
        installed also "nsf", "maf", "nice" and "gf" of its flows, or a flow of zuko without
        context, or a callable that makes one from n_features. It sees Gaussianised columns.
    generator_learning_rate : float, default=3e-4
        Of the flow, in the game.
    accuracy_threshold : float, default=0.5
        The flow takes a step whenever the discriminator tells at least this share of rows and
        samples apart rightly, on a moving average; below, the energy is given time.
    refinement : bool, default=True
        Whether more noise-contrastive estimation follows the game: against the flow at rest, and,
        with ``energy_model="auto"`` and a base, by boosted trees against samples of the energy.
        What does not help on held-out rows is left out.
    base : {"flow"} or None, default="flow"
        None is the form of the paper: exp(f) / Z with a confining Gaussian of three standard
        deviations in place of q_0, which is then also half of the noise of the refinement. No trees
        follow then.
    energy_model : str, torch.nn.Module or callable, default="auto"
        "periodic": network on periodic embeddings of the columns; "auto" has boosted trees correct
        it in the end. "mlp": network on piecewise-linear embeddings. A module (instance, or a class
        or factory called with n_features), (n, n_features) -> (n,) or (n, 1), which is copied and
        never trained itself. Energies see Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Of the energies.
    learning_rate : float or "auto", default="auto"
        Of the energies; "auto" is 3e-3.
    weight_decay : float, default=1e-3
        Of AdamW, for the energies.
    batch_size : int, default=256
        Rows, and samples of the flow, per member and step.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most, of game and of refinement each; "auto" is 20, or 700 steps if
        that is more. Also the most iterations of boosting, of which "auto" is 600. 0 is the flow
        alone.
    early_stopping : bool, default=True
        Whether to stop by, and keep the best state on, held-out normalised likelihood.
    validation_fraction : float, default=0.1
        Rows held out when `n_members` is 1. With more members every row is held out once.
    patience : int, default=20
        Epochs without improvement before a stage stops, but at least 200 steps.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below .01 nats, and
        anneals where the effective sample size stays below one per cent.
    smoothing : float, "scott" or "multiscale", default=0.0
        As in :class:`~skebm.NCEDensity`.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` calls outliers. "auto" takes the threshold from
        out-of-fold scores instead, so that 5 % of *new* rows of the same law fall below it.
    callbacks : list of skorch callbacks, default=None
        Called in the game and in the refinement.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps".
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps flow and columns, and goes on from the trained networks and
        their log Z, where these are part of the model. The flow that plays starts at the base
        again, and trees are grown anew.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    flow_ : FlowDensity
        The flow after the game, with `score_samples`, `score` and `sample`, in the units of X.
    stages_ : dict
        Held-out log-likelihood in nats per row, out of fold: of the ``flow`` fitted by maximum
        likelihood, the ``flow_after_game``, the ``energy_after_game``, the ``energy_refined`` (the
        better one of both energies), the ``energy_boosted`` (with trees, if these help) and the
        ``flow_boosted`` (with trees on the base instead, if these are better still; only with early
        stopping, up to 5,000 rows, and where the networks gained something). All before
        recalibration.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    log_partition_learned_ : ndarray of shape (n_members,)
        The c of the last discriminator, where a tilt was accepted. That of the trees has no c of
        its own: it takes what they correct for normalised, the base (0) or an energy, with log Z
        from 8,192 draws of the base, which is what is told here.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z; inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base), ``train_loss`` and ``jensen_shannon``, the Jensen-Shannon
        divergence between data and flow that the discriminator sees, log 2 + V / 2, in nats (NaN
        after the game).
    n_iter_ : int
        Epochs of the state kept, and iterations of boosting, counted through all stages; 0 if none
        was accepted.
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
    NCEDensity : Contrast with samples of a base at rest; usually the better density, and sooner.

    References
    ----------
    .. [1] Gao, R., Nijkamp, E., Kingma, D. P., Xu, Z., Dai, A. M. and Wu, Y. N. (2020). Flow
           contrastive estimation of energy-based models. CVPR.

    Examples
    --------
    >>> from skebm import FlowContrastiveDensity
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = FlowContrastiveDensity(n_members=1, max_epochs=5, random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.flow_.sample(3, random_state=0).shape
    (3, 2)
    """

    _parameter_constraints: dict = {
        **FlowBasedDensity._parameter_constraints,
        "generator_learning_rate": [Interval(Real, 0, None, closed="neither")],
        "accuracy_threshold": [Interval(Real, 0, 1, closed="both")],
        "refinement": ["boolean"],
    }

    def __init__(
        self,
        *,
        flow="coupling",
        generator_learning_rate=3e-4,
        accuracy_threshold=0.5,
        refinement=True,
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
        self.flow = flow
        self.generator_learning_rate = generator_learning_rate
        self.accuracy_threshold = accuracy_threshold
        self.refinement = refinement
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
        # trees are grown anew
        if kept is not None and isinstance(kept.energy, CorrectedEnergy):
            kept.energy = kept.energy.first
        elif kept is not None and isinstance(kept.energy, MemberEnergies):
            kept = None
        flow, coordinates = self._start
        flow = copy.deepcopy(flow).requires_grad_(True)
        learning_rate = if_auto(self.learning_rate, 3e-3)
        accuracy = torch.zeros((), device=device)

        def loss(game, y, z, log_base, weight, drawn):
            nonlocal accuracy
            points, log_flow, log_base_there = drawn()
            f = game.energy(torch.cat([z, points], dim=1).clamp(-CLIP, CLIP))
            f_data, f_flow = f.split([z.shape[1], points.shape[1]], dim=1)
            of_data = log_base + f_data - game.rival.log_prob(y)
            of_flow = log_base_there + f_flow - log_flow
            data, rivals = nce_losses(of_data, of_flow, game.log_partition)
            with torch.no_grad():
                c = game.log_partition[:, None]
                right = ((of_data > c).float().mean() + (of_flow < c).float().mean()) / 2
                accuracy = ACCURACY_MEMORY * accuracy + (1 - ACCURACY_MEMORY) * right
            return ((weight * data).mean(1) + rivals.mean(1)).sum()

        def plays(n_steps):
            return n_steps > HEAD_START and bool(accuracy >= self.accuracy_threshold)

        played, game, n_batches = self._play(
            members, flow, loss, plays, learning_rate=learning_rate,
            rival_learning_rate=self.generator_learning_rate, refresh=refresh,
            device=device, kept=kept, progress=progress,
        )  # fmt: skip
        self._trained = flow, coordinates
        losses = played.history["train_loss"] / len(members)
        played.history["jensen_shannon"] = math.log(2.0) - 0.5 * losses
        log_partition = game.log_partition.detach().cpu().double()
        best = replace(played, log_partition=log_partition)
        self._stages["energy_after_game"] = members.mean_gain(best.held, best.pool).item()
        if not self.refinement:
            return best
        members.noise = coordinates.laws(flow)
        if self.base is None:
            # f is learned where only the confining law has mass, too
            members.noise = halves(members.noise, members.bases)
        refined = train_against_noise(
            members, self._new_energy(members, "refinement", kept),
            partial(nce_losses, noise_ratio=NOISE_RATIO),
            stage="refinement", learns_partition=True, noise_ratio=NOISE_RATIO,
            batch_size=self.batch_size, refresh=refresh,
            log_partition=None if kept is None else kept.log_partition,
            learning_rate=learning_rate, max_epochs=self._n_epochs(n_batches),
            **self._training_options(n_batches, device, progress),
        )  # fmt: skip
        best = self._better(members, best, refined, "energy_refined")
        if not self._boosts():
            return best
        settings = boosting_settings(len(members.x))
        settings["max_iter"] = if_auto(self.max_epochs, settings["max_iter"])
        starts = {"energy_boosted": best}
        few = members.n_rows <= MANY_ROWS
        if few and self.early_stopping and members.mean_gain(best.held, best.pool) > 0:
            # in many columns, what the networks learned of few rows spoils it for the trees
            starts["flow_boosted"] = Trained.nothing(members)
        for stage, start in starts.items():
            boosted = train_classifiers(
                members, "boosting", **settings, early_stopping=self.early_stopping, stage=stage,
                progress=progress, start=start,
            )  # fmt: skip
            # what the classifiers take for one is the integral of what they correct
            boosted = replace(boosted, log_partition=members.log_partition(start.pool))
            best = self._better(members, best, boosted, stage)
        return best

    def _boosts(self):
        """Whether trees correct the energy in the end."""
        automatic = isinstance(self.energy_model, str) and self.energy_model == "auto"
        return automatic and self.base is not None

    def _better(self, members, before, after, stage):
        """The better one of two energies, with the history of both."""
        history, n_before = _one_after_the_other(before.history, after.history)
        gain = members.mean_gain(after.held, after.pool).item()
        level = members.mean_gain(before.held, before.pool).item()
        self._stages[stage] = gain
        if self.early_stopping and gain <= level:
            self._stages[stage] = level
            return replace(before, history=history)
        return replace(after, n_iter=n_before + after.n_iter, history=history)

    def _report(self, members, trained, accepted, partition):
        super()._report(members, trained, accepted, partition)
        laws = self._flow_laws(members)
        stages = {"flow": held_out_log_likelihood(members, laws)}
        level = held_out_log_likelihood(members, members.bases)
        for name, gain in self.__dict__.pop("_stages", {}).items():
            stages[name] = level + gain
        if "_trained" in vars(self):
            flow, coordinates = vars(self).pop("_trained")
            laws = coordinates.laws(flow)
        self.flow_ = FlowDensity(self._columns, laws)
        self.stages_ = {s: float(stages[s] + self._columns.log_det) for s in STAGES if s in stages}


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
