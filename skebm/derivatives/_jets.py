"""Jets: values that torch functions act on as on tensors, and that remember how they depend on z.

A jet goes through the code of an energy in place of its input. Every torch function that meets it
asks for a rule here: what it does to the value, to the tangent, and, if it is nonlinear, what it
contributes to the curvature. Elementwise functions need no rule of their own, only to be listed:
autograd knows their derivatives. Where there is no rule, `NoRule` ends the attempt.
"""

from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from skebm.derivatives._kernels import SiLU, SinCos
from skebm.derivatives._tangents import (
    NO_COLUMN,
    Node,
    Normalise,
    NoRule,
    Record,
    Rows,
    Tangent,
    require,
)

__all__ = ["Jet", "normalise"]

SMOOTH = """atan celu elu erf exp expm1 gelu log log1p mish pow reciprocal rsqrt selu sigmoid
softplus softsign sqrt square tanh tanhshrink""".split()
KINKED = "abs clamp clamp_max clamp_min hardtanh leaky_relu prelu relu relu6".split()
"""Elementwise functions; those with kinks have no second derivative beside them."""
RULES = {}
"""Name of a function of torch, Tensor or torch.nn.functional -> what it does to jets."""
ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "size", "dim", "numel"}


class Jet:
    """A value and its tangent (None: unknown, so that no nonlinear layer may follow).

    Not a Tensor, so that compiled code, which torch functions cannot see through, refuses it and
    does not drop the dependence.
    """

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        value: Tensor,
        tangent: Tangent | None,
        record: Record,
        n_row_axes: int | None = None,
        is_view: bool = False,
    ):
        self.value, self.tangent, self.record, self.is_view = value, tangent, record, is_view
        self.n_row_axes = record.n_row_axes if n_row_axes is None else n_row_axes
        self.waves = None  # sine and cosine of the value, if either was asked for

    @classmethod
    def of_input(cls, record: Record) -> Self:
        return cls(record.z, record.tangent, record, is_view=True)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function.__name__
        # without grad mode (an autograd.Function, a no_grad block) dependence on z means no more
        require(torch.is_grad_enabled())
        require(any(getattr(r, name, None) is function for r in (torch, Tensor, functional)))
        return _apply(name, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self.value, name)
        require(callable(getattr(Tensor, name)))
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def _call(self, name, *args, **kwargs):
        return self.__torch_function__(getattr(Tensor, name), (), (self, *args), kwargs)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[k] for k in range(len(self))])

    def __bool__(self) -> bool:
        raise NoRule

    def __eq__(self, other: object) -> Any:
        raise NoRule

    __add__ = __radd__ = partialmethod(_call, "add")
    __sub__ = partialmethod(_call, "sub")
    __rsub__ = partialmethod(_call, "__rsub__")
    __mul__ = __rmul__ = partialmethod(_call, "mul")
    __truediv__ = partialmethod(_call, "div")
    __rtruediv__ = partialmethod(_call, "__rtruediv__")
    __matmul__ = partialmethod(_call, "matmul")
    __pow__ = partialmethod(_call, "pow")
    __neg__ = partialmethod(_call, "neg")
    __getitem__ = partialmethod(_call, "__getitem__")
    __iadd__ = partialmethod(_call, "add_")
    __isub__ = partialmethod(_call, "sub_")
    __imul__ = partialmethod(_call, "mul_")
    __itruediv__ = partialmethod(_call, "div_")


def _apply(name, *args, inplace=False, **kwargs):
    """Apply the rule of a function; add, __add__ and add_ have the same one."""
    inplace = inplace or (name.endswith("_") and not name.endswith("__"))
    name = name.strip("_")
    if name in RULES:
        result = RULES[name](*args, **kwargs)
    elif name in SMOOTH or name in KINKED:
        result = _elementwise(name, *args, **kwargs)
    else:
        raise NoRule(name)
    return _write_into(args[0], result) if inplace else result


def _write_into(jet, result):
    """The jet, overwritten; nothing else may look at its numbers."""
    require(_is_jet(jet) and not jet.is_view and result.shape == jet.shape)
    jet.value, jet.tangent, jet.waves = result.value, result.tangent, None
    return jet


def _is_jet(x):
    return type(x) is Jet


def _value(x):
    return x.value if _is_jet(x) else x


def _rule(*names):
    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _linear(jet, value, function):
    """Jet of a linear map of the entries of a row, which acts on derivatives as on values."""
    tangent = jet.tangent
    if tangent is not None:
        tangent = Tangent(Node(lambda block, J: function(J), tangent.dense(jet.n_row_axes)))
    return Jet(value, tangent, jet.record, jet.n_row_axes)


