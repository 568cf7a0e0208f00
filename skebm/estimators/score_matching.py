"""Score matching."""

from dataclasses import field
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

from numpy.typing import ArrayLike

from skebm._sklearn_compat import Interval, StrOptions
from skebm._typing import FloatArray
from skebm.energies import Network
from skebm.training import Recipe
from skebm.training.score_matching import noise_levels, train_by_score_matching

from ._base import parameters
from ._mixed import MixedDensity
from ._tilted import TiltedDensity


@parameters
class ScoreMatchingEBM(MixedDensity, TiltedDensity):
    r"""Normalised density by score matching.

    .. math:: \log p(x) = \log q(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    The gradient of log q + f is fitted to that of the log-density of the data, in Gaussianised
    coordinates z; neither noise samples nor log Z are needed for that. As in
    :class:`~skebm.NCEDensity`, q is a base that is fitted first, log Z is measured afterwards, the
    estimator is the mean of `n_members` cross-fitted members, and f is kept only if the held-out
    likelihood gains by more than two standard errors. That is a test and no guarantee; in the
    benchmarks (one seed) the smallest gain over the base on new rows was -0.000 nats per row.

    Parameters
    ----------
    method : {"auto", "exact", "sliced", "denoising"}, default="auto"
        "exact" computes the Laplacian of f [1]_, in one forward and one reverse sweep. "sliced"
        takes it along random directions [2]_: the same in expectation, at a cost that does not grow
        with the number of columns. "denoising" predicts the noise in perturbed rows [3]_ and asks
        for first derivatives only, so that it takes energies with kinks (``energy_model="mlp"``,
        ReLU).
        "auto" is "exact" up to ten columns and "sliced" beyond.
    n_projections : int, default=1
        Random directions per row and step of "sliced": vectors of +-1 (Rademacher), which give the
        least variance. Idle in the other methods.
    sigma : float, array-like of float or "auto", default="auto"
        Noise that is added to the rows in training, in units of z (where the columns have a
        standard deviation of about one). "auto" is a fifth of Scott's bandwidth, 0.2 n^(-1 / (d +
        4)). Several levels, such as ``np.geomspace(0.05, 0.5, 5)``, are mixed, each weighted by its
        square. 0 fits the rows as they are ("exact" and "sliced" only). Unlike `smoothing` it does
        not change what is estimated.
    base : str, list of str, distribution or None, default="auto"
        As in :class:`~skebm.NCEDensity`. None is the pure energy-based model, exp(f) / Z with a
        confining Gaussian of three standard deviations.
    energy_model : str, Network, torch.nn.Module, callable or None, default="auto"
        What f is, and how it is trained. "periodic" ("auto"): a network on periodic embeddings of
        the columns, smooth, :class:`~skebm.Network`. "mlp": a network on piecewise-linear
        embeddings, for "denoising". A torch module (instance, or a class or factory called with
        n_features), (n, n_features) -> (n,) or (n, 1), which is copied and never trained itself.
        None: no f, the base alone. Settings such as ``energy_model__learning_rate`` are searched
        where a `Network` is given. Energies see Gaussianised columns clipped to five standard
        deviations; of rows with states an indicator of every state, and after them the values, 0
        where a row has none.
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
    method_ : str
        "exact", "sliced" or "denoising". Only if something was trained.
    sigma_ : ndarray of shape (n_levels,)
        Noise levels of training; likewise.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z (where it was annealed: of importance samples that
        would give the same error); inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base) and ``train_loss`` (nats per squared unit of z; 0 is the base,
        for "exact" and "sliced").
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
    UserWarning
        In `fit`, where ``base=None`` leaves the weights of separate modes to the recalibration or
        ``recalibration=False`` to the base, and where ``energy_model="mlp"`` or the activations of
        a module (ReLU) have kinks that second derivatives do not see.

    See Also
    --------
    NCEDensity : Contrast with samples of the base; usually the better density.

    Notes
    -----
    Near a good base score matching learns broad structure: its signal is the slope of the
    log-density, its noise the rows themselves. Where the base is far from the data it learns
    faster than noise-contrastive estimation.

    Of rows with states (categories, missing cells, atoms) the gradient is taken in the values that
    are there. It says nothing about the probabilities of the states, which are those of the base: f
    is centred under every pattern of states, by draws of the base's values (:ref:`mixed`).

    Large tables: networks see at most 200,000 rows, because the base is differentiated at each. So
    of more than 400,000 rows of positive weight all are checked, but `fit` looks at so many, which
    the seed draws with equal chances (:ref:`large`).

    References
    ----------
    .. [1] Hyvärinen, A. (2005). Estimation of non-normalized statistical models by score matching.
           Journal of Machine Learning Research 6.
    .. [2] Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching: a scalable
           approach to density and score estimation. UAI.
    .. [3] Vincent, P. (2011). A connection between score matching and denoising autoencoders.
           Neural Computation 23(7).

    Examples
    --------
    >>> from skebm import Network, ScoreMatchingEBM
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = ScoreMatchingEBM(energy_model=Network(max_epochs=50), random_state=0).fit(X)
    >>> density.method_
    'exact'
    >>> density.stein_score(X[:2]).shape
    (2, 2)
    """

    method: Literal["auto", "exact", "sliced", "denoising"] = "auto"
    n_projections: int = 1
    sigma: float | ArrayLike | Literal["auto"] = "auto"

    # what a fit sets
    method_: str = field(init=False)
    sigma_: FloatArray = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixedDensity._parameter_constraints,
        **TiltedDensity._parameter_constraints,
        "method": [StrOptions({"auto", "exact", "sliced", "denoising"})],
        "n_projections": [Interval(Integral, 1, None, closed="left")],
        "sigma": [StrOptions({"auto"}), Interval(Real, 0, None, closed="left"), "array-like"],
    }

    def _check_parameters(self):
        levels = noise_levels(self.sigma, 2, 1)
        if self.method == "denoising" and (levels == 0).any():
            raise ValueError('sigma=0 leaves method="denoising" no noise to predict; raise it.')

    @property
    def _looks_at_all_rows(self) -> bool:
        return False

    def _recipe(self) -> Recipe:
        network = self._resolve_energy_model(Network(), network_only=True)
        train = None
        if network is not None:
            train = partial(
                train_by_score_matching, network=network, method=self.method,
                n_projections=self.n_projections, sigma=self.sigma,
                recalibrates=self.recalibration,
            )  # fmt: skip
        return self._basic_recipe(train, data_modes=True)
