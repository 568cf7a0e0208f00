"""The program that carries derivatives along directions through the layers of an energy.

`_jets` records it while an energy is evaluated; here it runs, in blocks of directions that stay in
the cache, and forms the gradients in the parameters in the same pass.
"""

import torch
from torch.autograd.function import once_differentiable

from skebm.energies._products import gradient_of_second, product

# Entries of J, per layer, that are held at a time; they should stay in the cache.
_BLOCK = 1 << 17
# Entries from which sums of products go direction by direction, without memory for the products.
_LOOP = 1 << 12


class NoRule(Exception):
    """The fast path ends here."""


def require(condition):
    if not condition:
        raise NoRule


def stream(steps, n_directions, size):
    """Run steps in blocks of directions, for layers of some size; the curvature, by rows."""
    n_blocks = min(n_directions, max(1, round(size * n_directions / _BLOCK)))
    edges = [n_directions * i // n_blocks for i in range(n_blocks + 1)]
    blocks = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    tensors = [t for step in steps.values() for t in step.tensors]
    return _Stream.apply(steps, blocks, torch.is_grad_enabled(), *tensors)


class _Stream(torch.autograd.Function):
    """Run a program. Derivatives of a single block are kept for the gradients.

    Those of several are not: gradients are formed together with the value, for weight one in every
    row, and scaled by what comes back; only if rows are weighted unequally, the program is run
    again.
    """

    @staticmethod
    def forward(ctx, steps, blocks, with_gradients, *tensors):
        ctx.steps, ctx.blocks, ctx.gradients = steps, blocks, None
        ctx.save_for_backward(*tensors)
        _start(steps, tensors)
        if len(blocks) == 1 or not with_gradients:
            for block in blocks:
                ctx.derivative = _forward(steps, block)
        else:
            ctx.gradients = _gradients(steps, blocks, ctx.needs_input_grad[3:])
        return sum(step.share() for step in steps.values() if step.bends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        steps, blocks, needed = ctx.steps, ctx.blocks, ctx.needs_input_grad[3:]
        weight = grad.flatten()[0]
        if ctx.gradients is None:
            gradients = _gradients(steps, blocks, needed, grad, ctx.derivative)
        elif (grad == weight).all():
            gradients = [g if g is None else g * weight for g in ctx.gradients]
        else:
            _start(steps, ctx.saved_tensors)
            gradients = _gradients(steps, blocks, needed, grad)
        return None, None, None, *gradients


def _start(steps, tensors):
    place = 0
    for step in steps.values():
        step.start(tensors[place : (place := place + len(step.tensors))])


def _forward(steps, block):
    """The derivatives of a block, by step."""
    derivative = {}
    for i, step in steps.items():
        derivative[i] = step.forward(block, *(derivative[p] for p in step.parents))
    return derivative


def _gradients(steps, blocks, needed, weight=None, derivative=None):
    """Gradients of the curvature's (weighted) sum, maybe with the derivatives of the only block."""
    place = 0
    for step in steps.values():
        own = slice(place, place := place + len(step.tensors))
        step.need(needed[own], weight, any(steps[p].wanted for p in step.parents))
    for block in blocks:
        derivatives = _forward(steps, block) if derivative is None else derivative
        grads = {}
        for i, step in reversed(steps.items()):
            grad = grads.pop(i, None)
            if step.wanted and (grad is not None or step.bends):
                step.backward(block, grads, grad, *(derivatives[p] for p in step.parents))
    return [g for step in steps.values() for g in step.gradients()]


def _accumulate(grads, key, grad):
    if key in grads:
        grads[key].add_(grad)
    else:
        grads[key] = grad


class Step:
    """A map of derivatives, (r, n, ...) or (K, r, n, ...) for values (n, ...) or (K, n, ...).

    Parameters
    ----------
    parents : list of int
        Steps whose results it takes.
    tensors : list of Tensor
        What else it depends on.
    function : callable
        ``function(block, *derivatives, *tensors)``; subclasses know its transpose, others get it
        by autograd.
    """

    bends = False  # whether it has a share in the curvature

    def __init__(self, parents, tensors, function=None):
        self.parents, self.tensors, self.function = parents, tensors, function
        self.kept = {}

    def start(self, tensors):
        """Begin to go forward, with the present tensors."""
        self.values = tensors

    def need(self, needed, weight, up):
        """Begin to go backward: which gradients are needed, and weights of the rows.

        `up` says whether gradients are needed further up, in what the parents depend on.
        """
        self.needed, self.weight, self.up = needed, weight, up
        self.wanted = up or any(needed)
        self.sums = [None] * len(needed)

    def gradients(self):
        """After the last block: gradients in the tensors, None for zero."""
        return self.sums

    def add(self, place, part):
        """Add to the gradient in a tensor."""
        if self.needed[place]:
            total = self.sums[place]
            if total is None:
                self.sums[place] = part.expand_as(self.values[place]).clone()
            else:
                total.add_(part)

    def forward(self, block, *derivatives):
        return self.function(block, *derivatives, *self.values)

    def backward(self, block, grads, grad, *derivatives):
        """Add to the gradients, and to `grads` of the parents; `grad` may be overwritten."""
        derivatives = [J.detach().requires_grad_() for J in derivatives]
        tensors = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(self.values, self.needed, strict=True)
        ]
        inputs = [t for t in (*derivatives, *tensors) if t.requires_grad]
        if not inputs:
            return
        with torch.enable_grad():
            result = self.function(block, *derivatives, *tensors)
        grad = _weighted(torch.ones_like(result), self.weight) if grad is None else grad
        found = torch.autograd.grad(result, inputs, grad, materialize_grads=True)
        for p, g in zip(self.parents, found, strict=False):
            _accumulate(grads, p, g.clone(memory_format=torch.contiguous_format))
        places = [place for place, needed in enumerate(self.needed) if needed]
        for place, g in zip(places, found[len(self.parents) :], strict=True):
            self.add(place, g)

    def part(self, place, axis, block):
        """The part of a gradient that is that of a block alone."""
        if self.sums[place] is None:
            self.sums[place] = torch.empty_like(self.values[place])
        return self.sums[place].narrow(axis, *block)

    def keep(self, key, function, *args):
        """Result of a function in memory that the next block uses again."""
        known = self.kept.get(key)
        self.kept[key] = function(*args) if known is None else function(*args, out=known)
        return self.kept[key]


class Scale(Step):
    """J times a factor."""

    def __init__(self, parents, tensors, lead):
        super().__init__(parents, tensors)
        self.lead = lead

    def need(self, *args):
        super().need(*args)
        self.total = None

    def gradients(self):
        if self.total is None:
            return [None]
        return [self.total.unsqueeze(self.lead).sum_to_size(self.values[0].shape)]

    def forward(self, block, J):
        return self.keep(("J", block[1]), torch.mul, J, self.values[0])

    def backward(self, block, grads, grad, J):
        (factor,), (parent,) = self.values, self.parents
        if self.needed[0]:
            self.total = _plus_products(self.total, grad, J, self.lead)
        if self.up:
            _accumulate(grads, parent, grad.mul_(factor).sum_to_size(J.shape))


class Product(Step):
    """J @ W, with W (w, v) or one per member (K, w, v)."""

    def forward(self, block, J):
        (weight,) = self.values
        result = self.keep(("J", block[1]), product, self._rows(J), weight)
        return result.view(*J.shape[:-1], -1)

    def backward(self, block, grads, grad, J):
        (weight,), (parent,) = self.values, self.parents
        rows = self._rows(grad)
        if self.needed[0]:
            self.add(0, gradient_of_second(self._rows(J), weight, rows))
        if self.up:
            result = self.keep(("grad", block[1]), product, rows, weight.mT)
            _accumulate(grads, parent, result.view(J.shape))

    def _rows(self, J):
        weight = self.values[0]
        require(weight.ndim == 2 or len(J) == len(weight))  # not if J is shared by the members
        return J.reshape(*weight.shape[:-2], -1, J.shape[-1])


class FirstProduct(Step):
    """Derivatives of z @ W: the rows of W, the same for all rows of z."""

    basis = None

    def reduce(self, n_directions):
        """Number of directions that are enough if z enters here alone.

        Those in the range of W. Their basis may be taken as constant: along the others, second
        derivatives are zero, and so is their change with the weights.
        """
        (weight,) = self.tensors
        if weight.shape[-1] >= n_directions:
            return n_directions
        self.basis = torch.linalg.qr(weight.detach()).Q
        return weight.shape[-1]

    def forward(self, block):
        (weight,) = self.values
        if self.basis is None:
            return weight.narrow(-2, *block).contiguous().unsqueeze(-2)
        return (self.basis.narrow(-1, *block).mT @ weight).unsqueeze(-2)

    def backward(self, block, grads, grad):
        grad = grad.squeeze(-2)
        if self.basis is not None:
            self.add(0, self.basis.narrow(-1, *block) @ grad)
        elif self.needed[0]:
            self.part(0, -2, block).copy_(grad)


class ColumnProduct(Step):
    """Derivatives of h @ W where entries of h depend on one column of z each.

    Scales (..., d, n, m) times weights (..., d, m, w): the Jacobian of a layer that works column by
    column is never spread out.
    """

    def forward(self, block):
        scale, weight = (t.narrow(-3, *block) for t in self.values)
        return self.keep(("J", block[1]), torch.matmul, scale, weight)

    def backward(self, block, grads, grad):
        scale, weight = (t.narrow(-3, *block) for t in self.values)
        if self.needed[0]:
            self.part(0, -3, block).copy_((grad @ weight.mT).sum_to_size(scale.shape))
        if self.needed[1]:
            self.part(1, -3, block).copy_((scale.mT @ grad).sum_to_size(weight.shape))


class Share(Step):
    """A share in the curvature, and nothing that goes forward."""

    bends = True

    def start(self, tensors):
        super().start(tensors)
        self.total = 0.0

    def forward(self, block, *derivatives):
        self.total = self.total + self.function(block, *derivatives, *self.values)

    def share(self):
        return self.total


class Squares(Step):
    """Sum over directions and units of coefficient * J^2."""

    bends = True

    def __init__(self, parents, tensors, lead):
        super().__init__(parents, tensors)
        self.lead = lead

    def start(self, tensors):
        super().start(tensors)
        self.square = None

    def need(self, *args):
        super().need(*args)
        self.factor = None

    def forward(self, block, J):
        self.square = _plus_products(self.square, J, J, self.lead)

    def backward(self, block, grads, grad, J):
        (coefficient,), (parent,) = self.values, self.parents
        if self.factor is None:
            weighted = _weighted(coefficient, self.weight)
            self.factor = weighted.mul(2).sum_to_size(self.square.shape).unsqueeze(self.lead)
        if parent in grads:
            grads[parent].addcmul_(J, self.factor)
        else:
            grads[parent] = self.keep(("grad", block[1]), torch.mul, J, self.factor)

    def share(self):
        return by_row(self.values[0] * self.square, self.lead)

    def gradients(self):
        return [_weighted(self.square, self.weight).expand_as(self.values[0])]


class Normalise(Step):
    r"""Derivatives of y = (h - mean) k, k = 1 / standard deviation, along centred directions a.

    .. math:: y' = k (a - m y), \quad y'' = -k (2 m y' + m' y), \qquad
        m = \overline{y a},\ m' = \overline{y' a},

    and the share in the curvature is the sum of :math:`\langle \delta, y'' \rangle`. With
    :math:`u = \delta \cdot a,\ v = \overline{a^2},\ q = \delta \cdot y` it is
    :math:`-k^2 (2 m u - 3 q m^2 + q v)`.
    """

    bends = True

    def __init__(self, parents, tensors, lead):
        super().__init__(parents, tensors)
        self.lead = lead

    def with_delta(self, delta):
        self.tensors.append(delta)
        return self

    def start(self, tensors):
        super().start(tensors)
        y, _, delta = tensors
        self.q = (delta * y).sum(-1, keepdim=True)
        self.bent = torch.zeros_like(self.q)

    def need(self, *args):
        super().need(*args)
        self.of_q = torch.zeros_like(self.q)

    def forward(self, block, a):
        y, k, delta, q = (t.unsqueeze(self.lead) for t in (*self.values, self.q))
        m = self._product(block, a, y).mean(-1, keepdim=True)
        u = self._product(block, a, delta).sum(-1, keepdim=True)
        v = self.keep(("square", block[1]), torch.mul, a, a).mean(-1, keepdim=True)
        self.bent -= (k.square() * (m * (2 * u - 3 * q * m) + q * v)).sum(self.lead)
        self.moments = m, u, v
        return self.keep(("J", block[1]), torch.mul, a, k).addcmul_(y, -k * m)

    def backward(self, block, grads, grad, a):
        y, k, delta, q = (t.unsqueeze(self.lead) for t in (*self.values, self.q))
        (m, u, v), lead, width = self.moments, self.lead, a.shape[-1]
        kk = _weighted(self.values[1].square(), self.weight).unsqueeze(lead)
        along_y, along_delta = kk * (6 * q * m - 2 * u) / width, -2 * kk * m
        self.of_q += (kk * (3 * m.square() - v)).sum(lead)
        if grad is None:
            grad = torch.zeros_like(a * y)
        else:
            h = self._product(block, grad, y).sum(-1, keepdim=True)
            e = self._product(block, grad, a).sum(-1, keepdim=True)
            along_y -= k * h / width
            self.add(0, _over(self._product(block, grad, -k * m), lead))
            self.add(1, (e - m * h).sum(lead))
        self.add(0, _over(self._product(block, a, along_y), lead))
        self.add(2, _over(self._product(block, a, along_delta), lead))
        grad.mul_(k).addcmul_(y, along_y).addcmul_(delta, along_delta)
        grad.addcmul_(a, -2 * kk * q / width)
        _accumulate(grads, self.parents[0], grad.sum_to_size(a.shape))

    def share(self):
        return by_row(self.bent, self.lead)

    def gradients(self):
        y, k, delta = self.values
        self.add(0, delta * self.of_q)
        self.add(1, _weighted(2 * self.bent / k, self.weight))
        self.add(2, y * self.of_q)
        return self.sums

    def _product(self, block, a, b):
        return self.keep(("product", block[1]), torch.mul, a, b)


def _plus_products(total, a, b, lead):
    """The sum over directions of a * b, added to a total (None for nothing)."""
    if a.select(lead, 0).numel() < _LOOP:
        part = _over(a * b, lead)
        return part if total is None else total.add_(part)
    pairs = zip(a.unbind(lead), b.unbind(lead), strict=True)
    if total is None:
        total = torch.mul(*next(pairs))
    for pair in pairs:
        total.addcmul_(*pair)
    return total


def _over(x, lead):
    """Sum over directions; that of a single one need not be computed."""
    return x.squeeze(lead) if x.shape[lead] == 1 else x.sum(lead)


def _weighted(values, weight):
    """Values by row times the weights of the rows, None if these are one."""
    if weight is None:
        return values
    return values * weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))


def by_row(x, lead):
    """Sum over the axes behind the rows."""
    return x.flatten(lead + 1).sum(-1) if x.ndim > lead + 1 else x


class Columns:
    """Derivatives of entries that depend on one column of z each.

    `scale` has the shape of the value, or one that broadcasts to it, and ``columns`` (the shape of
    the value behind the rows) says which column an entry depends on.
    """

    def __init__(self, scale, columns, is_input=False):
        self.scale, self.columns, self.is_input = scale, columns, is_input
