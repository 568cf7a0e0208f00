"""A latent-variable density whose encoder needs no density of its own."""

from collections.abc import Callable, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from skebm._engine import check_callbacks
from skebm._modules import layer_sizes
from skebm._sklearn_compat import Interval, StrOptions
from skebm._statistics import gaussian_log_likelihood
from skebm._tensors import results_like, without_tensors
from skebm._typing import FloatArray, RandomState
from skebm.latents import BernoulliLikelihood, GaussianLikelihood
from skebm.models import LatentConditioner, antithetic_noise
from skebm.training import Columns, make_task
from skebm.training.latent import LatentSettings, fit_latent

from ._asking import Asking
from ._base import parameters
from ._completer import Completer
from ._mixed import MixedDensity
from ._warm_start import WarmStart

COMPARED_ROWS = 500
"""Rows on which the model that a warm start keeps is compared with a Gaussian."""

LIKELIHOODS: dict[str, type[torch.nn.Module]] = {
    "gaussian": GaussianLikelihood,
    "bernoulli": BernoulliLikelihood,
}

DECODED_ROWS, ENCODED = 8192, 2**16
"""Latent vectors, and draws of the encoder, that are made at once."""


@parameters
class ImplicitVAE(
    ClassNamePrefixFeaturesOutMixin, TransformerMixin, WarmStart, Asking, MixedDensity
):
    r"""Variational autoencoder: density and transformer, with an implicit encoder.

    Rows are made from latent variables, z ~ N(0, I) and x ~ p(x | z), by a decoder network. Its
    inverse is an encoder network z = g(x, eps) that can be sampled but has no density, so that the
    posterior of z may have any shape: bent, or in several pieces. Both are trained by the evidence
    lower bound; the gradient of its entropy needs only the score of the encoder, which a second
    network learns by sliced score matching [1]_, or which Stein's identity gives from samples [2]_.

    Training starts from factor analysis and its exact posterior, and falls back on it unless it
    gains on held-out rows. `score_samples` is log p(x) itself, not a bound: an integral over z
    by importance sampling with a proposal adapted to each row, with a standard error for each row.

    Columns may hold categories, missing cells and atoms: given z, columns are independent, and each
    has probabilities of its states, and a density of its numbers.

    Parameters
    ----------
    n_components : int or "auto", default="auto"
        Latent variables. "auto" takes the number of factors with the best held-out likelihood in
        factor analysis, at least 4 (or as many as there are columns) and at most 16.
    encoder : {"implicit", "stein", "gaussian"}, default="implicit"
        "implicit": any distribution of z given x; the score of the encoder is a network conditioned
        on x, trained by sliced score matching with three steps for each of the others. "stein": the
        same encoder, its score by the spectral Stein estimator from 16 draws per row; no network,
        but a bias. "gaussian": independent normal variables, the ordinary variational autoencoder
        [3]_; two to three times faster, and with a learned decoder usually about as good, because
        decoder and encoder adapt to each other.
    likelihood : {"gaussian", "bernoulli"}, default="gaussian"
        "gaussian": normal columns with learned variances. "bernoulli": for columns in [0, 1]; a
        probability where all values are 0 or 1, otherwise the density of the continuous Bernoulli
        distribution. New rows with other values have log-density -inf: after a ``MinMaxScaler``,
        take ``MinMaxScaler(clip=True)``. Categories, missing cells and atoms have probabilities
        under both.
    kl_weight_start : float, default=1.0
        Weight of the divergence between encoder and prior at the first step; it goes geometrically
        to one in the first 60 % of the steps. A small weight (0.1) is the warm-up that some
        decoders need. A large one (30) can let the encoder find several modes of a posterior where
        decoder and noise are fixed, and empties the latent variables of a decoder that is not. With
        a start other than one, training does not stop early.
    n_posterior_samples : int, default=64
        Draws of the encoder behind `transform` (unless the encoder is Gaussian) and `reconstruct`.
    n_importance_samples : int, default=180
        Draws behind every log-density, after those that the proposal is adapted with. Rows whose
        posterior is hard to hit have 4 or 16 times as many.
    encoder_model : "mlp", torch.nn.Module or callable, default="mlp"
        "mlp": a linear map and a perceptron. A module (instance, or a class or factory called with
        (n_features, 2 * n_components)) maps rows to location and log-scale of z,
        (n, n_features) -> (n, 2 * n_components). It is copied and never trained itself. Rows are on
        standardised columns (median, interquartile range), without the constant ones; indicators of
        all states come first, and values that are not there are 0.
    decoder_model : "mlp", torch.nn.Module or callable, default="mlp"
        "mlp": a linear map and a perceptron. A module (instance, or a class or factory called with
        (n_components, n_features)) maps z to the mean of standardised columns, or to logits,
        (n, n_components) -> (n, n_features); logits of all states come first.
    hidden_layer_sizes : int or sequence of int, default=(128, 128)
        Of every perceptron; an int is one hidden layer.
    learning_rate : float or "auto", default="auto"
        "auto" is 2e-3.
    weight_decay : float, default=1e-3
        Of AdamW, for encoder and decoder.
    batch_size : int, default=128
        Rows per step.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most; "auto" is 100, or 6,000 steps if that is more. 0 is the
        start: factor analysis.
    validation_fraction : float, default=0.1
        Rows held out.
    patience : int or None, default=20
        Epochs without improvement of the held-out likelihood before training stops, but at least
        600 steps; the best state is kept. None trains to the end and keeps the last state, as does
        a decoder of yours without parameters to learn, which has nothing to stop by.
    smoothing : float or "scott", default=0.0
        h > 0 fits the density of X + h eps, eps normal with the standard deviations of the columns.
        "scott" is n^(-1 / (d + 4)). Density estimation wants 0.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` and `fit_predict` call outliers; rows with the
        score at which the share ends are none, so that with ties it is less. "auto" takes the
        threshold from out-of-fold scores instead, so that 5 % of *new* rows of the same
        distribution fall below it.
    callbacks : list of skorch callbacks, default=None
        Called in training, as those of :class:`~skebm.Network`.
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
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". Networks train, and the
        model scores and samples, on the device; all else is fitted on the CPU.
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps the columns, and goes on from the trained networks; of tables
        of numbers alone.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    n_components_ : int
        Latent variables.
    noise_variance_ : ndarray of shape (`n_features_in_`,)
        Variances of the Gaussian likelihood, in the squared units of X; 0 for columns without
        numbers, or of one.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, from 32 draws for each, which err to
        the low side; the first entry is the start, NaN where an epoch was not judged) and
        ``train_loss`` (minus the evidence lower bound; the entropy of implicit encoders counts as
        if they were Gaussian).
    training_log_ : list of dict
        What skorch's callbacks see of the training, one dict per epoch; its ``batches`` are filled
        only where there are callbacks, and times are left out. ``History(training_log_)`` of
        ``skorch.history`` is indexed as skorch's own. Only where networks were trained.
    n_iter_ : int
        Epochs of the state kept; 0 if none beat the start.
    accepted_ : str
        What was kept: "networks", or "start", which is factor analysis, or with `warm_start` the
        model of the last fit.
    held_out_gain_ : float
        Gain of the held-out log-likelihood over the start, in nats per row: of the networks that
        were accepted or rejected; 0 where there was none, NaN where they were kept without a test
        (``patience=None``, or a decoder of yours).
    held_out_gain_std_error_ : float
        Its standard error; networks are accepted where the gain is more than 1.645 times that.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_offset_ : float
        Threshold of `fit_predict` on `out_of_fold_scores_`: `offset_`, or where `contamination` is
        a number, what that share of these scores lies below.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of the training rows (of positive weight) that were held out; NaN for the rest.
    out_of_fold_members_ : ndarray of shape (n_rows,), int
        0 for rows that were held out, -1 for the rest.
    out_of_fold_decision_function_ : ndarray of shape (n_rows,)
        `out_of_fold_scores_` above `out_of_fold_offset_`, negative for what `fit_predict` calls an
        outlier, and comparable between rows that have values in different columns.
    columns_ : list of ColumnReport
        How every column was taken: its kind, categories, whether missing cells are a state, atoms,
        grid and bounds.
    model_ : torch.nn.Module
        The fitted decoder, likelihood and encoder, on states and standardised values.
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
    >>> import numpy as np
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

    A frame with categories and missing cells, and draws that look like it:

    >>> import pandas as pd
    >>> table = pd.DataFrame({"x": X[:, 0], "half": np.where(X[:, 1] > 0.2, "upper", "lower")})
    >>> table.loc[::5, "x"] = np.nan
    >>> vae = ImplicitVAE(n_components=2, max_epochs=5, random_state=0).fit(table)
    >>> vae.sample(3, random_state=0).dtypes.equals(table.dtypes)
    True
    """

    n_components: int | Literal["auto"] = "auto"
    encoder: Literal["implicit", "stein", "gaussian"] = "implicit"
    likelihood: Literal["gaussian", "bernoulli"] = "gaussian"
    kl_weight_start: float = 1.0
    n_posterior_samples: int = 64
    n_importance_samples: int = 180
    encoder_model: Literal["mlp"] | torch.nn.Module | Callable[..., torch.nn.Module] = "mlp"
    decoder_model: Literal["mlp"] | torch.nn.Module | Callable[..., torch.nn.Module] = "mlp"
    hidden_layer_sizes: Sequence[int] = (128, 128)
    learning_rate: float | Literal["auto"] = "auto"
    weight_decay: float = 1e-3
    batch_size: int = 128
    max_epochs: int | Literal["auto"] = "auto"
    validation_fraction: float = 0.1
    patience: int | None = 20
    smoothing: float | Literal["scott"] = 0.0
    callbacks: Sequence[Any] | None = None

    # what a fit sets
    n_components_: int = field(init=False)
    noise_variance_: FloatArray = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MixedDensity._parameter_constraints,
        **WarmStart._parameter_constraints,
        "n_components": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "encoder": [StrOptions({"implicit", "stein", "gaussian"})],
        "likelihood": [StrOptions(set(LIKELIHOODS))],
        "kl_weight_start": [Interval(Real, 0, None, closed="neither")],
        "n_posterior_samples": [Interval(Integral, 1, None, closed="left")],
        "n_importance_samples": [Interval(Integral, 10, None, closed="left")],
        "encoder_model": [StrOptions({"mlp"}), callable, torch.nn.Module],
        "decoder_model": [StrOptions({"mlp"}), callable, torch.nn.Module],
        "hidden_layer_sizes": ["array-like", Integral],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "patience": [Interval(Integral, 1, None, closed="left"), None],
        "smoothing": [StrOptions({"scott"}), Interval(Real, 0, None, closed="left")],
        "callbacks": [list, tuple, None],
    }

    # ------------------------------------------------------------------ fit

    def _check_parameters(self):
        layer_sizes(self.hidden_layer_sizes)
        check_callbacks(self.callbacks, judged=self.patience is not None)
        if self.likelihood == "bernoulli" and self.smoothing != 0.0:
            raise ValueError(
                f"smoothing={self.smoothing!r} leaves [0, 1], where "
                'likelihood="bernoulli" has to stay; take smoothing=0.0, or likelihood="gaussian".'
            )

    def _cannot_go_on_from(self, model, n_units):
        if type(model.likelihood) is not LIKELIHOODS[self.likelihood]:
            return "likelihood is another one"
        return None

    def _kept_and_fresh(self, model, x, weight):
        x, weight = x[:COMPARED_ROWS], weight[:COMPARED_ROWS]
        kept, _ = model.log_prob(x, self._seed, n_samples=self.n_importance_samples)
        return (kept @ weight / weight.sum()).item(), gaussian_log_likelihood(x, weight)

    def _learn_columns(self, rows, names, weight, precision, kinds):
        columns = Columns.learn(rows, names, weight, precision, kinds)
        return columns.in_unit_interval() if self.likelihood == "bernoulli" else columns

    def _fit(self, rows, weight, columns, context):
        if columns.unit_interval:
            values = columns.encode(rows)[:, len(columns.states) :]
            outside = ((values < 0.0) | (values > 1.0)).any(axis=0)
            if outside.any():
                column = columns.names[np.flatnonzero(columns.varying)[outside.argmax()]]
                raise ValueError(
                    f'likelihood="bernoulli" needs values in [0, 1], but column {column!r} has '
                    "others; scale it, or take the gaussian one."
                )
        task = make_task(
            rows, weight, columns, n_members=1, validation_fraction=self.validation_fraction,
            smoothing=self.smoothing, **context,
        )  # fmt: skip
        names = [own.name for own in fields(LatentSettings)]
        return fit_latent(task, LatentSettings(**{name: getattr(self, name) for name in names}))

    @property
    def _n_features_out(self):
        return self.n_components_

    # ------------------------------------------------------------------ density

    def _log_density_std(self, X):
        x = self._tensor(X)
        measured = self.model_.log_prob(x, self._seed, n_samples=self.n_importance_samples)
        value, error = (t.cpu().numpy() for t in measured)
        return value + self._columns.log_factors(X), error

    # ------------------------------------------------------------------ some cells

    def _make_completer(self):
        conditioner = LatentConditioner(self.model_, self._columns.layout)
        return Completer(conditioner, self._columns, np.zeros(1), self._seed, self._device)

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        output: Literal["auto", "array"] = "auto",
        complete: bool = False,
        given: Any = None,
    ) -> Any:
        """Draw new rows: z from the prior, x from p(x | z). Exact, and independent.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        output : {"auto", "array"}, default="auto"
            "auto" is a frame where `fit` was given one, with its dtypes; "array" an array, of
            objects if there are categories.
        complete : bool, default=False
            Draw rows under the condition that no cell is missing: others are left out.
        given : mapping or None, default=None
            Cells by the names of their columns (the numbers of an array), as ``{"age": 40}``: the
            others are drawn given these, as by :meth:`condition`, which takes several rows, too.

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            Numbers lie where the columns can: integers and columns with ties on their grid, and not
            beyond bounds at which the rows pile up.

        Raises
        ------
        ValueError
            If hardly any row is complete, and complete ones are asked for.
        """
        if given is not None:
            options: Any = {"output": output, "complete": complete}
            return self.condition(given).complete_rows(n_samples, random_state, **options)
        rng = self._sampling_rng(random_state, n_samples=n_samples)

        def draw(n):
            sizes = [len(part) for part in torch.empty(n).split(DECODED_ROWS)]
            return torch.cat([self.model_.sample(size, rng) for size in sizes])

        with torch.no_grad():
            x = self._complete(draw, n_samples) if complete else draw(n_samples)
        return self._as_table(x, output, rng)

    # ------------------------------------------------------------------ transformer

    def transform(self, X: ArrayLike) -> FloatArray:
        """Posterior means of the latent variables, under the encoder.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components), float64
            Means of N(0, I) variables. The same rows give the same values.
        """
        x = self._tensor(self._validate(X))
        moments = self.model_.encoder.moments
        means = self._encode(x, lambda rows, noise: moments(rows, noise)[0])
        return results_like(X)(means.cpu().numpy())

    def reconstruct(self, X: ArrayLike) -> Any:
        """Rows as the latent variables remember them: means of p(x | z) over the encoder's z.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            In the units of X, a table like the one that was fitted. A cell has the likeliest of its
            categories, of its atoms, of missing and of a number, which is then their mean; in a
            frame this lies within bounds at which the rows pile up, and is rounded if the dtype
            holds integers.
        """
        x = self._tensor(self._validate(X))

        def means(rows, noise):
            return self.model_.mean(self.model_.encoder.draw(rows, noise)).mean(1)

        return self._means_as_table(self._encode(x, means), X)

    def inverse_transform(self, X: ArrayLike) -> Any:
        """Mean of p(x | z) for latent variables.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_components)
            Latent variables, such as `transform` returns.

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            In the units of the rows that were fitted, as of `reconstruct`.
        """
        check_is_fitted(self)
        z = check_array(without_tensors(X), dtype=np.float64)  # pyright: ignore[reportArgumentType]
        if z.shape[1] != self.n_components_:
            raise ValueError(
                f"X has {z.shape[1]} columns, but there are {self.n_components_} latent variables."
            )
        z = torch.tensor(z, device=self._device)
        with torch.no_grad():
            parts = [self.model_.mean(rows) for rows in z.split(DECODED_ROWS)]
        return self._means_as_table(torch.cat(parts), X)

    def _means_as_table(self, means, X):
        """Rows of likeliest states and mean values, as a table like the one that was fitted."""
        schema, columns = self._schema, self._columns
        x = columns.layout.likeliest(means).cpu().numpy()
        if schema.container in ("pandas", "polars"):
            table = schema.decode(columns.restore(columns.bounded(x)), "auto", None)
            # row by row these belong to those that were given
            return (
                table.set_axis(X.index) if hasattr(table, "iloc") and hasattr(X, "iloc") else table
            )
        return results_like(X)(schema.decode(columns.restore(x), "array", None))

    def _encode(self, x, function):
        """``function(rows, noise)`` over all rows, with one noise for all of them."""
        rng = torch.Generator(x.device).manual_seed(self._seed)
        encoder, n = self.model_.encoder, self.n_posterior_samples
        noise = antithetic_noise(encoder, n, rng, x.dtype)
        with torch.no_grad():
            parts = [function(rows, noise) for rows in x.split(max(1, ENCODED // n))]
        return torch.cat(parts)
