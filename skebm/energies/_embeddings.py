"""Numeric embeddings: what lets a network see sharp structure in a table.

A network on raw columns learns fine structure far too slowly; encoding each column first (by
quantile bins, or by waves of learned frequency) puts the detail within reach of the first layer.
Embeddings are stacks: (K, n, d) -> (K, n, n_outputs).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skebm._random import spawn
from skebm._statistics import weighted_quantile

__all__ = ["MixedEmbedding", "PeriodicEmbedding", "PiecewiseLinearEmbedding"]


class PiecewiseLinearEmbedding(nn.Module):
    r"""Piecewise-linear encoding of every column with quantile bins.

    Bin t of a column, between the edges :math:`b_t < b_{t+1}`, holds

    .. math:: \frac{z - b_t}{b_{t+1} - b_t} \text{ clipped to } [0, 1],

    where the first bin is not clipped from below and the last not from above. Linear between the
    edges, so its gradient in z jumps at them; :class:`PeriodicEmbedding` is smooth.

    Parameters
    ----------
    members : sequence of K tensors of shape (n_k, d)
        The rows each member learns from; its bin edges are their quantiles.
    n_bins : int, default=16
        Bins per column.
    weights : sequence of K tensors of shape (n_k,), optional
        Positive weights of the rows; equal by default.

    See Also
    --------
    PeriodicEmbedding : Smooth, by sines and cosines.
    MLPEnergy : A perceptron behind an embedding.

    References
    ----------
    Gorishniy, Y., Rubachev, I. and Babenko, A. (2022). On embeddings for numerical features in
    tabular deep learning. NeurIPS. https://arxiv.org/abs/2203.05556

    Examples
    --------
    >>> import torch
    >>> from skebm.energies import PiecewiseLinearEmbedding
    >>> rows = torch.linspace(0.0, 1.0, 101)[:, None]
    >>> embedding = PiecewiseLinearEmbedding([rows], n_bins=4)
    >>> embedding(torch.tensor([[[0.5], [0.6]]]))
    tensor([[[1.0000, 1.0000, 0.0000, 0.0000],
             [1.0000, 1.0000, 0.4000, 0.0000]]])
    """

    scale: Tensor
    shift: Tensor
    lowest: Tensor
    highest: Tensor

    n_members: int
    n_features: int
    n_outputs: int

    # Narrower bins (ties, atoms) are widened: they would be cliffs that no finite f can climb down.
    _MIN_WIDTH = 1e-3

    def __init__(
        self,
        members: Sequence[Tensor],
        n_bins: int = 16,
        weights: Sequence[Tensor] | None = None,
    ):
        super().__init__()
        levels = np.linspace(0.0, 1.0, n_bins + 1)
        if weights is None:
            weights = [torch.ones(len(z)) for z in members]
        columns = [
            [
                weighted_quantile(c, w.cpu().double().numpy(), levels)
                for c in z.cpu().double().numpy().T
            ]
            for z, w in zip(members, weights, strict=True)
        ]
        left = torch.from_numpy(np.array(columns))  # (K, d, n_bins + 1)
        width = left.diff(dim=-1).clamp_min(self._MIN_WIDTH)
        lowest, highest = torch.zeros_like(width), torch.ones_like(width)
        lowest[..., 0], highest[..., -1] = -math.inf, math.inf
        for name, value in {
            "scale": 1.0 / width,
            "shift": -left[..., :-1] / width,
            "lowest": lowest,
            "highest": highest,
        }.items():
            self.register_buffer(name, value.float().unsqueeze(1))  # (K, 1, d, n_bins)
        self.n_members, n_features = len(members), width.shape[1]
        self.n_features, self.n_outputs = n_features, n_features * n_bins

    def forward(self, z: Tensor) -> Tensor:
        encoded = torch.addcmul(self.shift, z.unsqueeze(-1), self.scale)
        return encoded.clamp_(self.lowest, self.highest).flatten(-2)


class PeriodicEmbedding(nn.Module):
    r"""Sines and cosines of every column, with learned frequencies.

    .. math:: \sin(2\pi c_{jm} z_j),\ \cos(2\pi c_{jm} z_j), \qquad c_{jm} \sim N(0, \sigma^2)
        \text{ at the start.}

    Smooth, so that score matching can use it.

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of members K.
    n_frequencies : int, default=16
        Frequencies per column.
    sigma : float, default=0.3
        Spread of the initial frequencies, in waves per unit of z.
    rng : torch.Generator
        Source of the initial frequencies.

    See Also
    --------
    PiecewiseLinearEmbedding : By quantile bins; not smooth.
    MLPEnergy : A perceptron behind an embedding.

    References
    ----------
    Gorishniy, Y., Rubachev, I. and Babenko, A. (2022). On embeddings for numerical features in
    tabular deep learning. NeurIPS. https://arxiv.org/abs/2203.05556

    Examples
    --------
    >>> import torch
    >>> from skebm.energies import PeriodicEmbedding
    >>> rng = torch.Generator().manual_seed(0)
    >>> embedding = PeriodicEmbedding(n_features=2, n_frequencies=8, rng=rng)
    >>> embedding(torch.zeros(1, 5, 2)).shape  # sine and cosine of 8 frequencies in 2 columns
    torch.Size([1, 5, 32])
    >>> embedding.n_outputs
    32
    """

    n_members: int
    n_features: int
    n_outputs: int
    frequencies: nn.Parameter

    def __init__(
        self,
        n_features: int,
        n_members: int = 1,
        *,
        n_frequencies: int = 16,
        sigma: float = 0.3,
        rng: torch.Generator,
    ):
        super().__init__()
        shape = (1, n_features, n_frequencies)
        draws = [
            torch.randn(shape, generator=own, dtype=torch.float32) for own in spawn(rng, n_members)
        ]
        self.frequencies = nn.Parameter(sigma * torch.stack(draws))
        self.n_members, self.n_features = n_members, n_features
        self.n_outputs = 2 * n_features * n_frequencies

    def forward(self, z: Tensor) -> Tensor:
        phase = (2 * math.pi * self.frequencies * z.unsqueeze(-1)).flatten(-2)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class MixedEmbedding(nn.Module):
    """Indicators of states as they are, beside an embedding of the values after them.

    The first layer of a network makes a learned vector of each state of these. A value that is
    absent is embedded as zero, and its state says that it is.

    Parameters
    ----------
    n_indicators : int
    values : nn.Module
        Embedding of the values alone.
    """

    n_indicators: int
    n_outputs: int

    def __init__(self, n_indicators: int, values: Any):
        super().__init__()
        self.n_indicators, self.values = n_indicators, values
        self.n_outputs = n_indicators + values.n_outputs

    def forward(self, numbers: Tensor) -> Tensor:
        n = self.n_indicators
        return torch.cat([numbers[..., :n], self.values(numbers[..., n:])], dim=-1)
