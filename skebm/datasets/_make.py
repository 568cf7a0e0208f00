"""The distributions in the manner of :mod:`sklearn.datasets`: functions that draw rows."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload

from skebm._typing import FloatArray, RandomState

from . import _mixed, _plane, _tables

if TYPE_CHECKING:
    import pandas

Rows = TypeVar("Rows", covariant=True)


class _Make(Protocol[Rows]):
    """The type of the functions that draw rows, but for the fields of their distributions."""

    @overload
    def __call__(
        self,
        n_samples: int = ...,
        *,
        random_state: RandomState = ...,
        return_log_density: Literal[False] = ...,
        **parameters: Any,
    ) -> Rows: ...
    @overload
    def __call__(
        self,
        n_samples: int = ...,
        *,
        random_state: RandomState = ...,
        return_log_density: Literal[True],
        **parameters: Any,
    ) -> tuple[Rows, FloatArray]: ...


def _make(distribution_class: type[Any]) -> Any:
    """Write the function that draws rows of a distribution, with its fields as parameters."""

    def make(n_samples=1000, *, random_state=None, return_log_density=False, **parameters):
        distribution = distribution_class(**parameters)
        X = distribution.sample(n_samples, random_state)
        return (X, distribution.log_density(X)) if return_log_density else X

    name, fields = distribution_class.__name__, dataclasses.fields(distribution_class)
    mixed = issubclass(distribution_class, _mixed.MixedDistribution)
    rows = "DataFrame of n_samples rows" if mixed else "ndarray of shape (n_samples, n_features)"
    make.__name__ = make.__qualname__ = f"make_{distribution_class.name}"
    first, *last, _ = inspect.signature(make).parameters.values()
    own = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in fields
    ]
    make.__signature__ = inspect.Signature([first, *own, *last])
    parameters = (
        f"{', '.join(f.name for f in fields)} : see :class:`{name}`\n"
        "    Parameters of the distribution.\n"
    )
    make.__doc__ = f"""{distribution_class.__doc__.splitlines()[0]}

Parameters
----------
n_samples : int, default=1000
    Number of rows.
{parameters if own else ""}random_state : int, RandomState instance or None, default=None
    Pass an int for reproducible rows.
return_log_density : bool, default=False
    Also return the exact log-density of the rows.

Returns
-------
X : {rows}
    The rows.
log_density : ndarray of shape (n_samples,)
    In nats. Only if ``return_log_density``.

See Also
--------
{name} : The distribution as an object, with its formula and source.

Examples
--------
>>> from skebm.datasets import {make.__name__}
>>> X, log_density = {make.__name__}(n_samples=3, random_state=0, return_log_density=True)
>>> X.shape[0], log_density.shape
(3, (3,))
"""
    return make


make_claw: _Make[FloatArray] = _make(_plane.Claw)
make_eight_gaussians: _Make[FloatArray] = _make(_plane.EightGaussians)
make_two_moons: _Make[FloatArray] = _make(_plane.TwoMoons)
make_spirals: _Make[FloatArray] = _make(_plane.Spirals)
make_checkerboard: _Make[FloatArray] = _make(_plane.Checkerboard)
make_rings: _Make[FloatArray] = _make(_plane.Rings)
make_pinwheel: _Make[FloatArray] = _make(_plane.Pinwheel)
make_banana: _Make[FloatArray] = _make(_plane.Banana)
make_funnel: _Make[FloatArray] = _make(_tables.Funnel)
make_gaussian_mixture: _Make[FloatArray] = _make(_tables.GaussianMixtureDistribution)
make_multivariate_t: _Make[FloatArray] = _make(_tables.MultivariateT)
make_gamma_copula: _Make[FloatArray] = _make(_tables.GammaCopula)
make_sheared_gaussian: _Make[FloatArray] = _make(_tables.ShearedGaussian)
make_latent_classes: _Make[pandas.DataFrame] = _make(_mixed.LatentClasses)
make_missing_by_value: _Make[pandas.DataFrame] = _make(_mixed.MissingByValue)
make_zero_inflated_amounts: _Make[pandas.DataFrame] = _make(_mixed.ZeroInflatedAmounts)
make_bayesian_network: _Make[pandas.DataFrame] = _make(_mixed.BayesianNetwork)
