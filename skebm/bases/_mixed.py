r"""Mixtures and kernel densities of rows with states and values.

A component says how likely every state is, and how the values are distributed together; states and
values are independent within it. Values that a row has not are integrated out, which leaves a
Gaussian of the others:

.. math:: q(s, v) = \sum_j w_j \prod_i \pi_{ji}(s_i) \; N(v_o; \mu_{j,o}, \Sigma_{j,oo}),

with o the values that are there under the states s. So q sums and integrates to one over all states
and the values of each (Little & Schluchter 1985; Hunt & Jorgensen 2003).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skebm._layout import Layout

from ._mixtures import _LOG_2PI, draw_components

_CELLS = 1 << 21  # numbers at a time, 16 MiB


class MixedMixtureBase(nn.Module):
    """Mixture whose components are products of categorical distributions and a Gaussian.

    Parameters
    ----------
    layout : Layout
    weights : Tensor of shape (n_components,)
    masses : list of n_states tensors of shape (n_components, size)
        Probabilities of the states.
    means : Tensor of shape (n_components, n_values)
    covariances : Tensor of shape (n_components, n_values, n_values)

    See Also
    --------
    fit_mixed_mixture : Fits one to rows.
    GaussianMixtureBase : The same for rows of numbers.
    values_given_states : Draws its values under given states.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import MixedMixtureBase
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> mixture = MixedMixtureBase(
    ...     columns.layout,
    ...     weights=torch.tensor([0.4, 0.6]).double(),
    ...     masses=[torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()],
    ...     means=torch.tensor([[1.0], [-1.0]]).double(),
    ...     covariances=torch.ones(2, 1, 1).double(),
    ... )
    >>> mixture.log_prob(torch.as_tensor(columns.encode(X))).shape
    torch.Size([5])
    >>> mixture.sample(4, torch.Generator().manual_seed(0)).shape
    torch.Size([4, 2])
    """

    layout: Layout
    weights: Tensor
    log_masses: Tensor
    means: Tensor
    covariances: Tensor
    diagonal: bool

    def __init__(
        self,
        layout: Layout,
        weights: Tensor,
        masses: Sequence[Tensor],
        means: Tensor,
        covariances: Tensor,
    ):
        super().__init__()
        self.layout = layout
        self.register_buffer("weights", weights / weights.sum())
        # of all states side by side, (sum of sizes, n_components)
        every = torch.cat([m.mT for m in masses]) if len(masses) else means.new_zeros(0, len(means))
        self.register_buffer("log_masses", every.log())
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)
        flat = covariances - torch.diag_embed(covariances.diagonal(dim1=-2, dim2=-1))
        self.diagonal = not bool(flat.any())

    @property
    def n_features(self) -> int:
        return self.layout.n_features

    @property
    def n_components(self) -> int:
        return len(self.weights)

    def _joint(self, x):
        """Log-density of every component with its weight, (n, n_components)."""
        joint = self.weights.log().expand(len(x), -1).clone()
        start = 0
        for i, size in enumerate(self.layout.sizes):
            joint += self.log_masses.index_select(0, start + x[:, i].long())
            start += size
        values = self.layout.values(x)
        if self.diagonal:
            return joint + self._independent(values)
        for rows, present in patterns(values):
            if len(present):
                own = self._gaussian(values[rows][:, present], present)
                joint = own + joint if rows == slice(None) else joint.index_add(0, rows, own)
        return joint

    def _independent(self, values):
        """Log-densities of the values under components with diagonal covariances."""
        there = ~values.isnan()
        v = torch.where(there, values, 0.0)
        there = there.to(v.dtype)
        variance = self.covariances.diagonal(dim1=-2, dim2=-1)
        constant = -0.5 * (variance.log() + _LOG_2PI + self.means.square() / variance)
        logs = there @ constant.mT + v @ (self.means / variance).mT
        return logs - 0.5 * v.square() @ (1.0 / variance).mT

    def _gaussian(self, v, present):
        """Log-densities of values (n, m), the `present` ones, under the Gaussians."""
        covariance = self.covariances[:, present[:, None], present]
        tril = torch.linalg.cholesky(covariance)
        eye = torch.eye(len(present), dtype=v.dtype, device=v.device)
        whitening = torch.linalg.solve_triangular(tril, eye, upper=False).mT
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        shift = torch.einsum("kd,kde->ke", self.means[:, present], whitening)
        white = v @ whitening.permute(1, 0, 2).flatten(1) - shift.flatten()
        square = white.unflatten(1, shift.shape).square().sum(-1)
        return -0.5 * (square + len(present) * _LOG_2PI) - log_det

    def _in_chunks(self, function, x):
        size = max(1, _CELLS // (self.n_components * max(1, self.layout.n_values)))
        return torch.cat([function(rows) for rows in x.split(size)])

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, mass for states, (n, n_features) -> (n,)."""
        return self._in_chunks(lambda rows: self._joint(rows).logsumexp(-1), x)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Posterior probability of each component, (n, n_features) -> (n, n_components)."""
        return self._in_chunks(lambda rows: self._joint(rows).softmax(-1), x)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw (n, n_features) rows."""
        which = draw_components(self.weights, n, rng)
        v = torch.randn(n, self.layout.n_values, dtype=torch.float64, generator=rng,
                        device=self.means.device)  # fmt: skip
        tril = torch.linalg.cholesky(self.covariances)
        for j in which.unique().tolist():
            rows = which == j
            v[rows] = self.means[j] + v[rows] @ tril[j].mT
        return self.layout.join(draw_states(self.masses, which, rng), v)

    @property
    def masses(self) -> list[Tensor]:
        """Probabilities of the states, (n_components, size) each."""
        return [m.mT for m in self.log_masses.exp().split(list(self.layout.sizes))]

    def marginal(self, kept: Sequence[int]) -> "MixedMixtureBase":
        """Distribution of some columns, the others summed and integrated out."""
        layout, masses = self.layout, self.masses
        states = [i for i in kept if i < layout.n_states]
        values = torch.tensor([j - layout.n_states for j in kept[len(states) :]], dtype=torch.long)
        return MixedMixtureBase(
            layout.subset(kept), self.weights, [masses[i] for i in states], self.means[:, values],
            self.covariances[:, values[:, None], values],
        )  # fmt: skip


