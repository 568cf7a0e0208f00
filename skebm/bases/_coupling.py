"""Coupling flows of rational-quadratic splines, K of them evaluated and trained together."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from skebm._random import spawn
from skebm._typing import Modules

from ._spline import Piece
from ._stacked_flow import REACH, LayeredFlow

_MIN_SIZE = 1e-3  # of a bin, relative to the spline's range; bounds the slopes, too
_MAX_LOG_SLOPE = math.log(1e3)


class CouplingSplineFlow(LayeredFlow):
    """K coupling flows of rational-quadratic splines, evaluated and trained together.

    A layer [1]_ mixes the coordinates linearly (a learned triangular factorisation that starts as a
    permutation), then maps half of them by monotone splines whose knots are a function of the other
    half. Splines are the identity outside of ``[-bound, bound]``, and their knots do not change any
    more where the other half leaves it, so that tails are linear. Both directions cost one pass.
    The flow starts at the standard normal distribution.

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of flows K.
    n_layers : int, default=5
    hidden : sequence of int, default=(64, 64)
        Widths of the networks that place the knots.
    n_bins : int, optional
        Of every spline; by default 8 in up to four columns and fewer in more, down to 5 from six
        columns on: rows that are spread over more dimensions cannot place as many knots.
    bound : float, default=5.0
        Data is expected to be standardised, or Gaussianised.
    rng : torch.Generator
        On the CPU. Source of the initial weights and permutations.

    See Also
    --------
    build_flow : Makes flows by name.
    train_flows : Trains them.
    AutoregressiveFlow : Fewer parameters; conditional locations and scales alone.

    References
    ----------
    .. [1] Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows, NeurIPS.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import CouplingSplineFlow
    >>> rng = torch.Generator().manual_seed(0)
    >>> flow = CouplingSplineFlow(n_features=3, n_members=2, rng=rng)
    >>> z = torch.zeros(2, 5, 3)
    >>> flow.log_prob(z).shape
    torch.Size([2, 5])
    >>> flow.log_prob(z)[0, :2].detach()  # not trained: a standard normal distribution
    tensor([-2.7568, -2.7568])
    """

    layers: Modules

    def __init__(
        self,
        n_features: int,
        n_members: int = 1,
        *,
        n_layers: int = 5,
        hidden: Sequence[int] = (64, 64),
        n_bins: int | None = None,
        bound: float = REACH,
        rng: torch.Generator,
    ):
        super().__init__(n_features, n_members)
        n_bins = min(8, max(5, 32 // n_features)) if n_bins is None else n_bins
        rngs = spawn(rng, n_members)
        self.layers = nn.ModuleList(
            _CouplingLayer(n_features, hidden, n_bins, bound, i % 2 == 1, rngs)
            for i in range(n_layers)
        )


class _CouplingLayer(nn.Module):
    """Linear map and spline coupling, in K members; rows on the last axis: (K, d, n).

    With rows last, sums and softmax over the bins run along the rows, many times as fast on a CPU.
    """

    permutation: torch.Tensor

    def __init__(self, n_features, hidden, n_bins, bound, shuffle, rngs):
        super().__init__()
        self.n_bins, self.bound = n_bins, bound
        self.n_fixed = n_features // 2
        self.n_mapped = n_features - self.n_fixed

        def parameter(*shape, scale=0.0):
            draws = [torch.rand(*shape, generator=own, dtype=torch.float32) for own in rngs]
            return nn.Parameter(scale * (2 * torch.stack(draws) - 1))

        eye = torch.eye(n_features, dtype=torch.float32)
        start = [eye[_order(n_features, shuffle, own)] for own in rngs]
        self.register_buffer("permutation", torch.stack(start))
        # W = (lower triangle, ones on the diagonal) (upper triangle, exp on it) permutation
        self.triangles = parameter(n_features, n_features)
        self.bias = parameter(n_features, 1)

        widths = [self.n_fixed, *hidden] if self.n_fixed else []
        self.weights, self.offsets = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            self.weights.append(parameter(n_out, n_in, scale=n_in**-0.5))
            self.offsets.append(parameter(n_out, 1, scale=n_in**-0.5))
        n_outputs = (3 * n_bins - 1) * self.n_mapped
        if widths:
            self.weights.append(parameter(n_outputs, widths[-1]))
        self.offsets.append(parameter(n_outputs, 1))

    def forward(self, x):
        """Towards the normal distribution, with the log-determinant: (K, d, n) -> (K, d, n), (K,
        n).
        """
        lower, upper, log_scale = self._factors()
        x = torch.baddbmm(self.bias, lower @ upper @ self.permutation, x)
        fixed, mapped = x.split([self.n_fixed, self.n_mapped], dim=1)
        mapped, log_slope = self._spline(mapped, fixed, inverse=False)
        return torch.cat([fixed, mapped], dim=1), log_slope.sum(1) + log_scale

    def inverse(self, y):
        """From the normal distribution, with the log-determinant of `forward` there."""
        fixed, mapped = y.split([self.n_fixed, self.n_mapped], dim=1)
        mapped, log_slope = self._spline(mapped, fixed, inverse=True)
        x = torch.cat([fixed, mapped], dim=1) - self.bias
        lower, upper, log_scale = self._factors()
        x = torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, x, upper=True)
        return self.permutation.mT @ x, log_slope.sum(1) + log_scale

    def _factors(self):
        log_diagonal = self.triangles.diagonal(dim1=1, dim2=2)
        eye = torch.eye(len(log_diagonal[0]), dtype=log_diagonal.dtype, device=log_diagonal.device)
        lower = self.triangles.tril(-1) + eye
        upper = self.triangles.triu(1) + torch.diag_embed(log_diagonal.exp())
        return lower, upper, log_diagonal.sum(1, keepdim=True)

    def _knots(self, fixed):
        """Raw sizes of bins (K, 2, n_bins, m, n) and log-slopes between (K, n_bins - 1, m, n)."""
        h = fixed.clamp(-self.bound, self.bound)
        for i, weight in enumerate(self.weights):
            h = torch.baddbmm(self.offsets[i], weight, functional.silu(h) if i else h)
        if not self.weights:
            h = self.offsets[0].expand(-1, -1, fixed.shape[2])
        n_sizes = 2 * self.n_bins * self.n_mapped
        sizes = h[:, :n_sizes].unflatten(1, (2, self.n_bins, self.n_mapped))
        return sizes, h[:, n_sizes:].unflatten(1, (self.n_bins - 1, self.n_mapped))

    def _spline(self, x, fixed, inverse):
        """Map coordinates (K, m, n); also the log-slope of the map in the forward direction."""
        sizes, log_slopes = self._knots(fixed)
        share = sizes.softmax(2)
        total = share.cumsum(2)
        free = 1 - self.n_bins * _MIN_SIZE
        u = (x.clamp(-self.bound, self.bound) + self.bound) / (2 * self.bound)

        with torch.no_grad():
            order = torch.arange(1, self.n_bins, dtype=x.dtype, device=x.device)[:, None, None]
            knots = torch.add(_MIN_SIZE * order, total[:, int(inverse), :-1], alpha=free)
            index = (u.unsqueeze(1) >= knots).sum(1, keepdim=True)  # (K, 1, m, n)
            both = index.unsqueeze(1).expand(-1, 2, -1, -1, -1)
        # widths and heights, and where they begin
        size = _MIN_SIZE + free * share.gather(2, both).squeeze(2)
        end = _MIN_SIZE * (index + 1).to(x.dtype) + free * total.gather(2, both).squeeze(2)
        (width, height), (left, bottom) = size.unbind(1), (end - size).unbind(1)
        at = torch.cat([index - 1, index], dim=1)
        slopes = log_slopes.gather(1, at.clamp(0, self.n_bins - 2))
        slopes = slopes / (1 + slopes.abs() / _MAX_LOG_SLOPE)
        slopes = torch.where((at < 0) | (at > self.n_bins - 2), 0.0, slopes).exp()
        piece = Piece(left, bottom, width, height, *slopes.unbind(1))
        if inverse:
            t = piece.share_of_width((u - bottom) / height).clamp(0, 1)
            v, log_slope = left + t * width, piece.at(t)[1]
        else:
            v, log_slope = piece.at(((u - left) / width).clamp(0, 1))
        inside = x.abs() < self.bound
        return (
            torch.where(inside, 2 * self.bound * v - self.bound, x),
            torch.where(inside, log_slope, 0.0),
        )


def _order(d, shuffle, rng):
    """Put the halves in new places, by chance; or swap them, so that all coordinates are mapped."""
    if shuffle and d > 3:
        return torch.randperm(d, generator=rng)
    return torch.arange(d).roll(d // 2)
