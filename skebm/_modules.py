"""Modules of users: how they are made, tried, and kept to a random stream of their own."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from skebm._random import seeded_global_rng

__all__ = ["PrivateStream", "build_module", "describe", "try_module"]


def build_module(model: Any, name: str, *sizes: int) -> nn.Module:
    """Copy of a user's module, or what the user's class or factory makes of `sizes`.

    Parameters
    ----------
    model : nn.Module, or callable
        A callable is called with `sizes`.
    name : str
        Of the parameter that it was given as, for the errors.
    *sizes : int

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If `model` is neither, or makes something else.
    """
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    call = f"{name}({', '.join(map(str, sizes))})"
    if not callable(model):
        raise ValueError(
            f"{name} must be a torch.nn.Module (class or instance) or a factory called as {call}, "
            f"got {model!r}."
        )
    module = model(*sizes)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{call} must return a torch.nn.Module, got {module!r}.")
    return module


@torch.no_grad()
def try_module(module: nn.Module, name: str, n_inputs: int) -> Any:
    """Return what a module makes of three rows of zeros, and leave it in training mode.

    It is tried in evaluation mode, so that it learns nothing.

    Raises
    ------
    ValueError
        That names the parameter, if the module does not take such rows.
    """
    module.eval()
    try:
        values = module(torch.zeros(3, n_inputs))
    except RuntimeError as error:  # torch on products of shapes that do not match
        raise ValueError(f"{name} failed on rows of shape (3, {n_inputs}): {error}") from error
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
