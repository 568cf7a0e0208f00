"""Normalizing flows: K of them side by side, or one, fitted and frozen, as a base."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

BLOCK = 4096
"""Rows that a flow computes on at once: what it makes of them stays in cache."""


class StackedFlow(nn.Module, ABC):
    """K normalizing flows of one shape (abstract).

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int
        Number of flows K.
    """

    n_features: int
    n_members: int

    def __init__(self, n_features: int, n_members: int):
        super().__init__()
        self.n_features, self.n_members = n_features, n_members

    @abstractmethod
    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of each flow at its own rows, (K, n, d) -> (K, n)."""

    @abstractmethod
    def rsample(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw from each flow, differentiable in the parameters.

        Returns
        -------
        z : Tensor of shape (K, n, d)
        log_prob : Tensor of shape (K, n)
            Log-density at z; its gradient includes the way through z.
        """

    @abstractmethod
    def alone(self, k: int) -> "StackedFlow":
        """Flow k by itself, trainable, with its own copy of the weights: K = 1."""

    @abstractmethod
    def beside(self, others: Sequence[Any]) -> "StackedFlow":
        """Make one flow of this one and others, one member each, with copied weights."""

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (K, n, d) points, n from each flow."""
        return self.rsample(n, rng)[0]

    def member(self, k: int) -> "FlowBase":
        """Flow k as a distribution, a `FlowBase`: float64, frozen."""
        return FlowBase(self.alone(k))


class FlowBase(nn.Module):
    """A fitted flow, in float64 and frozen.

    Parameters
    ----------
    flow : StackedFlow with one member, or zuko.lazy.LazyDistribution without context
        It is copied.
    """

    flow: StackedFlow
    n_features: int

    def __init__(self, flow: Any):
        super().__init__()
        if not isinstance(flow, StackedFlow):
            from ._zuko import ZukoFlows  # which is a StackedFlow

            (d,) = flow().event_shape
            flow = ZukoFlows(flow, d, rng=torch.Generator())
        self.flow = copy.deepcopy(flow).double().eval().requires_grad_(False)
        self.n_features = flow.n_features

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-density, (n, d) -> (n,)."""
        blocks = x.double()[None].split(BLOCK, dim=1)
        return torch.cat([self.flow.log_prob(rows)[0] for rows in blocks])

    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (n, d) points."""
        sizes = [BLOCK] * (n // BLOCK) + [n % BLOCK] * (n % BLOCK > 0)
        return torch.cat([self.flow.sample(size, rng)[0] for size in sizes or [0]])
