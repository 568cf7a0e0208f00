"""Values that remember how they depend on z, and what torch functions do to them.

A new function becomes fast by a rule: an entry of `_POINTWISE` for an activation (slope and
bend), or a function under `@_rule` for another operation.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from skebm.energies._products import product
from skebm.energies._streams import (
    ColumnProduct,
    Columns,
    FirstProduct,
    Normalise,
    NoRule,
    Product,
    Scale,
    Share,
    Squares,
    Step,
    by_row,
    require,
    stream,
)


class Source:
    """One input, and the program by which derivatives along directions go forward from it.

    The program is only written down while the energy is evaluated, and run when all is known: in
    blocks of directions, for those steps only that some nonlinear layer needs.
    """

    def __init__(self, z, directions=None):
        self.z, self.directions = z, directions
        self.lead = z.ndim - 2  # axes in front of the rows
        self.steps, self.bends, self.members = [], [], {}
        self.n_directions = z.shape[-1] if directions is None else directions.shape[-3]
        self.n_uses, self.first = 0, None

    def jet(self):
        if self.directions is None:
            one = self.z.new_ones((1,) * (self.lead + 1) + self.z.shape[-1:])
            columns = torch.arange(self.z.shape[-1], device=self.z.device)
            tangent = Columns(one, columns, is_input=True)
        else:
            step = Step([], [self.directions], lambda block, v: v.narrow(-3, *block))
            tangent = self.add(step)
        return _Jet(self.z, self.lead, tangent, self, is_view=True)

    def member(self, k):
        """Rows k of a stack as an input of their own."""
        if not self.members:
            vectors = [None] * len(self.z) if self.directions is None else self.directions
            self.members = dict(enumerate(map(Source, self.z, vectors)))
        return self.members[k].jet()

    def add(self, step):
        self.steps.append(step)
        return len(self.steps) - 1

    def bend(self, y, share, place=None):
        """Note a nonlinear layer: df/dy -> its share in the curvature, a tensor or a step."""
        self.bends.append((y, share, self.add(None) if place is None else place))

    def curvature(self, deltas):
        """Sum over directions and nonlinear layers."""
        total, steps, needed = torch.zeros_like(self.z[..., 0]), list(self.steps), set()
        for (_, share, place), delta in zip(self.bends, deltas, strict=True):
            part = share(delta)
            if isinstance(part, Tensor):
                total = total + part
            else:
                steps[place] = part
                needed.add(place)
        if not needed:
            return total
        for i in reversed(range(len(steps))):
            if i in needed:
                needed.update(steps[i].parents)
        steps = {i: steps[i] for i in sorted(needed)}
        n_directions = self.n_directions
        if self.first is not None and self.n_uses == 1:
            n_directions = self.first.reduce(n_directions)
        size = max(y.numel() for y, _, _ in self.bends)
        return total + stream(steps, n_directions, size)


class _Jet:
    """A value that remembers how it depends on z; torch functions act on it by `_RULES`.

    Not a Tensor, so that code which torch functions cannot see through (TorchScript, an
    autograd.Function) refuses it, and does not drop the dependence.
    """

    def __init__(self, value, lead, tangent, source, is_view=False):
        self.value, self.lead, self.tangent, self.source = value, lead, tangent, source
        self.is_view = is_view
        self.waves = None  # sine and cosine of the value, if either was asked for

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # without grad mode (an autograd.Function, a no_grad block) dependence on z means no more
        if function not in _RULES or not torch.is_grad_enabled():
            raise NoRule(function)
        return _RULES[function](*args, **(kwargs or {}))

    def __getattr__(self, name):
        if name in _ATTRIBUTES:
            return getattr(self.value, name)
        require(callable(getattr(Tensor, name)))
        return partial(self._call, getattr(Tensor, name))

    def _call(self, method, *args, **kwargs):
        return self.__torch_function__(method, (), (self, *args), kwargs)

    def __len__(self):
        return len(self.value)

    def __iter__(self):
        return iter([self[k] for k in range(len(self))])

    def __bool__(self):
        raise NoRule

    def __eq__(self, other):
        raise NoRule

    __hash__ = None


_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "size", "dim", "numel"}
_RULES = {}


def _is_jet(x):
    return type(x) is _Jet


def _rule(*names):
    """Register a function under torch.name, Tensor.name and functional.name."""

    def register(function):
        for name in names:
            for room in (torch, Tensor, functional):
                if hasattr(room, name):
                    _RULES[getattr(room, name)] = function
        return function

    return register


def _padded(constant, jet):
    """A constant that broadcasts against a value, made to broadcast against its derivatives."""
    if constant.ndim == 0:
        return constant
    require(constant.ndim <= jet.value.ndim)
    missing = jet.value.ndim - constant.ndim
    return constant.reshape((1,) * missing + constant.shape).unsqueeze(jet.lead)


def _dense(jet):
    """The node of the derivatives of a jet."""
    tangent = jet.tangent
    if isinstance(tangent, Columns):
        source, lead = jet.source, jet.lead
        source.n_uses += tangent.is_input

        def select(block, scale, columns=tangent.columns):
            number = torch.arange(block[0], sum(block), device=columns.device)
            hit = columns == number.reshape(-1, *(1,) * (columns.ndim + 1))
            return scale.unsqueeze(lead) * hit

        return source.add(Step([], [tangent.scale], select))
    if tangent is None:
        raise NoRule
    return tangent


def _linear(jet, value, function, columns=None):
    """Jet of a linear map: function(J), and columns(tangent) where that stays by columns."""
    if jet.tangent is None:
        tangent = None
    elif isinstance(jet.tangent, Columns) and columns is not None:
        jet.source.n_uses += jet.tangent.is_input
        tangent = columns(jet.tangent)
    else:
        step = Step([_dense(jet)], [], lambda block, J: function(J))
        tangent = jet.source.add(step)
    return _Jet(value, jet.lead, tangent, jet.source)


def _scaled(jet, value, factor):
    """Jet of value = jet * factor + constant."""
    if jet.tangent is None:
        return _Jet(value, jet.lead, None, jet.source)
    n_trailing = value.ndim - jet.lead - 1
    trailing = value.shape[jet.lead + 1 :]
    require(value.ndim == jet.value.ndim and value.shape[jet.lead] == jet.shape[jet.lead])
    if isinstance(jet.tangent, Columns):
        jet.source.n_uses += jet.tangent.is_input
        tangent = Columns(jet.tangent.scale * factor, jet.tangent.columns.expand(trailing))
        return _Jet(value, jet.lead, tangent, jet.source)
    tangent = _dense(jet)
    if isinstance(factor, Tensor):
        # factors are multiplied with each other first: that costs next to nothing
        tangent, known = _unscaled(jet, tangent)
        factor = _padded(factor, jet)
        factor = factor if known is None else known * factor
        tangent = jet.source.add(Scale([tangent], [factor], jet.lead))
    elif factor != 1:
        tangent = jet.source.add(Step([tangent], [], lambda block, J: J * factor))
    if jet.shape != value.shape:

        def spread(block, J):
            return J.expand(*J.shape[: J.ndim - n_trailing], *trailing)

        tangent = jet.source.add(Step([tangent], [], spread))
    return _Jet(value, jet.lead, tangent, jet.source)


def _unscaled(jet, node):
    """What a node is a multiple of, and the factor (None for one)."""
    step = jet.source.steps[node]
    return (step.parents[0], step.tensors[0]) if type(step) is Scale else (node, None)


# Linear maps -----------------------------------------------------------------------------------


@_rule("add", "__add__", "__radd__")
def _add(a, b, alpha=1):
    value = _value(a) + (_value(b) if alpha == 1 else alpha * _value(b))
    if not _is_jet(b):
        return _scaled(a, value, 1.0)
    if not _is_jet(a):
        return _scaled(b, value, alpha)
    return _sum(_scaled(a, value, 1.0), _scaled(b, value, alpha))


@_rule("sub", "__sub__", "subtract")
def _sub(a, b, alpha=1):
    return _add(a, b, alpha=-alpha)


@_rule("rsub", "__rsub__")
def _rsub(a, b):
    return _add(b, a, alpha=-1)


@_rule("neg", "__neg__", "negative")
def _neg(a):
    return _scaled(a, -a.value, -1.0)


def _value(x):
    return x.value if _is_jet(x) else x


def _common(a, b):
    """The source of two jets, whose axes must agree; None if they are of different members."""
    require(a.lead == b.lead)
    return a.source if a.source is b.source else None


def _sum(a, b):
    """Jet of a + b, two jets of the same (total) value."""
    source = _common(a, b)
    s, t = a.tangent, b.tangent
    if source is None or s is None or t is None:
        return _Jet(a.value, a.lead, None, source)
    if _same_columns(s, t):
        tangent = Columns(s.scale + t.scale, s.columns)
    else:
        tangent = source.add(Step([_dense(a), _dense(b)], [], lambda block, J, L: J + L))
    return _Jet(a.value, a.lead, tangent, source)


def _same_columns(s, t):
    both = isinstance(s, Columns) and isinstance(t, Columns)
    return both and s.columns.shape == t.columns.shape and bool((s.columns == t.columns).all())


@_rule("addcmul")
def _addcmul(base, a, b, value=1):
    if _is_jet(a) and not _is_jet(b) and not _is_jet(base) and value == 1:
        return _scaled(a, torch.addcmul(base, a.value, b), b)
    return _add(base, _mul(a, b), alpha=value)


@_rule("linear")
def _linear_layer(h, weight, bias=None):
    require(not _is_jet(weight) and not _is_jet(bias))
    weight = weight.mT
    return _product(h, weight, product(h.value, weight, bias))


@_rule("matmul", "__matmul__", "mm", "mv", "bmm")
def _matmul(h, weight):
    require(_is_jet(h) and not _is_jet(weight))
    return _product(h, weight, product(h.value, weight))


@_rule("addmm", "baddbmm")
def _addmm(bias, h, weight, *, beta=1, alpha=1):
    require(_is_jet(h) and not _is_jet(weight) and not _is_jet(bias))
    require(beta == 1 and alpha == 1)
    return _product(h, weight, product(h.value, weight, bias))


def _product(h, weight, value):
    """Jet of h @ weight; the weights have no axis of rows."""
    lead, tangent = h.lead, h.tangent
    stacked = weight.ndim > 2
    require(h.ndim >= lead + 2)
    require(not stacked or (weight.ndim == 3 and lead == 1 and h.ndim == 3))

    source, d = h.source, h.source.z.shape[-1]
    if tangent is None:
        return _Jet(value, lead, None, source)
    by_column = isinstance(tangent, Columns) and h.ndim == lead + 2 and weight.ndim == lead + 2
    if by_column:
        counts = torch.bincount(tangent.columns, minlength=d)
        by_column = bool((counts == counts[0]).all())
    if not by_column:
        if weight.ndim == 1:
            step = Step([_dense(h)], [weight], lambda block, J, weight: J @ weight)
        else:
            step = Product([_dense(h)], [weight])
    elif tangent.is_input:
        source.n_uses += 1
        step = source.first = FirstProduct([], [weight])
    else:
        order = tangent.columns.argsort(stable=True)
        scale = tangent.scale.expand(*tangent.scale.shape[:-1], len(order))
        scale = scale.index_select(-1, order).unflatten(-1, (d, -1)).transpose(-3, -2)
        weight = weight.index_select(-2, order).unflatten(-2, (d, -1))
        step = ColumnProduct([], [scale, weight])
    return _Jet(value, lead, source.add(step), source)


# Shapes ----------------------------------------------------------------------------------------


def _reshaped(jet, value, function):
    """Jet of a change of shape that leaves the rows and what is in front of them alone."""
    jet.is_view = True

    def columns(tangent):
        shape = tangent.scale.shape[: jet.lead + 1] + jet.shape[jet.lead + 1 :]
        return Columns(function(tangent.scale.expand(shape)), function(tangent.columns))

    result = _linear(jet, value, function, columns=columns)
    result.is_view = True
    return result


@_rule("reshape", "view")
def _reshape(h, *shape):
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    value = h.value.reshape(shape)
    kept = h.lead + 1
    if value.shape[:kept] != h.shape[:kept]:
        # such as the last squeeze: fine, as long as no nonlinear layer follows
        return _Jet(value, h.lead, None, h.source)
    n_old, trailing = h.ndim - kept, value.shape[kept:]
    return _reshaped(h, value, lambda J: J.reshape(J.shape[: J.ndim - n_old] + trailing))


@_rule("flatten")
def _flatten(h, start_dim=0, end_dim=-1):
    return _reshape(h, h.value.flatten(start_dim, end_dim).shape)


@_rule("unflatten")
def _unflatten(h, dim, sizes):
    return _reshape(h, h.value.unflatten(dim, sizes).shape)


@_rule("unsqueeze")
def _unsqueeze(h, dim):
    value = h.value.unsqueeze(dim)
    dim = dim if dim < 0 else dim - value.ndim
    if dim + value.ndim > h.lead:
        return _reshaped(h, value, lambda J: J.unsqueeze(dim))
    tangent = h.tangent
    if isinstance(tangent, Columns):
        tangent = Columns(tangent.scale.unsqueeze(0), tangent.columns, tangent.is_input)
    elif tangent is not None:
        tangent = h.source.add(Step([tangent], [], lambda block, J: J.unsqueeze(0)))
    require(dim + value.ndim == 0)
    return _Jet(value, h.lead + 1, tangent, h.source, is_view=True)


@_rule("squeeze")
def _squeeze(h, dim=None):
    value = h.value.squeeze() if dim is None else h.value.squeeze(dim)
    return _reshape(h, value.shape)


@_rule("__getitem__")
def _getitem(h, index):
    index = index if isinstance(index, tuple) else (index,)
    if len(index) == 1 and isinstance(index[0], int) and h.lead == 1:
        return _select(h, 0, index[0])
    n_axes = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (h.ndim - n_axes) + index[at + 1 :]
    kept = h.lead + 1
    front, rest = index[:kept], index[kept:]
    require(len(front) == kept and all(i == slice(None) for i in front))
    require(sum(not isinstance(i, int | slice | None) for i in rest) <= 1)
    n_trailing = h.ndim - kept

    def take(J):
        return J[(slice(None),) * (J.ndim - n_trailing) + rest]

    return _reshaped(h, h.value[index], take)


@_rule("select")
def _select(h, dim, index):
    dim = dim % h.ndim
    if dim > h.lead:
        return _getitem(h, (slice(None),) * dim + (index,))
    require(dim == 0 and h.lead == 1 and h.value is h.source.z)
    return h.source.member(range(len(h))[index])


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
    dim = dim if dim < 0 else dim - value.ndim
    same = all(_is_jet(j) and j.source is first.source and j.lead == first.lead for j in jets)
    if not same or any(j.tangent is None for j in jets) or dim + value.ndim <= first.lead:
        return _Jet(value, first.lead, None, first.source)
    kept = first.lead + 1
    if all(isinstance(j.tangent, Columns) for j in jets):
        scales = [j.tangent.scale for j in jets]
        front = torch.broadcast_shapes(*(s.shape[:kept] for s in scales))
        scales = [s.expand(front + j.shape[kept:]) for s, j in zip(scales, jets, strict=True)]
        for j in jets:
            first.source.n_uses += j.tangent.is_input
        columns = join([j.tangent.columns for j in jets], dim)
        return _Jet(value, first.lead, Columns(join(scales, dim), columns), first.source)
    trailing = [j.shape[kept:] for j in jets]

    def dense(block, *parts):
        front = torch.broadcast_shapes(*(J.shape[: kept + 1] for J in parts))
        parts = [J.expand(front + t) for J, t in zip(parts, trailing, strict=True)]
        return join(parts, dim)

    step = Step([_dense(j) for j in jets], [], dense)
    return _Jet(value, first.lead, first.source.add(step), first.source)


@_rule("sum")
def _sum_over(h, dim=None, keepdim=False):
    return _reduced(torch.sum, h, dim, keepdim)


@_rule("mean")
def _mean_over(h, dim=None, keepdim=False):
    return _reduced(torch.mean, h, dim, keepdim)


def _reduced(reduce, h, dim, keepdim):
    require(dim is not None)
    dims = [d if d < 0 else d - h.ndim for d in (dim if isinstance(dim, tuple | list) else [dim])]
    require(all(d + h.ndim > h.lead for d in dims))
    trailing = h.shape[h.lead + 1 :]

    def dense(J):
        J = J.expand(J.shape[: J.ndim - len(trailing)] + trailing)
        return reduce(J, dims, keepdim=keepdim)

    return _linear(h, reduce(h.value, dims, keepdim=keepdim), dense)


@_rule("contiguous")
def _contiguous(h):
    return _reshape(h, h.shape)


@_rule("clone")
def _clone(h):
    return _Jet(h.value.clone(), h.lead, h.tangent, h.source)


@_rule("detach")
def _detach(h):
    return h.value.detach()


# Nonlinear layers ------------------------------------------------------------------------------


def _pointwise(h, y, slope, bend):
    """Jet of y = s(h), from s'(h) and s''(h) (None if that is zero)."""
    lead, tangent = h.lead, h.tangent
    require(tangent is not None)
    if bend is not None and isinstance(tangent, Columns):
        h.source.bend(y, lambda delta: by_row(delta * bend * tangent.scale.square(), lead))
    elif bend is not None:
        node, factor = _unscaled(h, tangent)
        if factor is not None:
            bend = bend * (factor.squeeze(lead) if factor.ndim else factor).square()
        h.source.bend(y, lambda delta: Squares([node], [delta * bend], lead))
    return _scaled(h, y, slope)


