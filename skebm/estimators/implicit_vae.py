"""A latent-variable density whose encoder needs no density of its own."""

import copy
from dataclasses import replace
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from skebm._random import Seeds, draw_seed
from skebm._sklearn_compat import Interval, StrOptions
from skebm.latents import BernoulliLikelihood, GaussianLikelihood

from ._base import SCORED_ROWS, BaseDensity, perturbed_copies, resolve_device, scott
from ._columns import Columns, relative_precision
from ._members import make_splits
from ._neural import if_auto
from ._progress import Progress
from ._variational import (
    antithetic_noise,
    beats,
    build_networks,
    choose_n_components,
    train_latent,
)

ROUNDING = 1e-9
"""Values of the Bernoulli likelihood so far outside of [0, 1] are taken to be 0 or 1."""

COMPARED_ROWS = 2_000
"""Held-out rows, at most, on which training is compared with its start."""

LIKELIHOODS = {"gaussian": GaussianLikelihood, "bernoulli": BernoulliLikelihood}

DECODED_ROWS, ENCODED = 8192, 2**16
"""Latent vectors, and draws of the encoder, that are made at once."""


class ImplicitVAE(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseDensity):
    r"""Variational autoencoder: density and transformer, with an implicit encoder.

    Rows are made from latent variables, z ~ N(0, I) and x ~ p(x | z), by a decoder network. Its
    inverse is an encoder network z = g(x, eps) that can be sampled but has no density, so that the
    posterior of z may have any shape: bent, or in several pieces. Both are trained by the evidence
    lower bound; the gradient of its entropy needs only the score of the encoder, which a second
    network learns by sliced score matching [1]_, or which Stein's identity gives from samples [2]_.

    Training starts from factor analysis and its exact posterior, and falls back on it unless it
    gains on held-out rows. `score_samples` is log p(x) itself, not a bound: an integral over z
    by importance sampling with a proposal adapted to each row, with a standard error for each row.

    Parameters
    ----------
    n_components : int or "auto", default="auto"
        Latent variables. "auto" takes the number of factors with the best held-out likelihood in
        factor analysis, at least 4 (or as many as there are columns) and at most 16.
    encoder : {"implicit", "gaussian"}, default="implicit"
        "implicit": any law of z given x. "gaussian": independent normal variables, the ordinary
        variational autoencoder; two to three times faster, and with a learned decoder usually
        about as good, because decoder and encoder adapt to each other.
    score_estimator : {"sliced", "stein"}, default="sliced"
        Of implicit encoders. "sliced": a network conditioned on x, trained by sliced score matching
        with three steps for each of the others. "stein": the spectral Stein estimator, from 16
        draws per row; no network, but a bias.
    likelihood : {"gaussian", "bernoulli"}, default="gaussian"
        "gaussian": normal columns with learned variances. "bernoulli": for columns in [0, 1]; a
        probability where all values are 0 or 1, otherwise the density of the continuous Bernoulli
        law. New rows with other values have log-density -inf: after a ``MinMaxScaler``, take
        ``MinMaxScaler(clip=True)``.
    kl_weight_start : float, default=1.0
        Weight of the divergence between encoder and prior at the first step; it goes geometrically
        to one in the first 60 % of the steps. A small weight (.1) is the warm-up that some decoders
        need. A large one (30) can let the encoder find several modes of a posterior where decoder
        and noise are fixed, and empties the latent variables of a decoder that is not. With a start
        other than one, training does not stop early.
    n_posterior_samples : int, default=64
        Draws of the encoder behind `transform` (unless the encoder is Gaussian) and `reconstruct`.
    n_importance_samples : int, default=500
        Draws behind every log-density, after those that the proposal is adapted with.
    encoder_model : "mlp", torch.nn.Module or callable, default="mlp"
        "mlp": a linear map and a perceptron. A module (instance, or a class or factory called with
        (n_features, 2 * n_components)) maps rows to location and log-scale of z,
        (n, n_features) -> (n, 2 * n_components). It is copied and never trained itself. Rows are on
        standardised columns (median, interquartile range), without the constant ones.
    decoder_model : "mlp", torch.nn.Module or callable, default="mlp"
        "mlp": a linear map and a perceptron. A module (instance, or a class or factory called with
        (n_components, n_features)) maps z to the mean of standardised columns, or to logits,
        (n, n_components) -> (n, n_features).
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Of every perceptron.
    learning_rate : float or "auto", default="auto"
        "auto" is 2e-3.
    weight_decay : float, default=1e-3
        Of AdamW, for encoder and decoder.
    batch_size : int, default=128
        Rows per step.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most; "auto" is 100, or 6,000 steps if that is more. 0 is the
        start: factor analysis.
    early_stopping : bool, default=True
        Whether to stop by, and keep the best state on, held-out likelihood. A decoder of yours
        without parameters to learn has nothing to stop by, and the last state is kept.
    validation_fraction : float, default=0.1
        Rows held out.
    patience : int, default=20
        Epochs without improvement before training stops; at least 600 steps.
    smoothing : float or "scott", default=0.0
        Fits the density of X + h times standard deviation times normal noise.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` calls outliers. "auto" takes the threshold from
        the held-out rows instead, so that 5 % of *new* rows of the same law fall below it.
    callbacks : list of skorch callbacks, default=None
        Called in training.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps".
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps the columns, and goes on from the trained networks.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    n_components_ : int
        Latent variables.
    noise_variance_ : ndarray of shape (`n_features_in_`,)
        Variances of the Gaussian likelihood, in the squared units of X; 0 for constant columns.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, from 32 draws for each, which err to
        the low side; the first entry is the start, NaN where an epoch was not judged) and
        ``train_loss`` (minus the evidence lower bound; the entropy of implicit encoders counts as
        if they were Gaussian).
    n_iter_ : int
        Epochs of the state kept; 0 if none beat the start.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of the training rows (of positive weight) that were held out; NaN for the rest.
    model_ : torch.nn.Module
        The fitted networks, ``model`` and ``encoder``, on standardised columns.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    sklearn.decomposition.FactorAnalysis : The same with a linear decoder.
    NCEDensity : Without latent variables; usually the better density.

    References
    ----------
    .. [1] Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching: a scalable
           approach to density and score estimation. UAI.
    .. [2] Shi, J., Sun, S. and Zhu, J. (2018). A spectral approach to gradient estimation for
           implicit distributions. ICML.
    .. [3] Kingma, D. P. and Welling, M. (2014). Auto-encoding variational Bayes. ICLR.

    Examples
    --------
    >>> from skebm import ImplicitVAE
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> vae = ImplicitVAE(n_components=2, max_epochs=5, random_state=0).fit(X)
    >>> log_density, std_error = vae.score_samples(X[:3], return_std=True)
    >>> log_density.shape
    (3,)
    >>> vae.transform(X[:3]).shape
    (3, 2)
    >>> vae.reconstruct(X[:3]).shape
    (3, 2)
    """

    _parameter_constraints: dict = {
        **BaseDensity._parameter_constraints,
        "n_components": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "encoder": [StrOptions({"implicit", "gaussian"})],
        "score_estimator": [StrOptions({"sliced", "stein"})],
        "likelihood": [StrOptions(set(LIKELIHOODS))],
        "kl_weight_start": [Interval(Real, 0, None, closed="neither")],
        "n_posterior_samples": [Interval(Integral, 1, None, closed="left")],
        "n_importance_samples": [Interval(Integral, 10, None, closed="left")],
        "encoder_model": [StrOptions({"mlp"}), callable, torch.nn.Module],
        "decoder_model": [StrOptions({"mlp"}), callable, torch.nn.Module],
    }

    def __init__(
        self,
        *,
        n_components="auto",
        encoder="implicit",
        score_estimator="sliced",
        likelihood="gaussian",
        kl_weight_start=1.0,
        n_posterior_samples=64,
        n_importance_samples=500,
        encoder_model="mlp",
        decoder_model="mlp",
        hidden_layer_sizes=(128, 128),
        learning_rate="auto",
        weight_decay=1e-3,
        batch_size=128,
        max_epochs="auto",
        early_stopping=True,
        validation_fraction=0.1,
        patience=20,
        smoothing=0.0,
        contamination="auto",
        callbacks=None,
        device="auto",
        random_state=None,
        warm_start=False,
        verbose=0,
    ):
        self.n_components = n_components
        self.encoder = encoder
        self.score_estimator = score_estimator
        self.likelihood = likelihood
        self.kl_weight_start = kl_weight_start
        self.n_posterior_samples = n_posterior_samples
        self.n_importance_samples = n_importance_samples
        self.encoder_model = encoder_model
        self.decoder_model = decoder_model
        self.hidden_layer_sizes = hidden_layer_sizes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.smoothing = smoothing
        self.contamination = contamination
        self.callbacks = callbacks
        self.device = device
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose

    # ------------------------------------------------------------------ fit

    def _check_parameters(self):
        if self.likelihood == "bernoulli" and self.smoothing != 0.0:
            raise ValueError('smoothing leaves [0, 1]: it needs likelihood="gaussian".')

    def _fit(self, X, sample_weight, n_threads):
        self._check_parameters()
        kept = copy.deepcopy(getattr(self, "model_", None)) if self.warm_start else None
        if kept is not None and type(kept.model.likelihood) is not LIKELIHOODS[self.likelihood]:
            kept = None  # other columns: nothing to go on from
        precision = relative_precision(X)
        rows, weight = self._usable_rows(X, sample_weight, reset=kept is None)
        rows = self._rounded(rows)
        seed = self._draw_seed(self.random_state)
        seeds = Seeds(seed)
        device = resolve_device(self.device)
        self._check_range(rows)
        if kept is None:
            columns = self._learn_columns(rows, precision)
        else:
            columns = self._columns
            rows = columns.snap(rows, precision)
        x, _ = columns.standardize(rows)
        h = scott(x) if self.smoothing == "scott" else float(self.smoothing)
        folds = make_splits(len(x), 1, self.validation_fraction, seeds.generator("folds"))
        draw, row_weight, (split,) = perturbed_copies(x, weight, folds, columns, h)
        x_fit = draw(seeds.of("jitter"))
        with Progress(self.verbose) as progress, torch.no_grad():
            progress.stage("factor analysis")
            networks, goes_on = self._new_networks(x_fit, row_weight, split, seeds, kept)
            start = copy.deepcopy(networks)
            # a decoder with nothing to learn has one likelihood, whatever the encoder: none to
            # stop by
            learns = any(p.requires_grad for p in networks.model.decoder.parameters())
            early_stopping = self.early_stopping and learns
            history, n_iter = None, 0
            if self.max_epochs != 0:
                history = train_latent(
                    networks, x_fit, row_weight, split,
                    score_estimator=self.score_estimator, kl_weight_start=self.kl_weight_start,
                    refresh=partial(_fresh, draw) if h > 0 or columns.has_ties else None,
                    seeds=seeds,
                    learning_rate=if_auto(self.learning_rate, 2e-3),
                    weight_decay=self.weight_decay, batch_size=self.batch_size,
                    max_epochs=if_auto(self.max_epochs, None), patience=self.patience,
                    early_stopping=early_stopping, callbacks=self.callbacks, device=device,
                    n_threads=n_threads, progress=progress,
                )  # fmt: skip
                n_iter = int(history["epoch"][-1])
            networks, start = networks.cpu().double().eval(), start.double().eval()
            progress.stage("log-likelihood")
            held = split[1]
            if n_iter and early_stopping:
                n_iter = int(history["epoch"][np.nanargmax(history["validation_gain"])])
                some = held[:COMPARED_ROWS]
                # a decoder of the user has been fitted to nothing at the start
                fitted = isinstance(self.decoder_model, str) or goes_on
                if (
                    n_iter
                    and fitted
                    and not beats(networks, start, x_fit[some], row_weight[some], seed)
                ):
                    networks, n_iter = start, 0
        networks.requires_grad_(False)
        self._columns, self._seed, self.n_iter_ = columns, seed, n_iter
        self.model_ = networks.to("cpu" if device.type == "mps" else device)
        self.n_components_ = self._n_features_out = networks.model.n_components
        self._report(history, x_fit[held], row_weight[held])
        scores = np.full(len(rows), np.nan)
        x_held = torch.as_tensor(x[held.numpy()], device=self._device)
        scores[held.numpy()] = self._measure(x_held)[0].cpu().numpy() + columns.log_det
        self._set_offset(rows, weight, scores)

    def _rounded(self, X):
        """Values of columns in [0, 1], where scaling has left them outside by a rounding error."""
        if self.likelihood == "gaussian":
            return X
        X = np.where((X < 0.0) & (X >= -ROUNDING), 0.0, X)
        return np.where((X > 1.0) & (X <= 1.0 + ROUNDING), 1.0, X)

    def _validate(self, X):
        return self._rounded(super()._validate(X))

    def _check_range(self, rows):
        outside = ((rows < 0.0) | (rows > 1.0)).any(axis=0)
        if self.likelihood == "bernoulli" and outside.any():
            raise ValueError(
                f'likelihood="bernoulli" needs values in [0, 1], but column '
                f"{self._column_names(rows)[outside.argmax()]!r} has others; scale it, or take the "
                "gaussian one."
            )

    def _learn_columns(self, rows, precision):
        columns = Columns.learn(rows, self._column_names(rows), precision)
        if self.likelihood == "gaussian":
            return columns
        n_varying = columns.varying.sum()
        return replace(
            columns, center=np.zeros(n_varying), scale=np.ones(n_varying),
            half_steps=(None,) * n_varying,
        )  # fmt: skip

    def _new_networks(self, x, weight, split, seeds, kept):
        """Networks to start from, and whether they are those of the last fit."""
        rows, row_weight = x[split[0]], weight[split[0]]
        n_components = self.n_components
        if n_components == "auto":
            n_components = (
                choose_n_components(x, weight, split)
                if kept is None
                else kept.model.n_components
            )  # fmt: skip
        networks = build_networks(
            rows, row_weight, n_components, binary=bool(((x == 0) | (x == 1)).all()),
            likelihood=self.likelihood, encoder=self.encoder,
            score_estimator=self.score_estimator, encoder_model=self.encoder_model,
            decoder_model=self.decoder_model, hidden_layer_sizes=self.hidden_layer_sizes,
            seeds=seeds,
        )  # fmt: skip
        goes_on = False
        if kept is not None:
            old, new = kept.state_dict(), networks.state_dict()
            goes_on = {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
            if goes_on:
                networks.load_state_dict(old)
        return networks, goes_on

    def _report(self, history, held_x, held_weight):
        """Public attributes of a fit."""
        if history is None:  # max_epochs=0
            found = self.model_.marginals(held_x.to(self._device), self._seed).value.cpu()
            history = {
                "epoch": np.zeros(1, dtype=int),
                "validation_gain": np.atleast_1d(np.average(found, weights=held_weight)),
                "train_loss": np.full(1, np.nan),
            }
        self.history_ = {
            "n_iter": history["epoch"],
            "held_out_log_likelihood": history["validation_gain"] + self._columns.log_det,
            "train_loss": history["train_loss"],
        }
        self.__dict__.pop("noise_variance_", None)
        if self.likelihood == "gaussian":
            variance = np.zeros(self.n_features_in_)
            learned = self.model_.model.likelihood.variance.cpu().numpy()
            variance[self._columns.varying] = learned * self._columns.scale**2
            self.noise_variance_ = variance

    # ------------------------------------------------------------------ density

    def _score(self, X):
        return self._score_with_std(X)[0]

    def _score_with_std(self, X):
        x, met = self._tensor(X)
        value, error = (t.cpu().numpy() for t in self._measure(x))
        return np.where(met, value, -np.inf) + self._columns.log_det, np.where(met, error, 0.0)

    def _measure(self, x):
        """Log-densities of standardised rows, and their standard errors, (n,) each."""
        inside = self.model_.model.likelihood.supports(x)
        value = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        error = torch.zeros_like(value)
        for rows in inside.nonzero()[:, 0].split(SCORED_ROWS):
            measured = self.model_.marginals(
                x[rows], self._seed, n_samples=self.n_importance_samples
            )
            value[rows], error[rows] = measured.value, measured.std_error
        return value, error

    # ------------------------------------------------------------------ sampling

    def sample(self, n_samples=1, random_state=None):
        """Draw new rows: z from the prior, x from p(x | z). Exact, and independent.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
        """
        generator = self._sampling_generator(random_state, n_samples=n_samples)
        with torch.no_grad():
            parts = [
                self.model_.model.sample(len(part), generator)
                for part in torch.empty(n_samples).split(DECODED_ROWS)
            ]
        return self._columns.restore(torch.cat(parts).cpu().numpy())

    # ------------------------------------------------------------------ transformer

    def transform(self, X):
        """Posterior means of the latent variables, under the encoder.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components), float64
            Means of N(0, I) variables. The same rows give the same values.
        """
        x, _ = self._tensor(self._validate(X))
        return self._encode(x, lambda rows, noise: self.model_.encoder.moments(rows, noise)[0])

    def reconstruct(self, X):
        """Rows as the latent variables remember them: means of p(x | z) over the encoder's z.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In the units of X.
        """
        x, _ = self._tensor(self._validate(X))

        def means(rows, noise):
            return self.model_.model.mean(self.model_.encoder.draw(rows, noise)).mean(1)

        return self._columns.restore(self._encode(x, means))

    def inverse_transform(self, X):
        """Mean of p(x | z) for latent variables.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_components)
            Latent variables, such as `transform` returns.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In the units of the rows that were fitted.
        """
        check_is_fitted(self)
        z = check_array(X, dtype=np.float64)
        if z.shape[1] != self.n_components_:
            raise ValueError(
                f"X has {z.shape[1]} columns, but there are {self.n_components_} latent variables."
            )
        z = torch.tensor(z, device=self._device)
        with torch.no_grad():
            parts = [self.model_.model.mean(rows) for rows in z.split(DECODED_ROWS)]
        return self._columns.restore(torch.cat(parts).cpu().numpy())

    def _encode(self, x, function):
        """``function(rows, noise)`` over all rows, with one noise for all of them."""
        generator = torch.Generator(x.device).manual_seed(self._seed)
        encoder, n = self.model_.encoder, self.n_posterior_samples
        noise = antithetic_noise(encoder, n, generator, x.dtype)
        with torch.no_grad():
            parts = [function(rows, noise) for rows in x.split(max(1, ENCODED // n))]
        return torch.cat(parts).cpu().numpy()


def _fresh(draw, generator):
    """Rows with another jitter."""
    return draw(draw_seed(generator))
