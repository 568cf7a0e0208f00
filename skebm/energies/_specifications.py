"""Specifications: what an energy shall be, before there are rows to build it from.

An estimator's `energy_model` is a specification, a scikit-learn object with `get_params`, so that
its settings are searched like any others (``energy_model__hidden_layer_sizes``). A specification
holds every setting that acts on one kind of energy only. What belongs to the method or to the whole
fit is a parameter of the estimator, which calls `validate` and then `Network.build` or
`Boosting.classifier`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Self

import torch
from sklearn.base import BaseEstimator
from torch import nn

from skebm._engine import check_callbacks
from skebm._layout import Layout
from skebm._modules import layer_sizes
from skebm._sklearn_compat import Interval, StrOptions
from skebm.energies._embeddings import MixedEmbedding, PeriodicEmbedding, PiecewiseLinearEmbedding
from skebm.energies._networks import MLPEnergy
from skebm.energies._stack import ModuleStack, OnNumbers, StackedEnergy

__all__ = ["Boosting", "Network", "Specification", "makes_module"]

_MODULE = "module__"
_MANY_ROWS = 5_000  # above so many rows boosting takes larger steps by default
_MAX_LEAVES = 63  # a soft tree keeps its leaves in the bits of an int64


class Specification(BaseEstimator):
    """What both kinds share; nothing is checked before `validate`."""

    def validate(self) -> None:
        """Check the settings, alone and together; estimators call it in `fit`.

        Raises
        ------
        ValueError
            Where a setting has a wrong type, is out of range or cannot act beside another one.
        """
        self._validate_params()

    def setting(self, name: str, auto: Any) -> Any:
        """Value of the setting `name`, or `auto` where it is left to the method.

        Parameters
        ----------
        name : str
            Such as ``"learning_rate"``.
        auto : object
            The method's own value, which ``"auto"`` stands for.

        Returns
        -------
        object
        """
        value = getattr(self, name)
        return auto if isinstance(value, str) and value == "auto" else value


class Network(Specification):
    """Energy that is a neural network: skebm's perceptron, or a module of yours.

    Pass it as `energy_model` of an estimator. Members of the ensemble have networks of the same
    shape, which train side by side with AdamW.

    Parameters
    ----------
    module : torch.nn.Module or callable, default=None
        None is skebm's own perceptron, :class:`~skebm.energies.MLPEnergy`. Else a module that maps
        (n, n_features) to (n,) or (n, 1): an instance, which is copied and never trained itself, or
        a class or factory, which is called with n_features and with the `module__*` settings.
        Where all of its arguments have a value without, and none is called ``n_features``, it is
        called with the settings alone, as skorch does. A module must not change its input in place.
    hidden_layer_sizes : int or sequence of int, default=(128, 128)
        Widths of the hidden layers of the perceptron; an int is one layer.
    embedding : {"auto", "periodic", "piecewise_linear"} or None, default="auto"
        How the perceptron sees a column [1]_. "periodic" are sines and cosines of learned
        frequencies, which are smooth. "piecewise_linear" is the position between the quantiles of
        the column, whose gradient jumps at them. None are the raw columns. "auto" is the method's
        own: piecewise linear for noise-contrastive estimation, periodic where a method needs a
        smooth energy, and raw columns where that has rows with states.
    learning_rate : float or "auto", default="auto"
        Step size of AdamW. "auto" is the method's own.
    weight_decay : float, default=1e-3
        Of AdamW.
    batch_size : int, default=256
        Rows per member and step.
    max_epochs : int or "auto", default="auto"
        Passes over the rows, at most. "auto" is the method's own.
    patience : int or None, default=20
        Epochs without improvement of the held-out log-likelihood before training stops, but at
        least three looks at it (few rows are judged less than once per epoch) and, in a game, 200
        steps; the best state is kept. None trains to the end and keeps the last state.
    callbacks : list of skorch callbacks, default=None
        Called while the networks train, with skorch's history: ``train_loss``, and with `patience`
        ``valid_loss``, minus the held-out gain in nats per row. `EpochScoring`, `BatchScoring` and
        `InputShapeSetter` are refused: an energy predicts nothing, and there is no X to score. So
        are the `load_best` of a `Checkpoint`, because `patience` says which state is kept, and its
        `f_pickle`. A checkpoint holds the moving average of the weights, which is what is judged.
    **module_parameters : dict
        Arguments for a class or factory `module`, by skorch's convention, under names that begin
        with ``module__``: ``Network(MyModule, module__width=64)`` calls ``MyModule(n_features,
        width=64)``. They are parameters like the others, for `get_params`, `set_params` and a
        search.

    Raises
    ------
    TypeError
        By the constructor, for an argument that is neither a parameter above nor begins with
        ``module__``. All else is checked by :meth:`validate`, which `fit` calls.

    See Also
    --------
    Boosting : Energy of boosted trees.
    skebm.energies.MLPEnergy : The perceptron.
    skebm.energies.ModuleStack : What becomes of a module of yours.

    References
    ----------
    .. [1] Gorishniy, Y., Rubachev, I. and Babenko, A. (2022). On embeddings for numerical features
           in tabular deep learning. NeurIPS. https://arxiv.org/abs/2203.05556

    Examples
    --------
    >>> from skebm import Network
    >>> Network(hidden_layer_sizes=(64, 64), patience=None)
    Network(hidden_layer_sizes=(64, 64), patience=None)

    A module of yours, with an argument that can be searched:

    >>> from torch import nn
    >>> def small(n_features, width=16):
    ...     return nn.Sequential(nn.Linear(n_features, width), nn.SiLU(), nn.Linear(width, 1))
    >>> energy_model = Network(small, module__width=64)
    >>> energy_model.set_params(module__width=32).get_params()["module__width"]
    32

    What an estimator makes of it, here for two members and three columns:

    >>> import torch
    >>> rows = [torch.zeros(50, 3), torch.zeros(50, 3)]
    >>> f = energy_model.build(rows, embedding="periodic", seed=0)
    >>> f(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5])
    """

    _parameter_constraints: dict = {
        "module": [nn.Module, callable, None],
        "hidden_layer_sizes": ["array-like", Integral],
        "embedding": [StrOptions({"auto", "periodic", "piecewise_linear"}), None],
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "patience": [Interval(Integral, 1, None, closed="left"), None],
        "callbacks": [list, tuple, None],
    }

    def __init__(
        self,
        module: nn.Module | Callable[..., nn.Module] | None = None,
        *,
        hidden_layer_sizes: Sequence[int] = (128, 128),
        embedding: Literal["auto", "periodic", "piecewise_linear"] | None = "auto",
        learning_rate: float | Literal["auto"] = "auto",
        weight_decay: float = 1e-3,
        batch_size: int = 256,
        max_epochs: int | Literal["auto"] = "auto",
        patience: int | None = 20,
        callbacks: Sequence[Any] | None = None,
        **module_parameters: Any,
    ):
        self.module = module
        self.hidden_layer_sizes = hidden_layer_sizes
        self.embedding = embedding
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.callbacks = callbacks
        for name, value in module_parameters.items():
            if not name.startswith(_MODULE):
                raise TypeError(
                    f"Network() got an unexpected argument {name!r}. An argument of your module "
                    f"is passed as {_MODULE}{name}."
                )
            setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name, those of the module as ``module__*`` among them.

        Parameters
        ----------
        deep : bool, default=True
            Whether parameters of parameters are listed, too.

        Returns
        -------
        dict
        """
        return super().get_params(deep) | {
            name: value for name, value in vars(self).items() if name.startswith(_MODULE)
        }

    def set_params(self, **params: Any) -> Self:
        """Set parameters, those of the module as ``module__*``, which may be new ones.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self : Network

        Raises
        ------
        ValueError
            For a name that is no parameter and does not begin with ``module__``.
        """
        ours = {name: value for name, value in params.items() if not name.startswith(_MODULE)}
        super().set_params(**ours)
        for name, value in params.items():
            if name not in ours:
                setattr(self, name, value)
        return self

    def validate(self) -> None:
        """Check the settings, alone and together; estimators call it in `fit`.

        Raises
        ------
        ValueError
            Where a setting has a wrong type or is out of range; where a callback cannot do its
            work here (see `callbacks`); where `hidden_layer_sizes` or
            `embedding`, which shape skebm's perceptron, are given beside a `module`; and where
            there are `module__*` settings but no class or factory that could take them.
        """
        super().validate()
        sizes = layer_sizes(self.hidden_layer_sizes)
        check_callbacks(self.callbacks, judged=self.patience is not None)
        arguments = self._module_arguments()
        if arguments and (self.module is None or isinstance(self.module, nn.Module)):
            raise ValueError(
                f"{_MODULE}{min(arguments)} cannot act with {self._module_in_words()}: it is an "
                "argument for a class or factory that makes the module. Pass that as module, or "
                f"leave out {_MODULE}{min(arguments)}."
            )
        if self.module is None:
            return
        if not makes_module(self.module):
            raise ValueError(
                f"{self._module_in_words()} must be a torch.nn.Module, or a class or factory that "
                "makes one."
            )
        defaults = Network().get_params()
        for name, value in (("hidden_layer_sizes", sizes), ("embedding", self.embedding)):
            if value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} shapes skebm's own perceptron and cannot act with "
                    f"{self._module_in_words()}; leave {name} at {defaults[name]!r}, or leave out "
                    "module."
                )

    def build(
        self,
        rows: Sequence[torch.Tensor],
        *,
        embedding: str | None,
        seed: int,
        weights: Sequence[torch.Tensor] | None = None,
        layout: Layout | None = None,
    ) -> StackedEnergy:
        """Make the K energies, f = 0 at the start.

        Parameters
        ----------
        rows : list of K tensors of shape (n_k, n_features)
            The training rows of every member in the coordinates of the energies (Gaussianised
            columns). Piecewise-linear embeddings take their quantiles; of the others only number
            and shape matter.
        embedding : {"periodic", "piecewise_linear"} or None
            The method's own, which acts where the setting is "auto".
        seed : int
            Seed of the initial weights. Equal settings, rows and seeds give equal weights.
        weights : list of K tensors of shape (n_k,), optional
            Positive weights of those rows, for the quantiles; equal by default.
        layout : Layout, optional
            Of rows with states. `module` then sees indicators of all states, and after them the
            values, 0 where a row has none.

        Returns
        -------
        StackedEnergy
            Maps (K, n, n_features) to (K, n), in nats.

        Raises
        ------
        ValueError
            Where `module` makes no torch.nn.Module, or one that does not map (n, n_features) to
            (n,) or (n, 1).
        """
        n_members, n_features = len(rows), rows[0].shape[1]
        mixed = layout if layout is not None and layout.n_states else None
        if self.module is not None:
            made = isinstance(self.module, nn.Module)
            module = self.module if made else partial(self.module, **self._module_arguments())
            if mixed is None:
                return ModuleStack(module, n_features, n_members, seed=seed)
            return OnNumbers(mixed, ModuleStack(module, mixed.n_numbers, n_members, seed=seed))
        if mixed is not None:
            rows = [mixed.values(z).nan_to_num(nan=0.0) for z in rows]
        n_values = rows[0].shape[1]
        rng = torch.Generator().manual_seed(seed)
        kind, encoder = self.setting("embedding", embedding), None
        if kind == "periodic" and n_values:
            encoder = PeriodicEmbedding(n_values, n_members, rng=rng)
        elif kind == "piecewise_linear" and n_values:
            encoder = PiecewiseLinearEmbedding(rows, weights=weights)
        if mixed is not None and encoder is not None:
            encoder = MixedEmbedding(sum(mixed.sizes), encoder)
        energy = MLPEnergy(
            n_features if mixed is None else mixed.n_numbers,
            n_members,
            hidden_layer_sizes=layer_sizes(self.hidden_layer_sizes),
            embedding=encoder,
            rng=rng,
        )
        return energy if mixed is None else OnNumbers(mixed, energy)

    def _module_arguments(self):
        return {
            name.removeprefix(_MODULE): value
            for name, value in vars(self).items()
            if name.startswith(_MODULE)
        }

    def _module_in_words(self):
        """`module`, short: the repr of a torch module takes a line per layer."""
        if self.module is None or not isinstance(self.module, nn.Module):
            return f"module={self.module!r}"
        return f"module={type(self.module).__name__}(...), an instance"


