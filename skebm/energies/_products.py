"""Products of matrices, by the faster of the two libraries that torch has inside.

torch multiplies float32 matrices by MKL, which uses half of what an AMD processor can do: 331
microseconds for 1024 x 128 x 128 on one core of a Zen 5, where oneDNN takes 157. oneDNN has more to
prepare, so that small products stay with torch, as does everything that is not float32 on a CPU. Its
operator is a private one of torch; without it torch goes on alone.
"""

import torch
from torch.nn import functional

__all__ = ["is_large", "product"]

_LARGE = 1_000_000  # multiply-adds
_NARROW = 16

_onednn = None
if torch.backends.mkldnn.is_available():
    _onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def is_large(a, n_outputs):
    """Whether `product` of `a` and a matrix with so many columns goes by oneDNN."""
    *_, n_rows, n_inputs = a.shape
    return (
        _onednn is not None
        and n_rows * n_inputs * n_outputs >= _LARGE
        and min(n_inputs, n_outputs) >= _NARROW
        and a.dtype == torch.float32
        and a.device.type == "cpu"
    )


def product(a, b, bias=None, out=None):
    """a @ b + bias, differentiable to any order.

    Parameters
    ----------
    a : Tensor of shape (n, w) or (K, n, w)
    b : Tensor of shape (w, v) or (K, w, v)
    bias : Tensor of shape (v,) or (K, 1, v), optional
    out : Tensor, optional
        Memory that may be used for the result.
    """
    tensors = (a, b) if bias is None else (a, b, bias)
    if (
        is_large(a, b.shape[-1])
        and a.ndim == b.ndim <= 3
        and b.dtype == a.dtype
        and (bias is None or bias.shape == (*b.shape[:-2], *(1,) * (b.ndim - 2), b.shape[-1]))
    ):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _Product.apply(a, b, bias)
        return _by_onednn(a, b, bias)
    return _by_torch(a, b, bias, out)


def gradient_of_second(a, b, grad):
    """The gradient of a product in b, laid out in memory as b."""
    return product(grad.mT, a).mT if b.mT.is_contiguous() else product(a.mT, grad)


def _by_torch(a, b, bias=None, out=None):
    if bias is None:
        return torch.matmul(a, b, out=out)
    if a.ndim == b.ndim == 3:
        return torch.baddbmm(bias, a, b, out=out)
    return functional.linear(a, b.mT, bias)


def _by_onednn(a, b, bias):
    global _onednn
    try:
        if a.ndim == 2:
            return _onednn(a, b.mT, bias, "none", [], "")
        biases = [None] * len(a) if bias is None else bias.squeeze(-2)
        members = zip(a, b.mT, biases, strict=True)
        return torch.stack([_onednn(*member, "none", [], "") for member in members])
    except RuntimeError:
        result = _by_torch(a, b, bias)  # or a mistake of the caller's
        _onednn = None
        return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, bias):
        ctx.save_for_backward(a, b)
        return _by_onednn(a, b, bias)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        of_a, of_b, of_bias = ctx.needs_input_grad
        return (
            product(grad, b.mT) if of_a else None,
            gradient_of_second(a, b, grad) if of_b else None,
            grad.sum(-2, keepdim=a.ndim == 3) if of_bias else None,
        )