def _scaled(jet, value, factor):
    """Jet of value = jet * factor + constant."""
    if jet.tangent is None:
        return Jet(value, None, jet.record, jet.n_row_axes)
    n = jet.n_row_axes
    require(value.ndim == jet.ndim and value.shape[:n] == jet.shape[:n])
    base, row = jet.tangent.base, value.shape[n:]
    if value.shape != jet.shape:
        base = _map(base, lambda J: _spread(J, row))
    return Jet(value, Tangent(base, jet.tangent.factor * factor), jet.record, n)


def _spread(x, row):
    """Repeat what broadcasts to a row of some shape."""
    return x.expand(*x.shape[: max(0, x.ndim - len(row))], *row)


def _factor(jet):
    """The factor of a jet's tangent, for all entries of a row."""
    return (
        jet.value.new_ones((1,) * jet.n_row_axes + jet.shape[jet.n_row_axes :]) * jet.tangent.factor
    )


def _map(base, function):
    """A base whose entries in each row are moved or repeated."""
    return function(base) if isinstance(base, Tensor) else Node(lambda _, J: function(J), base)


# Linear maps -----------------------------------------------------------------------------------


@_rule("add", "radd")
def _add(a, b, alpha=1):
    value = _value(a) + (_value(b) if alpha == 1 else alpha * _value(b))
    if not _is_jet(b):
        return _scaled(a, value, 1.0)
    if not _is_jet(a):
        return _scaled(b, value, alpha)
    return _sum(value, _scaled(a, value, 1.0), _scaled(b, value, alpha))


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


@_rule("sub", "subtract")
def _sub(a, b, alpha=1):
    return _add(a, b, alpha=-alpha)


@_rule("rsub")
def _rsub(a, b):
    return _add(b, a, alpha=-1)


@_rule("neg", "negative")
def _neg(a):
    return _scaled(a, -a.value, -1.0)


@_rule("addcmul")
def _addcmul(base, a, b, value=1):
    if _is_jet(a) and not _is_jet(b) and not _is_jet(base) and value == 1:
        return _scaled(a, torch.addcmul(base, a.value, b), b)
    return _add(base, _mul(a, b), alpha=value)


@_rule("linear")
def _linear_layer(h, weight, bias=None):
    require(not _is_jet(weight) and not _is_jet(bias))
    return _product(h, weight.mT, functional.linear(h.value, weight, bias))


@_rule("matmul", "mm", "mv", "bmm")
def _matmul(h, weight):
    require(_is_jet(h) and not _is_jet(weight))
    return _product(h, weight, h.value @ weight)


@_rule("addmm", "baddbmm")
def _addmm(bias, h, weight, *, beta=1, alpha=1):
    require(_is_jet(h) and not _is_jet(weight) and not _is_jet(bias) and beta == alpha == 1)
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
            factor = function(_spread(factor, jet.shape[n:]))
        tangent = Tangent(_map(tangent.base, lambda x: function(_spread(x, jet.shape[n:]))), factor)
    return Jet(value, tangent, jet.record, n, is_view=True)


@_rule("reshape", "view")
def _reshape(h, *shape):
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    value, n = h.value.reshape(shape), h.n_row_axes
    if value.shape[:n] != h.shape[:n]:
        # such as the last squeeze: fine, as long as no nonlinear layer follows
        return Jet(value, None, h.record, n)
    n_old, row = h.ndim - n, value.shape[n:]
    return _moved(h, value, lambda x: x.reshape(x.shape[: x.ndim - n_old] + row))


@_rule("flatten")
def _flatten(h, start_dim=0, end_dim=-1):
    return _reshape(h, h.value.flatten(start_dim, end_dim).shape)


@_rule("unflatten")
def _unflatten(h, dim, sizes):
    return _reshape(h, h.value.unflatten(dim, sizes).shape)


@_rule("unsqueeze")
def _unsqueeze(h, dim):
    value = h.value.unsqueeze(dim)
    if dim % value.ndim >= h.n_row_axes:
        return _reshape(h, value.shape)
    require(dim % value.ndim == 0 and h.n_row_axes == 1)
    tangent = h.tangent
    if tangent is not None and not tangent.is_by_column:
        tangent = Tangent(Node(lambda _, J: J.unsqueeze(1), tangent.dense(1)))
    return Jet(value, tangent, h.record, 2, is_view=True)


@_rule("squeeze")
def _squeeze(h, *dim):
    return _reshape(h, h.value.squeeze(*dim).shape)


@_rule("contiguous")
def _contiguous(h):
    return _reshape(h, h.shape)


@_rule("clone")
def _clone(h):
    return Jet(h.value.clone(), h.tangent, h.record, h.n_row_axes)


@_rule("detach")
def _detach(h):
    return h.value.detach()


