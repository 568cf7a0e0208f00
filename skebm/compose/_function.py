"""A function as a transformer, with what a density behind it has to know."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import check_array

from skebm._typing import FloatArray


class InvertibleFunctionTransformer(FunctionTransformer):
    """Transformer made of a function, its inverse and its log-determinant.

    A :class:`~sklearn.preprocessing.FunctionTransformer` that a :class:`DensityPipeline` accepts,
    because it knows by how much the function stretches space. The functions get arrays. The
    pipeline warns where inverse or log-determinant is not that of the function.

    Parameters
    ----------
    func : callable
        One to one and differentiable, (n, d) -> (n, d). Rows for which it is not finite are outside
        of its domain.
    inverse_func : callable
        Its inverse, (n, d) -> (n, d).
    log_det : callable
        Logarithm of the absolute value of the determinant of the derivative of `func`, at rows in
        its domain: (n, d) -> (n,), or (n, d) -> (n, d) with the logarithms of the derivatives of
        every column where each is mapped for itself. Only the second leaves constant columns out.
    feature_names_out : callable, "one-to-one" or None, default="one-to-one"
        As in :class:`~sklearn.preprocessing.FunctionTransformer`.
    kw_args : dict, default=None
        Further arguments of `func` and of `log_det`.
    inv_kw_args : dict, default=None
        Further arguments of `inverse_func`.

    Attributes
    ----------
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    DensityPipeline : What it is made for.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm.compose import InvertibleFunctionTransformer
    >>> def log_det(X):
    ...     return -np.log(X)
    >>> log = InvertibleFunctionTransformer(np.log, np.exp, log_det)
    >>> log.fit_transform([[1.0], [2.0]])
    array([[0.     ],
           [0.69...]])
    >>> log.log_abs_det_jacobian([[1.0], [2.0]])
    array([[-0.     ],
           [-0.69...]])
    """

    _parameter_constraints = {
        **FunctionTransformer._parameter_constraints,
        "func": [callable],
        "inverse_func": [callable],
        "log_det": [callable],
    }

    def __init__(
        self,
        func: Callable[..., Any],
        inverse_func: Callable[..., Any],
        log_det: Callable[..., Any],
        *,
        feature_names_out: Callable[..., Any] | Literal["one-to-one"] | None = "one-to-one",
        kw_args: dict[str, Any] | None = None,
        inv_kw_args: dict[str, Any] | None = None,
    ):
        super().__init__(
            func,
            inverse_func,
            validate=True,
            check_inverse=False,
            feature_names_out=feature_names_out,
            kw_args=kw_args,
            inv_kw_args=inv_kw_args,
        )
        self.log_det = log_det

    def log_abs_det_jacobian(self, X: ArrayLike) -> FloatArray:
        """Logarithm of the absolute value of the determinant of the derivative at every row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_features), float64
            In nats; in the second case they are to be summed over columns.
        """
        X = check_array(X)
        return np.asarray(self.log_det(X, **(self.kw_args or {})), dtype=np.float64)