class Boosting(Specification):
    """Energy of boosted trees that tell data from samples of the base.

    Pass it as `energy_model` of an estimator that trains a classifier, such as
    :class:`~skebm.NCEDensity`. One :class:`~sklearn.ensemble.HistGradientBoostingClassifier` is
    fitted per member and read into :class:`~skebm.energies.SoftTrees`.

    Parameters
    ----------
    learning_rate : float or "auto", default="auto"
        Factor in front of every tree. "auto" is 0.1, and 0.2 above 5,000 rows.
    max_iter : int, default=600
        Trees per member, at most.
    max_leaf_nodes : int, default=31
        Leaves of a tree, from 2 to 63.
    min_samples_leaf : int, default=20
        Rows in a leaf, data and samples of the base together, at least.
    l2_regularization : float, default=1.0
        Penalty on the squared values of the leaves.
    max_features : float, default=0.5
        Share of the columns, in (0, 1], among which a split chooses.
    early_stopping : bool, default=True
        Whether the number of trees is the one with the best held-out log-likelihood. False fits,
        and keeps, all `max_iter`.

    See Also
    --------
    Network : Energy that is a neural network.
    skebm.energies.SoftTrees : What the fitted trees become.

    Examples
    --------
    >>> from skebm import Boosting
    >>> energy_model = Boosting(max_leaf_nodes=15)
    >>> energy_model
    Boosting(max_leaf_nodes=15)
    >>> energy_model.classifier(n_rows=1_000, seed=0).learning_rate
    0.1
    """

    _parameter_constraints: dict = {
        "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "max_leaf_nodes": [Interval(Integral, 2, _MAX_LEAVES, closed="both")],
        "min_samples_leaf": [Interval(Integral, 1, None, closed="left")],
        "l2_regularization": [Interval(Real, 0, None, closed="left")],
        "max_features": [Interval(Real, 0, 1, closed="right")],
        "early_stopping": ["boolean"],
    }

    def __init__(
        self,
        *,
        learning_rate: float | Literal["auto"] = "auto",
        max_iter: int = 600,
        max_leaf_nodes: int = 31,
        min_samples_leaf: int = 20,
        l2_regularization: float = 1.0,
        max_features: float = 0.5,
        early_stopping: bool = True,
    ):
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.l2_regularization = l2_regularization
        self.max_features = max_features
        self.early_stopping = early_stopping

    def classifier(self, n_rows: int, seed: int) -> Any:
        """Make the classifier of one member, not fitted yet.

        Its own early stopping is off whatever the setting says: the number of trees is chosen by
        the likelihood of the members together, not by the loss of one classifier.

        Parameters
        ----------
        n_rows : int
            Rows of the fit, on which ``learning_rate="auto"`` depends.
        seed : int
            Seed of the columns that are drawn for the splits.

        Returns
        -------
        HistGradientBoostingClassifier
        """
        # scikit-learn's ensembles take a fifth of the time that importing this package would take
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(
            learning_rate=self.setting("learning_rate", 0.2 if n_rows > _MANY_ROWS else 0.1),
            max_iter=self.max_iter,
            max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=self.min_samples_leaf,
            l2_regularization=self.l2_regularization,
            max_features=float(self.max_features),  # scikit-learn refuses the integer 1
            early_stopping=False,  # pyright: ignore[reportArgumentType]
            random_state=seed,
        )


def makes_module(value: Any) -> bool:
    """Whether `value` is a torch module, or a callable that may make one.

    Classes of scikit-learn are callable, too, and so are its kernels: `get_params` tells them.
    """
    is_module_class = isinstance(value, type) and issubclass(value, nn.Module)
    if isinstance(value, nn.Module) or is_module_class:
        return True
    return callable(value) and not hasattr(value, "get_params")
