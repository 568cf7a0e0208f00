"""What torch functions do to jets, one rule each; to import this file makes them known."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from skebm.derivatives._jets import (
    Jet,
    bent,
    elementwise,
    is_jet,
    mapped,
    rule,
    scaled,
    spread,
    value_of,
)
from skebm.derivatives._kernels import SiLU, SinCos
from skebm.derivatives._tangents import NO_COLUMN, Node, Normalise, Rows, Tangent, require

__all__ = ["normalise"]


def _factor(jet):
    """The factor of a jet's tangent, for all entries of a row."""
    return (
        jet.value.new_ones((1,) * jet.n_row_axes + jet.shape[jet.n_row_axes :]) * jet.tangent.factor
    )


def _linear(jet, value, function):
    """Jet of a linear map of the entries of a row, which acts on derivatives as on values."""
    tangent = jet.tangent
    if tangent is not None:
        tangent = Tangent(Node(lambda block, J: function(J), tangent.dense(jet.n_row_axes)))
    return Jet(value, tangent, jet.record, jet.n_row_axes)


# Linear maps -----------------------------------------------------------------------------------


@rule("add", "radd")
def _add(a, b, alpha=1):
    value = value_of(a) + (value_of(b) if alpha == 1 else alpha * value_of(b))
    if not is_jet(b):
        return scaled(a, value, 1.0)
    if not is_jet(a):
        return scaled(b, value, alpha)
    return _sum(value, scaled(a, value, 1.0), scaled(b, value, alpha))


def _sum(value, a, b):
    """Jet of a + b, of which only the tangents count."""
    require(a.n_row_axes == b.n_row_axes)
    s, t, n = a.tangent, b.tangent, a.n_row_axes
    if s is None or t is None or a.record is not b.record:
        tangent = None
    elif s.has_base_of(t):
        tangent = Tangent(s.base, s.factor + t.factor)
    else:
        tangent = Tangent(Node(lambda block, J, L: J + L, s.dense(n), t.dense(n)))
    return Jet(value, tangent, a.record, n)


@rule("sub", "subtract")
def _sub(a, b, alpha=1):
    return _add(a, b, alpha=-alpha)


@rule("rsub")
def _rsub(a, b):
    return _add(b, a, alpha=-1)


@rule("neg", "negative")
def _neg(a):
    return scaled(a, -a.value, -1.0)


@rule("addcmul")
def _addcmul(base, a, b, value=1):
    if is_jet(a) and not is_jet(b) and not is_jet(base) and value == 1:
        return scaled(a, torch.addcmul(base, a.value, b), b)
    return _add(base, _mul(a, b), alpha=value)


@rule("linear")
def _linear_layer(h, weight, bias=None):
    require(not is_jet(weight) and not is_jet(bias))
    return _product(h, weight.mT, functional.linear(h.value, weight, bias))


@rule("matmul", "mm", "mv", "bmm")
def _matmul(h, weight):
    require(is_jet(h) and not is_jet(weight))
    return _product(h, weight, h.value @ weight)


@rule("addmm", "baddbmm")
def _addmm(bias, h, weight, *, beta=1, alpha=1):
    require(is_jet(h) and not is_jet(weight) and not is_jet(bias) and beta == alpha == 1)
    add = torch.baddbmm if h.ndim == 3 else torch.addmm
    return _product(h, weight, add(bias, h.value, weight))


def _product(h, weight, value):
    """Jet of h @ weight; the weights have no axis of rows."""
    n, tangent, record = h.n_row_axes, h.tangent, h.record
    by_member = weight.ndim == 3
    require(h.ndim > n and weight.ndim <= 3 and (not by_member or h.ndim == 3 and n == 2))
    if tangent is None:
        return Jet(value, None, record, n)
    if tangent.is_by_column and weight.ndim > 1 and h.ndim == n + 1:
        columns, d = tangent.base, record.z.shape[-1]
        rows = weight.reshape((1,) * (n + 1 - weight.ndim) + weight.shape)
        if tangent is record.tangent:
            return Jet(value, Tangent(Rows(rows.unsqueeze(-2))), record, n)
        if _in_equal_parts(columns, d):
            order = columns.argsort(stable=True)[int((columns == NO_COLUMN).sum()) :]
            rows = rows.index_select(-2, order).unflatten(-2, (d, -1))
            scale = _factor(h).index_select(-1, order).unflatten(-1, (d, -1))
            return Jet(value, Tangent(Rows(rows, scale.transpose(-2, -3))), record, n)
    product = _product_by_member if by_member else torch.matmul
    node = Node(lambda _, J: product(J, weight), tangent.dense(n))
    return Jet(value, Tangent(node), record, n)


