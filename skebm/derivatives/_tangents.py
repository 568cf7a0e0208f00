"""How a value depends on z: derivatives along a block of directions, computed when asked for.

A tangent is a factor times a base. The base says along which directions a value moves at all: it is
either the number of the one column of z that each entry depends on (the input, and what works
column by column), or a node of a graph that gives dense derivatives J. Because the factor is kept
apart, gains and slopes of activations are multiplied with each other first, and only then, once,
with J. A record holds the nonlinear layers that an evaluation has passed, and adds up what each of
them contributes to the curvature. Autograd differentiates all of it with respect to parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skebm.derivatives._kernels import Normalised

__all__ = [
    "BLOCK",
    "NO_COLUMN",
    "NoRule",
    "Node",
    "Normalise",
    "Record",
    "Rows",
    "Tangent",
    "require",
]

BLOCK = 1 << 19
"""Entries of J in the largest layer that are computed at a time: they should stay in the cache."""

NO_COLUMN = -1
"""In place of the number of a column of z, for an entry that depends on none."""


class NoRule(Exception):
    """A jet cannot go on here; the energy is differentiated in the ordinary way instead."""


def require(condition: object) -> None:
    """End the attempt with jets unless a condition holds."""
    if not condition:
        raise NoRule


class Block(NamedTuple):
    """The directions from `start` to `stop`; `size` is that of all blocks but the last."""

    index: int
    start: int
    stop: int
    size: int


class Node:
    """Derivatives J along a block of directions, (r, ..., n, ...) for values (..., n, ...).

    Axes up to that of the rows, but for that of the directions, may have length one. A block is
    evaluated once, however many nodes ask for it.

    Parameters
    ----------
    function : callable
        ``function(block, *derivatives of parents)``, differentiable by autograd.
    *parents : Node
    """

    def __init__(self, function: Callable | None, *parents: "Node"):
        self.function, self.parents, self.block = function, parents, None

    def at(self, block: Block) -> Tensor:
        """The derivatives along the directions of a block."""
        if self.block is not block:
            self.value = self.run(block, *(node.at(block) for node in self.parents))
            self.block = block
        return self.value

    def run(self, block: Block, *derivatives: Tensor) -> Tensor:
        return self.function(block, *derivatives)


class Rows(Node):
    """Derivatives of z @ W, the same in all rows of z: the rows of W.

    Or of h @ W, where as many entries of h depend on each column of z and on no other; the
    Jacobian of h, mostly zeros, is never spread out.

    Parameters
    ----------
    weight : Tensor of shape (..., d, m, v)
        The rows of W that belong to each column of z; one for z itself.
    scale : Tensor of shape (..., d, n, m), optional
        Derivatives of the entries of h.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        super().__init__(None)
        self.weight, self.scale = weight, scale

    def run(self, block: Block) -> Tensor:
        if block.index == 0:
            # cut once: backward, gradients of all blocks are then put together once
            factors = [self.weight] if self.scale is None else [self.scale, self.weight]
            self.parts = list(zip(*(x.split(block.size, -3) for x in factors), strict=True))
        first, *others = self.parts[block.index]
        return (first @ others[0] if others else first).movedim(-3, 0)

    def reduce(self, n_directions: int) -> int:
        """Of z @ W with fewer columns than rows: go along a basis of the range of W only.

        Second derivatives along all other directions are zero, and so is their change with the
        weights, so that the basis may be taken as a constant. Gives the number of directions.
        """
        if self.scale is None and self.weight.shape[-1] < n_directions:
            weight = self.weight.squeeze(-2)
            self.weight = (torch.linalg.qr(weight.detach()).Q.mT @ weight).unsqueeze(-2)
            return weight.shape[-1]
        return n_directions


class Normalise(Node):
    """Derivatives of y, the normalised form of h, by `Normalised`; and its share in the curvature.

    Parameters
    ----------
    node : Node
        Derivatives of h.
    y, k : Tensor
        What came out, and one by the standard deviation of h.
    """

    def __init__(self, node: Node, y: Tensor, k: Tensor):
        super().__init__(None, node)
        self.y, self.k = y, k

    def run(self, block: Block, J: Tensor) -> Tensor:
        result, self.bent = Normalised.apply(J, self.y, self.k, self.delta)
        return result

    def share(self, delta: Tensor) -> Callable[[Tensor], Tensor]:
        self.delta = delta
        return lambda J: self.bent


