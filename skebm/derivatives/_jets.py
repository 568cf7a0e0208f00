"""Jets: values that torch functions act on as on tensors, and that remember how they depend on z.

A jet goes through the code of an energy in place of its input. Every torch function that meets it
asks for a rule (`_rules.py` has them): what it does to the value, to the tangent, and, if it is
nonlinear, what it contributes to the curvature. Elementwise functions need no rule of their own,
only to be listed: autograd knows their derivatives. Where there is no rule, `NoRule` ends the
attempt.
"""

from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from skebm.derivatives._tangents import Node, NoRule, Record, Tangent, require

__all__ = [
    "RULES",
    "Jet",
    "bent",
    "elementwise",
    "is_jet",
    "mapped",
    "rule",
    "scaled",
    "spread",
    "value_of",
]

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
        result = elementwise(name, *args, **kwargs)
    else:
        raise NoRule(name)
    return _write_into(args[0], result) if inplace else result


def _write_into(jet, result):
    """The jet, overwritten; nothing else may look at its numbers."""
    require(is_jet(jet) and not jet.is_view and result.shape == jet.shape)
    jet.value, jet.tangent, jet.waves = result.value, result.tangent, None
    return jet


def is_jet(x):
    return type(x) is Jet


def value_of(x):
    """The value of a jet; anything else as it is."""
    return x.value if is_jet(x) else x


def rule(*names):
    """Decorate what the functions of these names do to jets."""

    def register(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def scaled(jet, value, factor):
    """Jet of value = jet * factor + constant."""
    if jet.tangent is None:
        return Jet(value, None, jet.record, jet.n_row_axes)
    n = jet.n_row_axes
    require(value.ndim == jet.ndim and value.shape[:n] == jet.shape[:n])
    base, row = jet.tangent.base, value.shape[n:]
    if value.shape != jet.shape:
        base = mapped(base, lambda J: spread(J, row))
    return Jet(value, Tangent(base, jet.tangent.factor * factor), jet.record, n)


def spread(x, row):
    """Repeat what broadcasts to a row of some shape."""
    return x.expand(*x.shape[: max(0, x.ndim - len(row))], *row)


def mapped(base, function):
    """A base whose entries in each row are moved or repeated."""
    return function(base) if isinstance(base, Tensor) else Node(lambda _, J: function(J), base)


def bent(h, y, slope, bend):
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
    return scaled(h, y, slope)


def elementwise(name, h, *args, **kwargs):
    """Jet of a listed function, whose derivatives autograd takes."""
    room = next(r for r in (torch, functional, Tensor) if hasattr(r, name))
    require(is_jet(h) and not any(is_jet(x) for x in (*args, *kwargs.values())))
    x = h.value
    y = getattr(room, name)(x, *args, **kwargs)
    require(y.shape == x.shape)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    bend = None
    if name in SMOOTH and slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return bent(h, y, slope, bend)