def _in_equal_parts(columns, n_columns):
    counts = torch.bincount(columns[columns != NO_COLUMN], minlength=n_columns)
    return bool((counts == counts[0]).all())


def _product_by_member(J, weight):
    """J (r, K, n, w) times weights (K, w, v); in memory, members come first."""
    J = J.expand(-1, len(weight), -1, -1).transpose(0, 1)
    return torch.bmm(J.flatten(1, 2), weight).unflatten(1, J.shape[1:3]).transpose(0, 1)


# Shapes ----------------------------------------------------------------------------------------


def _moved(jet, value, function):
    """Jet of a change of shape that leaves the rows and what is in front of them alone."""
    jet.is_view, n, tangent = True, jet.n_row_axes, jet.tangent
    if tangent is not None:
        factor = tangent.factor
        if isinstance(factor, Tensor):
            factor = function(spread(factor, jet.shape[n:]))
        tangent = Tangent(
            mapped(tangent.base, lambda x: function(spread(x, jet.shape[n:]))), factor
        )
    return Jet(value, tangent, jet.record, n, is_view=True)


@rule("reshape", "view")
def _reshape(h, *shape):
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    value, n = h.value.reshape(shape), h.n_row_axes
    if value.shape[:n] != h.shape[:n]:
        # such as the last squeeze: fine, as long as no nonlinear layer follows
        return Jet(value, None, h.record, n)
    n_old, row = h.ndim - n, value.shape[n:]
    return _moved(h, value, lambda x: x.reshape(x.shape[: x.ndim - n_old] + row))


@rule("flatten")
def _flatten(h, start_dim=0, end_dim=-1):
    return _reshape(h, h.value.flatten(start_dim, end_dim).shape)


@rule("unflatten")
def _unflatten(h, dim, sizes):
    return _reshape(h, h.value.unflatten(dim, sizes).shape)


@rule("unsqueeze")
def _unsqueeze(h, dim):
    value = h.value.unsqueeze(dim)
    if dim % value.ndim >= h.n_row_axes:
        return _reshape(h, value.shape)
    require(dim % value.ndim == 0 and h.n_row_axes == 1)
    tangent = h.tangent
    if tangent is not None and not tangent.is_by_column:
        tangent = Tangent(Node(lambda _, J: J.unsqueeze(1), tangent.dense(1)))
    return Jet(value, tangent, h.record, 2, is_view=True)


@rule("squeeze")
def _squeeze(h, *dim):
    return _reshape(h, h.value.squeeze(*dim).shape)


@rule("contiguous")
def _contiguous(h):
    return _reshape(h, h.shape)


@rule("clone")
def _clone(h):
    return Jet(h.value.clone(), h.tangent, h.record, h.n_row_axes)


@rule("detach")
def _detach(h):
    return h.value.detach()


@rule("getitem")
def _getitem(h, index):
    index, n = index if isinstance(index, tuple) else (index,), h.n_row_axes
    if len(index) == 1 and isinstance(index[0], int) and n == 2:
        return _select(h, 0, index[0])
    if Ellipsis in index:
        at = index.index(Ellipsis)
        n_axes = sum(i is not None and i is not Ellipsis for i in index)
        index = index[:at] + (slice(None),) * (h.ndim - n_axes) + index[at + 1 :]
    front, row = index[:n], index[n:]
    require(len(front) == n and all(i == slice(None) for i in front))
    require(sum(not isinstance(i, int | slice | None) for i in row) <= 1)
    n_old = h.ndim - n
    return _moved(h, h.value[index], lambda x: x[(slice(None),) * (x.ndim - n_old) + row])


@rule("select")
def _select(h, dim, index):
    dim = dim % h.ndim
    if dim >= h.n_row_axes:
        return _getitem(h, (slice(None),) * dim + (index,))
    require(dim == 0 and h.n_row_axes == 2 and h.value is h.record.z)
    return Jet.of_input(h.record.member(range(len(h))[index]))


@rule("unbind")
def _unbind(h, dim=0):
    return tuple(_select(h, dim, k) for k in range(h.shape[dim]))


@rule("cat", "concat")
def _cat(jets, dim=0):
    return _joined(torch.cat, jets, dim)


@rule("stack")
def _stack(jets, dim=0):
    return _joined(torch.stack, jets, dim)