@_rule("mul", "__mul__", "__rmul__", "multiply")
def _mul(a, b):
    value = _value(a) * _value(b)
    if not _is_jet(b):
        return _scaled(a, value, b)
    if not _is_jet(a):
        return _scaled(b, value, a)
    source, lead = _common(a, b), a.lead
    require(source is not None)
    if a is b:
        return _square(a)
    s, t = a.tangent, b.tangent
    left, right = _scaled(a, value, b.value), _scaled(b, value, a.value)
    if _same_columns(s, t):
        source.bend(value, lambda delta: by_row(2 * delta * s.scale * t.scale, lead))
    else:

        def products(block, J, L, delta):
            return by_row(2 * delta * (J * L).sum(lead), lead)

        parents = [_dense(a), _dense(b)]
        source.bend(value, lambda delta: Share(parents, [delta], products))
    return _sum(left, right)


@_rule("div", "__truediv__", "true_divide")
def _div(a, b):
    if not _is_jet(b):
        return _scaled(a, a.value / b, 1.0 / b)
    return _mul(a, _reciprocal(b))


@_rule("__rtruediv__")
def _rdiv(a, b):
    return _mul(_reciprocal(a), b)


@_rule("reciprocal")
def _reciprocal(h):
    y = h.value.reciprocal()
    return _pointwise(h, y, -y.square(), 2 * y.pow(3))