@_rule("getitem")
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


@_rule("select")
def _select(h, dim, index):
    dim = dim % h.ndim
    if dim >= h.n_row_axes:
        return _getitem(h, (slice(None),) * dim + (index,))
    require(dim == 0 and h.n_row_axes == 2 and h.value is h.record.z)
    return Jet.of_input(h.record.member(range(len(h))[index]))


@_rule("unbind")
def _unbind(h, dim=0):
    return tuple(_select(h, dim, k) for k in range(h.shape[dim]))


@_rule("cat", "concat")
def _cat(jets, dim=0):
    return _joined(torch.cat, jets, dim)


@_rule("stack")
def _stack(jets, dim=0):
    return _joined(torch.stack, jets, dim)


def _joined(join, jets, dim):
    value = join([_value(j) for j in jets], dim)
    first = next(j for j in jets if _is_jet(j))
    record, n = first.record, first.n_row_axes
    jets = [j if _is_jet(j) else _constant(j, record, n) for j in jets]
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


@_rule("sum")
def _sum_over(h, dim=None, keepdim=False):
    return _reduced(torch.sum, h, dim, keepdim)


@_rule("mean")
def _mean_over(h, dim=None, keepdim=False):
    return _reduced(torch.mean, h, dim, keepdim)


def _reduced(reduce, h, dim, keepdim):
    require(dim is not None)
    value, n = reduce(h.value, dim, keepdim=keepdim), h.n_row_axes
    dims = [d if d < 0 else d - h.ndim for d in (dim if isinstance(dim, tuple | list) else [dim])]
    require(all(d + h.ndim >= n for d in dims))
    row = h.shape[n:]

    def function(J):
        return reduce(_spread(J, row), dims, keepdim=keepdim)

    return _linear(h, value, function)


# Nonlinear functions ---------------------------------------------------------------------------


def _bent(h, y, slope, bend):
    """Jet of y = s(h), from s'(h) and s''(h) (None if that is zero)."""
    require(h.tangent is not None)
    base, factor = h.tangent.base, h.tangent.factor
    if bend is not None:
        bend = bend * factor * factor

        def share(delta):
            coefficient = delta * bend
            if isinstance(base, Tensor):
                return coefficient
            return lambda J: coefficient * J.square().sum(0)

        h.record.bend(y, share, base)
    return _scaled(h, y, slope)


def _elementwise(name, h, *args, **kwargs):
    room = next(r for r in (torch, functional, Tensor) if hasattr(r, name))
    require(_is_jet(h) and not any(_is_jet(x) for x in (*args, *kwargs.values())))
    x = h.value
    y = getattr(room, name)(x, *args, **kwargs)
    require(y.shape == x.shape)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    bend = None
    if name in SMOOTH and slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return _bent(h, y, slope, bend)


@_rule("mul", "multiply")
def _mul(a, b):
    value = _value(a) * _value(b)
    if not _is_jet(b):
        return _scaled(a, value, b)
    if not _is_jet(a):
        return _scaled(b, value, a)
    if a is b:
        return _elementwise("square", a)
    n = a.n_row_axes
    require(a.record is b.record and a.tangent is not None and b.tangent is not None)
    left, right = _scaled(a, value, b.value), _scaled(b, value, a.value)
    s, t = a.tangent, b.tangent
    if s.is_by_column and t.is_by_column:
        both = 2 * s.factor * t.factor * (s.base == t.base)
        a.record.bend(value, lambda delta: delta * both)
    else:
        nodes = s.dense(n), t.dense(n)
        a.record.bend(value, lambda delta: lambda J, L: 2 * delta * (J * L).sum(0), *nodes)
    return _sum(value, left, right)


@_rule("div", "truediv", "true_divide")
def _div(a, b):
    if not _is_jet(b):
        return _scaled(a, a.value / b, 1.0 / b)
    return _mul(a, _elementwise("reciprocal", b))


@_rule("rdiv", "rtruediv")
def _rdiv(a, b):
    return _div(b, a)


@_rule("silu")
def _silu(h):
    return _bent(h, *SiLU.apply(h.value))


def _sin_cos(h):
    if h.waves is None:
        h.waves = SinCos.apply(h.value)
    return h.waves


@_rule("sin")
def _sin(h):
    sin, cos = _sin_cos(h)
    return _bent(h, sin, cos, -sin)


@_rule("cos")
def _cos(h):
    sin, cos = _sin_cos(h)
    return _bent(h, cos, -sin, -cos)


@_rule("dropout")
def _dropout(h, p=0.5, training=True):
    if not training:
        return h
    return _mul(h, functional.dropout(torch.ones_like(h.value), p, True))


@_rule("layer_norm")
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
