r"""Log-densities of several distributions at the same rows, with what they share computed once.

A model scores a row under every member, and a member stacks mixtures on coordinates of its own. One
after another that is hundreds of small steps. Here the maps of all members are looked up together
(`TogetherMapped`), and the mixtures of all members become products with the same monomials,

.. math:: \log w_j + \log N(x; \mu_j, P_j^{-1}) = c_j + b_j^\top x - x^\top P_j x / 2,

which costs half of the product that whitens rows, and no array of whitened ones. It loses digits
where components are tight and rows far from the origin: rows for which a bound of the error is
larger than `TOLERANCE` are left to the mixture itself.
"""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from skebm._typing import Distribution

from ._combine import StackedBase, TransformedBase
from ._marginal import MarginalGaussianization, TogetherMapped
from ._mixtures import GaussianMixtureBase
from ._stacked_flow import FlowBase

TOLERANCE = 1e-8  # nats

_CELLS = 1 << 19  # monomials and components at a time, 4 MiB
_FLOW_ROWS = 1024  # rows of flows at a time


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
    >>> from skebm.bases import GaussianMixtureBase, Together
    >>> bases = [GaussianMixtureBase([1.0], [[float(m)]], [[[1.0]]]) for m in range(3)]
    >>> x = torch.zeros(2, 1, dtype=torch.float64)
    >>> joints, _ = Together(bases)(x)
    >>> logs = torch.stack([joint.logsumexp(0) for joint in joints])
    >>> torch.allclose(logs, torch.stack([base.log_prob(x) for base in bases]))
    True
    """

    def __init__(
        self, distributions: Iterable[Distribution], maps: Iterable[MarginalGaussianization] = ()
    ):
        self.distributions: list[Any] = list(distributions)
        found: dict[int, Any] = {}
        for distribution in self.distributions:
            _collect(distribution, found)
        plain = [q for q in found.values() if isinstance(q, GaussianMixtureBase)]
        mapped = [q for q in found.values() if _is_mapped_mixture(q)]
        rest = [q for q in found.values() if not any(q is p for p in plain + mapped)]
        self._flows = [_Flows(group) for group in _alike(filter(_is_flow, rest))]
        self._others = [q for q in rest if not _is_flow(q)]
        plain.sort(key=_size)
        mapped.sort(key=_size)
        wanted = list(maps)
        maps = [q.transform for q in mapped] + wanted
        self._n_mapped, self._n_wanted = len(mapped), len(wanted)
        self._maps = TogetherMapped(maps) if maps else None
        # of equally many components, side by side: where they begin among the inputs
        self._groups: list[tuple[list[Any], int | None]] = [
            (group, None) for group in _equal(plain)
        ]
        start = 1
        for group in _equal(mapped):
            self._groups.append((group, start))
            start += len(group)
        self._coefficients = []
        reach = torch.full((start,), torch.inf, dtype=torch.float64)
        for group, start in self._groups:
            mixtures = [getattr(q, "base", q) for q in group]
            self._coefficients.append(_coefficients(mixtures))
            own = torch.stack([_reach(q) for q in mixtures]).to(reach)
            if start is None:
                reach[0] = torch.minimum(reach[0], own.min())
            else:
                reach[start : start + len(group)] = own
        d = self.distributions[0].n_features
        n_monomials = (d + 1) * (d + 2) // 2 if self._groups else d
        n_components = sum(len(group) * _size(group[0]) for group, _ in self._groups)
        self._cells_per_row = (1 + self._n_mapped) * n_monomials + n_components
        device = next((c.device for c in self._coefficients), None)
        self._square_of_reach = reach.square().to(device)[:, None]

    def __call__(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Evaluate all at the same rows, without a graph.

        Parameters
        ----------
        x : Tensor of shape (n, d)

        Returns
        -------
        joints : list of K tensors of shape (n_components, n)
            Log-densities of the components, with their weights: of what a distribution stacks or
            mixes; one of any other.
        mapped : Tensor of shape (n_maps, d, n) or None
            The rows as `maps` see them; None without any.
        """
        logs = self._other_log_probs(x)
        size = max(16, _CELLS // self._cells_per_row)
        parts: list[Any] = [
            self._few(x[start : start + size], {q: v[start : start + size] for q, v in logs})
            for start in range(0, max(1, len(x)), size)
        ]
        joints = [torch.cat(of_one, dim=1) for of_one in zip(*(p[0] for p in parts), strict=True)]
        return joints, torch.cat([p[1] for p in parts], dim=2) if self._n_wanted else None

    def _other_log_probs(self, x):
        """Of all that is no mixture, pairs of an id and (n,)."""
        logs = [(id(q), q.log_prob(x)) for q in self._others]
        for flows in self._flows:
            parts = torch.cat([flows(rows) for rows in x.split(_FLOW_ROWS)], dim=1)
            logs += zip(map(id, flows.distributions), parts, strict=True)
        return logs

    def _few(self, x, logs):
        """The same of few rows."""
        inputs = columns = x.mT.contiguous()[None]
        wanted = log_det = None
        if self._maps is not None:
            z, log_det = self._maps(columns[0])
            inputs, wanted = torch.cat([columns, z[: self._n_mapped]]), z[self._n_mapped :]
        monomials = _monomials(inputs) if self._groups else inputs
        far = inputs.square().sum(1) > self._square_of_reach
        any_far = far.any(1).tolist()
        joint = {}
        for (group, start), coefficients in zip(self._groups, self._coefficients, strict=True):
            own = monomials[:1] if start is None else monomials[start : start + len(group)]
            values = torch.matmul(coefficients, own)
            for i, q in enumerate(group):
                place = 0 if start is None else start + i
                if any_far[place]:
                    rows = far[place].nonzero().squeeze(1)
                    mixture = getattr(q, "base", q)
                    values[i][:, rows] = mixture._joint(inputs[place][:, rows].mT).mT
            if start is not None:
                values += log_det[start - 1 : start - 1 + len(group), None]
            joint |= dict(zip(map(id, group), values, strict=True))
            logs |= dict(zip(map(id, group), _log_sum_exp(values, 1), strict=True))
        return [self._joint(q, joint, logs) for q in self.distributions], wanted

    def _joint(self, q, joint, logs):
        if isinstance(q, StackedBase):
            parts = [self._log_prob(c, joint, logs) for c in q.components]
            return torch.stack(parts) + q.weights.log()[:, None]
        return joint[id(q)].clone() if id(q) in joint else logs[id(q)][None].clone()

    def _log_prob(self, q, joint, logs):
        if isinstance(q, StackedBase):
            return _log_sum_exp(self._joint(q, joint, logs), 0)
        return logs[id(q)]


class _Flows:
    """Flows of one shape in coordinates of their own, evaluated side by side."""

    def __init__(self, distributions):
        self.distributions = distributions
        first, *others = [q.base.flow for q in distributions]
        self._flow = first.beside(others)
        maps = [q.transform for q in distributions]
        together = all(isinstance(to, MarginalGaussianization) for to in maps)
        self._maps = TogetherMapped(maps) if together else None

    def __call__(self, x):
        """Log-densities at the same rows, (n, d) -> (K, n)."""
        if self._maps is None:
            pairs = [q.transform(x) for q in self.distributions]
            z, log_det = map(torch.stack, zip(*pairs, strict=True))
        else:
            z, log_det = self._maps(x.mT.contiguous())
            z = z.mT
        return self._flow.log_prob(z) + log_det


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


def _equal(distributions):
    """Runs of distributions of equally many components."""
    return [list(group) for _, group in groupby(distributions, key=_size)]


def _monomials(columns):
    """Products of two columns, columns, and one: (m, d, n) -> (m, (d + 1) (d + 2) / 2, n)."""
    m, d, n = columns.shape
    out = columns.new_empty(m, (d + 1) * (d + 2) // 2, n)
    end = 0
    for j in range(d):
        begin, end = end, end + d - j
        torch.mul(columns[:, j:], columns[:, j : j + 1], out=out[:, begin:end])
    out[:, end : end + d] = columns
    out[:, end + d] = 1.0
    return out


def _linear_and_constant(q, precision):
    linear = (precision @ q.means[..., None])[..., 0]
    return linear, q.log_constant - 0.5 * (linear * q.means).sum(-1)


def _coefficients(mixtures):
    """Coefficients of monomials, (m, k, n_monomials)."""
    coefficients = []
    for q in mixtures:
        precision = q.whitening @ q.whitening.mT
        linear, constant = _linear_and_constant(q, precision)
        # off the diagonal a product stands for two
        square = -0.5 * precision * (2.0 - torch.eye(q.n_features).to(precision))
        row, column = torch.triu_indices(q.n_features, q.n_features, device=precision.device)
        coefficients.append(torch.cat([square[:, row, column], linear, constant[:, None]], dim=1))
    return torch.stack(coefficients)


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


def _log_sum_exp(values, dim):
    """`torch.logsumexp` in fewer sweeps; -inf where all are."""
    largest = values.amax(dim, keepdim=True)
    largest.masked_fill_(largest.isinf(), 0.0)
    return (values - largest).exp_().sum(dim).log_().add_(largest.squeeze(dim))
