"""Contrastive divergence."""

import copy
from dataclasses import field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from skebm._sklearn_compat import Interval, StrOptions
from skebm._threads import limit_threads
from skebm._typing import FloatArray, RandomState
from skebm._warnings import warn
from skebm.energies import Network
from skebm.training import Recipe
from skebm.training.chains import SAMPLERS, Chains, Moves
from skebm.training.contrastive_divergence import train_by_contrastive_divergence

from ._base import parameters
from ._mixed import MixedDensity
from ._tilted import TiltedDensity

MIN_ACCEPTANCE = 0.1
"""Below this share of accepted proposals chains count as stuck."""

MAX_R_HAT = 1.2
"""Above this split R-hat chains count as not mixing."""

SAMPLED_CHAINS = 8192
"""`sample` runs so many chains at once, so that memory does not grow with n_samples."""


@parameters
class ContrastiveDivergenceEBM(MixedDensity, TiltedDensity):
    r"""Normalised density by contrastive divergence: maximum likelihood with Markov chains.

    .. math:: \log p(x) = \log q(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    f is pushed up at the rows and down at samples of the model, which is the gradient of the
    log-likelihood; the samples are Markov chains that follow f while it is learned, in Gaussianised
    coordinates. As in :class:`~skebm.NCEDensity`, q is a base that is fitted first, log Z is
    measured afterwards, the estimator is the mean of `n_members` cross-fitted members, and f is
    kept only if the held-out likelihood gains by more than two standard errors. That is a test and
    no guarantee; in 85 fits of the benchmarks the smallest gain over the base on new rows was
    -0.017 nats per row.

    Parameters
    ----------
    n_steps : int, default=2
        Steps of the sampler that chains take at a time: the k of CD-k. Persistent ones take them in
        every second step of training, and only jump in the others; without jumps in every step.
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
    reinit_fraction : float, default=1.0
        Share of the moved persistent chains that a fresh draw of the base is proposed to. The
        model decides (independence Metropolis), so that its distribution does not change: this is
        how chains get from mode to mode. Rows with states move from state to state in no other
        way, so that every chain of them is offered a draw before every move, also those that start
        at the rows.
    base : str, list of str, distribution or None, default="auto"
        As in :class:`~skebm.NCEDensity`. None is the pure energy-based model, exp(f) / Z with a
        confining Gaussian of three standard deviations.
    energy_model : str, Network, torch.nn.Module, callable or None, default="auto"
        What f is, and how it is trained. "periodic" ("auto"): a network on periodic embeddings of
        the columns, :class:`~skebm.Network`. "mlp": a network on piecewise-linear embeddings. A
        torch module (instance, or a class or factory called with n_features),
        (n, n_features) -> (n,) or (n, 1), which is copied and never trained itself. None: no f, the
        base alone. Settings such as ``energy_model__learning_rate`` are searched where a `Network`
        is given. Energies see Gaussianised columns clipped to five standard deviations; of rows
        with states an indicator of every state, and after them the values, 0 where a row has none.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below .01 nats, and
        anneals where the effective sample size stays below one per cent.
    recalibration : bool, default=True
        Whether the factor on f, and the weights of separate modes where training hardly sees them,
        are set by held-out likelihood after training; what does not help there is left out.
    smoothing : float or "scott", default=0.0
        h > 0 fits the density of X + h eps, eps normal with the standard deviations of the columns.
        "scott" is n^(-1 / (d + 4)). Density estimation wants 0.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` and `fit_predict` call outliers; rows with the
        score at which the share ends are none, so that with ties it is less. "auto" takes the
        threshold from out-of-fold scores instead, so that 5 % of *new* rows of the same
        distribution fall below it.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". Networks train, and the
        model scores and samples, on the device; all else is fitted on the CPU.
    categorical_features : "from_dtype", array-like or None, default="from_dtype"
        Columns that hold categories. "from_dtype", the default, takes those of a frame whose dtype
        is of categories, booleans, strings or objects that are no numbers. Otherwise names, numbers
        or a mask of columns, of an array, too; None for no column.
    max_categories : int or None, default=None
        Rare categories of a column share one probability, so that it has at most so many. Without
        it a column with more than 255 categories, or with more than 10 and than a tenth of the
        rows, is refused: it may be an identifier.
    atoms : {"auto", "off"} or dict, default="auto"
        Numbers that have a probability of their own, such as an amount of zero. "auto" finds values
        that many rows share in a column that otherwise hardly repeats one, where bootstrap samples
        agree. A dict gives them by column, ``{"amount": [0]}``.
    handle_missing : {"state", "error"}, default="state"
        Whether a missing cell is a state of its column with a probability of its own, or an error.
    n_jobs : int or None, default=None
        Candidates of the base, and members, that are fitted side by side by joblib: in threads, or
        where ``joblib.parallel_config`` says. None is as many as that says, one within a search
        that runs side by side itself, and elsewhere ``torch.get_num_threads()``; -1 is all cores.
        The result is the same to the bit. The networks of all members train as one, and take the
        threads of torch.
    memory : None, str or object with the joblib.Memory interface, default=None
        Used to cache bases and trained energies, so that fits to the same rows with the same seed
        share what their settings have in common, as those of a search do (:ref:`searches`). A
        string is the path of the directory; by default, nothing is cached. It acts only where
        `random_state` is given.
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps base and columns, and goes on from the trained networks.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    persistent_chains_ : ndarray of shape (n_members, 512, n_features)
        Where the persistent chains were at the end of training, in the units of X; categories are
        numbered as in `columns_`. Only if `persistent` and something was trained.
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
    training_log_ : list of dict
        What skorch's callbacks see of the training, one dict per epoch; its ``batches`` are filled
        only where there are callbacks, and times are left out. ``History(training_log_)`` of
        ``skorch.history`` is indexed as skorch's own. Only where networks were trained.
    n_iter_ : int
        Epochs of the state kept; 0 if none was accepted.
    accepted_ : str
        What was kept: "tilt"; "recalibration", the base with its modes weighted anew and no energy;
        "base"; or "flow" or "generator", where a game has made a better density of one.
    held_out_gain_ : float
        Gain of the held-out log-likelihood over the base, in nats per row: of what was accepted, or
        of the tilt that was rejected; 0 where training found none.
    held_out_gain_std_error_ : float
        Its standard error; a tilt is accepted where the gain is more than twice that.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_offset_ : float
        Threshold of `fit_predict` on `out_of_fold_scores_`: `offset_`, or where `contamination` is
        a number, what that share of these scores lies below.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of every training row (of positive weight) under the member that has not seen
        it; NaN for rows that were never held out (with one member, beyond 50,000 per member, or in
        a large table of which `fit` looks at a sample).
        This, and not `score_samples`, ranks the rows of the training table itself.
    out_of_fold_members_ : ndarray of shape (n_rows,), int
        Which member that is; -1 for rows that were never held out.
    out_of_fold_decision_function_ : ndarray of shape (n_rows,)
        `out_of_fold_scores_` above `out_of_fold_offset_`, negative for what `fit_predict` calls an
        outlier, and comparable between rows that have values in different columns.
    columns_ : list of ColumnReport
        How every column was taken: its kind, categories, whether missing cells are a state, atoms,
        grid and bounds.
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
    for it; a final Metropolis decision on every move puts that right, so that the chains'
    distribution is that of the model (delayed acceptance [3]_).

    Of rows with states (categories, missing cells, atoms) steps of the sampler move the values that
    are there, and states change with jumps to draws of the base (:ref:`mixed`).

    References
    ----------
    .. [1] Hinton, G. (2002). Training products of experts by minimizing contrastive divergence.
           Neural Computation 14(8).
    .. [2] Tieleman, T. (2008). Training restricted Boltzmann machines using approximations to the
           likelihood gradient. ICML.
    .. [3] Christen, J. A. and Fox, C. (2005). Markov chain Monte Carlo using an approximation.
           Journal of Computational and Graphical Statistics 14(4).

    Examples
    --------
    >>> from skebm import ContrastiveDivergenceEBM, Network
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> network = Network(max_epochs=50)
    >>> density = ContrastiveDivergenceEBM(energy_model=network, random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.sample(3, random_state=0).shape
    (3, 2)
    """

    n_steps: int = 2
    persistent: bool = True
    sampler: Literal["mala", "hmc", "random_walk", "ula"] = "mala"
    step_size: float | Literal["auto"] = "auto"
    reinit_fraction: float = 1.0

    # what a fit sets
    persistent_chains_: FloatArray = field(init=False)
    chain_diagnostics_: dict[str, Any] = field(init=False)
    sample_diagnostics_: dict[str, Any] = field(init=False)
    _fitted_moves: Any = field(init=False)
    _stand_in: Any = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixedDensity._parameter_constraints,
        **TiltedDensity._parameter_constraints,
        "n_steps": [Interval(Integral, 1, None, closed="left")],
        "persistent": ["boolean"],
        "sampler": [StrOptions(set(SAMPLERS))],
        "step_size": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "reinit_fraction": [Interval(Real, 0, 1, closed="both")],
    }

    def _recipe(self) -> Recipe:
        network = self._resolve_energy_model(Network(), network_only=True)
        train = None
        if network is not None:
            train = partial(
                train_by_contrastive_divergence, network=network, moves=self._moves(),
                persistent=self.persistent, buffer=getattr(self, "persistent_chains_", None),
            )  # fmt: skip
        return self._basic_recipe(train, data_modes=True, finish=self._results)

    def _moves(self):
        share = self.reinit_fraction if self.persistent else 0.0
        return Moves(self.sampler, self.n_steps, self.step_size, share)

    def _results(self, task, trained, model):
        """What the chains leave behind; nothing where nothing was trained."""
        left = {"sample_diagnostics_": {}, "_fitted_moves": None, "_stand_in": None}
        if not trained.results:
            return left
        diagnostics = trained.results["diagnostics"]
        self._warn_of_chains(diagnostics)
        left["chain_diagnostics_"] = diagnostics
        left["_fitted_moves"], left["_stand_in"] = self._moves(), trained.results["stand_in"]
        if self.persistent:
            x = [task.columns.restore(rows.numpy()) for rows in trained.results["buffer"]]
            left["persistent_chains_"] = np.stack(x)
        return left

    def _warn_of_chains(self, diagnostics):
        acceptance, r_hat = diagnostics["acceptance_rate"].min(), diagnostics["r_hat"]
        if acceptance < MIN_ACCEPTANCE:
            # steps that adapt cannot follow an f that changes too fast
            what = "the learning rate" if self._moves().adapts else 'step_size, or leave it "auto"'
            warn(
                f"the chains accept {acceptance:.0%} of the proposals of "
                f'sampler="{self.sampler}": they hardly move. Lower {what}.',
                ConvergenceWarning,
            )
        if r_hat > MAX_R_HAT:
            warn(
                f"the chains do not mix (split R-hat {r_hat:.2f}): f may have learned from samples "
                "that the model does not have. Raise n_steps or reinit_fraction, take another "
                "base, or NCEDensity, which needs no chains.",
                ConvergenceWarning,
            )

    # ------------------------------------------------------------------ sampling

    @torch.inference_mode(False)
    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        n_steps: int | None = None,
        start: Literal["base", "buffer"] = "base",
        output: Literal["auto", "array"] = "auto",
        complete: bool = False,
        given: Any = None,
    ) -> Any:
        """Draw new rows from the model, by chains of the sampler it was trained with.

        Chains take Metropolis steps under the fitted model ("ula" is corrected: MALA), so that
        they leave its distribution as it is.

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
        output : {"auto", "array"}, default="auto"
            "auto" is a frame where `fit` was given one.
        complete : bool, default=False
            Draw rows under the condition that no cell is missing: others are left out.
        given : mapping or None, default=None
            Cells by the names of their columns (the numbers of an array): the others are drawn
            given these, as by :meth:`condition`, whatever `n_steps` and `start` are.

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            In random order. `sample_diagnostics_` then holds ``start`` and ``n_steps``. Where
            steps were taken (none are where the model is its base), it also holds the ``step_size``
            and ``acceptance_rate`` of the sampler, ndarrays of shape (n_members,);
            ``move_acceptance_rate`` and ``restart_acceptance_rate`` as in `chain_diagnostics_`;
            and the mean ``log_density_change`` from the start to the end, in nats, with its
            ``log_density_change_std_error``: chains that have not reached the distribution of the
            model still climb.

        Raises
        ------
        ValueError
            For ``start="buffer"`` where there are no persistent chains; and if hardly any row is
            complete, and complete ones are asked for.
        """
        if given is not None:
            return super().sample(
                n_samples, random_state, output=output, complete=complete, given=given
            )
        default_steps = n_steps is None
        n_steps = self.n_steps if default_steps else n_steps
        rng = self._sampling_rng(random_state, n_samples=n_samples, n_steps=n_steps)
        if start not in ("base", "buffer"):
            raise ValueError(f"start={start!r} must be 'base' or 'buffer'.")
        if start == "buffer" and not hasattr(self, "persistent_chains_"):
            raise ValueError(
                'start="buffer" needs persistent chains: fit with persistent=True and an '
                "energy_model that is not None."
            )
        if not hasattr(self, "chain_diagnostics_"):  # no chains: as the other estimators
            n_steps = 0 if default_steps else n_steps
            self.sample_diagnostics_ = {"start": start, "n_steps": int(n_steps)}
            return super().sample(
                n_samples, random_state, n_steps=n_steps, output=output, complete=complete
            )
        if self.model_.is_untilted:
            start, n_steps = "base", 0  # draws of the base are draws of the model
        self.sample_diagnostics_ = {"start": start, "n_steps": int(n_steps)}

        def draw(n):
            sizes = self._member_sizes(n, rng)
            # chains of all members run side by side
            drawn = sizes.max().expand_as(sizes) if n_steps else sizes
            parts = (self._draw if start == "base" else self._pick)(drawn, rng)
            if n_steps:
                parts = self._run(parts, int(n_steps), rng)
            parts = [rows[:n] for rows, n in zip(parts, sizes.tolist(), strict=True)]
            return self._shuffled(parts, rng)

        with torch.no_grad(), limit_threads(1):
            x = self._complete(draw, n_samples) if complete else draw(n_samples)
        return self._restored(x, output, rng)

    def _pick(self, sizes, rng):
        """Rows of every member from its persistent chains, a list of K tensors."""
        picked = []
        for rows, n in zip(self.persistent_chains_, sizes.tolist(), strict=True):
            index = torch.randint(len(rows), (n,), generator=rng, device=self._device)
            picked.append(self._tensor(rows[index.cpu().numpy()]))
        return picked

    def _run(self, parts, n_steps, rng):
        """Run the chains of every member, a list of K tensors (n, d)."""
        model = self.model_
        moves, stand_in = self._fitted_moves, self._stand_in
        moves = replace(moves, sampler="mala" if moves.sampler == "ula" else moves.sampler)
        chains = Chains(
            model, copy.deepcopy(stand_in), moves,
            step_size=torch.tensor(self.chain_diagnostics_["step_size"]), dtype=torch.float64,
            rng=rng,
        )  # fmt: skip
        z = torch.stack([model.features.transform(rows)[0] for rows in parts])
        blocks, changes = [], []
        for block in z.split(max(1, SAMPLED_CHAINS // model.n_members), dim=1):
            walkers = chains.at(block)
            before = chains.log_density(walkers)
            walkers = chains.run(walkers, n_steps)
            blocks.append(walkers.z)
            changes.append(chains.log_density(walkers) - before)
        change = torch.cat(changes, dim=1).flatten().cpu().numpy()
        error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else np.nan
        self.sample_diagnostics_ |= chains.rates() | {
            "log_density_change": float(change.mean()),
            "log_density_change_std_error": float(error),
        }
        return [model.features.transform.inverse(rows) for rows in torch.cat(blocks, dim=1)]
