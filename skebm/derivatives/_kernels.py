"""What autograd would do too, in fewer passes over memory.

These three functions are those of our own networks that a step of score matching is noticeably
slower without: `benchmarks/laplacian.py --energy` shows it.
"""

import torch
from torch.autograd.function import once_differentiable

__all__ = ["Normalised", "SiLU", "SinCos"]


class Normalised(torch.autograd.Function):
    r"""Of y = (h - mean) k, k = 1 / standard deviation, the derivatives and the curvature.

    With centred derivatives a of h,

    .. math:: y' = k (a - m y), \quad y'' = -k (2 m y' + m' y), \qquad
        m = \overline{y a},\ m' = \overline{y' a},

    and the sum of :math:`\langle \delta, y'' \rangle` is :math:`-k^2 (2 m u - 3 q m^2 + q v)`, with
    :math:`u = \delta \cdot a,\ v = \overline{a^2},\ q = \delta \cdot y`.
    """

    @staticmethod
    def forward(ctx, J, y, k, delta):
        a = (J - J.mean(-1, keepdim=True)).expand(len(J), *y.shape)
        q, product = (delta * y).sum(-1, keepdim=True), a * y
        m = product.mean(-1, keepdim=True)
        u = torch.mul(a, delta, out=product).sum(-1, keepdim=True)
        v = torch.mul(a, a, out=product).mean(-1, keepdim=True)
        bent = -_over(k.square() * (m * (2 * u - 3 * q * m) + q * v))
        ctx.save_for_backward(a, y, k, delta, q, m, u, v, bent)
        ctx.shape = J.shape
        return torch.mul(a, k, out=product).addcmul_(y, -k * m), bent

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, weight):
        a, y, k, delta, q, m, u, v, bent = ctx.saved_tensors
        width, kk = a.shape[-1], k.square() * weight
        product = grad * y
        h = product.sum(-1, keepdim=True)
        e = torch.mul(grad, a, out=product).sum(-1, keepdim=True)
        along_y = kk * (6 * q * m - 2 * u) / width - k * h / width
        along_delta = -2 * kk * m
        of_q = _over(kk * (3 * m.square() - v))
        of_y = _over(torch.mul(a, along_y, out=product)) + delta * of_q
        of_y -= _over(torch.mul(grad, k * m, out=product))
        of_delta = _over(torch.mul(a, along_delta, out=product)) + y * of_q
        of_k = _over(e - m * h) + 2 * weight * bent / k
        of_a = torch.mul(grad, k, out=product).addcmul_(y, along_y).addcmul_(delta, along_delta)
        of_a.addcmul_(a, -2 * kk * q / width)
        of_J = (of_a - of_a.mean(-1, keepdim=True)).sum_to_size(ctx.shape)
        return of_J, of_y, of_k, of_delta


class SiLU(torch.autograd.Function):
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


class SinCos(torch.autograd.Function):
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


def _over(x):
    """Sum over directions; that of a single one need not be computed."""
    return x.squeeze(0) if len(x) == 1 else x.sum(0)
