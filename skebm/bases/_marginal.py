"""Marginal Gaussianisation: one smooth monotone map per column."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr, ndtri
from torch import nn

from ._spline import Piece
from ._tails import fit_tail, tail_distance, tail_share, tail_value

_MIN_SLOPE = 0.2

_REACH = 9.0  # kernel widths, beyond which a kernel has less mass than rounding

_CELLS = 1 << 20  # values that are mapped at a time, of which there are some twenty arrays


class MarginalGaussianization(nn.Module):
    r"""Bijection G that makes every column nearly standard normal.

    Per column, :math:`G(x) = \Phi^{-1}(F_h(x))` at some sixty quantiles, where :math:`F_h` is the
    kernel-smoothed distribution function, joined by monotone rational-quadratic pieces (Gregory &
    Delbourgo 1982; Durkan et al. 2019), which have closed-form inverse and Jacobian. They are
    continued by straight lines, which leave the tails of a Gaussian; where the rows beyond an outer
    quantile fall off like a power, by generalised Pareto tails, so that far rows have about the
    density that they have.

    Parameters
    ----------
    knots : array-like of shape (n_features, n_knots)
        Strictly increasing positions.
    values : array-like of shape (n_features, n_knots)
        Strictly increasing values of G at the knots.
    slopes : array-like of shape (n_features, n_knots)
        Positive derivatives at the knots.
    tails : array-like of shape (n_features, 2, 2), default=None
        Scale and shape of the lower and the upper tail of every column, beyond the outer knots.
        Shape 0, the default, is a straight line; the outer slopes of others follow from them.

    See Also
    --------
    TransformedBase : A distribution behind this map.
    ValuesTransform : The same for rows with states.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import MarginalGaussianization
    >>> x = np.random.default_rng(0).exponential(size=(1000, 1))
    >>> gaussianize = MarginalGaussianization.fit(x)
    >>> z, log_det = gaussianize(torch.as_tensor(x))
    >>> z.mean().abs().item() < 0.1, abs(z.std().item() - 1) < 0.1
    (True, True)
    >>> torch.allclose(gaussianize.inverse(z), torch.as_tensor(x))
    True
    """

    knots: torch.Tensor
    values: torch.Tensor
    slopes: torch.Tensor
    tails: torch.Tensor

    def __init__(
        self,
        knots: ArrayLike,
        values: ArrayLike,
        slopes: ArrayLike,
        tails: ArrayLike | None = None,
    ):
        super().__init__()
        tails = np.zeros((len(np.asarray(knots)), 2, 2)) if tails is None else tails
        arrays = {"knots": knots, "values": values, "slopes": slopes, "tails": tails}
        for name, array in arrays.items():
            self.register_buffer(name, torch.as_tensor(array, dtype=torch.float64).clone())
        self._heavy = bool((self.tails[..., 1] > 0).any())
        for side, end in ((0, 0), (1, -1)):
            scale, shape = self.tails[:, side].T
            heavy = shape > 0
            # C1 at the join
            at_zero, ends = torch.zeros(int(heavy.sum())).double(), self.values[heavy, end].abs()
            _, log_slope = tail_value(at_zero, ends, scale[heavy], shape[heavy])
            self.slopes[heavy, end] = log_slope.exp()

    @classmethod
    def fit(
        cls,
        x: np.ndarray,
        *,
        bandwidth: float = 1.0,
        n_knots: int = 60,
        sample_weight: np.ndarray | None = None,
    ) -> Self:
        """Fit the map to the columns of `x`.

        Parameters
        ----------
        x : ndarray of shape (n_samples, n_features)
            NaN where a row has no value in a column: that map is fitted to the others.
        bandwidth : float, default=1.0
            Kernel width of the smoothed distribution function, in multiples of Silverman's rule.
        n_knots : int, default=60
        sample_weight : ndarray of shape (n_samples,), default=None
        """
        n, d = x.shape
        weight = np.ones(n) if sample_weight is None else sample_weight
        present = [~np.isnan(column) for column in x.T]
        # a column without any value counts as one zero
        columns = [
            column[there] if there.any() else np.zeros(1)
            for column, there in zip(x.T, present, strict=True)
        ]
        shares = [weight[there] if there.any() else np.ones(1) for there in present]
        shares = [share / share.sum() for share in shares]
        sizes = [float(1.0 / np.square(share).sum()) for share in shares]
        n_knots = int(min(n_knots, max(4, min(sizes, default=0) // 2)))
        knots, values, slopes = (np.empty((d, n_knots)) for _ in range(3))
        tails = np.zeros((d, 2, 2))
        for j in range(d):
            n_eff = sizes[j]
            top, outer = -ndtri(0.5 / max(n_eff, 2.0)), tail_share(n_eff)
            order = np.argsort(columns[j])
            column, share = columns[j][order], shares[j][order]
            cdf = np.cumsum(share) - 0.5 * share
            spread = np.sqrt(share @ np.square(column - share @ column))
            if column[0] == column[-1]:
                spread = 1.0  # nothing to go by
            bulk, iqr = (
                -np.diff(np.interp([1.0 - p, p], cdf, column))[0] / (-2.0 * ndtri(p))
                for p in (0.01, 0.25)
            )
            bulk = min(spread, bulk) or spread  # not moved by a few gross outliers
            width = bandwidth * 0.9 * (min(spread, iqr) or bulk) * n_eff**-0.2
            width = max(width, 1e-4 * bulk)
            ends = np.array([-top, top])
            for side, sign in enumerate((-1.0, 1.0)) if outer else ():
                start = np.interp(outer if sign < 0 else 1.0 - outer, cdf, column)
                beyond = sign * (column - start) > 0
                found = fit_tail(sign * (column[beyond] - start), share[beyond], -ndtri(outer))
                if found is not None:
                    tails[j, side] = found
                    ends[side] = -sign * ndtri(outer)
            levels = ndtr(np.linspace(ends[0], ends[1], n_knots))
            t = np.interp(levels, cdf, column)
            step = max(1e-3 * width, 4.0 * np.spacing(np.abs(t).max()))
            t = np.maximum.accumulate(t + step * np.arange(n_knots))
            smooth = np.clip(_smoothed_cdf(column, share, t, width), 1e-300, 1 - 1e-16)
            z = ndtri(smooth)
            z = np.maximum.accumulate(z + 1e-9 * np.arange(n_knots))
            slope = PchipInterpolator(t, z).derivative()(t)
            knots[j], values[j] = t, z
            secant = np.diff(z) / np.diff(t)
            floor = 1e-3 * np.minimum(np.r_[secant[0], secant], np.r_[secant, secant[-1]])
            slopes[j] = np.maximum(slope, floor)
            for end in (0, -1):
                slopes[j, end] = max(slopes[j, end], _MIN_SLOPE / max(spread, 1e-300))
        return cls(knots, values, slopes, tails)

    @property
    def n_features(self) -> int:
        return self.knots.shape[0]

    def marginal(self, kept: Sequence[int]) -> "MarginalGaussianization":
        """The maps of some columns."""
        kept = list(kept)
        return MarginalGaussianization(
            self.knots[kept], self.values[kept], self.slopes[kept], self.tails[kept]
        )

    def _piece(self, at, table):
        """The piece that holds each entry of `at`, a position in `table`."""
        index = torch.searchsorted(table[:, 1:-1].contiguous(), at.contiguous())
        x0, x1, z0, z1, d0, d1 = (
            a.gather(1, index + shift)
            for a in (self.knots, self.values, self.slopes)
            for shift in (0, 1)
        )
        return Piece(x0, z0, x1 - x0, z1 - z0, d0, d1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return G(x), (n, d), and log |det dG/dx|, (n,)."""
        z, log_slope = self.columns(x.mT)
        return z.mT, log_slope.sum(0)

    def columns(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map columns, (d, n), and return log dz/dx as well, of the same shape; NaN stays NaN."""
        size = max(64, _CELLS // max(1, len(x)) // 64 * 64)  # whole vectors of the processor
        if x.shape[1] <= size:
            return self._columns(x)
        parts = [self._columns(part) for part in x.split(size, dim=1)]
        z, log_slope = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return z, log_slope

    def _columns(self, x):
        """The same, for all rows at once."""
        piece = self._piece(x.detach(), self.knots)
        raw = (x - piece.left) / piece.width
        t = raw.clamp(0.0, 1.0)
        z, log_slope = piece.at(t)
        # beyond the outer knots (raw != t): straight lines with the slope of the outermost knot
        z = z + piece.width * torch.where(raw < 0.0, *piece[-2:]) * (raw - t)
        if self._heavy:
            for side, sign, beyond in ((0, -1.0, raw < 0.0), (1, 1.0, raw > 1.0)):
                index, tail = self._in_tail(side, beyond)
                y = sign * (x[index] - self.knots[index[0], -side])
                value, own_slope = tail_value(y, *tail)
                z = z.index_put(index, sign * value)
                log_slope = log_slope.index_put(index, own_slope)
        return z, log_slope

    def _in_tail(self, side, beyond):
        """Index of entries beyond the outer knots of columns with that heavy tail, and the tail."""
        index = (beyond & (self.tails[:, side, 1] > 0)[:, None]).nonzero(as_tuple=True)
        scale, shape = self.tails[index[0], side].T
        return index, (self.values[index[0], -side].abs(), scale, shape)

    def _coefficients(self, j, ends):
        """How column j is mapped in intervals that end at `ends`, of which none holds a knot.

        Scale and shift to the share t of a piece, where the piece begins, its height, the slope at
        its beginning and the sum of the slopes at its ends minus 2, these in units of its mean
        slope. The lines beyond the outer knots are pieces without an end. Shape (n_intervals, 6).
        """
        x, z, slope = self.knots[j], self.values[j], self.slopes[j]
        width, height = x.diff(), z.diff()
        first, last = slope[:-1] * width / height, slope[1:] * width / height
        one, nothing = torch.ones_like(x[:1]), torch.zeros_like(x[:1])
        columns = [
            torch.cat([one, 1.0 / width, one]),
            torch.cat([-x[:1], -x[:-1] / width, -x[-1:]]),
            torch.cat([z[:1], z[:-1], z[-1:]]),
            torch.cat([slope[:1], height, slope[-1:]]),
            torch.cat([one, first, one]),
            torch.cat([nothing, first + last - 2.0, nothing]),
        ]
        return torch.stack(columns, dim=1)[torch.searchsorted(x, ends)]

    def _heavy_side(self, j, ends):
        """-1 and 1 for intervals in a heavy lower and upper tail of column j, else 0."""
        is_heavy = (self.tails[j, :, 1] > 0).to(torch.int8)
        below, above = ends <= self.knots[j, 0], ends > self.knots[j, -1]
        return above * is_heavy[1] - below * is_heavy[0]

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Return x with G(x) = z, (n, d)."""
        piece = self._piece(z.mT, self.values)
        raw = (z.mT - piece.bottom) / piece.height
        r = raw.clamp(0.0, 1.0)
        x = piece.left + piece.width * piece.share_of_width(r)
        x = x + piece.height * (raw - r) / torch.where(raw < 0.0, *piece[-2:])
        if self._heavy:
            for side, sign, beyond in ((0, -1.0, raw < 0.0), (1, 1.0, raw > 1.0)):
                index, tail = self._in_tail(side, beyond)
                y = tail_distance(sign * z.mT[index], *tail)
                x = x.index_put(index, self.knots[index[0], -side] + sign * y)
        return x.mT


class TogetherMapped:
    """Several maps of the same columns, evaluated together and without a graph.

    Between two neighbours among the knots of all maps, each is a fraction of two quadratic
    functions, and beyond the outer ones a line: one row of a table for each such interval holds
    the coefficients of all maps.

    Parameters
    ----------
    maps : list of M MarginalGaussianization
        Of the same columns.
    """

    def __init__(self, maps: Sequence[MarginalGaussianization]):
        device = maps[0].knots.device
        knots, tables, first, heavy = [], [], [], []
        for j in range(maps[0].n_features):
            joined = torch.cat([to.knots[j] for to in maps]).unique()
            # each interval ends at its knot, as `searchsorted` has it, and the last one nowhere
            ends = torch.cat([joined, joined.new_full((1,), torch.inf)])
            tables.append(torch.stack([to._coefficients(j, ends) for to in maps], dim=2))
            heavy.append(torch.stack([to._heavy_side(j, ends) for to in maps], dim=1))
            first.append(sum(map(len, knots)) + j)
            knots.append(joined)
        padded = nn.utils.rnn.pad_sequence(knots, batch_first=True, padding_value=torch.inf)
        self._n_maps = len(maps)
        self._knots = padded
        self._n_knots = torch.tensor([len(k) for k in knots], device=device)[:, None]
        self._first = torch.tensor(first, device=device)[:, None]
        # six arrays of shape (n_intervals, M)
        self._tables = [table.contiguous() for table in torch.cat(tables).unbind(1)]
        self._heavy_side = torch.cat(heavy)
        self._any_heavy = self._heavy_side.ne(0).any(1) if self._heavy_side.any() else None
        # of every column, map and side: where the tail begins, and what `tail_value` asks for
        tails = [
            torch.cat([to.knots[:, [0, -1], None], to.values[:, [0, -1], None].abs(), to.tails], 2)
            for to in maps
        ]
        self._tails = torch.stack(tails, dim=1).view(-1, 4)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map columns, (d, n), to z, (M, d, n), with log |det dz/dx|, (M, n)."""
        place = torch.minimum(torch.searchsorted(self._knots, x), self._n_knots)
        place = place.add_(self._first).view(-1)
        unit, shift, bottom, height, first, bend = (
            table.index_select(0, place) for table in self._tables
        )
        # see `Piece.at`; `first` and `bend` are d_0 and d_0 + d_1 - 2 s, over s
        t = torch.addcmul(shift, unit, x.reshape(-1, 1))
        rest = 1.0 - t
        denominator = (t * rest).mul_(bend).add_(1.0)
        slope = bend.mul_(t).add_(2.0).addcmul_(first, first.new_tensor(-2.0)).mul_(t).add_(first)
        slope.mul_(unit.mul_(height)).div_(denominator).div_(denominator)
        z = torch.addcmul(t, first, rest).mul_(t).div_(denominator).mul_(height).add_(bottom)
        log_slope = slope.log_()
        if self._any_heavy is not None:
            self._enter_tails(x, place, z, log_slope)
        shape = *x.shape, self._n_maps
        return z.view(shape).permute(2, 0, 1).contiguous(), log_slope.view(shape).sum(0).mT

    def _enter_tails(self, x, place, z, log_slope):
        """Values of the entries, (d * n, M), beyond the outer knots of columns with heavy tails."""
        cells = self._any_heavy.index_select(0, place).nonzero().squeeze(1)
        if not len(cells):
            return
        sides = self._heavy_side.index_select(0, place.index_select(0, cells))
        which, m = sides.nonzero(as_tuple=True)
        sign, at = sides[which, m], cells[which]
        column = torch.div(at, x.shape[1], rounding_mode="floor")
        tail = (column * self._n_maps + m) * 2 + (sign > 0)
        knot, *tail = self._tails.index_select(0, tail).unbind(1)
        y = (x.reshape(-1).index_select(0, at) - knot).mul_(sign)
        value, own_slope = tail_value(y, *tail)
        entry = at * self._n_maps + m
        z.view(-1).scatter_(0, entry, value.mul_(sign))
        log_slope.view(-1).scatter_(0, entry, own_slope)


def _smoothed_cdf(column, weight, t, width):
    """F_h(t) = sum_i w_i Phi((t - x_i) / h) of sorted x_i, of which only the near ones cost."""
    begin = np.searchsorted(column, t - _REACH * width)
    end = np.searchsorted(column, t + _REACH * width)
    below = np.concatenate([[0.0], np.cumsum(weight)])[begin]
    near = [
        ndtr((at - column[i:j]) / width) @ weight[i:j]
        for at, i, j in zip(t, begin, end, strict=True)
    ]
    return below + near
