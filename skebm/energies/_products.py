"""Products of matrices, by the faster of the two libraries that torch has inside.

torch multiplies float32 matrices by MKL, which uses half of what an AMD processor can do: 331
microseconds for 1024 x 128 x 128 on one core of a Zen 5, where oneDNN takes 157. oneDNN has more to
prepare, so that small products stay with torch, as does all that is not float32 on a CPU. Its
operator is a private one of torch; where it is missing or fails, torch goes on alone.
"""

import torch

__all__ = ["gradient_of_second", "is_large", "product"]

# Multiply-adds; in a graph of autograd a function of our own has to earn its keep, too.
_LARGE, _LARGE_IN_GRAPH = 1_000_000, 10_000_000
_NARROW = 16

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_works = _onednn is not None and torch.backends.mkldnn.is_available()


def is_large(a, n_outputs, least=_LARGE):
    """Whether `product` of `a` and a matrix with so many columns goes by oneDNN."""
    *_, n_rows, n_inputs = a.shape
    return (
        _works
        and n_rows * n_inputs * n_outputs >= least
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
    in_graph = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (a, b, bias)
    )
    if not (
        is_large(a, b.shape[-1], _LARGE_IN_GRAPH if in_graph else _LARGE)
        and (*a.shape[:-2], a.shape[-1]) == b.shape[:-1]
        and a.dtype == b.dtype
        and (bias is None or bias.shape == (b[0] if b.ndim == 2 else b[:, :1]).shape)
    ):
        return _by_torch(a, b, bias, out)
    return (_Product.apply if in_graph else _by_onednn)(a, b, bias)


def gradient_of_second(a, b, grad):
    """The gradient of a product in b, laid out in memory as b."""
    return product(grad.mT, a).mT if b.mT.is_contiguous() else product(a.mT, grad)


def _by_torch(a, b, bias=None, out=None):
    if a.ndim != b.ndim:
        result = torch.matmul(a, b, out=out)
        return result if bias is None else result + bias
    if bias is None:
        return (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out=out)
    return (torch.baddbmm if a.ndim == 3 else torch.addmm)(bias, a, b, out=out)


def _by_onednn(a, b, bias):
    global _works
    try:
        if a.ndim == 2 or len(a) == 1:
            return _one(a, b.squeeze(0), bias)
        biases = [None] * len(a) if bias is None else bias
        return torch.stack(list(map(_one, a, b, biases)))
    except RuntimeError:
        _works = False
        return _by_torch(a, b, bias)


def _one(a, b, bias):
    bias = None if bias is None else bias.flatten()
    return _onednn(a, b.mT, bias, "none", [], "")


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
