"""Masked autoregressive flows, K of them evaluated and trained together."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from skebm._random import spawn
from skebm._typing import Modules

from ._stacked_flow import REACH, LayeredFlow, log_normal

_MAX_LOG_SCALE = 7.0


class AutoregressiveFlow(LayeredFlow):
    """K masked autoregressive flows, evaluated and trained together.

    A layer [1]_ shifts and scales every column by amounts that are a function of the columns before
    it, and the next layer has the columns in reverse order. What depends on others in its location
    and scale alone is then a few parameters, where a mixture needs many components. Both directions
    cost about one pass, as the units of the networks are ordered by the last column that reaches
    them. Networks see columns clipped to ``[-bound, bound]``, so that tails are Gaussian. The flow
    starts at the standard normal distribution.

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of flows K.
    n_layers : int, default=3
    hidden : sequence of int, default=(32, 32)
        Widths of the networks.
    bound : float, default=5.0
        Data is expected to be standardised.
    rng : torch.Generator
        On the CPU. Source of the initial weights.

    See Also
    --------
    build_flow : Makes flows by name.
    train_flows : Trains them.
    CouplingSplineFlow : More flexible, with more parameters.

    References
    ----------
    .. [1] Papamakarios, Pavlakou and Murray (2017), Masked autoregressive flow for density
       estimation, NeurIPS.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import AutoregressiveFlow
    >>> rng = torch.Generator().manual_seed(0)
    >>> flow = AutoregressiveFlow(n_features=3, n_members=2, rng=rng)
    >>> samples, log_prob = flow.rsample(4, rng)
    >>> samples.shape, log_prob.shape
    (torch.Size([2, 4, 3]), torch.Size([2, 4]))
    """

    layers: Modules

    def __init__(
        self,
        n_features: int,
        n_members: int = 1,
        *,
        n_layers: int = 3,
        hidden: Sequence[int] = (32, 32),
        bound: float = REACH,
        rng: torch.Generator,
    ):
        super().__init__(n_features, n_members)
        rngs = spawn(rng, n_members)
        self.layers = nn.ModuleList(
            _AutoregressiveLayer(n_features, hidden, bound, rngs) for _ in range(n_layers)
        )

    def frozen(self) -> Callable[[torch.Tensor], torch.Tensor]:
        layers = [
            (layer.bound, layer.frozen(is_reversed=i % 2 == 1))
            for i, layer in enumerate(self.layers)
        ]

        def log_prob(x):
            log_scales = []
            for bound, networks in layers:
                h = x.clamp(-bound, bound)
                for i, (weight, offset) in enumerate(networks):
                    h = torch.baddbmm(offset, weight, functional.silu(h, inplace=True) if i else h)
                shift, log_scale = h.chunk(2, dim=1)
                log_scales.append(_bounded(log_scale))
                x = torch.addcmul(shift, x, log_scales[-1].exp())
            return log_normal(x) + torch.stack(log_scales).sum((0, 2))

        return log_prob


class _AutoregressiveLayer(nn.Module):
    """Shift and scale by functions of the columns before, then reversal of their order; K members.

    Rows are on the last axis: (K, d, n).
    """

    def __init__(self, n_features, hidden, bound, rngs):
        super().__init__()
        self.bound = bound
        # of inputs, units and outputs: the number of columns, from the first on, that they know
        columns = torch.arange(n_features)
        known = [columns + 1]
        if n_features > 1:
            known += [1 + torch.arange(n) * (n_features - 1) // n for n in hidden]
        known.append(columns.repeat_interleave(2))  # shift and log-scale of each column
        # where the units end that know at most j columns
        self._ends = [torch.searchsorted(k, columns, side="right").tolist() for k in known]
        self.weights, self.offsets = nn.ParameterList(), nn.ParameterList()
        for i, (below, own) in enumerate(pairwise(known)):
            scale = 0.0 if i == len(known) - 2 else len(below) ** -0.5  # the identity at the start
            mask = (below <= own[:, None]).float()
            self.register_buffer(f"mask_{i}", mask.expand(len(rngs), -1, -1).clone())
            for parameters, width in ((self.weights, len(below)), (self.offsets, 1)):
                draws = [
                    torch.rand(len(own), width, generator=r, dtype=torch.float32) for r in rngs
                ]
                parameters.append(nn.Parameter(scale * (2 * torch.stack(draws) - 1)))

    def _masked(self):
        return [w * self.get_buffer(f"mask_{i}") for i, w in enumerate(self.weights)]

    def frozen(self, is_reversed):
        """Masked weights, and offsets, for columns in one order, whatever the layer; its outputs
        are then shifts first, and after these the raw log-scales.
        """
        weights = [weight.detach().clone() for weight in self._masked()]
        offsets = [offset.detach() for offset in self.offsets]
        if is_reversed:
            weights[0] = weights[0].flip(2)
        for own in (weights, offsets):
            halves = own[-1][:, ::2], own[-1][:, 1::2]
            halves = [half.flip(1) for half in halves] if is_reversed else halves
            own[-1] = torch.cat(halves, dim=1)
        return list(zip(weights, offsets, strict=True))

    def forward(self, x):
        """Towards the normal distribution, with the log-determinant: (K, d, n) -> (K, d, n), (K,
        n).
        """
        h = x.clamp(-self.bound, self.bound)
        for i, weight in enumerate(self._masked()):
            h = torch.baddbmm(self.offsets[i], weight, functional.silu(h) if i else h)
        shift, log_scale = _shift_and_log_scale(h)
        return torch.addcmul(shift, x, log_scale.exp()).flip(1), log_scale.sum(1)

    def inverse(self, y):
        """From the normal distribution, with the log-determinant of `forward` there."""
        y, weights, ends = y.flip(1), self._masked(), self._ends
        # what is known of the inputs and of the units of each layer, and of x, so far
        known = [y[:, :0] for _ in weights]
        x, log_det = [], 0.0
        for j in range(y.shape[1]):
            for i, weight in enumerate(weights):
                # with j columns some more units can be computed, and the outputs of the next one
                begin = ends[i + 1][j - 1] if j else 0
                rows = slice(begin, ends[i + 1][j])
                new = torch.baddbmm(
                    self.offsets[i][:, rows], weight[:, rows, : ends[i][j]], known[i]
                )
                if i + 1 < len(weights):
                    known[i + 1] = torch.cat([known[i + 1], functional.silu(new)], dim=1)
            shift, log_scale = _shift_and_log_scale(new)
            x.append((y[:, j : j + 1] - shift) * (-log_scale).exp())
            known[0] = torch.cat([known[0], x[-1].clamp(-self.bound, self.bound)], dim=1)
            log_det = log_det + log_scale[:, 0]
        return torch.cat(x, dim=1), log_det


def _shift_and_log_scale(outputs):
    """Of every column, from rows that take turns; bounded scales."""
    shift, log_scale = outputs[:, ::2], outputs[:, 1::2]
    return shift, _bounded(log_scale)


def _bounded(log_scale):
    return log_scale / (1 + log_scale.abs() / _MAX_LOG_SCALE)
