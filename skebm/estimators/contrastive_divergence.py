"""Contrastive divergence."""

import copy
import math
import warnings
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from skebm._engine import MemberBatches
from skebm._sklearn_compat import Interval, StrOptions
from skebm.bases import MAX_FIT_ROWS
from skebm.diagnostics import split_r_hat
from skebm.energies import SpectralBound
from skebm.objectives import contrastive_divergence_losses

from ._chains import SAMPLERS, Chains, fit_stand_in
from ._members import data_modes
from ._model import CLIP, TiltedMixture
from ._neural import EnergyAlone, build_energy, few_copies, if_auto, rows_judged, train_networks
from ._threads import limit_threads
from ._tilted import BaseTiltedDensity

EPOCHS, STEPS = 30, 1000
"""``max_epochs="auto"``: whichever lasts longer. The learning rate must have come down before the
energy overfits, because no row ever stops to pull, as it does in noise-contrastive estimation."""

MAX_COPIES, MAX_COPIED = 8, 400_000
"""Of rows with fresh jitter, where columns have ties: so many copies, and rows in all of them."""

DIAGNOSED_CHAINS, DIAGNOSED_MOVES = 16, 100
"""Chains per member, and moves of each, behind R-hat."""

MIN_ACCEPTANCE = 0.1
"""Below this share of accepted proposals chains count as stuck."""

MAX_R_HAT = 1.2
"""Above this split R-hat chains count as not mixing."""

SAMPLED_CHAINS = 8192
"""`sample` runs so many chains at once, so that memory does not grow with n_samples."""


