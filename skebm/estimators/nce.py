"""Noise-contrastive estimation."""

from functools import partial
from numbers import Real

from sklearn.base import is_classifier
from sklearn.ensemble import HistGradientBoostingClassifier

from skebm._sklearn_compat import HasMethods, Interval, StrOptions
from skebm.objectives import nce_losses, ranking_nce_losses, self_normalized_losses

from ._classifiers import boosting_settings, train_classifiers
from ._neural import build_energy, if_auto, train_against_noise
from ._tilted import LAW, BaseTiltedDensity


class NCEDensity(BaseTiltedDensity):
    r"""Normalised density by noise-contrastive estimation.

    .. math:: \log p(x) = \log q(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    q is a base that is fitted first, f is trained to tell the rows from samples of a noise law (by
    default q itself), and log Z is measured by importance sampling. The estimator is the mean of
    `n_members` such densities, each trained on the other folds and judged on its own; f is kept
    only if the held-out likelihood gains by more than two standard errors, so the result is not
    below its base.

    Parameters
    ----------
    objective : {"nce", "ranking", "self_normalized"}, default="nce"
        What trains a neural energy: binary noise-contrastive estimation with a learned log Z [1]_,
        ranking [2]_, or the self-normalised likelihood [3]_. Boosting and classifiers are always
        trained by binary noise-contrastive estimation (that is what classification is).
    noise_ratio : float or "auto", default="auto"
        Noise samples per row, nu. "auto" is 10 for boosting and classifiers (5 above 5,000 rows), 2
        for networks. No member sees more than 200,000 noise samples.
    noise : law or None, default=None
        Law of the noise, given like `base`. None is the base itself (log q then cancels in the
        loss); without a base, ``"auto"`` and the confining Gaussian, half and half.
    base : str, list of str, law or None, default="auto"
        "auto" stacks Gaussian mixtures on plain and on marginally Gaussianised columns and, for
        small data, kernel densities, with weights learned on held-out rows. Single candidates:
        "gaussian", "gmm", "gaussianized_gmm", "gaussianized_gmm_narrow", "kde",
        "gaussianized_kde", "flow" (a coupling spline flow), "uniform"; a list of them is stacked. A
        torch Distribution or a fitted density with `score_samples` and `sample` is taken as it is,
        in the units of X; an unfitted scikit-learn density is fitted to standardised columns. None
        is the pure energy-based model, exp(f) / Z with a confining Gaussian of three standard
        deviations.
    energy_model : str, torch.nn.Module, callable or classifier, default="auto"
        "boosting": boosted trees, read into soft trees. "mlp": network on piecewise-linear
        embeddings of the columns. "periodic": network on periodic embeddings. A module (instance,
        or a class or factory called with n_features), (n, n_features) -> (n,) or (n, 1), which is
        copied and never trained itself.
        Any scikit-learn classifier. "auto" is "boosting" where the noise is the base, and "mlp"
        elsewhere. Energies see Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Of the networks.
    learning_rate : float or "auto", default="auto"
        "auto" is .1 for boosting (.2 above 5,000 rows) and 3e-3 for networks.
    weight_decay : float, default=1e-3
        Of the networks (AdamW).
    batch_size : int, default=256
        Rows per member and step, for networks.
    max_epochs : int or "auto", default="auto"
        Passes over the rows ("auto": 100, or 2,000 steps if that is more), or boosting iterations
        ("auto": 600), at most. 0 is the base alone.
    early_stopping : bool, default=True
        Whether to stop by, and keep the best state on, held-out normalised likelihood.
    validation_fraction : float, default=0.1
        Rows held out when `n_members` is 1. With more members every row is held out once.
    patience : int, default=20
        Epochs without improvement before a network stops. Few rows are judged less than once per
        epoch; a network then stops after three looks without improvement.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below .01 nats, and
        anneals where the effective sample size stays below one per cent.
    smoothing : float, "scott" or "multiscale", default=0.0
        h > 0 fits the density of X + h eps, eps normal with the standard deviations of the
        columns. "scott" is n^(-1 / (d + 4)). Density estimation wants 0. Anomaly detection wants
        several scales at once: "multiscale" is the normalised geometric mean of the bases at
        h = 0, Scott's h and h = .5, without a trained energy, so that `score_samples` is the mean
        of three log-densities up to a constant.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` calls outliers. "auto" takes the threshold from
        out-of-fold scores instead, so that 5 % of *new* rows of the same law fall below it.
    callbacks : list of skorch callbacks, default=None
        Called while networks train.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". Bases and trees are
        fitted on the CPU; networks train, and every model scores and samples, on the device.
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
    n_iter_ : int
        Epochs or boosting iterations of the state kept; 0 if the base alone was better.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of every training row (of positive weight) under the member that has not seen
        it; NaN for rows that were never held out (with one member, or beyond 50,000 per member).
        This, and not `score_samples`, ranks the rows of the training table itself.
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
    its values are spread evenly over the cells between them while fitting. A constant column is a
    point mass.

    Large tables: bases are fitted on at most 20,000 rows per member, boosted trees on at most
    200,000, and a member is judged on at most 50,000; networks see every row.

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
    >>> from skebm import NCEDensity
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> density = NCEDensity(random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.sample(3, random_state=0).shape
    (3, 2)
    """

    _parameter_constraints: dict = {
        **BaseTiltedDensity._parameter_constraints,
        "objective": [StrOptions({"nce", "ranking", "self_normalized"})],
        "noise_ratio": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "noise": [*LAW, None],
        "energy_model": [
            *BaseTiltedDensity._parameter_constraints["energy_model"],
            StrOptions({"boosting"}),
            HasMethods(["fit", "predict_proba"]),
        ],
    }

    def __init__(
        self,
        *,
        objective="nce",
        noise_ratio="auto",
        noise=None,
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
        self.objective = objective
        self.noise_ratio = noise_ratio
        self.noise = noise
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

    def _noise(self):
        return self.noise

    def _energy(self):
        if isinstance(self.energy_model, str) and self.energy_model == "auto":
            return "mlp" if self.base is None or self.noise is not None else "boosting"
        return self.energy_model

    def _energy_is_opaque(self):
        model = self._energy()
        return _is_classifier(model) and not isinstance(model, HistGradientBoostingClassifier)

    def _train(self, members, refresh, device, kept, progress):
        model = self._energy()
        classifier = _is_classifier(model) or (isinstance(model, str) and model == "boosting")

        if classifier:
            settings = boosting_settings(len(members.x))
        else:
            settings = {"noise_ratio": 2.0, "learning_rate": 3e-3, "max_iter": None}
        noise_ratio = if_auto(self.noise_ratio, settings["noise_ratio"])
        learning_rate = if_auto(self.learning_rate, settings["learning_rate"])
        max_epochs = if_auto(self.max_epochs, settings["max_iter"])
        if classifier:
            if not members.tilts_its_proposal:
                raise ValueError(
                    f"energy_model={model!r} is a classifier of data against samples of the base; "
                    "it needs a base, and noise=None."
                )
            return train_classifiers(
                members, model, noise_ratio=noise_ratio, learning_rate=learning_rate,
                max_iter=max_epochs, early_stopping=self.early_stopping, progress=progress,
            )  # fmt: skip
        energy = build_energy(
            model, members, self.hidden_layer_sizes, members.seeds.of("network"), kept
        )
        loss = {
            "nce": partial(nce_losses, noise_ratio=noise_ratio),
            "ranking": _ranking,
            "self_normalized": self_normalized_losses,
        }[self.objective]
        return train_against_noise(
            members, energy, loss, learns_partition=self.objective != "ranking",
            noise_ratio=noise_ratio, learning_rate=learning_rate,
            weight_decay=self.weight_decay, batch_size=self.batch_size, max_epochs=max_epochs,
            patience=self.patience, early_stopping=self.early_stopping, callbacks=self.callbacks,
            device=device, refresh=refresh, progress=progress,
        )  # fmt: skip


def _is_classifier(model):
    return hasattr(model, "predict_proba") and is_classifier(model)


def _ranking(log_ratio_data, log_ratio_noise, log_partition):
    """Ranking losses; every row of a batch competes with all noise rows of the batch."""
    return ranking_nce_losses(log_ratio_data, log_ratio_noise.unsqueeze(-2)), None
