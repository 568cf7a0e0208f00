"""Normalizing flows: K of them side by side, or one, fitted and frozen, as a base."""

import copy
import math
import pickle
from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.distributions import Distribution
from torch.nn import functional

from skebm._random import GLOBAL_RNG_LOCK, draw_seed, seeded_global_rng, spawn

_MIN_SIZE = 1e-3  # of a bin, relative to the spline's range; bounds the slopes, too
_MAX_LOG_SLOPE = math.log(1e3)

REACH = 5.0
"""Splines end there, in standard deviations."""


class StackedFlow(nn.Module, ABC):
    """K normalizing flows of one shape (abstract).

    Parameters
    ----------
    n_features : int
        Number of columns d.
    n_members : int
        Number of flows K.
    """

    def __init__(self, n_features, n_members):
        super().__init__()
        self.n_features, self.n_members = n_features, n_members

    @abstractmethod
    def log_prob(self, z):
        """Log-density of each flow at its own rows, (K, n, d) -> (K, n)."""

    @abstractmethod
    def rsample(self, n, generator):
        """Draw from each flow, differentiable in the parameters.

        Returns
        -------
        z : Tensor of shape (K, n, d)
        log_prob : Tensor of shape (K, n)
            Log-density at z; its gradient includes the way through z.
        """

    @abstractmethod
    def alone(self, k):
        """Flow k by itself, trainable, with its own copy of the weights: K = 1."""

    @torch.no_grad()
    def sample(self, n, generator):
        """Draw (K, n, d) points, n from each flow."""
        return self.rsample(n, generator)[0]

    def member(self, k):
        """Flow k as a law, a `FlowBase`: float64, frozen."""
        return FlowBase(self.alone(k))


