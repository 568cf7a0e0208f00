"""What a user may write for `energy_model`, and what it means."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self, TypeAlias

from sklearn.base import is_classifier
from torch import nn

from skebm.energies._specifications import Boosting, Network, Specification, makes_module

__all__ = ["EnergyModel", "EnergyModelMixin", "resolve_energy_model"]

_NAMES = {
    "boosting": Boosting,
    "mlp": partial(Network, embedding="piecewise_linear"),
    "periodic": partial(Network, embedding="periodic"),
}


class _Classifier(Protocol):
    def predict_proba(self, X: Any) -> Any: ...


EnergyModel: TypeAlias = (
    str | Network | Boosting | nn.Module | Callable[..., nn.Module] | _Classifier
)
"""What a user may write for `energy_model`."""


def resolve_energy_model(energy_model: EnergyModel, default: Network | Boosting) -> Any:
    """What a user wrote for `energy_model`, as a specification or a classifier.

    Parameters
    ----------
    energy_model : str, Network, Boosting, torch.nn.Module, callable or classifier
        "auto" is `default`, "boosting" is ``Boosting()``, "mlp" is
        ``Network(embedding="piecewise_linear")`` and "periodic" is
        ``Network(embedding="periodic")``. A torch module (instance or class) or another callable is
        the `module` of a `Network`. Specifications and instances of scikit-learn classifiers with
        `predict_proba` are returned as they are.
    default : Network or Boosting
        The method's own.

    Returns
    -------
    Network, Boosting or classifier

    Raises
    ------
    ValueError
        For anything else, classes of scikit-learn and of specifications among it.

    See Also
    --------
    EnergyModelMixin : For specifications of your own.
    skebm.Network : A specification of ours.
    skebm.Boosting : Another one.

    Examples
    --------
    >>> from skebm import Boosting
    >>> from skebm.energies import resolve_energy_model
    >>> resolve_energy_model("auto", default=Boosting())
    Boosting()
    >>> resolve_energy_model("periodic", default=Boosting())
    Network(embedding='periodic')
    """
    if isinstance(energy_model, str):
        if energy_model == "auto":
            return default
        if energy_model in _NAMES:
            return _NAMES[energy_model]()
    elif isinstance(energy_model, Specification):
        return energy_model
    elif makes_module(energy_model):
        return Network(energy_model)  # pyright: ignore[reportArgumentType]
    elif not isinstance(energy_model, type) and hasattr(energy_model, "predict_proba"):
        if is_classifier(energy_model):
            return energy_model
    hint = ""
    if isinstance(energy_model, type):
        hint = f" This is a class; pass an instance, {energy_model.__name__}()."
    raise ValueError(
        'energy_model must be "auto", "boosting", "mlp" or "periodic"; a specification, '
        "Network(...) or Boosting(...); a torch.nn.Module (instance, or a class or factory called "
        "with n_features); or an instance of a scikit-learn classifier with predict_proba; got "
        f"{energy_model!r}.{hint}"
    )


class EnergyModelMixin:
    """For estimators with a parameter `energy_model`: says what to pass where it has no parameters.

    A name, a module or a class has no parameters, and scikit-learn would only say that "'str'
    object has no attribute 'set_params'". Stands before
    :class:`~sklearn.base.BaseEstimator` among the bases of a class.

    See Also
    --------
    resolve_energy_model : What estimators do with it.
    skebm.Network : A specification of ours.
    skebm.Boosting : Another one.

    Examples
    --------
    >>> from sklearn.base import BaseEstimator
    >>> from skebm.energies import EnergyModelMixin
    >>> class Estimator(EnergyModelMixin, BaseEstimator):
    ...     def __init__(self, energy_model="auto"):
    ...         self.energy_model = energy_model
    >>> Estimator().set_params(energy_model__weight_decay=0.1)
    Traceback (most recent call last):
        ...
    ValueError: energy_model='auto' is a name and has no parameters; ...
    """

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the estimator, and of its `energy_model` as ``energy_model__*``.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self : object

        Raises
        ------
        ValueError
            For a name that is no parameter, and for ``energy_model__*`` where `energy_model` is a
            name, a module or a class, which have none.
        """
        for field in ("energy_model", "correction"):
            if not any(name.startswith(f"{field}__") for name in params):
                continue
            model = params.get(field, getattr(self, field, None))
            if isinstance(model, type) or not hasattr(model, "set_params"):
                raise ValueError(_without_parameters(field, model))
        return super().set_params(**params)  # pyright: ignore[reportAttributeAccessIssue]


def _without_parameters(field, model):
    """Why parameters of such a `field` cannot be set, and what to pass instead."""
    name = getattr(model, "__name__", type(model).__name__)
    instead = "Boosting()" if field == "correction" else "Network() (or Boosting())"
    if isinstance(model, str):
        what = f"{model!r} is a name and"
        if model in _NAMES:
            instead = repr(_NAMES[model]())
    elif makes_module(model):
        what, instead = f"{name} is a bare module and", f"Network({name})"
    elif isinstance(model, type):
        what, instead = f"{name} is a class and", f"{name}()"
    else:
        what = repr(model)
    return f"{field}={what} has no parameters; pass {field}={instead} and search its parameters."