@_rule("square")
def _square(h):
    return _pointwise(h, h.value.square(), 2 * h.value, torch.full_like(h.value, 2.0))


@_rule("pow", "__pow__")
def _pow(h, exponent):
    require(isinstance(exponent, int | float) and exponent not in (0, 1))
    x, p = h.value, exponent
    return _pointwise(h, x.pow(p), p * x.pow(p - 1), p * (p - 1) * x.pow(p - 2))


@_rule("dropout")
def _dropout(h, p=0.5, training=True, inplace=False):
    if not training:
        return h
    mask = functional.dropout(torch.ones_like(h.value), p, True)
    return _mul(h, mask)


class _LayerNorm(torch.autograd.Function):
    """y = (x - mean) k and k = 1 / standard deviation; y can be differentiated twice."""

    @staticmethod
    def forward(ctx, x, eps):
        ctx.set_materialize_grads(False)
        y, _, k = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(y, k)
        return y, k

    @staticmethod
    def backward(ctx, of_y, of_k):
        y, k = ctx.saved_tensors
        grad = None if of_y is None else _LayerNormBackward.apply(of_y, y, k)
        if of_k is not None:
            along_y = of_k * k.square() / -y.shape[-1]
            grad = along_y * y if grad is None else torch.addcmul(grad, along_y, y)
        return grad, None


