"""Normalizing flows: K of them side by side, or one, fitted and frozen, as a base."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from skebm._typing import Modules

REACH = 5.0
"""What flows learn from lies within so many standard deviations."""

BLOCK = 4096
"""Rows that a flow computes on at once: what it makes of them stays in cache."""


class StackedFlow(nn.Module, ABC):
    """K normalizing flows of one shape (abstract).

    Parameters and buffers have the members on their first axis.

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int
        Number of flows K.

    See Also
    --------
    build_flow : Makes one by name.
    train_flows : Trains all members to one stopping time.
    FlowBase : One member, fitted and frozen.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import build_flow
    >>> rng = torch.Generator().manual_seed(0)
    >>> flow = build_flow("coupling", n_features=2, n_members=3, rng=rng)
    >>> flow.sample(4, rng).shape  # of every member
    torch.Size([3, 4, 2])
    >>> flow.member(0).sample(4, rng).shape  # of one, as a base
    torch.Size([4, 2])
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

    def frozen(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`log_prob` as a function of columns, (K, d, n) -> (K, n), for weights that stay."""
        return lambda columns: self.log_prob(columns.mT)

    def alone(self, k: int) -> "StackedFlow":
        """Flow k by itself, trainable, with its own copy of the weights: K = 1."""
        single = copy.deepcopy(self)
        single.n_members = 1
        for part in single.modules():
            for name, parameter in part._parameters.items():
                row = parameter.detach()[k : k + 1].clone()
                part._parameters[name] = nn.Parameter(row, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer[k : k + 1].clone()
        return single

    def beside(self, others: Sequence[Any]) -> "StackedFlow":
        """Make one flow of this one and others, one member each, with copied weights."""
        whole = copy.deepcopy(self)
        whole.n_members = 1 + len(others)
        flows = (self, *others)
        for part, *parts in zip(whole.modules(), *(f.modules() for f in flows), strict=True):
            for name, parameter in part._parameters.items():
                rows = torch.cat([p._parameters[name].detach() for p in parts])
                part._parameters[name] = nn.Parameter(rows, parameter.requires_grad)
            for name in part._buffers:
                part._buffers[name] = torch.cat([p._buffers[name] for p in parts])
        return whole

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """Draw (K, n, d) points, n from each flow."""
        return self.rsample(n, rng)[0]

    def member(self, k: int) -> "FlowBase":
        """Flow k as a distribution, a `FlowBase`: float64, frozen."""
        return FlowBase(self.alone(k))


class LayeredFlow(StackedFlow):
    """K flows of layers, each of which returns what it makes of columns, and the log-determinant.

    A layer maps (K, d, n) towards the normal distribution, and `inverse` back; both return the
    log-determinant of the first, (K, n).
    """

    layers: Modules

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        u, log_det = z.mT, 0.0
        for layer in self.layers:
            u, change = layer(u)
            log_det = log_det + change
        return log_normal(u) + log_det

    def rsample(self, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        z, log_prob = self._noise(n, rng)
        for layer in reversed(self.layers):
            z, change = layer.inverse(z)
            log_prob = log_prob + change
        return z.mT, log_prob

    def _noise(self, n, rng):
        """Standard normal columns, (K, d, n), and their log-density."""
        place = next(self.parameters())
        shape = self.n_members, self.n_features, n
        u = torch.randn(shape, generator=rng, device=rng.device, dtype=place.dtype)
        u = u.to(place.device)
        return u, log_normal(u)


class FlowBase(nn.Module):
    """A fitted flow, in float64 and frozen.

    Parameters
    ----------
    flow : StackedFlow with one member, or zuko.lazy.LazyDistribution without context
        It is copied.

    See Also
    --------
    fit_flow : Fits a flow and returns one of these.
    StackedFlow.member : Makes it of one of several flows.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import FlowBase, build_flow
    >>> rng = torch.Generator().manual_seed(0)
    >>> base = FlowBase(build_flow("coupling", n_features=2, rng=rng))
    >>> base.sample(3, rng).dtype
    torch.float64
    >>> base.log_prob(torch.zeros(1, 2, dtype=torch.float64))
    tensor([-1.8379], dtype=torch.float64)
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
        flow = copy.deepcopy(self.flow).float()  # half the time, and draws need no more digits
        return torch.cat([flow.sample(size, rng)[0] for size in sizes or [0]]).double()


def log_normal(u: torch.Tensor) -> torch.Tensor:
    """Standard normal log-density of columns, (K, d, n) -> (K, n)."""
    return -0.5 * (u.square().sum(1) + u.shape[1] * math.log(2 * math.pi))