class CouplingSplineFlow(StackedFlow):
    """K coupling flows of rational-quadratic splines [1]_, evaluated and trained together.

    A layer mixes the coordinates linearly (a learned triangular factorisation that starts as a
    permutation), then maps half of them by monotone splines whose knots are a function of the other
    half. Splines are the identity outside of ``[-bound, bound]``, and their knots do not change any
    more where the other half leaves it, so that tails are linear. Both directions cost one pass.
    The flow starts at the standard normal law.

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
    generator : torch.Generator
        On the CPU. Source of the initial weights and permutations.

    References
    ----------
    .. [1] Durkan, Bekasov, Murray and Papamakarios (2019), Neural spline flows, NeurIPS.
    """

    def __init__(
        self,
        n_features,
        n_members=1,
        *,
        n_layers=5,
        hidden=(64, 64),
        n_bins=None,
        bound=REACH,
        generator,
    ):
        super().__init__(n_features, n_members)
        n_bins = min(8, max(5, 32 // n_features)) if n_bins is None else n_bins
        generators = spawn(generator, n_members)
        self.layers = nn.ModuleList(
            _CouplingLayer(n_features, hidden, n_bins, bound, i % 2 == 1, generators)
            for i in range(n_layers)
        )

    def log_prob(self, z):
        u, log_det = z.mT, 0.0
        for layer in self.layers:
            u, change = layer(u)
            log_det = log_det + change
        return _log_normal(u) + log_det

    def rsample(self, n, generator):
        place = self.layers[0].bias
        shape = self.n_members, self.n_features, n
        u = torch.randn(shape, generator=generator, device=generator.device, dtype=place.dtype)
        z = u = u.to(place.device)
        log_prob = _log_normal(u)
        for layer in reversed(self.layers):
            z, change = layer.inverse(z)
            log_prob = log_prob + change
        return z.mT, log_prob

    def alone(self, k):
        single = copy.deepcopy(self)
        single.n_members = 1
        for part in single.modules():
            for name, parameter in part._parameters.items():
                row = parameter.detach()[k : k + 1].clone()
                part._parameters[name] = nn.Parameter(row, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer[k : k + 1].clone()
        return single


def _log_normal(u):
    """Standard normal log-density of columns, (K, d, n) -> (K, n)."""
    return -0.5 * (u.square().sum(1) + u.shape[1] * math.log(2 * math.pi))


class _CouplingLayer(nn.Module):
    """Linear map and spline coupling, in K members; rows on the last axis: (K, d, n).

    With rows last, sums and softmax over the bins run along the rows, many times as fast on a CPU.
    """

    def __init__(self, n_features, hidden, n_bins, bound, shuffle, generators):
        super().__init__()
        self.n_bins, self.bound = n_bins, bound
        self.n_fixed = n_features // 2
        self.n_mapped = n_features - self.n_fixed

        def parameter(*shape, scale=0.0):
            draws = torch.stack([torch.rand(*shape, generator=own) for own in generators])
            return nn.Parameter(scale * (2 * draws - 1))

        eye = torch.eye(n_features)
        start = [eye[_order(n_features, shuffle, own)] for own in generators]
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
        """Towards the normal law, with the log-determinant: (K, d, n) -> (K, d, n), (K, n)."""
        lower, upper, log_scale = self._factors()
        x = torch.baddbmm(self.bias, lower @ upper @ self.permutation, x)
        fixed, mapped = x.split([self.n_fixed, self.n_mapped], dim=1)
        mapped, log_slope = self._spline(mapped, fixed, inverse=False)
        return torch.cat([fixed, mapped], dim=1), log_slope.sum(1) + log_scale

    def inverse(self, y):
        """From the normal law, with the log-determinant of `forward` there."""
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
        end = _MIN_SIZE * (index + 1) + free * total.gather(2, both).squeeze(2)
        (width, height), (left, bottom) = size.unbind(1), (end - size).unbind(1)
        at = torch.cat([index - 1, index], dim=1)
        slopes = log_slopes.gather(1, at.clamp(0, self.n_bins - 2))
        slopes = slopes / (1 + slopes.abs() / _MAX_LOG_SLOPE)
        slopes = torch.where((at < 0) | (at > self.n_bins - 2), 0.0, slopes).exp()
        first, last = slopes.unbind(1)

        mean = height / width
        bend = first + last - 2 * mean
        if inverse:
            eta = (u - bottom) / height
            b = first - eta * bend
            root = b.square() + 4 * mean * eta * (mean - b)
            t = 2 * mean * eta / (b + root.clamp_min(1e-12).sqrt())
            t = t.clamp(0, 1)
            v = left + t * width
        else:
            t = ((u - left) / width).clamp(0, 1)
        product = t * (1 - t)
        denominator = mean + bend * product
        if not inverse:
            v = bottom + height * (mean * t.square() + first * product) / denominator
        slope = last * t.square() + 2 * mean * product + first * (1 - t).square()
        log_slope = ((mean / denominator).square() * slope).log()
        inside = x.abs() < self.bound
        return (
            torch.where(inside, 2 * self.bound * v - self.bound, x),
            torch.where(inside, log_slope, 0.0),
        )


def _order(d, shuffle, generator):
    """Put the halves in new places, by chance; or swap them, so that all coordinates are mapped."""
    if shuffle and d > 3:
        return torch.randperm(d, generator=generator)
    return torch.arange(d).roll(d // 2)


_ZUKO_NAMES = {"nsf": "NSF", "maf": "MAF", "nice": "NICE", "gf": "GF"}


class ZukoFlows(StackedFlow):
    """K flows of the package zuko, one after the other.

    Parameters
    ----------
    flow : {"nsf", "maf", "nice", "gf"}, zuko.lazy.LazyDistribution, or callable
        Autoregressive neural spline flow, masked autoregressive flow, affine couplings,
        Gaussianization flow; or a flow without context, which is copied; or a class or factory,
        called as ``flow(n_features, **options)`` once per member.
    n_features : int
        Number of columns d.
    n_members : int, default=1
        Number of flows K.
    generator : torch.Generator
        Source of the initial weights.
    **options
        Of zuko's class; by default ``transforms=3, hidden_features=(64, 64)`` for a name.
    """

    def __init__(self, flow, n_features, n_members=1, *, generator, **options):
        super().__init__(n_features, n_members)
        if isinstance(flow, str) and flow not in _ZUKO_NAMES:
            raise ValueError(
                f"flow={flow!r} must be 'coupling', one of {sorted(_ZUKO_NAMES)}, a flow of "
                "the package zuko or a function that makes one."
            )
        zuko = _import_zuko()
        if isinstance(flow, str):
            options = dict(transforms=3, hidden_features=(64, 64)) | options
            build = getattr(zuko.flows, _ZUKO_NAMES[flow])
        elif isinstance(flow, nn.Module):
            build = lambda n_features: copy.deepcopy(flow)  # noqa: E731
        elif callable(flow):
            build = flow
        else:
            raise ValueError(f"flow must be a name, a flow of zuko or a factory, got {flow!r}.")
        with seeded_global_rng(draw_seed(generator)):
            flows = [build(n_features, **options) for _ in range(n_members)]
        for made in flows:
            law = made() if isinstance(made, zuko.lazy.LazyDistribution) else None
            if not isinstance(law, zuko.distributions.NormalizingFlow):
                raise ValueError(
                    "flow must be a normalizing flow of the package zuko or make one, "
                    f"got {made!r}."
                )
            try:  # of another number of features, or in need of a context
                law.log_prob(next(made.parameters()).new_zeros(2, n_features))
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"flow must take rows of {n_features} features and no context; on such rows "
                    f"{type(made).__name__} failed: {error}"
                ) from error
        self.flows = nn.ModuleList(flows)

    def __reduce__(self):
        # Loading a flow imports zuko, which must not happen unguarded. The flows come as bytes,
        # so that the guard is called first.
        return _load_zuko_flows, (pickle.dumps(self.__dict__),)

    def log_prob(self, z):
        return torch.stack(
            [flow().log_prob(rows) for flow, rows in zip(self.flows, z, strict=True)]
        )

    def rsample(self, n, generator):
        laws = [flow() for flow in self.flows]
        device = next(self.parameters()).device
        with seeded_global_rng(draw_seed(generator), device):
            draws = [law.base.rsample((n,)) for law in laws]
        z, log_prob = [], []
        for law, u in zip(laws, draws, strict=True):
            x, log_det = law.transform.inv.call_and_ladj(u)
            z.append(x)
            log_prob.append(law.base.log_prob(u) - log_det.reshape(n, -1).sum(1))
        return torch.stack(z), torch.stack(log_prob)

    def alone(self, k):
        single = copy.copy(self)
        single._modules = {"flows": nn.ModuleList([copy.deepcopy(self.flows[k])])}
        single.n_members = 1
        return single


def _load_zuko_flows(state):
    _import_zuko()
    flows = ZukoFlows.__new__(ZukoFlows)
    flows.__setstate__(pickle.loads(state))
    return flows


def _import_zuko():
    """Import zuko, which turns off the validation of all torch distributions, and undo that."""
    with GLOBAL_RNG_LOCK:
        validate = Distribution._validate_args
        try:
            import zuko
        except ImportError as error:
            raise ImportError(
                'flows by name other than "coupling" need the package zuko: '
                'pip install "skebm[flows]"'
            ) from error
        finally:
            Distribution.set_default_validate_args(validate)
    return zuko


def build_flow(flow, n_features, n_members=1, *, generator, **options):
    """K flows of one kind, to be trained side by side.

    Parameters
    ----------
    flow : "coupling", or what `ZukoFlows` takes
    n_features : int
    n_members : int, default=1
    generator : torch.Generator
        On the CPU. Source of the initial weights.
    **options
        Of `CouplingSplineFlow` or of zuko's class.

    Returns
    -------
    StackedFlow
    """
    if isinstance(flow, str) and flow == "coupling":
        return CouplingSplineFlow(n_features, n_members, generator=generator, **options)
    return ZukoFlows(flow, n_features, n_members, generator=generator, **options)


def stack_flows(flows):
    """Stack copies of K flows of one shape and one member each, trainable, in float32.

    Parameters
    ----------
    flows : list of StackedFlow

    Returns
    -------
    StackedFlow
    """
    whole = copy.deepcopy(flows[0])
    whole.n_members = len(flows)
    if isinstance(whole, ZukoFlows):
        whole.flows = nn.ModuleList(copy.deepcopy(f.flows[0]) for f in flows)
    else:
        for part, *parts in zip(whole.modules(), *(f.modules() for f in flows), strict=True):
            for name in part._parameters:
                rows = torch.cat([p._parameters[name].detach() for p in parts])
                part._parameters[name] = nn.Parameter(rows)
            for name in part._buffers:
                part._buffers[name] = torch.cat([p._buffers[name] for p in parts])
    return whole.float().requires_grad_(True)


class FlowBase(nn.Module):
    """A fitted flow, in float64 and frozen.

    Parameters
    ----------
    flow : StackedFlow with one member, or zuko.lazy.LazyDistribution without context
        It is copied.
    """

    def __init__(self, flow):
        super().__init__()
        if not isinstance(flow, StackedFlow):
            (d,) = flow().event_shape
            flow = ZukoFlows(flow, d, generator=torch.Generator())
        self.flow = copy.deepcopy(flow).double().eval().requires_grad_(False)
        self.n_features = flow.n_features

    def log_prob(self, x):
        """Log-density, (n, d) -> (n,)."""
        return self.flow.log_prob(x.double()[None])[0]

    def sample(self, n, generator):
        """Draw (n, d) points."""
        return self.flow.sample(n, generator)[0]