class _LayerNormBackward(torch.autograd.Function):
    """k (g - mean(g) - y mean(g y))."""

    @staticmethod
    def forward(ctx, g, y, k):
        ctx.save_for_backward(g, y, k)
        return _projected(g, y, k)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        g, y, k = ctx.saved_tensors
        of_g, inner = _projected(grad, y, k)
        product = g * y
        along = product.mean(-1, keepdim=True)
        of_k = torch.mul(g, of_g, out=product).sum(-1, keepdim=True) / k
        of_y = torch.addcmul(grad * along, g, inner).mul_(-k)
        return of_g, of_y, of_k


def _projected(g, y, k):
    inner = (g * y).mean(-1, keepdim=True)
    return (g - g.mean(-1, keepdim=True)).addcmul_(y, inner, value=-1).mul_(k), inner


def _centred(jet):
    """The node of J - mean(J) over units; after a product, a product with centred weights."""
    node, source = _dense(jet), jet.source
    step = source.steps[node]
    if type(step) in (Product, ColumnProduct):
        *rest, weight = step.tensors
        return source.add(type(step)(step.parents, [*rest, weight - weight.mean(-1, keepdim=True)]))
    return source.add(Step([node], [], lambda block, J: J - J.mean(-1, keepdim=True)))


@_rule("layer_norm")
def _layer_norm(h, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    require(h.tangent is not None and tuple(normalized_shape) == tuple(h.shape[-1:]))
    require(h.ndim > h.lead + 1)
    lead = h.lead
    y, scale = _LayerNorm.apply(h.value, eps)
    step = Normalise([_centred(h)], [y, scale], lead)
    result = h.source.add(step)
    h.source.bend(y, step.with_delta, result)
    jet = _Jet(y, lead, result, h.source)
    if weight is not None:
        jet = _mul(jet, weight)
    return jet if bias is None else _add(jet, bias)


class _SiLU(torch.autograd.Function):
    """y = s(x), s'(x) and s''(x) in few passes; of these, y can be differentiated twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        g = x.sigmoid()
        p = torch.addcmul(g, g, g, value=-1)  # g' = g (1 - g)
        e = torch.rsub(g, 1, alpha=2)  # p' / p
        y, slope = x * g, torch.addcmul(g, x, p)
        bend = torch.mul(x, e, out=g).add_(2).mul_(p)
        third = torch.add(x, e, alpha=3, out=e).addcmul_(x, p, value=-6).mul_(p)
        ctx.save_for_backward(slope, bend, third)
        return y, slope, bend

    @staticmethod
    def backward(ctx, of_y, of_slope, of_bend):
        slope, bend, third = ctx.saved_tensors
        grad = None if of_y is None else of_y * slope
        if of_slope is not None:
            grad = of_slope * bend if grad is None else grad.addcmul_(of_slope, bend)
        if of_bend is not None:
            grad = of_bend * third if grad is None else grad.addcmul_(of_bend, third)
        return grad


class _SinCos(torch.autograd.Function):
    """sin(x) and cos(x), each the slope of the other; differentiable to any order."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        sin, cos = x.sin(), x.cos()
        ctx.save_for_backward(sin, cos)
        return sin, cos

    @staticmethod
    def backward(ctx, of_sin, of_cos):
        sin, cos = ctx.saved_tensors
        if of_sin is None:
            return -of_cos * sin
        grad = of_sin * cos
        return grad if of_cos is None else torch.addcmul(grad, of_cos, sin, value=-1)


def _sin_cos(h):
    if h.waves is None:
        h.waves = _SinCos.apply(h.value)
    return h.waves


@_rule("sin")
def _sin(h):
    sin, cos = _sin_cos(h)
    return _pointwise(h, sin, cos, -sin)


@_rule("cos")
def _cos(h):
    sin, cos = _sin_cos(h)
    return _pointwise(h, cos, -sin, -cos)


@_rule("silu")
def _silu(h, inplace=False):
    result = _pointwise(h, *_SiLU.apply(h.value))
    return _write_into(h, result) if inplace else result


def _tanh(x, y):
    slope = 1 - y.square()
    return slope, -2 * y * slope


def _sigmoid(x, y):
    slope = y * (1 - y)
    return slope, slope * (1 - 2 * y)


def _softplus(x, y, beta=1, threshold=20):
    g = torch.where(beta * x > threshold, 1.0, (beta * x).sigmoid())
    return g, beta * g * (1 - g)


def _logsigmoid(x, y):
    g = (-x).sigmoid()
    return g, g * (g - 1)


def _gelu(x, y, approximate="none"):
    if approximate == "none":
        density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density, density * (2 - x.square())
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = (c * (x + k * x.pow(3))).tanh()
    du, ddu = c * (1 + 3 * k * x.square()), 6 * c * k * x
    dt = (1 - t.square()) * du
    ddt = (1 - t.square()) * ddu - 2 * t * dt * du
    return 0.5 * (1 + t + x * dt), dt + 0.5 * x * ddt


def _mish(x, y):
    g, t = x.sigmoid(), functional.softplus(x).tanh()
    dt = (1 - t.square()) * g
    return t + x * dt, 2 * dt + x * dt * (1 - g - 2 * t * g)


def _elu(x, y, alpha=1.0):
    grown = y + alpha
    return torch.where(x > 0, 1.0, grown), torch.where(x > 0, 0.0, grown)


def _celu(x, y, alpha=1.0):
    grown = y / alpha + 1
    return torch.where(x > 0, 1.0, grown), torch.where(x > 0, 0.0, grown / alpha)


def _selu(x, y):
    scale = 1.0507009873554804934193349852946
    grown = y + scale * 1.6732632423543772848170429916717
    return torch.where(x > 0, scale, grown), torch.where(x > 0, 0.0, grown)


def _leaky_relu(x, y, negative_slope=0.01):
    return torch.where(x > 0, 1.0, x.new_tensor(negative_slope)), None


def _hardtanh(x, y, min_val=-1.0, max_val=1.0):
    return ((x > min_val) & (x < max_val)).to(x.dtype), None


def _clamp(x, y, min=None, max=None):
    inside = torch.ones_like(x, dtype=torch.bool)
    if min is not None:
        inside = inside & (x >= min)
    if max is not None:
        inside = inside & (x <= max)
    return inside.to(x.dtype), None


# name -> s'(x) and s''(x) from x and y = s(x), with the options of the torch function
_POINTWISE = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "logsigmoid": _logsigmoid,
    "gelu": _gelu,
    "mish": _mish,
    "elu": _elu,
    "celu": _celu,
    "selu": _selu,
    "relu": lambda x, y: ((x > 0).to(x.dtype), None),
    "relu6": lambda x, y: (((x > 0) & (x < 6)).to(x.dtype), None),
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "abs": lambda x, y: (x.sign(), None),
    "exp": lambda x, y: (y, y),
    "log": lambda x, y: (1 / x, -1 / x.square()),
    "sqrt": lambda x, y: (0.5 / y, -0.25 / (x * y)),
    "erf": lambda x, y: (
        2 / math.sqrt(math.pi) * (-x.square()).exp(),
        -4 / math.sqrt(math.pi) * x * (-x.square()).exp(),
    ),
}


