"""A pipeline whose log-densities are in the units of the rows that it is given."""

import inspect
import math
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import ArrayLike
from sklearn import get_config
from sklearn.pipeline import Pipeline
from sklearn.utils import check_array, check_random_state
from sklearn.utils.metadata_routing import process_routing
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, has_fit_parameter

from skebm._containers import like
from skebm._random import seed_of
from skebm._sklearn_compat import _check_method_params, _check_sample_weight, _safe_indexing
from skebm._typing import FloatArray, RandomState
from skebm.bases import draw_from
from skebm.estimators._base import BaseDensity
from skebm.training import relative_precision
from skebm.training.precision import Precision

from ._asking import AskingBehind
from ._changes import as_rows, change_of, check_given, filled, is_finite, kept, refuse_unknown
from ._detecting import DetectorBehind, has, is_detector

N_IMAGE_DRAWS = 20_000
"""Draws of the density by which its mass inside the image of the transformers is measured."""

MAX_DRAWN, MAX_BARREN = 100_000, 20
"""Rows that `sample` draws from the density at once, and rounds without a single row in the image
after which it gives up."""


class DensityPipeline(AskingBehind, DetectorBehind, Pipeline):
    r"""Pipeline of invertible transformers and a density, with log-densities in the units of X.

    If z = T(x) are the rows that reach the density q, then

    .. math:: \log p(x) = \log q(T(x)) + \log |\det T'(x)| - \log m,

    where m is the mass that q has inside the image of T. So densities behind different scalers
    compare, which they do not in a :class:`~sklearn.pipeline.Pipeline`, where `score_samples` is
    log q(T(x)), in the units of z.

    Transformers may be StandardScaler, MinMaxScaler, RobustScaler, MaxAbsScaler, PowerTransformer,
    PCA with as many components as columns, :class:`InvertibleFunctionTransformer`, "passthrough",
    and any object with `fit`, `transform`, `inverse_transform` and
    ``log_abs_det_jacobian(X)``, the logarithm of \|det T'\| at rows, (n, d) -> (n,), or (n, d)
    for transformers of single columns. All others are refused by `fit`.

    Parameters
    ----------
    steps : list of (str, object)
        Names and transformers, and at the end a density: any estimator with `score_samples`, a
        normalised log-density in nats, and `sample`. Those of skebm are, and so are GaussianMixture
        and KernelDensity.
    transform_input, memory, verbose : as in :class:`~sklearn.pipeline.Pipeline`

    Attributes
    ----------
    log_image_mass_ : float
        log m; 0 where the transformers reach all rows z. It is measured by draws of the density.
    log_image_mass_std_error_ : float
        Its standard error, in nats.
    offset_ : float
        Threshold of `predict` on `score_samples`, set by the rule of the density, in the units of
        X. Only with a density of skebm.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Those of the density, in the units of X. Only with a density of skebm.
    named_steps : Bunch
        Steps by name.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen in `fit`, where X had any.

    See Also
    --------
    InvertibleFunctionTransformer : A transformer of functions.
    sklearn.pipeline.Pipeline : Scores in the units behind the transformers.

    Notes
    -----
    Missing cells, and atoms, have a probability and no unit, so that no Jacobian counts for them.
    Rows outside of the domain of a transformer have log-density -inf: values that are not positive
    before Box-Cox, or values beyond the range seen in `fit` with ``MinMaxScaler(clip=True)``.

    What is asked of some cells (:meth:`condition`, :meth:`marginal`, :meth:`explain`, ``given`` of
    :meth:`sample`) has an answer behind transformers of single columns; those that mix them are
    refused by name. Where the image of T ends, marginals have the factor 1 / m too, conditionals
    are normalised over the image of the open cells, and draws are from there: by completions, whose
    stated error counts in what was cut off, also where a single cell is open. Cells outside of the
    domain of a transformer cannot be given. The `excess` of an explanation is that of the
    rows behind the transformers.

    A slice that leaves the density out is a plain Pipeline; one that contains it has to be fitted.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.stats import lognorm
    >>> from sklearn.mixture import GaussianMixture
    >>> from sklearn.preprocessing import PowerTransformer
    >>> from skebm.compose import DensityPipeline
    >>> X = lognorm(0.5, scale=20.0).rvs((2000, 1), random_state=0)
    >>> density = DensityPipeline(
    ...     [("power", PowerTransformer("box-cox")), ("density", GaussianMixture(1))]
    ... ).fit(X)
    >>> bool(abs(density.score(X) - lognorm(0.5, scale=20.0).logpdf(X).mean()) < 0.01)
    True
    >>> density.sample(3, random_state=0).shape
    (3, 1)
    """

    # what a fit sets
    log_image_mass_: float
    log_image_mass_std_error_: float
    offset_: float
    out_of_fold_scores_: FloatArray
    _constants: FloatArray
    _met: FloatArray
    _precision: Precision
    _seen: dict[str, Any]

    def __getitem__(self, ind: Any) -> Any:
        steps = range(len(self.steps))
        if isinstance(ind, slice) and steps[-1] not in steps[ind]:
            return Pipeline(self.steps, memory=self.memory, verbose=self.verbose)[ind]
        return super().__getitem__(ind)

    @property
    def n_features_in_(self) -> int:
        """Number of columns seen in `fit`."""
        return self._first.n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Names of the columns seen in `fit`, where X had any."""
        return self._first.feature_names_in_

    @property
    def _first(self) -> Any:
        """The first step that sees X, which Pipeline takes to be steps[0]."""
        return [*self._transformers(), self.steps[-1]][0][1]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "log_image_mass_")

    # ------------------------------------------------------------------ fit

    def fit(
        self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None, **params: Any
    ) -> Self:
        """Fit the transformers one after the other, and the density behind them.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Finite numbers; and NaN, a missing cell, where the density models these and all
            transformers are of single columns.
        y : Ignored
            Handed to the steps, as Pipeline does.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows, for all steps whose `fit` takes them, the density among them. Rows
            of weight zero are left out everywhere. With metadata routing it goes to the steps that
            request it.
        **params : dict
            As in :class:`~sklearn.pipeline.Pipeline`; ``step__sample_weight`` is that of one step.

        Returns
        -------
        self : DensityPipeline

        Raises
        ------
        ValueError
            For a transformer that is not known to be invertible, by its name.
        """
        self._learn(X, y, sample_weight, params)
        return self

    def _learn(self, X, y, sample_weight, params):
        """Fit, and return which rows have positive weight, and their weights of mean one."""
        rows, precision = self._check(X), relative_precision(X)
        X = like(X, rows)
        for name in inspect.get_annotations(DensityPipeline):  # what a fit sets
            vars(self).pop(name, None)
        self._check_steps(rows.shape[1])
        params = self._with_weight(sample_weight, params)
        weight = _check_sample_weight(
            self._weight_of_density(params), rows, dtype=np.float64, ensure_non_negative=True
        )
        used = np.flatnonzero(weight > 0)
        if len(used) < len(rows):
            y = y if y is None else _safe_indexing(y, used)
            params = _check_method_params(X, params, used)
            X, rows, weight = _safe_indexing(X, used), rows[used], weight[used]
        super().fit(X, y, **params)

        self._seen = {}
        step_input = X
        for name, transformer in self._transformers():
            self._seen[name] = step_input[:0]
            check_given(name, transformer, step_input)
            step_input = transformer.transform(step_input)
        self._seen[self.steps[-1][0]] = step_input[:0]
        self._met = rows[np.argmax(~np.isnan(rows), axis=0), np.arange(rows.shape[1])]
        self._constants, self._precision = np.full(rows.shape[1], np.nan), precision
        if is_detector(self):
            constant = (rows == rows[0]).all(axis=0) & ~self._varying()
            self._constants[constant] = rows[0, constant]
        mass, error = self._measure_image()
        self._set_threshold(X, weight / weight.mean(), mass)
        self.log_image_mass_, self.log_image_mass_std_error_ = mass, error
        return used, weight / weight.mean()

    def _transformers(self):
        return [(name, t) for name, t in self.steps[:-1] if t is not None and t != "passthrough"]

    def _check(self, X):
        """X as an array of finite numbers, or an error that names the column."""
        rows = check_array(X, dtype=np.float64, ensure_all_finite=False, estimator=self)  # pyright: ignore[reportArgumentType]
        takes_missing = getattr(self.steps[-1][1], "_takes_missing", False)
        bad = ~(np.isfinite(rows) | (np.isnan(rows) & takes_missing)).all(axis=0)
        if bad.any():
            column = getattr(X, "columns", range(rows.shape[1]))[int(bad.argmax())]
            what = "infinity" if takes_missing else "NaN or infinity"
            raise ValueError(
                f"column {column!r} of X contains {what}: a density has no value there. Leave "
                "those rows out, or impute them before the pipeline."
            )
        return rows

    def _snap(self, rows, precision):
        """Rows with constants wherever they are met within the precision of what was given.

        Transformers subtract and scale, and a rounding error would be all that is left of them.
        """
        coarser = 4.0 * np.maximum(self._precision, precision)
        met = np.abs(rows - self._constants) <= coarser * np.abs(self._constants)  # NaN is not
        return np.where(met, self._constants, rows)

    def _check_steps(self, n_features):
        name, density = self.steps[-1]
        for method in ("fit", "score_samples", "sample"):
            if not callable(getattr(density, method, None)):
                raise ValueError(
                    f"the last step, {name!r}, must be a density with score_samples and sample; "
                    f"{density!r} has no method {method}."
                )
        for name, transformer in self._transformers():
            refuse_unknown(name, transformer, n_features)

    def _with_weight(self, sample_weight, params):
        """Parameters as Pipeline takes them, the weight handed to all steps that can use it."""
        if sample_weight is None:
            return params
        if get_config()["enable_metadata_routing"]:
            return params | {"sample_weight": sample_weight}
        steps = [*self._transformers(), self.steps[-1]]
        taking = [name for name, step in steps if has_fit_parameter(step, "sample_weight")]
        name, density = self.steps[-1]
        if name not in taking:
            raise TypeError(f"sample_weight: {type(density).__name__}.fit takes no weights.")
        return {f"{step}__sample_weight": sample_weight for step in taking} | params

    def _weight_of_density(self, params):
        name = self.steps[-1][0]
        if get_config()["enable_metadata_routing"]:
            return process_routing(self, "fit", **params)[name].fit.get("sample_weight")
        return params.get(f"{name}__sample_weight")

    def _varying(self) -> Any:
        """Columns that the density has a density in; the others are states to it."""
        density = self.steps[-1][1]
        return density._columns.varying if is_detector(self) else slice(None)

    def _has_values(self, z):
        """Where rows z have a value to the density, in the columns that it has a density in."""
        if not is_detector(self):
            return np.ones(z.shape, dtype=bool)
        columns = self.steps[-1][1]._columns
        return ~np.isnan(columns.encode(columns.snap(z, 0.0))[:, len(columns.states) :])

    # ------------------------------------------------------------------ change of variables

    def _changes(self):
        """Names, transformers, and the changes of variables that they make."""
        return [(name, t, change_of(name, t, self._seen[name])) for name, t in self._transformers()]

    def _forward(self, X):
        """Rows that have a z, and what there is to know of them.

        Returns
        -------
        z : table
        log_det : ndarray
            Log-determinants, over the values that the rows have to the density.
        where : ndarray
            Positions in X.
        absent : ndarray
            What values that they have not would add to a log-density, see `BaseDensity`.
        """
        rows = as_rows(X)
        where, joint = np.arange(len(rows)), np.zeros(len(rows))
        single = np.zeros((len(rows), rows[:, self._varying()].shape[1]))
        for _, transformer, change in self._changes():
            if change.in_domain is not None:
                inside = change.in_domain(filled(as_rows(X), transformer, of_image=False))
                X, joint, single, where = kept(inside, X, joint, single, where)
            if not len(where):
                break
            with np.errstate(all="ignore"):  # where a function has no value
                z = transformer.transform(X)
            finite = is_finite(as_rows(z), as_rows(X))
            X, z, joint, single, where = kept(finite, X, z, joint, single, where)
            if len(where):
                term = change.log_det(as_rows(X))
                if term.ndim == 2:
                    single = single + np.nan_to_num(term[:, self._varying()])
                else:
                    joint = joint + term
            X = z
        has_value = self._has_values(as_rows(X)) if len(where) else single == 0
        absent = np.where(has_value, 0.0, single).sum(1)
        if is_detector(self) and len(where):
            absent = self.steps[-1][1]._comparable(absent, as_rows(X))
        return X, joint + np.where(has_value, single, 0.0).sum(1), where, absent

    def _behind(self, X):
        """How many rows these are, and what `_forward` says of them, once they are checked."""
        check_is_fitted(self)
        rows = self._check(X)
        if rows.shape[1] != len(self._constants):
            raise ValueError(
                f"X has {rows.shape[1]} features, but DensityPipeline is expecting "
                f"{len(self._constants)} features as input."
            )
        return len(rows), *self._forward(like(X, self._snap(rows, relative_precision(X))))

    def _backward(self, z):
        """Rows that have an x, as x, and their positions in z."""
        where = np.arange(len(z))
        for _, transformer, change in reversed(self._changes()):
            if not len(where):
                break
            with np.errstate(all="ignore"):
                if change.in_image is not None:
                    inside = change.in_image(filled(z, transformer, of_image=True))
                    z, where = z[inside], where[inside]
                before = z
                if len(where):
                    z = as_rows(transformer.inverse_transform(z))
            inside = is_finite(z, before)
            z, where = z[inside], where[inside]
        return z, where

    def _measure_image(self):
        """log of the mass of the density inside the image of the transformers, and its error."""
        if all(change.in_image is None for *_, change in self._changes()):
            return 0.0, 0.0
        inside = len(self._backward(draw_from(self.steps[-1][1], N_IMAGE_DRAWS, 0))[1])
        if not inside:
            raise ValueError(
                f"none of {N_IMAGE_DRAWS} draws of the density has a row x that the transformers "
                "would take there: fit it on rows as they come out of the transformers."
            )
        share = inside / N_IMAGE_DRAWS
        return math.log(share), math.sqrt((1.0 - share) / inside)

    # ------------------------------------------------------------------ density

    @overload
    def score_samples(self, X: ArrayLike, return_std: Literal[False] = ...) -> FloatArray: ...
    @overload
    def score_samples(
        self, X: ArrayLike, return_std: Literal[True]
    ) -> tuple[FloatArray, FloatArray]: ...
    def score_samples(
        self, X: ArrayLike, return_std: bool = False
    ) -> FloatArray | tuple[FloatArray, FloatArray]:
        """Log-density of every row, in the units of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_std : bool, default=False
            Also return the standard error: that of the density, and that of `log_image_mass_`.

        Returns
        -------
        log_density : ndarray of shape (n_samples,), float64
            In nats; -inf for rows outside of the domain of a transformer.
        std_error : ndarray of shape (n_samples,), float64
            Only if `return_std`; in nats.

        Raises
        ------
        ValueError
            For `return_std`, if the density does not say its standard error.
        """
        n, z, log_det, where, _ = self._behind(X)
        density, options = self.steps[-1][1], {}
        if return_std:
            if "return_std" not in inspect.signature(density.score_samples).parameters:
                raise ValueError(
                    f"return_std=True: {type(density).__name__} does not say its standard error."
                )
            options["return_std"] = True
        log_density, error = np.full(n, -np.inf), np.zeros(n)
        if len(where):
            scores = density.score_samples(z, **options)
            if return_std:
                scores, own = scores
                error[where] = np.hypot(own, self.log_image_mass_std_error_)
            log_density[where] = scores + log_det - self.log_image_mass_
        return (log_density, error) if return_std else log_density

    score = BaseDensity.score  # pyright: ignore[reportAssignmentType]

    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        given: Any = None,
        **options: Any,
    ) -> FloatArray:
        """Draw new rows, in the units of X.

        Rows are drawn from the density and taken back by `inverse_transform` of the transformers;
        those that no x is mapped to are drawn anew.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        given : mapping or None, default=None
            Cells by the names of their columns (the numbers of an array), as ``{0: 1.5}``: the
            others are drawn given these, as by :meth:`condition`, which takes several rows, too.
        **options : dict
            Passed to `sample` of the density, such as ``n_steps``.

        Returns
        -------
        ndarray of shape (n_samples, n_features), float64
            In random order.
        """
        check_is_fitted(self)
        if given is not None:
            if not hasattr(self, "condition"):
                kind = type(self.steps[-1][1]).__name__
                raise ValueError(f"given: {kind} has no conditionals; those of skebm have.")
            return self.condition(given).complete_rows(n_samples, random_state, **options)
        if not isinstance(n_samples, int | np.integer) or n_samples < 1:
            raise ValueError(f"n_samples={n_samples!r} must be an integer of at least 1.")
        random = check_random_state(random_state)
        parts, missing, barren = [], n_samples, 0
        while missing:
            n = min(math.ceil(missing / math.exp(self.log_image_mass_)), MAX_DRAWN)
            z = draw_from(self.steps[-1][1], n, seed_of(random), **options)
            # the rows of a mixture come component by component, and some may be left over
            x = self._backward(z[random.permutation(n)])[0][:missing]
            parts.append(x)
            missing -= len(x)
            barren = 0 if len(x) else barren + 1
            if barren == MAX_BARREN:
                raise ValueError("the density draws no rows that the transformers can take back.")
        x = np.concatenate(parts)
        return np.where(np.isnan(self._constants), x, self._constants)

    @available_if(has("transform"))
    def fit_transform(
        self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None, **params: Any
    ) -> Any:
        """Fit, then transform the same rows by all steps.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : Ignored
            Handed to the steps, as Pipeline does.
        sample_weight : array-like of shape (n_samples,), default=None
        **params : dict
            As in `fit`.

        Returns
        -------
        array-like of shape (n_samples, n_components)
        """
        return self.fit(X, y, sample_weight, **params).transform(X)