def _joined(join, jets, dim):
    value = join([value_of(j) for j in jets], dim)
    first = next(j for j in jets if is_jet(j))
    record, n = first.record, first.n_row_axes
    jets = [j if is_jet(j) else _constant(j, record, n) for j in jets]
    dim = dim if dim < 0 else dim - value.ndim
    same = all(j.record is record and j.n_row_axes == n for j in jets)
    if not same or any(j.tangent is None for j in jets) or dim + value.ndim < n:
        return Jet(value, None, record, n)
    rows = [j.shape[n:] for j in jets]

    def joined(*parts):
        front = torch.broadcast_shapes(
            *(x.shape[: x.ndim - len(row)] for x, row in zip(parts, rows, strict=True))
        )
        return join([x.expand(front + row) for x, row in zip(parts, rows, strict=True)], dim)

    if all(j.tangent.is_by_column for j in jets):
        base = join([j.tangent.base for j in jets], dim)
        return Jet(value, Tangent(base, joined(*map(_factor, jets))), record, n)
    node = Node(lambda _, *parts: joined(*parts), *(j.tangent.dense(n) for j in jets))
    return Jet(value, Tangent(node), record, n)


def _constant(value, record, n):
    """Jet of what does not depend on z: of no column, with derivative zero."""
    row = value.shape[n:]
    base = torch.full(row, NO_COLUMN, device=value.device)
    return Jet(value, Tangent(base, value.new_zeros((1,) * n + row)), record, n)


@rule("sum")
def _sum_over(h, dim=None, keepdim=False):
    return _reduced(torch.sum, h, dim, keepdim)


@rule("mean")
def _mean_over(h, dim=None, keepdim=False):
    return _reduced(torch.mean, h, dim, keepdim)


def _reduced(reduce, h, dim, keepdim):
    require(dim is not None)
    value, n = reduce(h.value, dim, keepdim=keepdim), h.n_row_axes
    dims = [d if d < 0 else d - h.ndim for d in (dim if isinstance(dim, tuple | list) else [dim])]
    require(all(d + h.ndim >= n for d in dims))
    row = h.shape[n:]

    def function(J):
        return reduce(spread(J, row), dims, keepdim=keepdim)

    return _linear(h, value, function)


# Nonlinear functions ---------------------------------------------------------------------------


@rule("mul", "multiply")
def _mul(a, b):
    value = value_of(a) * value_of(b)
    if not is_jet(b):
        return scaled(a, value, b)
    if not is_jet(a):
        return scaled(b, value, a)
    if a is b:
        return elementwise("square", a)
    n = a.n_row_axes
    require(a.record is b.record and a.tangent is not None and b.tangent is not None)
    left, right = scaled(a, value, b.value), scaled(b, value, a.value)
    s, t = a.tangent, b.tangent
    if s.is_by_column and t.is_by_column:
        both = 2 * s.factor * t.factor * (s.base == t.base)
        a.record.bend(value, lambda delta: delta * both)
    else:
        nodes = s.dense(n), t.dense(n)
        a.record.bend(value, lambda delta: lambda J, L: 2 * delta * (J * L).sum(0), *nodes)
    return _sum(value, left, right)


@rule("div", "truediv", "true_divide")
def _div(a, b):
    if not is_jet(b):
        return scaled(a, a.value / b, 1.0 / b)
    return _mul(a, elementwise("reciprocal", b))


@rule("rdiv", "rtruediv")
def _rdiv(a, b):
    return _div(b, a)


@rule("silu")
def _silu(h):
    return bent(h, *SiLU.apply(h.value))


def _sin_cos(h):
    if h.waves is None:
        h.waves = SinCos.apply(h.value)
    return h.waves


@rule("sin")
def _sin(h):
    sin, cos = _sin_cos(h)
    return bent(h, sin, cos, -sin)


@rule("cos")
def _cos(h):
    sin, cos = _sin_cos(h)
    return bent(h, cos, -sin, -cos)


@rule("dropout")
def _dropout(h, p=0.5, training=True):
    if not training:
        return h
    return _mul(h, functional.dropout(torch.ones_like(h.value), p, True))


@rule("layer_norm")
def _layer_norm(h, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    n = h.n_row_axes
    require(h.tangent is not None and tuple(normalized_shape) == h.shape[-1:] and h.ndim > n)
    y, k = normalise(h.value, eps)
    node = Normalise(h.tangent.dense(n), y, k)
    h.record.bend(y, node.share, node)
    jet = Jet(y, Tangent(node), h.record, n)
    jet = jet if weight is None else _mul(jet, weight)
    return jet if bias is None else _add(jet, bias)


def normalise(x: Any, eps: float, axes: tuple[int, ...] = (-1,)) -> Any:
    """Mean 0 and variance 1 along axes, and one by the standard deviation, in elementary steps.

    The third derivative of torch's fused form is silently wrong, up to torch 2.13 at least:
    https://github.com/pytorch/pytorch/issues/175754
    """
    x = x - x.mean(axes, keepdim=True)
    k = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    return x * k, k