def _act(torch_function, slopes, h, *args, inplace=False, **kwargs):
    y = torch_function(h.value, *args, **kwargs)
    result = _pointwise(h, y, *slopes(h.value, y, *args, **kwargs))
    return _write_into(h, result) if inplace else result


def _write_into(h, result):
    """The jet h, overwritten; nothing else may look at its numbers."""
    require(not h.is_view)
    require(result.shape == h.shape)
    h.value, h.tangent, h.waves = result.value, result.tangent, None
    return h


def _in_place(rule, h, *args, **kwargs):
    return _write_into(h, rule(h, *args, **kwargs))


for _name, _slopes in _POINTWISE.items():
    for _room in (functional, torch, Tensor):
        if hasattr(_room, _name):
            _function = getattr(_room, _name)
            _RULES[_function] = partial(_act, _function, _slopes)
            if hasattr(_room, _name + "_"):
                _RULES[getattr(_room, _name + "_")] = partial(
                    _act, _function, _slopes, inplace=True
                )

for _name, _function in {"add": _add, "sub": _sub, "mul": _mul, "div": _div}.items():
    _RULES[getattr(Tensor, _name + "_")] = partial(_in_place, _function)


def _operator(name):
    method = getattr(Tensor, name)
    return lambda jet, *args: jet._call(method, *args)


for _name in "add radd sub rsub mul rmul truediv rtruediv pow neg matmul getitem".split():
    setattr(_Jet, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("add", "sub", "mul", "div"):
    _augmented = "__itruediv__" if _name == "div" else f"__i{_name}__"
    setattr(_Jet, _augmented, _operator(_name + "_"))