class MixedKernelBase(nn.Module):
    r"""Kernel density of states and values, a product of kernels of single columns.

    A state keeps that of the centre with probability :math:`1 - \lambda (c - 1) / c`, and is any of
    the c - 1 others with :math:`\lambda / c` each (Aitchison & Aitken 1976); values have a
    Gaussian kernel around the centre, and where the centre has no value a Gaussian of the column.

    Parameters
    ----------
    layout : Layout
    centers : Tensor of shape (n_centers, n_features)
    bandwidth : float or Tensor of shape (n_centers,)
        Of values, in the units of `spread`; the same at every centre, or one for each.
    mixing : float
        lambda, in (0, 1].
    mean, spread : Tensor of shape (n_values,)
        Of the columns of values.
    weights : Tensor of shape (n_centers,)

    See Also
    --------
    KernelDensityBase : The same for rows of numbers.
    MixedMixtureBase : A few components in place of a kernel around every row.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import MixedKernelBase
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> rows = torch.as_tensor(columns.encode(X))
    >>> kernels = MixedKernelBase(
    ...     columns.layout, rows, bandwidth=0.5, mixing=0.1, mean=torch.zeros(1).double(),
    ...     spread=torch.ones(1).double(), weights=torch.full((5,), 0.2),
    ... )
    >>> kernels.log_prob(rows).shape
    torch.Size([5])
    >>> kernels.masses_around(0)[0]  # of the kinds, around the first row
    tensor([0.9500, 0.0500], dtype=torch.float64)
    """

    layout: Layout
    centers: Tensor
    weights: Tensor
    bandwidth: Tensor
    mean: Tensor
    spread: Tensor
    mixing: float

    def __init__(
        self,
        layout: Layout,
        centers: Tensor,
        bandwidth: float | Tensor,
        mixing: float,
        mean: Tensor,
        spread: Tensor,
        weights: Tensor,
    ):
        super().__init__()
        self.layout, self.mixing = layout, mixing
        bandwidth = torch.as_tensor(bandwidth).to(weights).expand(len(centers)).contiguous()
        buffers = {"centers": centers, "weights": weights / weights.sum(), "bandwidth": bandwidth}
        for name, tensor in (buffers | {"mean": mean, "spread": spread}).items():
            self.register_buffer(name, tensor)

    @property
    def n_features(self) -> int:
        return self.layout.n_features

    def around(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the kernel of every centre, (n_centers, n_values)."""
        v = self.layout.values(self.centers)
        absent = v.isnan()
        return (
            torch.where(absent, self.mean, v),
            torch.where(absent, self.spread, self.bandwidth[:, None] * self.spread),
        )

    def _coefficients(self):
        """Log-kernels as linear functions of `_functions`, (n_functions, n_centers)."""
        sizes = torch.tensor(self.layout.sizes, dtype=torch.float64, device=self.centers.device)
        on, off = (1.0 - self.mixing * (sizes - 1.0) / sizes).log(), (self.mixing / sizes).log()
        more = (on - off).repeat_interleave(sizes.long())[:, None]
        mean, deviation = (a.mT for a in self.around())
        precision = deviation.square().reciprocal()
        constant = -0.5 * (_LOG_2PI + mean.square() * precision) - deviation.log()
        parts = [
            (self.weights.log() + off.sum())[None],
            more * self.layout.one_hot(self.centers).mT,
        ]
        return torch.cat([*parts, constant, mean * precision, -0.5 * precision])

    def _functions(self, x):
        """One, indicators of states and of values, the values and their squares."""
        values = self.layout.values(x)
        there = (~values.isnan()).to(x.dtype)
        values = torch.where(values.isnan(), 0.0, values)
        one = torch.ones_like(x[:, :1])
        return torch.cat([one, self.layout.one_hot(x), there, values, values.square()], dim=1)

    def _joint(self, x):
        """Log-kernel around every centre with its weight, (n, n_centers)."""
        return self._functions(x) @ self._coefficients()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, mass for states, (n, n_features) -> (n,)."""
        coefficients = self._coefficients()
        size = max(1, _CELLS // len(self.centers))
        parts = [(self._functions(rows) @ coefficients).logsumexp(-1) for rows in x.split(size)]
        return torch.cat(parts)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw (n, n_features) rows."""
        which = draw_components(self.weights, n, rng)
        options: dict[str, Any] = {"generator": rng, "device": self.centers.device}
        mean, deviation = self.around()
        noise = torch.randn(n, self.layout.n_values, dtype=torch.float64, **options)
        u = torch.rand(n, self.layout.n_states, dtype=torch.float64, **options)
        codes = self.states_around(which, u)
        return self.layout.join(codes, mean[which] + deviation[which] * noise)

    def states_around(self, which: Tensor, u: Tensor) -> Tensor:
        """States of rows from the kernels of centres, (n,), by uniform numbers, (n, n_states)."""
        codes = self.layout.codes(self.centers)[which]
        anew = u / self.mixing  # uniform where it is below one
        sizes = torch.tensor(self.layout.sizes, device=u.device)
        return torch.where(anew < 1.0, (anew * sizes).long(), codes)

    def masses_around(self, column: int) -> Tensor:
        """Probabilities of the states of a column around the centres, (n_centers, size)."""
        size = self.layout.sizes[column]
        own = self.layout.codes(self.centers)[:, column, None] == torch.arange(
            size, device=self.centers.device
        )
        return (1.0 - self.mixing) * own.to(self.centers) + self.mixing / size

    def marginal(self, kept: Sequence[int]) -> "MixedKernelBase":
        """Distribution of some columns, the others summed and integrated out."""
        values = [j - self.layout.n_states for j in kept if j >= self.layout.n_states]
        return MixedKernelBase(
            self.layout.subset(kept), self.centers[:, kept], self.bandwidth, self.mixing,
            self.mean[values], self.spread[values], self.weights,
        )  # fmt: skip


class ValuesTransform(nn.Module):
    """A marginal map of the values of rows; states pass through.

    Parameters
    ----------
    layout : Layout
    transform : MarginalGaussianization

    See Also
    --------
    MarginalGaussianization : The same for rows of numbers.
    TransformedBase : A distribution behind this map.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skebm.bases import MarginalGaussianization, ValuesTransform
    >>> from skebm.training import Columns, Kinds
    >>> X = np.array([[0, 1.2], [0, 0.4], [1, -0.3], [1, -1.1], [1, -0.8]])  # a category, a number
    >>> kinds = Kinds(np.array([2, 0]), np.zeros(2, dtype=bool))
    >>> columns = Columns.learn(X, ["kind", "size"], kinds=kinds)
    >>> rows = torch.as_tensor(columns.encode(X))
    >>> values = columns.layout.values(rows).numpy()
    >>> transform = ValuesTransform(columns.layout, MarginalGaussianization.fit(values))
    >>> mapped, log_det = transform(rows)
    >>> mapped[:, 0]  # states pass through
    tensor([0., 0., 1., 1., 1.], dtype=torch.float64)
    >>> torch.allclose(transform.inverse(mapped), rows)
    True
    """

    layout: Layout
    transform: Any

    def __init__(self, layout: Layout, transform: nn.Module):
        super().__init__()
        self.layout, self.transform = layout, transform

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows with mapped values, (n, n_features), and log |det| of the values there, (n,)."""
        values = self.layout.values(x)
        z, log_slope = self.transform.columns(values.mT)
        log_det = torch.where(values.isnan(), 0.0, log_slope.mT).sum(1)
        return torch.cat([x[:, : self.layout.n_states], z.mT], dim=1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """Rows whose mapped values these are."""
        values = self.transform.inverse(self.layout.values(z))
        return torch.cat([z[:, : self.layout.n_states], values], dim=1)

    def marginal(self, kept: Sequence[int]) -> "ValuesTransform":
        """The map of some columns."""
        values = [j - self.layout.n_states for j in kept if j >= self.layout.n_states]
        return ValuesTransform(self.layout.subset(kept), self.transform.marginal(values))


def patterns(values: Tensor) -> list[tuple[Any, Tensor]]:
    """Rows that have the same values, and which these are.

    Parameters
    ----------
    values : Tensor of shape (n, n_values)
        NaN where there is none.

    Returns
    -------
    list of (rows, present)
        Indices of rows, ``slice(None)`` where all have the same ones, and of columns.
    """
    there = ~values.isnan()
    if bool(there.all()) or len(values) == 0:
        return [(slice(None), torch.arange(values.shape[1], device=values.device))]
    distinct, which = torch.unique(there, dim=0, return_inverse=True)
    return [
        ((which == i).nonzero().squeeze(1), row.nonzero().squeeze(1))
        for i, row in enumerate(distinct)
    ]


def draw_states(masses: Sequence[Tensor], which: Tensor, rng: torch.Generator) -> Tensor:
    """States of rows whose components are known, (n, n_states).

    Parameters
    ----------
    masses : list of n_states tensors of shape (n_components, size)
    which : Tensor of shape (n,)
        Components.
    rng : torch.Generator
    """
    u = torch.rand(len(which), len(masses), dtype=torch.float64, generator=rng, device=which.device)
    return states_of(masses, which, u)


def states_of(masses: Sequence[Tensor], which: Tensor, u: Tensor) -> Tensor:
    """The same by uniform numbers, (n, n_states) -> (n, n_states)."""
    codes = torch.empty(u.shape, dtype=torch.long, device=which.device)
    for i, mass in enumerate(masses):
        steps = mass.cumsum(1)[:, :-1].contiguous()  # the last state has what rounding leaves
        codes[:, i] = (u[:, i, None] > steps[which]).sum(1)
    return codes
