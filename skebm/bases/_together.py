r"""Log-densities of several distributions at the same rows, with what they share computed once.

A model scores a row under every member, and a member stacks mixtures on coordinates of its own. One
after another that is hundreds of small steps. Here the maps of all members are looked up together
(`TogetherMapped`), equal ones once, as a flow and a mixture of one member often live in the same
coordinates; flows run side by side; and mixtures become products with the same monomials,

.. math:: \log w_j + \log N(x; \mu_j, P_j^{-1}) = c_j + b_j^\top x - x^\top P_j x / 2,

which costs half of the product that whitens rows, and no array of whitened ones. It loses digits
where components are tight and rows far from the origin: rows for which a bound of the error is
larger than `TOLERANCE` are left to the mixture itself.
"""

import math
from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skebm._typing import Distribution

from ._combine import StackedBase, TransformedBase
from ._marginal import MarginalGaussianization, TogetherMapped
from ._mixtures import GaussianMixtureBase, log_sum_exp
from ._stacked_flow import FlowBase

TOLERANCE = 1e-8  # nats

_FEW = 64  # rows for which few steps matter more than few copies
_CELLS = 1 << 21  # monomials and components at a time, 16 MiB


class Together:
    """Log-densities of distributions, and marginal maps, at the same rows.

    Parameters
    ----------
    distributions : list of K distributions
    maps : list of MarginalGaussianization
        That are wanted as well, of the same columns.

    See Also
    --------
    StackedBase : A mixture of distributions.

    Examples
    --------
    >>> import torch
    >>> from skebm.bases import GaussianMixtureBase, StackedBase, Together, UniformBase
    >>> box = UniformBase([-10.0], [10.0])
    >>> normals = [GaussianMixtureBase([1.0], [[float(m)]], [[[1.0]]]) for m in range(3)]
    >>> bases = [StackedBase([normal, box], [0.9, 0.1]) for normal in normals]
    >>> x = torch.zeros(5, 1, dtype=torch.float64)
    >>> joint, _ = Together(bases)(x)
    >>> joint.shape
    torch.Size([3, 2, 5])
    >>> torch.allclose(joint.logsumexp(1), torch.stack([base.log_prob(x) for base in bases]))
    True
    """

    def __init__(
        self, distributions: Iterable[Distribution], maps: Iterable[MarginalGaussianization] = ()
    ):
        tops, wanted = list(distributions), list(maps)
        found: dict[int, Any] = {}
        for distribution in tops:
            _collect(distribution, found)
        parts = list(found.values())
        plain = sorted((q for q in parts if isinstance(q, GaussianMixtureBase)), key=_size)
        mapped = sorted(filter(_is_mapped_mixture, parts), key=_size)
        groups = _alike(filter(_is_flow, parts))
        ordered = [*plain, *mapped, *(q for group in groups for q in group)]
        self._others = [q for q in parts if not any(q is p for p in ordered)]
        # those of mixtures come first, which ask for arrays of their own
        kept, place = _distinct([q.transform for q in ordered[len(plain) :]] + wanted)
        self._maps = TogetherMapped(kept) if kept else None
        self._wanted = _consecutive([place[id(to)] for to in wanted]) if wanted else None
        self._mixtures = _Mixtures(plain, mapped, place) if plain or mapped else None
        self._flows = [_Flows(group, place) for group in groups]
        d = tops[0].n_features
        self._size = max(16, _CELLS // (d if self._mixtures is None else self._mixtures.n_cells))
        # what is stacked: numbers of parts, and log-weights
        self._row = {id(q): i for i, q in enumerate([*ordered, *self._others])}
        self._inner: list[Any] = []
        stacks = [self._stacked(q) for q in tops]
        rows, log_weights = (pad_sequence(list(own), True) for own in zip(*stacks, strict=True))
        self._rows, self._log_weights = rows, log_weights.where(_lengths(stacks), -torch.inf)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Evaluate all at the same rows, without a graph.

        Parameters
        ----------
        x : Tensor of shape (n, d)

        Returns
        -------
        joint : Tensor of shape (K, n_components, n)
            Log-densities of what every distribution stacks, with their weights; of one that is no
            stack, its own. -inf where a distribution has fewer components than others.
        mapped : Tensor of shape (n_maps, d, n) or None
            The rows as `maps` see them; None without any.
        """
        others = [q.log_prob(x) for q in self._others]
        starts = range(0, max(1, len(x)), self._size)
        rows = [slice(start, start + self._size) for start in starts]
        parts = [self._few(x[own], [logs[own] for logs in others]) for own in rows]
        if len(parts) == 1:
            return parts[0]
        joint, mapped = zip(*parts, strict=True)
        return torch.cat(joint, dim=2), None if self._wanted is None else torch.cat(mapped, dim=2)

    def _few(self, x, others):
        """The same of few rows; `others` are log-densities, (n,) each."""
        columns, z, log_det = x.mT.contiguous(), None, None
        if self._maps is not None:
            z, log_det = self._maps(columns)
        logs = [] if self._mixtures is None else [self._mixtures(columns, z, log_det)]
        logs += [flows(x, z, log_det) for flows in self._flows]
        logs += [own[None] for own in others]
        logs = torch.cat(logs)
        for rows, log_weights in self._inner:
            joint = logs[rows.to(x.device)] + log_weights.to(x.device)[:, None]
            logs = torch.cat([logs, log_sum_exp(joint, 0)[None]])
        joint = logs.index_select(0, self._rows.view(-1).to(x.device))
        joint = joint.view(*self._rows.shape, len(x))
        joint += self._log_weights.to(x.device)[..., None]
        return joint, None if self._wanted is None else z[self._wanted]

    def _stacked(self, q):
        """Numbers of what a distribution stacks, itself where it is no stack, and log-weights."""
        if not isinstance(q, StackedBase):
            return torch.tensor([self._row[id(q)]]), torch.zeros(1, dtype=torch.float64)
        for inner in q.components:
            if id(inner) not in self._row:  # a stack, too
                self._inner.append(self._stacked(inner))
                self._row[id(inner)] = len(self._row)
        return torch.tensor([self._row[id(c)] for c in q.components]), q.weights.log().cpu()


class _Mixtures:
    """Gaussian mixtures, of the rows as they are and of mapped ones, evaluated side by side.

    Parameters
    ----------
    plain : list of GaussianMixtureBase
        Sorted by size, as the next ones.
    mapped : list of TransformedBase
    place : dict
        Number of every map, by its id.
    """

    def __init__(self, plain, mapped, place):
        self._of = [*plain, *(q.base for q in mapped)]
        maps = [place[id(q.transform)] for q in mapped]
        self._input = [0] * len(plain) + [1 + own for own in maps]
        self._n_maps, self._n_plain = max(maps, default=-1) + 1, len(plain)
        self._maps = _consecutive(maps) if maps else None
        ends = np.cumsum([0, *map(_size, self._of)]).tolist()
        self._components = [slice(*pair) for pair in pairwise(ends)]
        # where there are equally many components one product will do, as for all of the plain ones
        self._products, self._runs = [], []
        if plain:
            own = torch.cat([_coefficients(q) for q in plain])[None]
            self._products.append((own, slice(1), slice(ends[len(plain)])))
        for run in _runs([_size(q) for q in self._of[len(plain) :]], len(plain)):
            own = torch.stack([_coefficients(q) for q in self._of[run]])
            at = _consecutive(self._input[run])
            self._products.append((own, at, slice(ends[run.start], ends[run.stop])))
        for run in _runs(list(map(_size, self._of))):
            shape = run.stop - run.start, _size(self._of[run.start])
            self._runs.append((run, slice(ends[run.start], ends[run.stop]), shape))
        d, device = self._of[0].n_features, self._products[0][0].device
        self._pairs = torch.triu_indices(d, d, device=device)
        reach = torch.stack([_reach(q) for q in self._of])
        self._square_of_reach = reach.square()[:, None]
        n_monomials = self._products[0][0].shape[2]
        self.n_cells = (1 + self._n_maps) * n_monomials + ends[-1]

    def __call__(self, columns, z, log_det):
        """Log-densities in the original coordinates, (m, n).

        Parameters
        ----------
        columns : Tensor of shape (d, n)
        z : Tensor of shape (n_maps, d, n) or None
            The columns as all maps see them.
        log_det : Tensor of shape (n_maps, n) or None
        """
        inputs, n = columns[None], columns.shape[1]
        if self._n_maps:
            inputs = torch.cat([inputs, z[: self._n_maps]])
        monomials = _monomials(inputs, *self._pairs)
        values = columns.new_empty(self._components[-1].stop, n)
        for coefficients, at, components in self._products:
            own = values[components].view(*coefficients.shape[:2], n)
            torch.bmm(coefficients, monomials[at], out=own)
        self._mend(values, inputs)
        logs = columns.new_empty(len(self._of), n)
        for run, components, shape in self._runs:
            logs[run] = log_sum_exp(values[components].view(*shape, n), 1)
        if self._maps is not None:
            logs[self._n_plain :] += log_det[self._maps]
        return logs

    def _mend(self, values, inputs):
        """Put in what mixtures themselves say of rows out of reach."""
        far = inputs.square().sum(1)[self._input] > self._square_of_reach
        if not far.any():
            return
        for i in far.any(1).nonzero().flatten().tolist():
            rows = far[i].nonzero().squeeze(1)
            own = inputs[self._input[i]].index_select(1, rows)
            values[self._components[i], rows] = self._of[i]._joint(own.mT).mT


class _Flows:
    """Flows of one shape in coordinates of their own, evaluated side by side.

    Parameters
    ----------
    distributions : list of TransformedBase
    place : dict
        Number of every map that is evaluated with others, by its id.
    """

    def __init__(self, distributions, place):
        first, *others = [q.base.flow for q in distributions]
        self._log_prob = first.beside(others).frozen()
        self._transforms = [q.transform for q in distributions]
        known = all(id(to) in place for to in self._transforms)
        self._maps = _consecutive([place[id(to)] for to in self._transforms]) if known else None

    def __call__(self, x, z, log_det):
        """Log-densities at the same rows, (n, d) -> (m, n); what maps make of them as above."""
        if self._maps is not None:
            return self._log_prob(z[self._maps]) + log_det[self._maps]
        pairs = [to(x) for to in self._transforms]
        z, log_det = map(torch.stack, zip(*pairs, strict=True))
        return self._log_prob(z.mT) + log_det


def _distinct(maps):
    """Marginal maps that are not equal, and the number of each of `maps` by its id."""
    kept, place = [], {}
    for to in maps:
        if isinstance(to, MarginalGaussianization) and id(to) not in place:
            same = (i for i, other in enumerate(kept) if _is_equal(to, other))
            place[id(to)] = next(same, len(kept))
            kept += [to] * (place[id(to)] == len(kept))
    return kept, place


def _is_equal(one, other):
    return all(map(torch.equal, one.buffers(), other.buffers()))


def _consecutive(places):
    """An index: a slice, which copies nothing, where these are numbers one after another."""
    begin, end = places[0], places[0] + len(places)
    return slice(begin, end) if places == list(range(begin, end)) else places


def _runs(sizes, start=0):
    """Slices of equal ones among `sizes`, which are counted from `start`."""
    ends = [start]
    for _, group in groupby(sizes):
        ends.append(ends[-1] + len(list(group)))
    return [slice(*pair) for pair in pairwise(ends)]


def _lengths(stacks):
    """Which entries of padded stacks are theirs, (K, n_components)."""
    return pad_sequence([torch.ones(len(rows), dtype=torch.bool) for rows, _ in stacks], True)


def _is_mapped_mixture(q):
    return (
        isinstance(q, TransformedBase)
        and isinstance(q.transform, MarginalGaussianization)
        and isinstance(q.base, GaussianMixtureBase)
    )


def _is_flow(q):
    return isinstance(q, TransformedBase) and isinstance(q.base, FlowBase)


def _alike(distributions):
    """Lists of flows whose parameters have equal shapes."""
    groups: dict[Any, list[Any]] = {}
    for q in distributions:
        flow = q.base.flow
        shapes = tuple(p.shape for p in flow.parameters())
        groups.setdefault((type(flow), shapes), []).append(q)
    return list(groups.values())


def _collect(q, found):
    if isinstance(q, StackedBase):
        for component in q.components:
            _collect(component, found)
    else:
        found[id(q)] = q


def _size(q):
    return q.n_components


def _monomials(columns, row, column):
    """Products of two columns, columns, and one: (m, d, n) -> (m, (d + 1) (d + 2) / 2, n).

    `row` and `column` are the numbers of the columns of each product.
    """
    m, d, n = columns.shape
    out = columns.new_empty(m, len(row) + d + 1, n)
    if n < _FEW:  # fewer steps
        torch.mul(columns[:, row], columns[:, column], out=out[:, : len(row)])
    else:
        end = 0
        for j in range(d):
            begin, end = end, end + d - j
            torch.mul(columns[:, j:], columns[:, j : j + 1], out=out[:, begin:end])
    out[:, len(row) : -1] = columns
    out[:, -1] = 1.0
    return out


def _linear_and_constant(q, precision):
    linear = (precision @ q.means[..., None])[..., 0]
    return linear, q.log_constant - 0.5 * (linear * q.means).sum(-1)


def _coefficients(q):
    """Coefficients of monomials, (n_components, n_monomials)."""
    precision = q.whitening @ q.whitening.mT
    linear, constant = _linear_and_constant(q, precision)
    # off the diagonal a product stands for two
    square = -0.5 * precision * (2.0 - torch.eye(q.n_features).to(precision))
    row, column = torch.triu_indices(q.n_features, q.n_features, device=precision.device)
    return torch.cat([square[:, row, column], linear, constant[:, None]], dim=1)


def _reach(q):
    """The |x| up to which the sum over monomials is exact enough."""
    # its terms add up to at most a |x|^2 + b |x| + c, and it has an error of some square roots of
    # their number times the unit roundoff (Higham & Mary 2019)
    precision = q.whitening @ q.whitening.mT
    linear, constant = _linear_and_constant(q, precision)
    a, b = 0.5 * torch.linalg.matrix_norm(precision.abs(), 2), linear.norm(dim=1)
    n_monomials = (q.n_features + 1) * (q.n_features + 2) / 2
    room = TOLERANCE / (4.0 * math.sqrt(n_monomials) * 2.0**-53) - constant.abs()
    return (
        (((b.square() + 4.0 * a * room).clamp_min(0.0).sqrt() - b) / (2.0 * a)).min().clamp_min(0)
    )
