"""Multi-resolution grids: smooth look-up tables for pairs and triples of columns.

What tables of data hide is fine in scale and low in order. A network learns it slowly; a grid of
values over a pair of columns learns it at once, and as many such grids as there are pairs, at a
few resolutions each, cost one gather per step.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from skebm.energies._stack import StackedEnergy

__all__ = ["GridEnergy"]

# Adam moves every parameter by the same amount; tables like half of what networks like.
_TABLE_SCALE = 0.5


class GridEnergy(StackedEnergy):
    r"""A network plus one table of values per group of columns and resolution.

    .. math:: f(z) = u(z) + \sum_{g, R} T_{gR}(\Phi(z_g)),

    where g runs over pairs and triples of columns and :math:`T_{gR}` interpolates linearly, with
    smoothstep weights (so that f has a continuous gradient), between R points per axis, equally
    spaced in :math:`u = \Phi(z)`, the normal distribution function: where there are more data, the
    points are denser. The tables start at zero, the network u is expected to.

    The number of values grows with :math:`d^2 R^2` (pairs) and :math:`d^3 R^3` (triples):
    :attr:`n_values` says how many one member has.

    Parameters
    ----------
    network : StackedEnergy
        The smooth part u, such as a small :class:`~skebm.energies.MLPEnergy`.
    pair_resolutions : sequence of int, default=(8, 32, 128)
        Points per axis of the tables over pairs of columns.
    triple_resolutions : sequence of int, default=()
        Points per axis of the tables over triples of columns.
    """

    def __init__(
        self,
        network: StackedEnergy,
        *,
        pair_resolutions: Sequence[int] = (8, 32, 128),
        triple_resolutions: Sequence[int] = (),
    ):
        super().__init__(network.n_features, network.n_members)
        self.network = network
        self.grids = [(order, r) for order, rs in ((2, pair_resolutions), (3, triple_resolutions))
                      for r in rs]
        self.groups = {
            order: torch.tensor(list(combinations(range(self.n_features), order))).reshape(-1, order).T
            for order in (2, 3)
        }
        self.n_values = sum(self.groups[order].shape[1] * r**order for order, r in self.grids)
        self.values = nn.Parameter(torch.zeros(self.n_members, self.n_values))

    def stacked(self, z: Tensor) -> Tensor:
        u = torch.special.ndtr(z).transpose(1, 2).contiguous()  # (K, d, n): long rows are fast
        places, weights, first = [], [], 0
        for order, r in self.grids:
            place, weight = self._corners(u, self.groups[order].to(z.device), r)
            places.append(place + first)
            weights.append(weight)
            first += self.groups[order].shape[1] * r**order
        # one gather for all tables: its backward then fills one gradient, not one per table
        place, weight = torch.cat(places, 1), torch.cat(weights, 1)
        values = self.values.gather(1, place.flatten(1)).view_as(weight)
        return self.network(z) + _TABLE_SCALE * (values * weight).sum(1)

    @staticmethod
    def _corners(u: Tensor, groups: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Places in the tables and weights of the corners of the cells: (K, corners, n) each."""
        t = u * (r - 1)
        left = t.detach().floor().clamp_(0, r - 2)
        right_weight = t - left
        right_weight = right_weight.square() * (3 - 2 * right_weight)
        axis_weights = torch.stack([1 - right_weight, right_weight], 1)  # (K, 2, d, n)
        left = left.long()
        n_groups = groups.shape[1]
        place = torch.arange(n_groups, device=u.device).mul(r ** len(groups)).unsqueeze(-1)
        place = place.expand(len(u), 1, n_groups, 1)
        weight = None
        for axis, columns in enumerate(groups):
            stride = r ** (len(groups) - 1 - axis)
            step = torch.tensor([0, stride], device=u.device).view(2, 1, 1)
            along = stride * left[:, columns].unsqueeze(1) + step  # (K, 2, n_groups, n)
            place = (place.unsqueeze(2) + along.unsqueeze(1)).flatten(1, 2)
            w = axis_weights[:, :, columns]
            weight = w if weight is None else (weight.unsqueeze(2) * w.unsqueeze(1)).flatten(1, 2)
        return place.flatten(1, 2), weight.flatten(1, 2)
