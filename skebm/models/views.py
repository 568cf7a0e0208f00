"""The model of an outlier detector: a row is as likely as its oddest view says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from skebm._layout import Layout
from skebm.bases import StackedBase

from .tilted import TiltedMixture


class Unmapped(nn.Module):
    """Rows as they are, in the place of a `FeatureMap`.

    Parameters
    ----------
    layout : Layout
    """

    layout: Layout

    def __init__(self, layout: Layout):
        super().__init__()
        self.layout = layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, d) -> (n, d)."""
        return x


class CommonScale(nn.Module):
    r"""Increasing maps :math:`g_v` from the log-densities of views to a common scale.

    Piecewise linear between pairs of quantiles, and beyond the outer ones continued with slope one,
    so that :math:`\exp g_v(\log q_v(x))` falls off like the density itself.

    Parameters
    ----------
    knots : Tensor of shape (n_views, n_knots)
        Increasing quantiles of the log-densities of every view.
    values : Tensor of shape (n_knots,)
        Increasing quantiles on the common scale.
    """

    knots: torch.Tensor
    values: torch.Tensor

    def __init__(self, knots: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.register_buffer("knots", knots)
        self.register_buffer("values", values)

    def forward(self, log_prob: torch.Tensor) -> torch.Tensor:
        """Log-densities of all views on the common scale, (..., n_views) -> (..., n_views)."""
        x = log_prob.movedim(-1, 0).flatten(1)
        inner = self.knots[:, 1:-1].contiguous()
        left = torch.searchsorted(inner, x.detach().contiguous(), right=True)
        x0, x1 = self.knots.gather(1, left), self.knots.gather(1, left + 1)
        y0, y1 = self.values[left], self.values[left + 1]
        share = (x.clamp(self.knots[:, :1], self.knots[:, -1:]) - x0) / (x1 - x0)
        below = (x - self.knots[:, :1]).clamp(max=0.0)
        above = (x - self.knots[:, -1:]).clamp(min=0.0)
        y = y0 + (y1 - y0) * share + below + above
        shape = log_prob.shape[-1], *log_prob.shape[:-1]
        return y.view(shape).movedim(0, -1)


class LowestView(TiltedMixture):
    r"""Mean over K members of :math:`e^{f_k(x)} / Z_k`, with the lowest of several views as f.

    .. math:: f_k(x) = \min_v g_v(\log q_{kv}(x))

    The views :math:`q_{kv}` are distributions, and the maps :math:`g_v` bring their log-densities
    to a common scale. The minimum is written as a tilt of their mixture, which is easy to sample
    and nowhere much below it.

    Parameters
    ----------
    bases : list of K StackedBase
        Mixtures of the views of every member, on standardised columns.
    in_own_columns : sequence of bool
        Which components are `TransformedBase` whose density is taken in the columns of their base.
    layout : Layout
        Of the rows.
    density : TiltedMixture, default=None
        Further model of K members; its own is the last view of each, in the place of the last
        component of the mixture.
    scale : CommonScale, default=None
        By default log-densities as they are.
    """

    in_own_columns: tuple[bool, ...]
    scale: Any
    density: Any

    def __init__(
        self,
        bases: Sequence[StackedBase],
        in_own_columns: Sequence[bool],
        layout: Layout,
        density: TiltedMixture | None = None,
        scale: CommonScale | None = None,
    ):
        super().__init__(bases, bases, Unmapped(layout), None)
        self.in_own_columns = tuple(in_own_columns)
        self.density = density
        self.scale = nn.Identity() if scale is None else scale

    @property
    def is_untilted(self) -> bool:
        """Never: log Z is measured."""
        return False

    def member(self, k: int) -> "LowestView":
        """Member k alone, as a model of one."""
        density = None if self.density is None else self.density.member(k)
        bases: Any = self.bases[k : k + 1]
        layout = self.features.layout
        single = LowestView(bases, self.in_own_columns, layout, density, self.scale)
        single.log_partition = self.log_partition[k : k + 1]
        single.log_partition_std_error = self.log_partition_std_error[k : k + 1]
        return single

    def view_scores(self, x: torch.Tensor) -> torch.Tensor:
        """g_v(log q_kv(x)) - log Z_k, the mean over members, (n, d) -> (n, n_views)."""
        scores = [
            self.scale(self.view_log_probs(k, x)[0]) - self.log_partition[k]
            for k in range(self.n_members)
        ]
        return torch.stack(scores).mean(0)

    def view_log_probs(self, k: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-densities of the views of member k, (n, d) -> (n, n_views), and of their mixture."""
        base, views, components = self.bases[k], [], []
        for view, own in zip(base.components, self.in_own_columns, strict=True):
            if own:
                z, log_det = view.transform(x)
                views.append(view.base.log_prob(z))
                components.append(views[-1] + log_det)
            else:
                views.append(view.log_prob(x))
                components.append(views[-1])
        if self.density is not None:
            views[-1] = self.density.log_member(k, x)
        mixture = (torch.stack(components, dim=-1) + base.weights.log()).logsumexp(-1)
        return torch.stack(views, dim=-1), mixture

    def log_members_and_bases(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised log-densities of the members at the same rows, and of their mixtures of views,
        (n, d) -> (K, n) each.
        """
        found = [self.view_log_probs(k, x) for k in range(self.n_members)]
        logs, mixtures = map(torch.stack, zip(*found, strict=True))
        return self.scale(logs).amin(-1) - self.log_partition[:, None], mixtures

    def tilt(self, x: torch.Tensor) -> torch.Tensor:
        """Of the mixtures of the views, (K, n, d) -> (K, n)."""
        tilts = []
        for k, rows in enumerate(x):
            logs, mixture = self.view_log_probs(k, rows)
            tilts.append(self.scale(logs).amin(-1) - mixture)
        return torch.stack(tilts)
