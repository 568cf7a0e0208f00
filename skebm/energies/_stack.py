"""Energies come in stacks: K members of one shape, evaluated and trained side by side.

The sign, said once: an energy module returns **f, minus the residual energy**. The model is
``log p = log q + f - log Z``, so a larger f means more likely, and f = 0 means "the base as it is".
Every stack starts at exactly f = 0.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from skebm._layout import Layout
from skebm._modules import PrivateStream, build_module, describe, try_module
from skebm._random import seeded_global_rng

__all__ = ["ModuleStack", "OnNumbers", "StackedEnergy"]


class StackedEnergy(nn.Module, ABC):
    """K energies of one shape (abstract).

    To write a new one, give every parameter and buffer a leading axis of length ``n_members`` and
    implement :meth:`stacked`; shapes are checked here and nowhere else.
    :class:`~skebm.energies.MLPEnergy` is the one to imitate.

    Parameters
    ----------
    n_features : int
        Number of columns d of the inputs.
    n_members : int
        Number of members K.

    See Also
    --------
    MLPEnergy : The one to imitate.
    ModuleStack : Members that are modules of their own.

    Examples
    --------
    >>> import torch
    >>> from skebm.energies import StackedEnergy
    >>> class Quadratic(StackedEnergy):
    ...     def __init__(self, n_features, n_members):
    ...         super().__init__(n_features, n_members)
    ...         self.a = torch.nn.Parameter(torch.zeros(n_members, n_features))
    ...
    ...     def stacked(self, z):
    ...         return -(self.a[:, None] * z.square()).sum(-1)
    >>> energy = Quadratic(n_features=2, n_members=3)
    >>> energy(torch.ones(3, 5, 2)).shape
    torch.Size([3, 5])
    >>> energy.member(0)(torch.ones(5, 2)).shape
    torch.Size([5])
    """

    def __init__(self, n_features: int, n_members: int):
        super().__init__()
        self.n_features = n_features
        self.n_members = n_members

    @abstractmethod
    def stacked(self, z: Tensor) -> Tensor:
        """Evaluate member k on ``z[k]``: (K, n, d) -> (K, n)."""

    def forward(self, z: Tensor) -> Tensor:
        """Evaluate f.

        Parameters
        ----------
        z : Tensor of shape (K, n, d), or (n, d) when there is one member
            Gaussianised coordinates, rows ``z[k]`` for member k.

        Returns
        -------
        Tensor of shape (K, n), or (n,)
            f, minus the residual energy.
        """
        if z.shape[-1:] == (self.n_features,):
            if z.ndim == 3 and len(z) == self.n_members:
                return self.stacked(z)
            if z.ndim == 2 and self.n_members == 1:
                return self.stacked(z.unsqueeze(0)).squeeze(0)
        raise ValueError(
            f"{type(self).__name__} with n_members={self.n_members} expects z of shape "
            f"({self.n_members}, n, {self.n_features})"
            + (f" or (n, {self.n_features})" if self.n_members == 1 else "")
            + f", got {tuple(z.shape)}."
        )

    def member(self, k: int) -> "StackedEnergy":
        """Member k alone, an energy (n, d) -> (n,) with its own copy of the weights."""
        single = copy.deepcopy(self)
        for part in single.modules():
            part.n_members = 1  # pyright: ignore[reportArgumentType]
            for name, parameter in part._parameters.items():
                row = parameter.detach()[k : k + 1].clone()
                part._parameters[name] = nn.Parameter(row, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer[k : k + 1].clone()
        return single


class ModuleStack(PrivateStream, StackedEnergy):
    r"""K copies of a user's torch module, each with a learned gain.

    A module written by a user does not start at zero, so member k is

    .. math:: f_k(z) = g_k\, u_k(z),

    with the user's module u and a learned scalar gain g that starts at 0: the model starts as its
    base, the gain moves first and the module follows.

    Members run one after the other, so that any module is accepted, whether or not it could be
    batched. Random numbers that it draws in training mode (dropout) come from private streams;
    torch's global generators are left as found.

    Parameters
    ----------
    energy_model : torch.nn.Module, or callable
        A class or factory, called as ``energy_model(n_features)`` once per member; or an instance,
        which is copied (all members then start from its weights) and never trained itself. Maps
        (n, d) to (n,) or (n, 1).
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of members K.
    seed : int, default=0
        Seed of the initial weights and of the random numbers drawn in training.

    See Also
    --------
    resolve_energy_model : Makes it of what a user passes.
    MLPEnergy : Members that run as one.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from skebm.energies import ModuleStack
    >>> def make(n_features):
    ...     return nn.Sequential(nn.Linear(n_features, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> energy = ModuleStack(make, n_features=3, n_members=2)
    >>> energy(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))).shape
    torch.Size([2, 5])
    """

    members: nn.ModuleList
    gain: nn.Parameter

    def __init__(
        self,
        energy_model: nn.Module | Callable[..., nn.Module],
        n_features: int,
        n_members: int = 1,
        *,
        seed: int = 0,
    ):
        super().__init__(n_features, n_members)
        with seeded_global_rng(seed):
            members = [
                build_module(energy_model, "energy_model", n_features) for _ in range(n_members)
            ]
            self.members = nn.ModuleList(members).to("cpu", torch.float32)
            for member in self.members:  # a module that does not fit fails here
                _as_vector(try_module(member, "energy_model", n_features), 3)
        self.gain = nn.Parameter(torch.zeros(n_members, dtype=torch.float32))
        self._next_seed = seed + 1

    def stacked(self, z: Tensor) -> Tensor:
        with self._stream(z.device):
            values = [
                _as_vector(u(rows), len(rows)) for u, rows in zip(self.members, z, strict=True)
            ]
        return self.gain.unsqueeze(-1) * torch.stack(values)

    def member(self, k: int) -> "ModuleStack":
        single = copy.deepcopy(self)
        single.n_members = 1
        single.members = single.members[k : k + 1]
        single.gain = nn.Parameter(self.gain.detach()[k : k + 1].clone())
        return single


class OnNumbers(StackedEnergy):
    """An energy that knows numbers only, on rows with states: it sees indicators of these.

    Parameters
    ----------
    layout : Layout
    energy : StackedEnergy
        Of ``layout.n_numbers`` columns.
    """

    layout: Layout
    energy: StackedEnergy

    def __init__(self, layout: Layout, energy: StackedEnergy):
        super().__init__(layout.n_features, energy.n_members)
        self.layout, self.energy = layout, energy

    def stacked(self, z: Tensor) -> Tensor:
        return self.energy(self.layout.as_numbers(z))

    def of_values(self, z: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """f as a function of the values of rows, whose states stay what they are.

        Parameters
        ----------
        z : Tensor of shape (K, n, n_features)

        Returns
        -------
        energy : callable
            (K, n, n_values) -> (K, n). It does not depend on values that are absent.
        values : Tensor of shape (K, n, n_values)
            Those of the rows, 0 where one is absent.
        """
        numbers = self.layout.as_numbers(z)
        indicators, values = numbers.split([sum(self.layout.sizes), self.layout.n_values], dim=-1)
        present = (~z[..., self.layout.n_states :].isnan()).to(z.dtype)
        return lambda v: self.energy(torch.cat([indicators, v * present], dim=-1)), values

    def member(self, k: int) -> "OnNumbers":
        return OnNumbers(self.layout, self.energy.member(k))


def _as_vector(values: Tensor, n: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape not in ((n,), (n, 1)):
        raise ValueError(
            "energy_model must map (n, n_features) to shape (n,) or (n, 1); "
            f"for n={n} it returned {describe(values)}."
        )
    return values.reshape(n)
