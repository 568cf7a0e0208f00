"""Networks of ours and of users: sizes, how modules are made, tried, and kept to a stream."""

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import Parameter
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from skebm._random import seeded_global_rng

__all__ = ["PrivateStream", "build_module", "describe", "layer_sizes", "try_module"]


def layer_sizes(hidden_layer_sizes: int | Sequence[int]) -> tuple[int, ...]:
    """Widths of hidden layers as a tuple; an int is one layer.

    Raises
    ------
    ValueError
        That names the parameter, for anything but integers of at least 1.
    """
    whole = isinstance(hidden_layer_sizes, Integral)
    try:
        sizes: tuple[Any, ...] = (hidden_layer_sizes,) if whole else tuple(hidden_layer_sizes)  # pyright: ignore[reportArgumentType]
    except TypeError:
        sizes = (None,)
    good = (isinstance(n, Integral) and not isinstance(n, bool) and n >= 1 for n in sizes)  # pyright: ignore[reportOperatorIssue]
    if not all(good):
        raise ValueError(
            f"hidden_layer_sizes={hidden_layer_sizes!r} must be the width of one hidden layer, or "
            "a sequence of widths: integers of at least 1, such as (128, 128)."
        )
    return tuple(int(n) for n in sizes)


def build_module(model: Any, name: str, *sizes: int) -> nn.Module:
    """Copy of a user's module, or what the user's class or factory makes of `sizes`.

    Parameters
    ----------
    model : nn.Module, or callable
        A callable is called with `sizes`, by position; with one size, as ``n_features`` where it
        has an argument of that name, and without any where all its arguments have a value already
        (as skorch calls the class of a module).
    name : str
        Of the parameter that it was given as, for the errors.
    *sizes : int

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If `model` is neither, cannot be called like that, or makes something else.
    """
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    call = f"{name}({', '.join(map(str, sizes))})"
    if not callable(model):
        raise ValueError(
            f"{name} must be a torch.nn.Module (class or instance) or a factory called as {call}, "
            f"got {model!r}."
        )
    positional, named = _arguments(model, sizes)
    try:
        module = model(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"{name} could not be made by {model!r}: {error}. It is called as {call}; other "
            "arguments that it needs are those of a factory, or the module__* settings of Network."
        ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"{call} must return a torch.nn.Module, got {module!r}.")
    return module


def _arguments(model, sizes):
    """How a callable takes the sizes: what is passed by position, and what by name."""
    if len(sizes) > 1:
        return sizes, {}
    try:
        parameters = inspect.signature(model).parameters
    except ValueError:
        return sizes, {}
    if "n_features" in parameters and parameters["n_features"].kind != Parameter.POSITIONAL_ONLY:
        return (), {"n_features": sizes[0]}
    by_position = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
    waits = any(
        p.kind == Parameter.VAR_POSITIONAL or (p.kind in by_position and p.default is p.empty)
        for p in parameters.values()
    )
    return (sizes if waits else ()), {}


@torch.no_grad()
def try_module(module: nn.Module, name: str, n_inputs: int) -> Any:
    """Return what a module makes of three rows of zeros, and leave it in training mode.

    It is tried in evaluation mode, so that it learns nothing.

    Raises
    ------
    ValueError
        That names the parameter, if the module does not take such rows, or changes them in place:
        they are also the rows of others, and autograd needs them as they are.
    """
    module.eval()
    rows = torch.zeros(3, n_inputs, dtype=torch.float32)
    version = rows._version
    try:
        values = module(rows)
    except Exception as error:  # the module's own, or torch's on shapes that do not match
        raise ValueError(f"{name} failed on rows of shape (3, {n_inputs}): {error}") from error
    if rows._version != version:
        raise ValueError(
            f"{name} changes its input in place; write a new tensor instead, such as x = x - 1 in "
            "place of x -= 1, and nn.ReLU() in place of nn.ReLU(inplace=True) as the first layer."
        )
    module.train()
    return values


def describe(values: object) -> str:
    """Shape of a tensor, type of anything else, for errors."""
    return str(tuple(values.shape)) if isinstance(values, Tensor) else type(values).__name__


class PrivateStream:
    """For an `nn.Module` around modules of users, which draw from a stream of its own in training.

    Torch's global generators, on which dropout draws, are as found afterwards. The seed of the last
    forward pass in training mode is `_next_seed`, to be set by the constructor.
    """

    training: bool
    _next_seed: int

    def _stream(self, device: torch.device):
        """Context in which the modules run; in evaluation mode it does nothing."""
        if not self.training:
            return nullcontext()
        self._next_seed += 1
        return seeded_global_rng(self._next_seed, device)
