"""Flow-contrastive estimation."""

from collections.abc import Callable
from dataclasses import field
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Literal

from torch import nn

from skebm._sklearn_compat import Interval, StrOptions
from skebm._typing import FloatArray
from skebm.energies import Boosting, Network
from skebm.training import Recipe
from skebm.training.flow_contrastive import FLOW_EFFORT, STAGES, train_by_flow_contrast

from ._base import parameters
from ._generators import FlowDensity
from ._tilted import TiltedDensity


@parameters
class FlowContrastiveDensity(TiltedDensity):
    r"""Normalised density by flow-contrastive estimation: an energy and a flow in one game.

    .. math:: \log p(x) = \log q_0(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    A normalizing flow is fitted by maximum likelihood, and is the base q_0. Then a copy of it, the
    noise q, plays against the energy: a discriminator

    .. math:: D(x) = \sigma\left(\log q_0(x) + f(x) - c - \log q(x)\right)

    tells rows from samples of the flow, with c a learned log Z [1]_. The energy raises

    .. math:: V = E_{\mathrm{data}} \log D + E_q \log(1 - D),

    which draws p to the data; the flow lowers it, which draws q to the data, so that its samples
    stay hard to tell from rows. Then the energy goes on learning against the flow at rest, and
    boosted trees correct the better one of both, or the base. Of all stages, the flows among them,
    the state that is best on held-out rows is kept.

    Parameters
    ----------
    flow : str, zuko flow or callable, default="coupling"
        "coupling": coupling flow of rational-quadratic splines, quick in both directions;
        "autoregressive": masked autoregressive flow, which draws column by column. With zuko
        installed also "nsf", "maf", "nice" and "gf" of its flows, or a flow of zuko without
        context, or a callable that makes one from n_features. It sees Gaussianised columns.
    generator_learning_rate : float, default=3e-4
        Of the flow, in the game.
    accuracy_threshold : float, default=0.5
        The flow takes a step whenever the discriminator tells at least this share of rows and
        samples apart rightly, on a moving average; below, the energy is given time.
    refinement : bool, default=True
        Whether more noise-contrastive estimation follows the game, against the flow at rest. What
        does not help on held-out rows is left out.
    correction : Boosting, "auto" or None, default="auto"
        Boosted trees that correct the energy in the end, against samples of it (or of the base,
        where that is better). "auto" is ``Boosting()`` with ``energy_model="auto"``,
        ``refinement=True`` and a base, and None otherwise. They need a base.
    base : {"flow"} or None, default="flow"
        None is the form of the paper: exp(f) / Z with a confining Gaussian of three standard
        deviations in place of q_0, which is then also half of the noise of the refinement. No trees
        follow then.
    energy_model : str, Network, torch.nn.Module, callable or None, default="auto"
        What f is in the game, and how it is trained. "periodic" ("auto"): a network on periodic
        embeddings of the columns, :class:`~skebm.Network`; its `batch_size` is also that of the
        flow. "mlp": a network on piecewise-linear embeddings. A torch module (instance, or a class
        or factory called with n_features), (n, n_features) -> (n,) or (n, 1), which is copied and
        never trained itself. None: no game, the flow alone. Settings such as
        ``energy_model__learning_rate`` are searched where a `Network` is given. Energies see
        Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below 0.01 nats, and
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
        ``flow_boosted`` (with trees on the base instead, if these are better by 0.01; only with
        early stopping of the trees, up to 5,000 rows, and where the networks gained something). All
        before recalibration.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    log_partition_learned_ : ndarray of shape (n_members,)
        The c of the last discriminator, where a tilt was accepted. That of the trees has no c of
        its own: it takes what they correct for normalised, the base (0) or an energy, with log Z
        from 8,192 draws of the base, which is what is told here.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z (where it was annealed: of importance samples that
        would give the same error); inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base), ``train_loss`` and ``jensen_shannon``, the Jensen-Shannon
        divergence between data and flow that the discriminator sees, log 2 + V / 2, in nats (NaN
        after the game).
    training_log_ : list of dict
        What skorch's callbacks see of the training, one dict per epoch; its ``batches`` are filled
        only where there are callbacks, and times are left out. ``History(training_log_)`` of
        ``skorch.history`` is indexed as skorch's own. Only where networks were trained.
    n_iter_ : int
        Epochs of the state kept, and iterations of boosting, counted through all stages; 0 if none
        was accepted.
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
    >>> from skebm import FlowContrastiveDensity, Network
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> network = Network(max_epochs=5)
    >>> density = FlowContrastiveDensity(energy_model=network, n_members=1, random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.flow_.sample(3, random_state=0).shape
    (3, 2)
    """

    flow: str | nn.Module | Callable[..., nn.Module] = "coupling"
    generator_learning_rate: float = 3e-4
    accuracy_threshold: float = 0.5
    refinement: bool = True
    correction: Boosting | Literal["auto"] | None = "auto"
    base: Literal["flow"] | None = "flow"

    # what a fit sets
    log_partition_learned_: FloatArray = field(init=False)
    flow_: FlowDensity = field(init=False)
    stages_: dict[str, Any] = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **TiltedDensity._parameter_constraints,
        "flow": [str, callable, nn.Module],
        "generator_learning_rate": [Interval(Real, 0, None, closed="neither")],
        "accuracy_threshold": [Interval(Real, 0, 1, closed="both")],
        "refinement": ["boolean"],
        "correction": [StrOptions({"auto"}), Boosting, None],
        "base": [StrOptions({"flow"}), None],
    }

    def _check_parameters(self):
        if isinstance(self.correction, Boosting):
            self.correction.validate()
            if self.base is None or self.energy_model is None:
                raise ValueError(
                    f"correction={self.correction!r} corrects an energy on a base; it needs a base "
                    "and an energy_model, or take correction=None."
                )

    def _recipe(self) -> Recipe:
        network = self._resolve_energy_model(Network(), network_only=True)
        train, correction = None, self.correction
        if correction == "auto":
            automatic = isinstance(self.energy_model, str) and self.energy_model == "auto"
            whole = automatic and self.refinement and self.base is not None
            correction = Boosting() if whole else None
        if network is not None:
            train = partial(
                train_by_flow_contrast, network=network, correction=correction,
                generator_learning_rate=self.generator_learning_rate,
                accuracy_threshold=self.accuracy_threshold, refinement=self.refinement,
            )  # fmt: skip
        return self._basic_recipe(
            train, flow=self.flow, finish=self._results,
            flow_batch_size=(network or Network()).batch_size,
            flow_effort=1.0 if network is None else FLOW_EFFORT,
        )  # fmt: skip

    def _results(self, task, trained, model):
        """The flow after the game, and what every stage gave."""
        flows, columns = task.flow_distributions, task.columns
        stages = {"flow": task.mean(task.held_log_prob(flows)).item()}
        level = task.mean(task.held_log_prob(task.bases)).item()
        for name, gain in trained.results.get("stages", {}).items():
            stages[name] = level + gain
        return {
            "flow_": FlowDensity(columns, trained.results.get("flows", flows)),
            "stages_": {s: float(stages[s] + columns.log_factor) for s in STAGES if s in stages},
        }