class ContrastiveDivergenceEBM(BaseTiltedDensity):
    r"""Normalised density by contrastive divergence: maximum likelihood with Markov chains.

    .. math:: \log p(x) = \log q(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    f is pushed up at the rows and down at samples of the model, which is the gradient of the
    log-likelihood; the samples are Markov chains that follow f while it is learned, in Gaussianised
    coordinates. As in :class:`~skebm.NCEDensity`, q is a base that is fitted first, log Z is
    measured afterwards, the estimator is the mean of `n_members` cross-fitted members, and f is
    kept only if the held-out likelihood gains by more than two standard errors, so the result is
    not below its base.

    Parameters
    ----------
    n_steps : int, default=5
        Steps of the sampler between two steps of training: the k of CD-k.
    persistent : bool, default=True
        Whether chains go on from where they were (persistent contrastive divergence [2]_), starting
        from the base. False starts them at the rows every time (CD-k [1]_): cheaper to get right,
        but what lies far from the data is never looked at.
    sampler : {"mala", "hmc", "ula", "random_walk"}, default="mala"
        What moves the chains, see :mod:`skebm.samplers`. "hmc" takes five leapfrog steps per step;
        "ula" is MALA without its accept step and biased; "random_walk" (Metropolis-Hastings) needs
        no gradient.
    step_size : float or "auto", default="auto"
        Of the sampler, in units of z (where columns have a standard deviation of about one). "auto"
        adapts it, member by member, to the acceptance rate that the sampler aims at.
    buffer_size : int, default=256
        Persistent chains per member. Every step of training moves `batch_size` of them.
    reinit_fraction : float, default=1.0
        Share of the moved persistent chains that a fresh draw of the base is proposed to. The
        model decides (independence Metropolis), so that its law does not change: this is how
        chains get from mode to mode.
    energy_regularization : float, default=0.0
        Weight of the mean of f^2 over rows and chains in the loss [3]_.
    spectral_norm : float or None, default=None
        Largest singular value that a weight matrix may have; None sets no bound.
    recalibration : bool, default=True
        Whether temperature and mode weights are set by held-out likelihood after training. Chains
        that stay in their mode say nothing about its weight.
    base : str, list of str, law or None, default="auto"
        As in :class:`~skebm.NCEDensity`. None is the pure energy-based model, exp(f) / Z with a
        confining Gaussian of three standard deviations.
    energy_model : str, torch.nn.Module or callable, default="auto"
        "periodic" ("auto"): network on periodic embeddings of the columns. "mlp": network on
        piecewise-linear embeddings. A module (instance, or a class or factory called with
        n_features), (n, n_features) -> (n,) or (n, 1), which is copied and never trained itself.
        Energies see Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Of the networks.
    learning_rate : float or "auto", default="auto"
        "auto" is 1e-3.
    weight_decay : float, default=1e-3
        Of AdamW.
    batch_size : int, default=256
        Rows, and chains, per member and step.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most; "auto" is 30, or 1,000 steps if that is more. 0 is the base
        alone.
    early_stopping : bool, default=True
        Whether to stop by, and keep the best state on, held-out normalised likelihood. The loss
        itself is no guide: it estimates no likelihood.
    validation_fraction : float, default=0.1
        Rows held out when `n_members` is 1. With more members every row is held out once.
    patience : int, default=20
        Epochs without improvement before training stops.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below .01 nats, and
        anneals where the effective sample size stays below one per cent.
    smoothing : float, "scott" or "multiscale", default=0.0
        As in :class:`~skebm.NCEDensity`.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` calls outliers. "auto" takes the threshold from
        out-of-fold scores instead, so that 5 % of *new* rows of the same law fall below it.
    callbacks : list of skorch callbacks, default=None
        Called while the networks train.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". Bases are fitted on the
        CPU; networks train, chains move, and the model scores and samples, on the device.
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps base and columns, and goes on from the trained networks.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    persistent_chains_ : ndarray of shape (n_members, buffer_size, n_features)
        Where the persistent chains were at the end of training, in the units of X. Only if
        `persistent` and something was trained.
    chain_diagnostics_ : dict
        What the chains did, of the last quarter of training: ``step_size`` and
        ``acceptance_rate`` of the sampler, ndarrays of shape (n_members,); ``move_acceptance_rate``
        of the moves of `n_steps` as wholes, of which the base decides, and
        ``restart_acceptance_rate`` of jumps to the base (NaN without), floats; and ``r_hat``, the
        largest split R-hat over members, columns and f of chains under the trained model (NaN
        unless `persistent`, and where no state was better than the base). Only if something was
        trained.
    sample_diagnostics_ : dict
        Of the last call of `sample`, see there; empty before.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z (where it was annealed: of importance samples that
        would give the same error); inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base) and ``train_loss`` (which estimates no likelihood).
    n_iter_ : int
        Epochs of the state kept; 0 if no state was better than the base, whose modes the
        recalibration may still have weighted.
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

    Warns
    -----
    ConvergenceWarning
        In `fit`, where chains do not mix: proposals are hardly ever accepted, or R-hat exceeds 1.2.

    See Also
    --------
    NCEDensity : Contrast with samples of the base; no chains, usually the better density.
    ScoreMatchingEBM : Fits the gradient of the log-density; no samples at all.

    Notes
    -----
    The base may cost more than the energy. While chains move, a mixture of 16 Gaussians stands in
    for it; a final Metropolis decision on every move puts that right, so that the chains' law is
    that of the model (delayed acceptance [4]_).

    References
    ----------
    .. [1] Hinton, G. (2002). Training products of experts by minimizing contrastive divergence.
           Neural Computation 14(8).
    .. [2] Tieleman, T. (2008). Training restricted Boltzmann machines using approximations to the
           likelihood gradient. ICML.
    .. [3] Du, Y. and Mordatch, I. (2019). Implicit generation and modeling with energy-based
           models. NeurIPS.
    .. [4] Christen, J. A. and Fox, C. (2005). Markov chain Monte Carlo using an approximation.
           Journal of Computational and Graphical Statistics 14(4).

    Examples
    --------
    >>> from skebm import ContrastiveDivergenceEBM
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = ContrastiveDivergenceEBM(max_epochs=50, random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.sample(3, random_state=0).shape
    (3, 2)
    """

    _parameter_constraints: dict = {
        **BaseTiltedDensity._parameter_constraints,
        "n_steps": [Interval(Integral, 1, None, closed="left")],
        "persistent": ["boolean"],
        "sampler": [StrOptions(set(SAMPLERS))],
        "step_size": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "buffer_size": [Interval(Integral, 1, None, closed="left")],
        "reinit_fraction": [Interval(Real, 0, 1, closed="both")],
        "energy_regularization": [Interval(Real, 0, None, closed="left")],
        "spectral_norm": [None, Interval(Real, 0, None, closed="neither")],
        "recalibration": ["boolean"],
    }

    def __init__(
        self,
        *,
        n_steps=5,
        persistent=True,
        sampler="mala",
        step_size="auto",
        buffer_size=256,
        reinit_fraction=1.0,
        energy_regularization=0.0,
        spectral_norm=None,
        recalibration=True,
        base="auto",
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
        self.n_steps = n_steps
        self.persistent = persistent
        self.sampler = sampler
        self.step_size = step_size
        self.buffer_size = buffer_size
        self.reinit_fraction = reinit_fraction
        self.energy_regularization = energy_regularization
        self.spectral_norm = spectral_norm
        self.recalibration = recalibration
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

    def _recalibrates(self):
        return self.recalibration

    def _modes(self, x, weight, n_rows, splits, bases, seeds):
        if not self.recalibration or self.max_epochs == 0:
            return None
        return data_modes(x, weight, n_rows, splits, bases, seeds)

    def _train(self, members, refresh, device, kept, progress):
        n_features = members.x.shape[1]
        energy = build_energy(
            if_auto(self.energy_model, "periodic"),
            members,
            self.hidden_layer_sizes,
            members.seeds.of("network"),
            kept,
        )
        module = EnergyAlone(energy).to(device)
        bound = None
        if self.spectral_norm is not None:
            bound = SpectralBound(energy, self.spectral_norm)
            bound.apply()
        chains = self._follow(members, energy, device)
        buffer, record = None, []
        if self.persistent:
            buffer = self._buffer(members, chains, kept)
        weight = (members.weight / members.weight.mean()).float().to(device)
        weight = weight.expand(len(members), -1)

        def rows(generator):
            z = members.features.transform(members.x if refresh is None else refresh(generator))[0]
            if self.persistent:  # the rows themselves are not moved
                z = z.float().to(device)
                return z.expand(len(members), *z.shape), weight
            return chains.rows(z.expand(len(members), *z.shape)), weight

        n_copies = max(1, min(MAX_COPIES, MAX_COPIED // len(members.x)))
        batches = MemberBatches(
            few_copies(rows, 1 if refresh is None else n_copies),
            [train for train, _ in members.splits],
            batch_size=self.batch_size,
            generator=members.seeds.generator("energy, batches"),
        )

        def batch_loss(module, batch):
            x, w = batch
            if bound is not None:
                bound.apply()
            module.eval()  # chains follow f itself: no dropout
            with torch.no_grad():
                if self.persistent:
                    moved, chain_weight = self._move_some(chains, buffer, x.shape[1], record), 1.0
                else:
                    moved, chain_weight = self._move(chains, x, record), w
            module.train()
            z = torch.cat([x[..., :n_features], moved[..., :n_features]], dim=1)
            f = module.energy(z.clamp(-CLIP, CLIP))
            data, negative = contrastive_divergence_losses(
                *f.split([x.shape[1], moved.shape[1]], dim=1), self.energy_regularization
            )
            return ((w * data).mean(1) + (chain_weight * negative).mean(1)).sum()

        # in forward passes per row: two for the step, and two for every gradient of a chain
        n_train = max(len(train) for train, _ in members.splits)
        trained = train_networks(
            members, module, batch_loss, batches,
            evaluation_cost=rows_judged(members) / ((6 + 2 * self.n_steps) * n_train),
            learning_rate=if_auto(self.learning_rate, 1e-3), weight_decay=self.weight_decay,
            max_epochs=if_auto(self.max_epochs, max(EPOCHS, math.ceil(STEPS / len(batches)))),
            patience=self.patience,
            early_stopping=self.early_stopping, callbacks=self.callbacks, device=device,
            progress=progress,
        )  # fmt: skip
        self._chains = chains, buffer, self._diagnose(chains, record, trained.n_iter, device)
        return trained

    def _follow(self, members, energy, device):
        """Chains under the model as it is trained."""
        model = TiltedMixture(members.bases, members.proposals, members.features, energy)
        if device.type not in ("cpu", "mps"):  # doubles are not for every device
            model = copy.deepcopy(model).to(device)
            model.energy = energy
        n_features = members.x.shape[1]
        auto = isinstance(self.step_size, str)
        step_size = n_features ** (-1.0 / 3.0) if auto else self.step_size
        x = members.pool.flatten(0, 1)
        generator = members.seeds.generator("stand-in")
        x = x[torch.randperm(len(x), generator=generator)[:MAX_FIT_ROWS]]
        chains = Chains(
            model, fit_stand_in(x, members.features, generator),
            sampler=self.sampler, n_steps=self.n_steps,
            step_size=torch.full((len(members),), step_size), dtype=torch.float32,
            generator=members.seeds.generator("chains", device=device),
        )  # fmt: skip
        energy.eval()
        if auto:
            with torch.no_grad():
                chains.warm_up()
        return chains

    def _buffer(self, members, chains, kept):
        """Persistent chains: where a former fit left them, or draws of the base."""
        old = getattr(self, "persistent_chains_", None)
        shape = (len(members), self.buffer_size, self.n_features_in_)
        if kept is None or old is None or old.shape != shape:
            return chains.start(self.buffer_size)
        x = np.stack([self._columns.standardize(rows)[0] for rows in old])
        x = torch.as_tensor(x)
        return chains.rows(torch.stack([members.features.transform(rows)[0] for rows in x]))

    def _move(self, chains, rows, record, restart_rate=None):
        rows, acceptance, move_acceptance = chains.move(rows)
        if isinstance(self.step_size, str):
            chains.adapt(acceptance)
        record.append((acceptance, move_acceptance, restart_rate))
        return rows

    def _move_some(self, chains, buffer, n, record):
        """Move n of the persistent chains of every member."""
        order = torch.rand(buffer.shape[:2], generator=chains.generator, device=buffer.device)
        index = order.argsort(1)[:, :n, None].expand(-1, -1, buffer.shape[-1])
        rows, restart_rate = buffer.gather(1, index), None
        if self.reinit_fraction > 0:
            n_restarts = max(1, round(self.reinit_fraction * rows.shape[1]))
            rows[:, :n_restarts], restart_rate = chains.restart(rows[:, :n_restarts])
        rows = self._move(chains, rows, record, restart_rate)
        buffer.scatter_(1, index, rows)
        return rows

    def _diagnose(self, chains, record, n_iter, device):
        """What the chains did at the end of training, and whether they mix."""
        diagnostics = _rates(chains, record[-max(1, len(record) // 4) :]) | {"r_hat": np.nan}
        if self.persistent and n_iter > 0:
            energy = chains.model.energy.float().to(device)
            diagnostics["r_hat"] = self._r_hat(chains)
            energy.cpu().double()
        return diagnostics

    @torch.no_grad()
    def _r_hat(self, chains):
        """Split R-hat, the largest over members, columns and f, of chains as in training."""
        rows, draws = chains.start(DIAGNOSED_CHAINS), []
        for _ in range(DIAGNOSED_MOVES):
            rows, _ = self._steps(chains, rows, chains.n_steps)
            tilt = chains.target.tilt(rows[..., :-1].flatten(0, 1)).view(rows.shape[:2])
            draws.append(torch.cat([rows[..., :-1], tilt[..., None]], dim=-1))
        # (moves, members, chains, d + 1) -> (moves, chains, members * (d + 1))
        draws = torch.stack(draws).transpose(1, 2).flatten(2)
        return float(np.nanmax(split_r_hat(draws)))

    def _report(self, members, trained, accepted, partition):
        for name in ("persistent_chains_", "chain_diagnostics_", "_stand_in"):
            self.__dict__.pop(name, None)
        super()._report(members, trained, accepted, partition)
        self.sample_diagnostics_ = {}
        if not hasattr(self, "_chains"):  # nothing was trained
            return
        chains, buffer, self.chain_diagnostics_ = self.__dict__.pop("_chains")
        self._stand_in = chains.target.stand_in.cpu().double()
        if buffer is not None:
            z = buffer[..., : members.x.shape[1]].cpu().double()
            x = [members.features.transform.inverse(rows).numpy() for rows in z]
            self.persistent_chains_ = np.stack([self._columns.restore(rows) for rows in x])
        acceptance, r_hat = (self.chain_diagnostics_[k] for k in ("acceptance_rate", "r_hat"))
        if acceptance.min() < MIN_ACCEPTANCE:
            # steps that adapt cannot follow an f that changes too fast
            auto = isinstance(self.step_size, str)
            what = "learning_rate" if auto else 'step_size, or leave it "auto"'
            warnings.warn(
                f"the chains accept {acceptance.min():.0%} of the proposals of "
                f'sampler="{self.sampler}": they hardly move. Lower {what}.',
                ConvergenceWarning,
                stacklevel=5,
            )
        if r_hat > MAX_R_HAT:
            warnings.warn(
                f"the chains do not mix (split R-hat {r_hat:.2f}): f may have learned from samples "
                "that the model does not have. Raise n_steps or reinit_fraction, take another "
                "base, or NCEDensity, which needs no chains.",
                ConvergenceWarning,
                stacklevel=5,
            )

    # ------------------------------------------------------------------ sampling

    def sample(self, n_samples=1, random_state=None, *, n_steps=None, start="base"):
        """Draw new rows from the model, by chains of the sampler it was trained with.

        Chains take Metropolis steps under the fitted model ("ula" is corrected: MALA), so that
        they leave its law as it is.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        n_steps : int, default=None
            Steps of the sampler from the start; the `n_steps` of training by default, 0 for none.
        start : {"base", "buffer"}, default="base"
            "base": at rows that the base proposes and their importance picks, as `sample` of the
            other estimators: right from the start where the base covers the model. "buffer": at
            the persistent chains, picked with replacement. These followed f as it was at the end of
            training, so take many steps.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In random order. `sample_diagnostics_` then holds ``start`` and ``n_steps``. Where
            steps were taken (none are where the model is its base), it also holds the ``step_size``
            and ``acceptance_rate`` of the sampler, ndarrays of shape (n_members,);
            ``move_acceptance_rate`` and ``restart_acceptance_rate`` as in `chain_diagnostics_`;
            and the mean ``log_density_change`` from the start to the end, in nats, with its
            ``log_density_change_std_error``: chains that have not reached the law of the model
            still climb.

        Raises
        ------
        ValueError
            For ``start="buffer"`` where there are no persistent chains.
        """
        default_steps = n_steps is None
        n_steps = self.n_steps if default_steps else n_steps
        generator = self._sampling_generator(random_state, n_samples=n_samples, n_steps=n_steps)
        if start not in ("base", "buffer"):
            raise ValueError(f"start={start!r} must be 'base' or 'buffer'.")
        if start == "buffer" and not hasattr(self, "persistent_chains_"):
            raise ValueError(
                'start="buffer" needs persistent chains: fit with persistent=True and max_epochs '
                "above 0."
            )
        if not hasattr(self, "chain_diagnostics_"):  # no chains: as the other estimators
            n_steps = 0 if default_steps else n_steps
            self.sample_diagnostics_ = {"start": start, "n_steps": int(n_steps)}
            return super().sample(n_samples, random_state, n_steps=n_steps)
        if self.model_.is_untilted:
            start, n_steps = "base", 0  # draws of the base are draws of the model
        self.sample_diagnostics_ = {"start": start, "n_steps": int(n_steps)}
        with torch.no_grad(), limit_threads(1):
            sizes = self._member_sizes(n_samples, generator)
            # chains of all members run side by side
            drawn = sizes.max().expand_as(sizes) if n_steps else sizes
            parts = (self._draw if start == "base" else self._pick)(drawn, generator)
            if n_steps:
                parts = self._run(parts, int(n_steps), generator)
            parts = [rows[:n] for rows, n in zip(parts, sizes.tolist(), strict=True)]
            x = self._shuffled(parts, generator)
        return self._columns.restore(x.cpu().numpy())

    def _pick(self, sizes, generator):
        """Rows of every member from its persistent chains, a list of K tensors."""
        picked = []
        for rows, n in zip(self.persistent_chains_, sizes.tolist(), strict=True):
            index = torch.randint(len(rows), (n,), generator=generator, device=self._device)
            picked.append(self._tensor(rows[index.cpu().numpy()])[0])
        return picked

    def _run(self, parts, n_steps, generator):
        """Run the chains of every member, a list of K tensors (n, d)."""
        model = self.model_
        chains = Chains(
            model, copy.deepcopy(self._stand_in),
            sampler="mala" if self.sampler == "ula" else self.sampler, n_steps=self.n_steps,
            step_size=torch.as_tensor(self.chain_diagnostics_["step_size"]), dtype=torch.float64,
            generator=generator,
        )  # fmt: skip
        z = torch.stack([model.features.transform(rows)[0] for rows in parts])
        blocks, records, changes = [], [], []
        for block in z.split(max(1, SAMPLED_CHAINS // model.n_members), dim=1):
            rows = chains.rows(block)
            before = chains.log_density(rows)
            rows, record = self._steps(chains, rows, n_steps)
            blocks.append(rows[..., :-1])
            records += record
            changes.append(chains.log_density(rows) - before)
        change = torch.cat(changes, dim=1).flatten().cpu().numpy()
        error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else np.nan
        self.sample_diagnostics_ |= _rates(chains, records) | {
            "log_density_change": float(change.mean()),
            "log_density_change_std_error": float(error),
        }
        return [model.features.transform.inverse(rows) for rows in torch.cat(blocks, dim=1)]

    def _steps(self, chains, rows, n_steps):
        """Moves of at most the trained length, and restarts as in training, with their rates."""
        record = []
        while n_steps:
            restart_rate = None
            if self.persistent and self.reinit_fraction > 0:
                shape = rows.shape[:2]
                offered = torch.rand(shape, generator=chains.generator, device=rows.device)
                jumped, restart_rate = chains.restart(rows)
                rows = torch.where((offered < self.reinit_fraction)[..., None], jumped, rows)
            chains.n_steps = min(n_steps, self.n_steps)
            rows, acceptance, move_acceptance = chains.move(rows)
            record.append((acceptance, move_acceptance, restart_rate))
            n_steps -= chains.n_steps
        return rows, record


def _rates(chains, record):
    """Mean acceptance rates of a record of moves: (steps, moves, restarts or None), each (K,)."""
    steps, moves, restarts = zip(*record, strict=True)
    restarts = [r for r in restarts if r is not None]
    return {
        "step_size": chains.step_size.cpu().numpy(),
        "acceptance_rate": torch.stack(steps).mean(0).cpu().numpy(),
        "move_acceptance_rate": torch.stack(moves).mean().item(),
        "restart_acceptance_rate": torch.stack(restarts).mean().item() if restarts else np.nan,
    }
