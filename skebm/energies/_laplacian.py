r"""Value, gradient and Laplacian of an energy in one forward and one reverse sweep.

Score matching trains on :math:`\tfrac12 |\nabla f|^2 + \Delta f`. A loop of d backward passes is
the usual way to the Laplacian; here it costs one forward sweep of directions. With the outputs
:math:`y_l` of the nonlinear layers, :math:`\delta_l = \partial f / \partial y_l` of one reverse
sweep, and J the derivatives along the directions that are summed over,

.. math:: \Delta f = \sum_l \langle \delta_l, C_l \rangle, \qquad
    C_l = \sum_r y_l''[J_r, J_r] \quad (= s''(h_l) \sum_r J_r^2 \text{ for } y_l = s(h_l)),

so that second derivatives are never streamed, and nothing is after the last nonlinear layer.
"""

import math
from contextlib import nullcontext, suppress
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from skebm.energies._stack import ModuleStack, _seeded_global_rng

__all__ = ["derivatives"]

# Entries of J, per layer, that are held at a time; they should stay in the cache.
_BLOCK = 1 << 17


def derivatives(energy, z, directions=None):
    r"""Value, gradient and Laplacian (or second derivatives along directions) of an energy.

    All three can be differentiated once more with respect to the parameters of the energy, not
    with respect to `z`: ``(0.5 * gradient.square().sum(-1) + curvature).mean().backward()`` is a
    step of score matching.

    Rows must not interact. A function that is linear between kinks (ReLU,
    :class:`~skebm.energies.PiecewiseLinearEmbedding`) has second derivative zero there; what its
    kinks would add to the Laplacian is left out, as by any other automatic differentiation.

    Parameters
    ----------
    energy : StackedEnergy, torch.nn.Module or callable
        A stack (K, n, d) -> (K, n), or any function (n, d) -> (n,) or (n, 1). The usual layers
        have fast rules, also with residual sums and Python control flow; anything else is
        differentiated by d (or P) double backward passes, to the same result.
    z : Tensor of shape (K, n, d) or (n, d)
        Where to evaluate.
    directions : Tensor of shape (K, P, n, d) or (P, n, d), optional
        Vectors v, with the axis of the P directions in front of the axis of the rows. All unit
        vectors by default.

    Returns
    -------
    value : Tensor of shape (K, n) or (n,)
        f.
    gradient : Tensor of shape (K, n, d) or (n, d)
        Gradient of f in z.
    curvature : Tensor of shape (K, n) or (n,)
        The Laplacian :math:`\Delta f`, or with `directions` the sum of :math:`v^T \nabla^2 f\, v`
        over them.

    References
    ----------
    Hyvärinen, A. (2005). Estimation of non-normalized statistical models by score matching. JMLR
    6. https://jmlr.org/papers/v6/hyvarinen05a.html

    Song, Y., Garg, S., Shi, J. and Ermon, S. (2019). Sliced score matching. UAI.
    https://arxiv.org/abs/1905.07088

    Li, R. et al. (2024). A computational framework for neural network-based variational Monte
    Carlo with forward Laplacian. Nature Machine Intelligence 6. https://arxiv.org/abs/2307.08214

    Dangel, F. et al. (2025). Collapsing Taylor mode automatic differentiation. NeurIPS.
    https://arxiv.org/abs/2505.13644

    Examples
    --------
    >>> import torch
    >>> from skebm.energies import derivatives
    >>> z = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> with torch.no_grad():  # no need of gradients in the parameters
    ...     derivatives(lambda z: (z**3).sum(-1), z)
    (tensor([ 9., 27.]), tensor([[ 3., 12.], [ 0., 27.]]), tensor([18., 18.]))
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        result = None
        # a layer without a rule; an error of the user's shows up again below
        with suppress(Exception):
            result = _by_jets(energy, z, directions, create_graph)
        if result is None:
            result = _by_double_backward(energy, z, directions, create_graph)
    return result if create_graph else tuple(part.detach() for part in result)


def _by_double_backward(energy, z, directions, create_graph):
    """The same by one more backward pass per direction."""
    with _Primitives(), sdpa_kernel(SDPBackend.MATH):
        value = _rows(energy(z), z)
    (gradient,) = _grad(value.sum(), [z], create_graph=True)
    if directions is None:
        directions = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).unsqueeze(1)
    curvature = torch.zeros_like(value)
    for v in directions.unbind(-3):
        (product,) = _grad((gradient * v).sum(), [z], create_graph=create_graph)
        curvature = curvature + (product * v).sum(-1)
    return value, gradient, curvature


class _Primitives(TorchFunctionMode):
    """``layer_norm`` in elementary steps.

    The third derivative of the fused form is silently wrong, up to torch 2.13 at least:
    https://github.com/pytorch/pytorch/issues/175754
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (functional.layer_norm, torch.layer_norm):
            return _layer_norm_by_steps(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _layer_norm_by_steps(x, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _grad(output, inputs, create_graph):
    """Gradients, zero where the output does not depend on an input."""
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad(
        output, inputs, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )


def _rows(value, z):
    rows = z.shape[:-1]
    if not isinstance(value, Tensor) or value.shape not in (rows, (*rows, 1)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"energy must map z of shape {tuple(z.shape)} to one value per row, got {got}."
        )
    return value.reshape(rows)


def _by_jets(energy, z, directions, create_graph):
    if isinstance(energy, ModuleStack):
        jet, source = _through_members(energy, z, directions)
    else:
        source = _Source(z, directions)
        jet = energy(source.jet())
    value = _rows(jet.value, source.z).reshape(z.shape[:-1])
    sources = [source, *source.members.values()]
    outputs = [y for s in sources for y, _, _ in s.bends]
    gradient, *deltas = _grad(value.sum(), [z, *outputs], create_graph=create_graph)
    deltas = iter(deltas)
    with torch.set_grad_enabled(create_graph):
        parts = [s.curvature([next(deltas) for _ in s.bends]) for s in sources]
        curvature = parts[0].reshape(value.shape)
        if source.members:
            curvature = curvature + torch.stack(parts[1:]).reshape(value.shape)
    return value, gradient, curvature


def _through_members(energy, z, directions):
    """What ModuleStack does, but for its check that modules return tensors."""
    if z.ndim == 2:
        z, directions = z.unsqueeze(0), None if directions is None else directions.unsqueeze(0)
    source = _Source(z, directions)
    energy._next_seed += energy.training
    with _seeded_global_rng(energy._next_seed, z.device) if energy.training else nullcontext():
        values = [u(rows) for u, rows in zip(energy.members, source.jet(), strict=True)]
    values = torch.stack([value.reshape(z.shape[1]) for value in values])
    return energy.gain.unsqueeze(-1) * values, source


class _NoRule(Exception):
    """The fast path ends here."""


class _Source:
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
            tangent = _Columns(one, columns, is_input=True)
        else:
            step = _Step([], [self.directions], lambda block, v: v.narrow(-3, *block))
            tangent = self.add(step)
        return _Jet(self.z, self.lead, tangent, self, is_view=True)

    def member(self, k):
        """Rows k of a stack as an input of their own."""
        if not self.members:
            vectors = [None] * len(self.z) if self.directions is None else self.directions
            self.members = dict(enumerate(map(_Source, self.z, vectors)))
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
        return total + _stream(steps, n_directions, size)


def _stream(steps, n_directions, size):
    """Run steps in blocks of directions, for layers of some size; the curvature, by rows."""
    n_blocks = min(n_directions, max(1, round(size * n_directions / _BLOCK)))
    edges = [n_directions * i // n_blocks for i in range(n_blocks + 1)]
    blocks = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    tensors = [t for step in steps.values() for t in step.tensors]
    return _Stream.apply(steps, blocks, torch.is_grad_enabled(), *tensors)


class _Stream(torch.autograd.Function):
    """Run a program, and keep nothing but gradients.

    They are formed together with the value, for weight one in every row, and scaled by what comes
    back; only if rows are weighted unequally, the program is run again.
    """

    @staticmethod
    def forward(ctx, steps, blocks, with_gradients, *tensors):
        ctx.steps, ctx.blocks = steps, blocks
        ctx.save_for_backward(*tensors)
        needed = ctx.needs_input_grad[3:] if with_gradients else None
        curvature, ctx.gradients = _run(steps, blocks, tensors, needed)
        return curvature

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight = grad.flatten()[0]
        if (grad == weight).all():
            gradients = [g if g is None else g * weight for g in ctx.gradients]
        else:
            needed = ctx.needs_input_grad[3:]
            _, gradients = _run(ctx.steps, ctx.blocks, ctx.saved_tensors, needed, grad)
        return None, None, None, *gradients


def _run(steps, blocks, tensors, needed=None, weight=None):
    """Curvature by rows, and gradients of its (weighted) sum in the tensors that need them."""
    needed = needed or [False] * len(tensors)
    sums = [torch.zeros_like(t) if n else None for t, n in zip(tensors, needed, strict=True)]
    place = 0
    for step in steps.values():
        own = slice(place, place := place + len(step.tensors))
        step.start(tensors[own], sums[own], weight)
    for block in blocks:
        derivative, grads = {}, {}
        for i, step in steps.items():
            derivative[i] = step.forward(block, *(derivative[p] for p in step.parents))
        for i, step in reversed(steps.items()) if any(needed) else ():
            grad = grads.pop(i, None)
            if grad is not None or step.bends:
                step.backward(block, grads, grad, *(derivative[p] for p in step.parents))
    shares = [step.finish() for step in steps.values() if step.bends]
    return sum(shares), sums


def _accumulate(grads, key, grad):
    if key in grads:
        grads[key].add_(grad)
    else:
        grads[key] = grad


class _Step:
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

    def start(self, tensors, sums, weight):
        """Begin a run: detached tensors, sums of their gradients (or None), weights of rows."""
        self.values, self.sums, self.weight = tensors, sums, weight

    def forward(self, block, *derivatives):
        return self.function(block, *derivatives, *self.values)

    def backward(self, block, grads, grad, *derivatives):
        """Add gradients to `sums`, and to `grads` of the parents; `grad` may be overwritten."""
        derivatives = [J.detach().requires_grad_() for J in derivatives]
        tensors = [
            t.detach().requires_grad_(s is not None)
            for t, s in zip(self.values, self.sums, strict=True)
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
        sums = [s for s in self.sums if s is not None]
        for s, g in zip(sums, found[len(self.parents) :], strict=True):
            s += g

    def keep(self, key, function, *args):
        """Result of a function in memory that the next block uses again."""
        known = self.kept.get(key)
        self.kept[key] = function(*args) if known is None else function(*args, out=known)
        return self.kept[key]


class _Scale(_Step):
    """J times a factor."""

    def forward(self, block, J):
        return self.keep(("J", block[1]), torch.mul, J, self.values[0])

    def backward(self, block, grads, grad, J):
        (factor,), (total,), (parent,) = self.values, self.sums, self.parents
        if total is not None:
            total += self.keep(("product", block[1]), torch.mul, grad, J).sum_to_size(factor.shape)
        _accumulate(grads, parent, grad.mul_(factor).sum_to_size(J.shape))


class _Product(_Step):
    """J @ W, with W (w, v) or one per member (K, w, v)."""

    def forward(self, block, J):
        (weight,) = self.values
        result = self.keep(("J", block[1]), torch.matmul, self._rows(J), weight)
        return result.view(*J.shape[:-1], -1)

    def backward(self, block, grads, grad, J):
        (weight,), (total,), (parent,) = self.values, self.sums, self.parents
        rows = self._rows(grad)
        if total is not None:
            add = total.addmm_ if weight.ndim == 2 else total.baddbmm_
            add(self._rows(J).mT, rows)
        result = self.keep(("grad", block[1]), torch.matmul, rows, weight.mT)
        _accumulate(grads, parent, result.view(J.shape))

    def _rows(self, J):
        weight = self.values[0]
        _require(weight.ndim == 2 or len(J) == len(weight))  # not if J is shared by the members
        return J.reshape(*weight.shape[:-2], -1, J.shape[-1])


class _FirstProduct(_Step):
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
        (total,) = self.sums
        if total is None:
            return
        if self.basis is None:
            total.narrow(-2, *block).add_(grad.squeeze(-2))
        else:
            total += self.basis.narrow(-1, *block) @ grad.squeeze(-2)


class _ColumnProduct(_Step):
    """Derivatives of h @ W where entries of h depend on one column of z each.

    Scales (..., d, n, m) times weights (..., d, m, w): the Jacobian of a layer that works column by
    column is never spread out.
    """

    def forward(self, block):
        scale, weight = (t.narrow(-3, *block) for t in self.values)
        return self.keep(("J", block[1]), torch.matmul, scale, weight)

    def backward(self, block, grads, grad):
        scale, weight = (t.narrow(-3, *block) for t in self.values)
        of_scale, of_weight = (s if s is None else s.narrow(-3, *block) for s in self.sums)
        if of_scale is not None:
            of_scale += (grad @ weight.mT).sum_to_size(scale.shape)
        if of_weight is not None:
            of_weight += (scale.mT @ grad).sum_to_size(weight.shape)


class _Share(_Step):
    """A share in the curvature, and nothing that goes forward."""

    bends = True

    def start(self, *args):
        super().start(*args)
        self.total = 0.0

    def forward(self, block, *derivatives):
        self.total = self.total + self.function(block, *derivatives, *self.values)

    def finish(self):
        return self.total


class _Squares(_Step):
    """Sum over directions and units of coefficient * J^2."""

    bends = True

    def __init__(self, parents, tensors, lead):
        super().__init__(parents, tensors)
        self.lead = lead

    def start(self, *args):
        super().start(*args)
        self.square = self.factor = None

    def forward(self, block, J):
        square = _over(self.keep(("square", block[1]), torch.mul, J, J), self.lead)
        if self.square is None:
            self.square = square
            self.kept.clear()  # it may be a view of that
        else:
            self.square += square

    def backward(self, block, grads, grad, J):
        (coefficient,), (parent,) = self.values, self.parents
        if self.factor is None:
            weighted = _weighted(coefficient, self.weight)
            self.factor = weighted.mul(2).sum_to_size(self.square.shape).unsqueeze(self.lead)
        if parent in grads:
            grads[parent].addcmul_(J, self.factor)
        else:
            grads[parent] = self.keep(("grad", block[1]), torch.mul, J, self.factor)

    def finish(self):
        (coefficient,), (total,) = self.values, self.sums
        if total is not None:
            total.add_(_weighted(self.square, self.weight))
        return _by_row(coefficient * self.square, self.lead)


class _Normalise(_Step):
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

    def start(self, *args):
        super().start(*args)
        y, _, delta = self.values
        self.q = (delta * y).sum(-1, keepdim=True)
        self.bent, self.of_q = torch.zeros_like(self.q), torch.zeros_like(self.q)

    def forward(self, block, a):
        y, k, delta, q = (t.unsqueeze(self.lead) for t in (*self.values, self.q))
        m = self._product(block, a, y).mean(-1, keepdim=True)
        u = self._product(block, a, delta).sum(-1, keepdim=True)
        v = torch.linalg.vector_norm(a, dim=-1, keepdim=True).square_() / a.shape[-1]
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
            self._add(0, _over(self._product(block, grad, -k * m), lead))
            self._add(1, (e - m * h).sum(lead))
        self._add(0, _over(self._product(block, a, along_y), lead))
        self._add(2, _over(self._product(block, a, along_delta), lead))
        grad.mul_(k).addcmul_(y, along_y).addcmul_(delta, along_delta)
        grad.addcmul_(a, -2 * kk * q / width)
        _accumulate(grads, self.parents[0], grad.sum_to_size(a.shape))

    def finish(self):
        y, k, delta = self.values
        self._add(0, delta * self.of_q)
        self._add(1, _weighted(2 * self.bent / k, self.weight))
        self._add(2, y * self.of_q)
        return _by_row(self.bent, self.lead)

    def _product(self, block, a, b):
        return self.keep(("product", block[1]), torch.mul, a, b)

    def _add(self, place, part):
        if self.sums[place] is not None:
            self.sums[place] += part


def _over(x, lead):
    """Sum over directions; that of a single one need not be computed."""
    return x.squeeze(lead) if x.shape[lead] == 1 else x.sum(lead)


def _weighted(values, weight):
    """Values by row times the weights of the rows, None if these are one."""
    if weight is None:
        return values
    return values * weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))


def _by_row(x, lead):
    """Sum over the axes behind the rows."""
    return x.flatten(lead + 1).sum(-1) if x.ndim > lead + 1 else x


class _Columns:
    """Derivatives of entries that depend on one column of z each.

    `scale` has the shape of the value, or one that broadcasts to it, and ``columns`` (the shape of
    the value behind the rows) says which column an entry depends on.
    """

    def __init__(self, scale, columns, is_input=False):
        self.scale, self.columns, self.is_input = scale, columns, is_input


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
            raise _NoRule(function)
        return _RULES[function](*args, **(kwargs or {}))

    def __getattr__(self, name):
        if name in _ATTRIBUTES:
            return getattr(self.value, name)
        _require(callable(getattr(Tensor, name)))
        return partial(self._call, getattr(Tensor, name))

    def _call(self, method, *args, **kwargs):
        return self.__torch_function__(method, (), (self, *args), kwargs)

    def __len__(self):
        return len(self.value)

    def __iter__(self):
        return iter([self[k] for k in range(len(self))])

    def __bool__(self):
        raise _NoRule

    def __eq__(self, other):
        raise _NoRule

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


def _require(condition):
    if not condition:
        raise _NoRule


def _padded(constant, jet):
    """A constant that broadcasts against a value, made to broadcast against its derivatives."""
    if constant.ndim == 0:
        return constant
    _require(constant.ndim <= jet.value.ndim)
    missing = jet.value.ndim - constant.ndim
    return constant.reshape((1,) * missing + constant.shape).unsqueeze(jet.lead)


def _dense(jet):
    """The node of the derivatives of a jet."""
    tangent = jet.tangent
    if isinstance(tangent, _Columns):
        source, lead = jet.source, jet.lead
        source.n_uses += tangent.is_input

        def select(block, scale, columns=tangent.columns):
            number = torch.arange(block[0], sum(block), device=columns.device)
            hit = columns == number.reshape(-1, *(1,) * (columns.ndim + 1))
            return scale.unsqueeze(lead) * hit

        return source.add(_Step([], [tangent.scale], select))
    if tangent is None:
        raise _NoRule
    return tangent


def _linear(jet, value, function, columns=None):
    """Jet of a linear map: function(J), and columns(tangent) where that stays by columns."""
    if jet.tangent is None:
        tangent = None
    elif isinstance(jet.tangent, _Columns) and columns is not None:
        jet.source.n_uses += jet.tangent.is_input
        tangent = columns(jet.tangent)
    else:
        step = _Step([_dense(jet)], [], lambda block, J: function(J))
        tangent = jet.source.add(step)
    return _Jet(value, jet.lead, tangent, jet.source)


def _scaled(jet, value, factor):
    """Jet of value = jet * factor + constant."""
    if jet.tangent is None:
        return _Jet(value, jet.lead, None, jet.source)
    n_trailing = value.ndim - jet.lead - 1
    trailing = value.shape[jet.lead + 1 :]
    _require(value.ndim == jet.value.ndim and value.shape[jet.lead] == jet.shape[jet.lead])
    if isinstance(jet.tangent, _Columns):
        jet.source.n_uses += jet.tangent.is_input
        tangent = _Columns(jet.tangent.scale * factor, jet.tangent.columns.expand(trailing))
        return _Jet(value, jet.lead, tangent, jet.source)
    tangent = _dense(jet)
    if isinstance(factor, Tensor):
        tangent = jet.source.add(_Scale([tangent], [_padded(factor, jet)]))
    elif factor != 1:
        tangent = jet.source.add(_Step([tangent], [], lambda block, J: J * factor))
    if jet.shape != value.shape:

        def spread(block, J):
            return J.expand(*J.shape[: J.ndim - n_trailing], *trailing)

        tangent = jet.source.add(_Step([tangent], [], spread))
    return _Jet(value, jet.lead, tangent, jet.source)


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
    _require(a.lead == b.lead)
    return a.source if a.source is b.source else None


def _sum(a, b):
    """Jet of a + b, two jets of the same (total) value."""
    source = _common(a, b)
    s, t = a.tangent, b.tangent
    if source is None or s is None or t is None:
        return _Jet(a.value, a.lead, None, source)
    if _same_columns(s, t):
        tangent = _Columns(s.scale + t.scale, s.columns)
    else:
        tangent = source.add(_Step([_dense(a), _dense(b)], [], lambda block, J, L: J + L))
    return _Jet(a.value, a.lead, tangent, source)


def _same_columns(s, t):
    both = isinstance(s, _Columns) and isinstance(t, _Columns)
    return both and s.columns.shape == t.columns.shape and bool((s.columns == t.columns).all())


@_rule("addcmul")
def _addcmul(base, a, b, value=1):
    if _is_jet(a) and not _is_jet(b) and not _is_jet(base) and value == 1:
        return _scaled(a, torch.addcmul(base, a.value, b), b)
    return _add(base, _mul(a, b), alpha=value)


@_rule("linear")
def _linear_layer(h, weight, bias=None):
    _require(not _is_jet(weight) and not _is_jet(bias))
    return _product(h, weight.mT, functional.linear(h.value, weight, bias))


@_rule("matmul", "__matmul__", "mm", "mv", "bmm")
def _matmul(h, weight):
    _require(_is_jet(h) and not _is_jet(weight))
    return _product(h, weight, h.value @ weight)


@_rule("addmm", "baddbmm")
def _addmm(bias, h, weight, *, beta=1, alpha=1):
    _require(_is_jet(h) and not _is_jet(weight) and not _is_jet(bias))
    _require(beta == 1 and alpha == 1)
    function = torch.baddbmm if h.ndim == 3 else torch.addmm
    return _product(h, weight, function(bias, h.value, weight))


def _product(h, weight, value):
    """Jet of h @ weight; the weights have no axis of rows."""
    lead, tangent = h.lead, h.tangent
    stacked = weight.ndim > 2
    _require(h.ndim >= lead + 2)
    _require(not stacked or (weight.ndim == 3 and lead == 1 and h.ndim == 3))

    source, d = h.source, h.source.z.shape[-1]
    if tangent is None:
        return _Jet(value, lead, None, source)
    by_column = isinstance(tangent, _Columns) and h.ndim == lead + 2 and weight.ndim == lead + 2
    if by_column:
        counts = torch.bincount(tangent.columns, minlength=d)
        by_column = bool((counts == counts[0]).all())
    if not by_column:
        if weight.ndim == 1:
            step = _Step([_dense(h)], [weight], lambda block, J, weight: J @ weight)
        else:
            step = _Product([_dense(h)], [weight])
    elif tangent.is_input:
        source.n_uses += 1
        step = source.first = _FirstProduct([], [weight])
    else:
        order = tangent.columns.argsort(stable=True)
        scale = tangent.scale.expand(*tangent.scale.shape[:-1], len(order))
        scale = scale.index_select(-1, order).unflatten(-1, (d, -1)).transpose(-3, -2)
        weight = weight.index_select(-2, order).unflatten(-2, (d, -1))
        step = _ColumnProduct([], [scale, weight])
    return _Jet(value, lead, source.add(step), source)


# Shapes ----------------------------------------------------------------------------------------


def _reshaped(jet, value, function):
    """Jet of a change of shape that leaves the rows and what is in front of them alone."""
    jet.is_view = True

    def columns(tangent):
        shape = tangent.scale.shape[: jet.lead + 1] + jet.shape[jet.lead + 1 :]
        return _Columns(function(tangent.scale.expand(shape)), function(tangent.columns))

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
    if isinstance(tangent, _Columns):
        tangent = _Columns(tangent.scale.unsqueeze(0), tangent.columns, tangent.is_input)
    elif tangent is not None:
        tangent = h.source.add(_Step([tangent], [], lambda block, J: J.unsqueeze(0)))
    _require(dim + value.ndim == 0)
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
    _require(len(front) == kept and all(i == slice(None) for i in front))
    _require(sum(not isinstance(i, int | slice | None) for i in rest) <= 1)
    n_trailing = h.ndim - kept

    def take(J):
        return J[(slice(None),) * (J.ndim - n_trailing) + rest]

    return _reshaped(h, h.value[index], take)


@_rule("select")
def _select(h, dim, index):
    dim = dim % h.ndim
    if dim > h.lead:
        return _getitem(h, (slice(None),) * dim + (index,))
    _require(dim == 0 and h.lead == 1 and h.value is h.source.z)
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
    if all(isinstance(j.tangent, _Columns) for j in jets):
        scales = [j.tangent.scale for j in jets]
        front = torch.broadcast_shapes(*(s.shape[:kept] for s in scales))
        scales = [s.expand(front + j.shape[kept:]) for s, j in zip(scales, jets, strict=True)]
        for j in jets:
            first.source.n_uses += j.tangent.is_input
        columns = join([j.tangent.columns for j in jets], dim)
        return _Jet(value, first.lead, _Columns(join(scales, dim), columns), first.source)
    trailing = [j.shape[kept:] for j in jets]

    def dense(block, *parts):
        front = torch.broadcast_shapes(*(J.shape[: kept + 1] for J in parts))
        parts = [J.expand(front + t) for J, t in zip(parts, trailing, strict=True)]
        return join(parts, dim)

    step = _Step([_dense(j) for j in jets], [], dense)
    return _Jet(value, first.lead, first.source.add(step), first.source)


@_rule("sum")
def _sum_over(h, dim=None, keepdim=False):
    return _reduced(torch.sum, h, dim, keepdim)


@_rule("mean")
def _mean_over(h, dim=None, keepdim=False):
    return _reduced(torch.mean, h, dim, keepdim)


def _reduced(reduce, h, dim, keepdim):
    _require(dim is not None)
    dims = [d if d < 0 else d - h.ndim for d in (dim if isinstance(dim, tuple | list) else [dim])]
    _require(all(d + h.ndim > h.lead for d in dims))
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
    _require(tangent is not None)
    if bend is not None and isinstance(tangent, _Columns):
        h.source.bend(y, lambda delta: _by_row(delta * bend * tangent.scale.square(), lead))
    elif bend is not None:
        h.source.bend(y, lambda delta: _Squares([tangent], [delta * bend], lead))
    return _scaled(h, y, slope)


@_rule("mul", "__mul__", "__rmul__", "multiply")
def _mul(a, b):
    value = _value(a) * _value(b)
    if not _is_jet(b):
        return _scaled(a, value, b)
    if not _is_jet(a):
        return _scaled(b, value, a)
    source, lead = _common(a, b), a.lead
    _require(source is not None)
    if a is b:
        return _square(a)
    s, t = a.tangent, b.tangent
    left, right = _scaled(a, value, b.value), _scaled(b, value, a.value)
    if _same_columns(s, t):
        source.bend(value, lambda delta: _by_row(2 * delta * s.scale * t.scale, lead))
    else:

        def products(block, J, L, delta):
            return _by_row(2 * delta * (J * L).sum(lead), lead)

        parents = [_dense(a), _dense(b)]
        source.bend(value, lambda delta: _Share(parents, [delta], products))
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
    _require(isinstance(exponent, int | float) and exponent not in (0, 1))
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
    if type(step) in (_Product, _ColumnProduct):
        *rest, weight = step.tensors
        return source.add(type(step)(step.parents, [*rest, weight - weight.mean(-1, keepdim=True)]))
    return source.add(_Step([node], [], lambda block, J: J - J.mean(-1, keepdim=True)))


@_rule("layer_norm")
def _layer_norm(h, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    _require(h.tangent is not None and tuple(normalized_shape) == tuple(h.shape[-1:]))
    _require(h.ndim > h.lead + 1)
    lead = h.lead
    y, scale = _LayerNorm.apply(h.value, eps)
    step = _Normalise([_centred(h)], [y, scale], lead)
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
        e = g.mul(-2).add_(1)  # p' / p
        y, slope = x * g, torch.addcmul(g, x, p)
        bend = torch.addcmul(g.new_tensor(2.0), x, e).mul_(p)
        third = e.mul_(3).addcmul_(x, p.mul(-6).add_(1)).mul_(p)
        ctx.save_for_backward(slope, bend, third)
        return y, slope, bend

    @staticmethod
    def backward(ctx, of_y, of_slope, of_bend):
        slope, bend, third = ctx.saved_tensors
        grad = None if of_y is None else of_y * slope
        if of_slope is not None:
            grad = of_slope * bend if grad is None else torch.addcmul(grad, of_slope, bend)
        if of_bend is not None:
            grad = of_bend * third if grad is None else torch.addcmul(grad, of_bend, third)
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
    _require(not h.is_view)
    _require(result.shape == h.shape)
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