class Tangent:
    """A factor, which broadcasts to the value, times a base.

    Parameters
    ----------
    base : Node, or Tensor of the shape of a row
        Of a tensor, the entries are numbers of columns of z, and J is 1 in that column's direction;
        `NO_COLUMN` stands at constants, whose factor is 0.
    factor : Tensor or float
    """

    def __init__(self, base: Any, factor: Tensor | float = 1.0):
        self.base, self.factor = base, factor

    @property
    def is_by_column(self) -> bool:
        return isinstance(self.base, Tensor)

    def has_base_of(self, other: "Tangent") -> bool:
        if self.is_by_column and other.is_by_column:
            return torch.equal(self.base, other.base)
        return self.base is other.base

    def dense(self, n_row_axes: int) -> Node:
        """The node of factor times base; values have so many axes up to that of the rows."""
        base, factor = self.base, self.factor
        if self.is_by_column:

            def select(block):
                number = torch.arange(block.start, block.stop, device=base.device)
                return factor * (base == number.reshape(-1, *(1,) * (n_row_axes + base.ndim)))

            return Node(select)
        if not isinstance(factor, Tensor) and factor == 1:
            return base
        return Node(lambda block, J: factor * J, base)


class Record:
    """The nonlinear layers between one input and its value.

    Parameters
    ----------
    z : Tensor of shape (n, d) or (K, n, d)
    directions : Tensor of shape (P, n, d) or (K, P, n, d), optional
        All unit vectors by default.
    """

    def __init__(self, z: Tensor, directions: Tensor | None = None):
        self.z, self.directions, self.layers, self.members = z, directions, [], []
        self.n_row_axes = z.ndim - 1
        if directions is None:
            self.n_directions = z.shape[-1]
            self.tangent = Tangent(torch.arange(z.shape[-1], device=z.device))
        else:
            self.n_directions, directions = directions.shape[-3], directions.movedim(-3, 0)
            self.tangent = Tangent(Node(lambda block: directions[block.start : block.stop]))

    def member(self, k: int) -> "Record":
        """The record of rows k of a stack, as an input of their own."""
        if not self.members:
            directions = [None] * len(self.z) if self.directions is None else self.directions
            self.members = [Record(z, v) for z, v in zip(self.z, directions, strict=True)]
        return self.members[k]

    def bend(self, y: Any, share: Callable, *nodes: Node) -> None:
        """Note the output y of a nonlinear layer.

        Parameters
        ----------
        y : Tensor
        share : callable
            From df/dy, what the layer contributes to the curvature, with any axes behind the rows
            that are summed over; or, where derivatives are dense, a function of those of `nodes`
            along a block of directions that gives the part of that block.
        *nodes : Node
        """
        self.layers.append((y, share, nodes))

    def curvature(self, deltas: Sequence[Tensor]) -> Tensor:
        """Sum over nonlinear layers and directions, (..., n), from df/dy of each layer."""
        total, dense, n_directions = torch.zeros_like(self.z[..., 0]), [], self.n_directions
        for (_, share, nodes), delta in zip(self.layers, deltas, strict=True):
            part = share(delta)
            if isinstance(part, Tensor):
                total = total + _by_row(part, total.shape)
            else:
                dense.append((part, nodes))
        if not dense:
            return total
        sources = _sources(node for _, nodes in dense for node in nodes)
        if len(sources) == 1 and isinstance(sources[0], Rows):
            n_directions = sources[0].reduce(n_directions)
        largest = max(y.numel() for y, *_ in self.layers)
        n_blocks = min(n_directions, max(1, round(largest * n_directions / BLOCK)))
        size = -(-n_directions // n_blocks)
        for index, start in enumerate(range(0, n_directions, size)):
            block = Block(index, start, min(start + size, n_directions), size)
            for share, nodes in dense:
                part = share(*(node.at(block) for node in nodes))
                total = total + _by_row(part, total.shape)
        return total


def _by_row(part, rows):
    """Sum over the axes behind the rows; those in front may be more, of length one."""
    return part.reshape(*rows, -1).sum(-1)


def _sources(nodes):
    """The nodes without parents from which others come."""
    seen, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.parents)
    return [node for node in seen if not node.parents]
