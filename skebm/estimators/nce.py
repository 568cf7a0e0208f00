"""Noise-contrastive estimation."""

from dataclasses import field
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Literal

from skebm._sklearn_compat import Interval, StrOptions
from skebm._typing import FloatArray
from skebm.energies import Boosting, Network
from skebm.training import Recipe
from skebm.training.automatic import train_automatically
from skebm.training.classifiers import train_classifiers
from skebm.training.noise_contrastive import train_against_noise

from ._base import parameters
from ._mixed import MixedDensity
from ._tilted import DISTRIBUTION, DistributionLike, TiltedDensity


@parameters
class NCEDensity(MixedDensity, TiltedDensity):
    r"""Normalised density by noise-contrastive estimation.

    .. math:: \log p(x) = \log q(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    q is a base that is fitted first, f is trained to tell the rows from samples of a noise
    distribution (by default q itself), and log Z is measured by importance sampling. The estimator
    is the mean of `n_members` such densities, each trained on the other folds and judged on its
    own; f is kept only if the held-out likelihood gains by more than two standard errors. That is a
    test and no guarantee; in 228 fits of the benchmarks, before flows were part of the default
    base, the smallest gain over the base on new rows was -0.0000 nats per row.

    Parameters
    ----------
    objective : {"nce", "ranking", "self_normalized"}, default="nce"
        What trains a network: binary noise-contrastive estimation with a learned log Z [1]_,
        ranking [2]_, or the self-normalised likelihood [3]_. Boosting and classifiers are trained
        by binary noise-contrastive estimation alone (that is what classification is).
    noise_ratio : float or "auto", default="auto"
        Noise samples per row, nu. "auto" is 10 for boosting and classifiers (5 above 5,000 rows), 2
        for networks. No member sees more than 200,000 noise samples.
    noise : distribution or None, default=None
        Distribution of the noise, given like `base`. None is the base itself (log q then cancels in
        the loss); without a base, ``"auto"`` and the confining Gaussian, half and half.
    base : str, list of str, distribution or None, default="auto"
        "auto" stacks Gaussian mixtures on plain and on marginally Gaussianised columns and, for
        small data, kernel densities, with weights learned on held-out rows; and from 300 rows on
        an autoregressive flow, where a look at few rows says that it is worth it. Single
        candidates: "gaussian", "gmm", "gaussianized_gmm", "gaussianized_gmm_narrow", "kde",
        "gaussianized_kde", "flow" (a coupling spline flow), "autoregressive",
        "gaussianized_autoregressive", "uniform"; a list of them is stacked. A
        torch Distribution or a fitted density with `score_samples` and `sample` is taken as it is,
        in the units of X; an unfitted scikit-learn density is fitted to standardised columns. None
        is the pure energy-based model, exp(f) / Z with a confining Gaussian of three standard
        deviations.
    energy_model : str, Network, Boosting, module, callable, classifier or None, default="auto"
        What f is, and how it is trained. "boosting": boosted trees, read into soft trees,
        :class:`~skebm.Boosting`. "mlp" and "periodic": a network on piecewise-linear or periodic
        embeddings of the columns, :class:`~skebm.Network`. A torch module (instance, or a class or
        factory called with n_features), (n, n_features) -> (n,) or (n, 1), which is copied and
        never trained itself. Any scikit-learn classifier. "auto" is "boosting" where the noise is
        the base, and "mlp" elsewhere; in up to three columns, where steps are seen, "periodic"
        takes the place of trees that have found something, unless they are better on held-out rows
        by more than two standard errors. None: no f, the base alone. Settings such as
        ``energy_model__learning_rate`` are searched where a `Network` or `Boosting` is given.
        Energies see Gaussianised columns clipped to five standard deviations. Of rows with states,
        trees see codes and NaN; networks, modules and other classifiers see an indicator of every
        state, and after them the values, 0 where a row has none.
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
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    log_partition_learned_ : ndarray of shape (n_members,)
        Log Z as learned by the network's objective for f before recalibration; only where one is
        learned and the tilt was accepted.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z (where it was annealed: of importance samples that
        would give the same error); inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base) and, for networks, ``train_loss``.
    training_log_ : list of dict
        What skorch's callbacks see of the training, one dict per epoch; its ``batches`` are filled
        only where there are callbacks, and times are left out. ``History(training_log_)`` of
        ``skorch.history`` is indexed as skorch's own. Only where networks were trained.
    n_iter_ : int
        Epochs or boosting iterations of the state kept; 0 if none was accepted.
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

    See Also
    --------
    sklearn.mixture.GaussianMixture : Mixture of Gaussians.
    sklearn.neighbors.KernelDensity : Kernel density.

    Notes
    -----
    Columns are standardised by median and interquartile range, so the units of X change the scores
    by a constant only. A column with ties (integers, rounding) is modelled at its own resolution:
    its values are spread evenly over the cells between them while fitting. A constant column has
    two states, its constant and elsewhere. Categories, missing cells and atoms have probabilities,
    other numbers a density, so that log-densities compare where the same columns show the same
    states (:ref:`mixed`). The user guide says what becomes of weights, copies of
    rows, groups and far rows (:ref:`tables`).

    Large tables: bases are fitted on at most 20,000 rows per member, boosted trees and classifiers
    on at most 200,000, and a member is judged on at most 50,000. So of more than 400,000 rows of
    positive weight all are checked, but `fit` looks at so many, which the seed draws with equal
    chances; the model, the threshold and out-of-fold scores are about these. A network by
    `energy_model`, or by default where ``base=None`` or `noise` is given, learns from every row
    (:ref:`large`).

    References
    ----------
    .. [1] Gutmann, M. and Hyvärinen, A. (2010). Noise-contrastive estimation: a new estimation
           principle for unnormalized statistical models. AISTATS.
    .. [2] Ma, Z. and Collins, M. (2018). Noise contrastive estimation and negative sampling for
           conditional models: consistency and statistical efficiency. EMNLP.
    .. [3] Senetaire, H., Jeha, P., Mattei, P.-A. and Frellsen, J. (2025). Learning energy-based
           models by self-normalising the likelihood.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import NCEDensity
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = NCEDensity(random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.sample(3, random_state=0).shape
    (3, 2)

    A frame with categories and missing cells, and draws that look like it:

    >>> import pandas as pd
    >>> table = pd.DataFrame({"x": X[:, 0], "half": np.where(X[:, 1] > 0.2, "upper", "lower")})
    >>> table.loc[::5, "x"] = np.nan
    >>> density = NCEDensity(random_state=0).fit(table)
    >>> [column.kind for column in density.columns_]
    ['number', 'category']
    >>> density.sample(3, random_state=0).dtypes.equals(table.dtypes)
    True
    """

    objective: Literal["nce", "ranking", "self_normalized"] = "nce"
    noise_ratio: float | Literal["auto"] = "auto"
    noise: DistributionLike = None

    # what a fit sets
    log_partition_learned_: FloatArray = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixedDensity._parameter_constraints,
        **TiltedDensity._parameter_constraints,
        "objective": [StrOptions({"nce", "ranking", "self_normalized"})],
        "noise_ratio": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "noise": [*DISTRIBUTION, None],
    }

    def _energy(self) -> Any:
        default = Network() if self.base is None or self.noise is not None else Boosting()
        return self._resolve_energy_model(default)

    @property
    def _looks_at_all_rows(self) -> bool:
        return isinstance(self._energy(), Network)

    def _recipe(self) -> Recipe:
        model = self._energy()
        if model is None:
            train = None
            if self.noise is not None or self.objective != "nce":
                raise ValueError(
                    "energy_model=None trains nothing, so that noise and objective cannot act; "
                    "leave them out, or take another energy_model."
                )
        elif isinstance(model, Network):
            train = partial(
                train_against_noise, network=model, objective=self.objective,
                noise_ratio=self.noise_ratio,
            )  # fmt: skip
        elif self.energy_model == "auto" and self.objective == "nce":
            train = partial(train_automatically, noise_ratio=self.noise_ratio)
        elif self.objective == "nce":
            train = partial(train_classifiers, model=model, noise_ratio=self.noise_ratio)
        else:
            raise ValueError(
                f'objective="{self.objective}" trains networks only, and energy_model is '
                f'{model!r}; take objective="nce", or energy_model="mlp".'
            )
        return self._basic_recipe(train, noise=self.noise)
