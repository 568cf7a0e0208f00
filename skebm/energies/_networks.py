"""Stacked multilayer perceptrons."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skebm._random import spawn
from skebm.energies._stack import StackedEnergy

__all__ = ["MLPEnergy"]


class MLPEnergy(StackedEnergy):
    """K perceptrons on embedded columns: linear, LayerNorm, SiLU, ..., linear without bias.

    The last layer starts at zero, so f does; a bias there would only be a second log Z.

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of members K.
    hidden_layer_sizes : sequence of int, default=(128, 128)
        Widths of the hidden layers.
    embedding : nn.Module, optional
        Stacked embedding (K, n, d) -> (K, n, ``n_outputs``) in front of the first layer, such as
        :class:`~skebm.energies.PiecewiseLinearEmbedding`; raw columns by default.
    rng : torch.Generator
        Source of the initial weights.

    See Also
    --------
    PeriodicEmbedding : A smooth embedding of the columns.
    PiecewiseLinearEmbedding : One by quantile bins.
    skebm.Network : The specification that estimators take.

    Examples
    --------
    >>> import torch
    >>> from skebm.energies import MLPEnergy, PeriodicEmbedding
    >>> rng = torch.Generator().manual_seed(0)
    >>> embedding = PeriodicEmbedding(n_features=2, n_members=4, rng=rng)
    >>> energy = MLPEnergy(2, 4, hidden_layer_sizes=(32,), embedding=embedding, rng=rng)
    >>> z = torch.randn(4, 10, 2, generator=rng)
    >>> energy(z).shape
    torch.Size([4, 10])
    >>> bool((energy(z) == 0).all())  # f is zero at the start
    True
    """

    hidden: nn.ModuleList
    output: nn.Parameter

    def __init__(
        self,
        n_features: int,
        n_members: int = 1,
        *,
        hidden_layer_sizes: Sequence[int] = (128, 128),
        embedding: nn.Module | None = None,
        rng: torch.Generator,
    ):
        super().__init__(n_features, n_members)
        self.embedding = embedding
        self.hidden = nn.ModuleList()
        width: Any = n_features if embedding is None else embedding.n_outputs
        rngs = spawn(rng, n_members)
        for n_units in hidden_layer_sizes:
            self.hidden.append(_Hidden(width, n_units, rngs))
            width = n_units
        self.output = nn.Parameter(torch.zeros(n_members, width, 1, dtype=torch.float32))

    def stacked(self, z: Tensor) -> Tensor:
        h = z if self.embedding is None else self.embedding(z)
        for layer in self.hidden:
            h = layer(h)
        return torch.bmm(h, self.output).squeeze(-1)


class _Hidden(nn.Module):
    """Linear, LayerNorm, SiLU for K members at once (batched products)."""

    def __init__(self, n_inputs: int, n_units: int, rngs: Sequence[torch.Generator]):
        super().__init__()
        n_members = len(rngs)

        def uniform(n_rows):  # as torch.nn.Linear
            draws = [
                torch.rand(n_rows, n_units, generator=own, dtype=torch.float32) for own in rngs
            ]
            return nn.Parameter(n_inputs**-0.5 * (2 * torch.stack(draws) - 1))

        self.weight, self.offset = uniform(n_inputs), uniform(1)
        self.gain = nn.Parameter(torch.ones(n_members, 1, n_units, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(n_members, 1, n_units, dtype=torch.float32))

    def forward(self, h: Tensor) -> Tensor:
        h = torch.baddbmm(self.offset, h, self.weight)
        h = functional.layer_norm(h, h.shape[-1:])
        return functional.silu(torch.addcmul(self.bias, h, self.gain))
