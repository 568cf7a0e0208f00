"""All trees of all members in one sweep.

A split is soft within `REACH` tau of its threshold and hard beyond, so that nearly all leaves of a
tree are out of reach of a given point. The leaves of a tree, numbered from left to right, are the
bits of one integer; for each feature and each interval of its axis a table holds the leaves of each
tree that are still in reach. One row lookup per feature and a bitwise "and" leave, for most trees,
a single bit: the leaf. Only where several bits are left are splits evaluated, and only those that
separate the remaining leaves: the lowest and the highest bit name their lowest common ancestor,
which cuts the set in two, until single leaves remain. Trees come in blocks whose part of the table
stays in the cache. No array is larger than `CELLS`, or the table (10 to 20 MB for 1,000 trees in
ten dimensions; it is left out of pickles).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

REACH = 4.0
"""Distance from its threshold, in units of tau, where a soft split becomes hard."""

BLOCK = 64  # trees whose table is a few hundred kilobytes
CELLS = 1 << 18  # pairs of a row and a tree at a time: bounds the memory
MANY = 1 << 15  # pairs that reach several leaves at a time


class Forest:
    """The trees of K members in one table, so that one sweep evaluates all of them.

    Parameters
    ----------
    members : sequence of K SoftTrees
        Of equally many features. It is made for their present softness, precision and device.
    """

    def __init__(self, members: Sequence[Any]):
        self._made_for = [(trees.threshold, trees.softness) for trees in members]
        self._is_soft = any(trees.softness > 0 for trees in members)
        n_trees = max(trees.n_trees for trees in members)
        self.n_leaves = max(trees.value.shape[1] for trees in members)
        # blocks of trees whose tables fit the cache
        n_blocks = -(-n_trees // BLOCK)
        self.width = -(-n_trees // max(n_blocks, 1))
        shape = n_blocks * self.width, self.n_leaves

        def flat(name, dtype=None):
            # a tree of zeros has one leaf, of value zero
            padded = [_padded(getattr(trees, name), shape) for trees in members]
            return torch.stack(padded).to(dtype=dtype).view(-1)

        self.baseline = torch.stack([trees.baseline for trees in members])[:, None]
        self.value = flat("value")
        self.feature = flat("feature", torch.int32)
        lca = [_padded(trees.lca, (*shape, self.n_leaves)) for trees in members]
        self.lca = torch.stack(lca).view(-1)
        softness = self.value.new_tensor([trees.softness for trees in members])
        scale = flat("spacing") * softness.repeat_interleave(math.prod(shape))
        # of (t - x) / (REACH tau)
        self.per_unit = torch.where(scale > 0, 1.0 / (REACH * scale), 0.0)
        self.at_zero = flat("threshold") * self.per_unit
        device = self.value.device
        self._member = torch.arange(len(members), device=device).repeat_interleave(n_blocks)
        first_leaf = self.n_leaves * torch.arange(len(members) * shape[0], device=device)
        self._first_leaf = first_leaf.to(torch.int32).view(len(self._member), 1, self.width)
        if n_blocks:
            self._make_table(members, n_blocks)

    def is_made_for(self, members: Iterable[Any]) -> bool:
        """Whether nothing of these members has changed since."""
        return all(
            trees.threshold is threshold and trees.softness == softness
            for trees, (threshold, softness) in zip(members, self._made_for, strict=True)
        )

    def _make_table(self, members, n_blocks):
        """Table of the leaves in reach, for each interval between the breakpoints of a feature."""
        # 31 leaves, scikit-learn's default, fit an int32: half the memory and time of an int64
        mask_dtype = np.int32 if self.n_leaves <= 31 else np.int64
        n_features = members[0].n_features
        breakpoints, first, blocks, begins, begin = [], [], [], [], 0
        for trees in members:
            pairs = [_leaves_in_reach(trees, j, mask_dtype) for j in range(n_features)]
            breakpoints.append([points for points, _ in pairs])
            table = np.concatenate([masks for _, masks in pairs])
            padding = [(0, 0), (0, n_blocks * self.width - trees.n_trees)]
            table = np.pad(table, padding, constant_values=1)
            blocks.append(table.reshape(len(table), n_blocks, self.width).transpose(1, 0, 2))
            first.append(np.cumsum([0] + [len(masks) for _, masks in pairs[:-1]]))
            begins += (begin + len(table) * np.arange(n_blocks)).tolist()
            begin += n_blocks * len(table)
        # one search for all members: in the breakpoints of all, and then in a list of their places
        of_features = list(zip(*breakpoints, strict=True))
        joined = [np.unique(np.concatenate(own)) for own in of_features]
        # a feature that splits nothing need not be looked up
        self._used = [j for j, points in enumerate(joined) if len(points)] or [0]
        joined = [joined[j] for j in self._used]
        places = [
            [
                _own_interval(points, own) + starts[j]
                for own, starts in zip(of_features[j], first, strict=True)
            ]
            for j, points in zip(self._used, joined, strict=True)
        ]
        sizes = np.array(list(map(len, joined)))
        padded = np.full((len(joined), sizes.max()), np.inf)
        for row, points in zip(padded, joined, strict=True):
            row[: len(points)] = points

        def tensor(array, dtype):
            return torch.from_numpy(array).to(self.value.device, dtype)

        self._breakpoints = tensor(padded, self.value.dtype)
        self._n_breakpoints = tensor(sizes[:, None], torch.int32)
        starts = np.cumsum(sizes + 2) - sizes - 2
        self._starts = tensor(starts[:, None], torch.int32)
        # of all intervals of the features, and of NaN after those, in the blocks: (n, K)
        self._places = tensor(np.concatenate(places, axis=1).T.copy(), torch.int32)
        self._begin = tensor(np.array(begins, dtype=np.int32), torch.int32)
        table = np.concatenate([block.reshape(-1, self.width) for block in blocks])
        self._table = torch.from_numpy(table).to(self.value.device)

    def __call__(self, z: torch.Tensor, gradient: torch.Tensor | None = None) -> torch.Tensor:
        """Sums of the trees of every member.

        Parameters
        ----------
        z : Tensor of shape (K, n, d)
            In the precision of the trees.
        gradient : Tensor of shape (K, n, d), default=None
            Where the gradients are added.

        Returns
        -------
        Tensor of shape (K, n)
        """
        value = self.baseline.repeat(1, z.shape[1])
        if not self.width or not z.shape[1]:
            return value
        size = max(1, CELLS // self.width)
        several: list[Any] = []

        def resolve():
            alive, tree, member, row = map(torch.cat, zip(*several, strict=True))
            row = member * z.shape[1] + row
            resolved = self._resolve(z, alive, tree, row * z.shape[2], gradient)
            value.view(-1).index_add_(0, row, resolved)
            several.clear()

        for start in range(0, z.shape[1], size):
            x = z[:, start : start + size]
            place = self._place(x)
            # as many blocks of trees at once as there is room for
            n_blocks = max(1, size // x.shape[1])
            for block in range(0, len(self._begin), n_blocks):
                blocks = slice(block, block + n_blocks)
                sums, found = self._evaluate(place, blocks)
                value[:, start : start + size].index_add_(0, self._member[blocks], sums)
                if found is not None:
                    alive, tree, member, row = found
                    several.append((alive, tree, member, row + start))
                    # many at a time, as there are many small steps
                    if sum(len(alive) for alive, *_ in several) >= MANY:
                        resolve()
        if several:
            resolve()
        return value

    def _place(self, x):
        """Row of a block of the table that holds the leaves in reach, (K, n, d) -> (d, K, n); of
        the features that are used.
        """
        n_members = len(x)
        if x.stride(0) == 0:  # the same rows for all members
            x = x[:1]
        columns = x.permute(2, 0, 1)
        if len(self._used) < len(columns):
            columns = columns[self._used]
        columns = columns.flatten(1).contiguous()
        at = torch.searchsorted(self._breakpoints, columns, out_int32=True)
        at = torch.minimum(at, self._n_breakpoints)
        is_nan = columns.isnan()
        if is_nan.any():  # after all intervals
            at = torch.where(is_nan, self._n_breakpoints + 1, at)
        at = at.add_(self._starts).mul_(n_members).view(len(at), len(x), -1)
        member = torch.arange(n_members, dtype=at.dtype, device=at.device)[:, None]
        at = at + member
        return self._places.view(-1).index_select(0, at.flatten()).view(at.shape)

    def _evaluate(self, place, blocks):
        """Sum of the trees of some blocks, (n_blocks, n), but for those of which a row reaches
        several leaves: for these their bits, and the numbers of tree, member and row.
        """
        member, n_rows = self._member[blocks], place.shape[2]
        at = place.index_select(1, member).add_(self._begin[blocks, None]).view(len(place), -1)
        if at.numel() * self.width <= CELLS:  # fewer steps
            alive, *others = self._table.index_select(0, at.view(-1)).chunk(len(at))
            for other in others:
                alive.bitwise_and_(other)
            other = torch.empty_like(alive)
        else:
            first, *others = at.unbind()
            alive = self._table.index_select(0, first)
            other = torch.empty_like(alive)
            for own in others:
                alive.bitwise_and_(torch.index_select(self._table, 0, own, out=other))
        lowest = alive
        if self._is_soft:
            lowest = torch.neg(alive, out=other).bitwise_and_(alive)
        by_block = len(member), n_rows, self.width
        leaf = _bit_number(lowest).view(by_block).add_(self._first_leaf[blocks]).view(-1)
        value = self.value.index_select(0, leaf)
        several = None
        if self._is_soft:
            shared = _where_different(alive.view(-1), lowest.view(-1))
            if len(shared):
                value.index_fill_(0, shared, 0.0)
                pair = torch.div(shared, self.width, rounding_mode="floor")
                block = torch.div(pair, n_rows, rounding_mode="floor")
                first = self._first_leaf[blocks].view(-1)
                tree = first.index_select(0, shared + (block - pair) * self.width)
                row = pair - block * n_rows
                several = alive.view(-1).index_select(0, shared), tree, member[block], row
        return value.view(by_block).sum(-1), several

    def _resolve(self, z, alive, tree, row, gradient):
        """Value of trees of which a point reaches several leaves.

        `alive` holds the bits of their leaves, `tree` and `row` where the values of the tree and
        of the point begin in flat arrays.
        """
        x = z.reshape(-1)
        levels = []
        lowest, highest = _lowest(alive), _highest(alive)
        while len(tree):
            # the split that separates the leaves left over, and what it leaves on either side
            gap = self.lca.index_select(0, (tree + lowest).mul_(self.n_leaves).add_(highest))
            node = tree + gap
            cell = row + self.feature.index_select(0, node)
            per_unit = self.per_unit.index_select(0, node)
            v = self.at_zero.index_select(0, node)
            v.addcmul_(per_unit, x.index_select(0, cell), value=-1.0)
            weight = _split(v)
            left = (2 << gap.to(alive.dtype)).sub_(1).bitwise_and_(alive)
            right = alive ^ left
            # what both sides have, one after the other
            tree, row = tree.repeat(2), row.repeat(2)
            lowest = torch.cat([lowest, _lowest(right)])
            highest = torch.cat([_highest(left), highest])
            value = self.value.index_select(0, tree + lowest)
            again = _where_different(lowest, highest)
            levels.append((cell, per_unit, v, weight, value, again))
            if not len(again):
                break
            alive, tree, row, lowest, highest = (
                both.index_select(0, again)
                for both in (torch.cat([left, right]), tree, row, lowest, highest)
            )

        below: Any = None
        differences = []
        for *_, weight, value, again in reversed(levels):
            if below is not None:
                value.scatter_(0, again, below)
            on_left, on_right = value.chunk(2)
            differences.append(on_left - on_right)
            below = torch.addcmul(on_right, weight, differences[-1])

        if gradient is not None:
            total = torch.zeros_like(x)
            reach = torch.ones_like(below)
            for cell, per_unit, v, weight, _, again in levels:
                to_left = reach * weight
                to_right = reach - to_left
                slope = _split_slope(v).mul_(reach).mul_(differences.pop()).mul_(per_unit)
                total.index_add_(0, cell, slope, alpha=-1.0)
                reach = torch.cat([to_left, to_right]).index_select(0, again)
            gradient += total.view(z.shape)
        return below


class _TreeSum(torch.autograd.Function):
    """All values, and all gradients with them: they share nearly all of the work."""

    @staticmethod
    def forward(ctx, z, forest):
        x = z.detach().to(forest.value.dtype)
        gradient = torch.zeros_like(x, memory_format=torch.contiguous_format)
        value = forest(x, gradient)
        ctx.save_for_backward(gradient.to(z.dtype))
        return value.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad[..., None] * gradient, None


def evaluate(owner: nn.Module, members: Sequence[Any], z: torch.Tensor) -> torch.Tensor:
    """Sums of the trees of every member, (K, n, d) -> (K, n), in the precision of `z`.

    Differentiable once in `z`. The table is kept with its `owner` until a member changes.
    """
    forest = owner.__dict__.get(_FOREST)
    if forest is None or not forest.is_made_for(members):
        forest = owner.__dict__[_FOREST] = Forest(members)
    if z.requires_grad and torch.is_grad_enabled():
        return _TreeSum.apply(z, forest)
    return forest(z.detach().to(forest.value.dtype)).to(z.dtype)


_FOREST = "_forest"


def without_forest(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an owner for pickles; the table is larger, and made anew in milliseconds."""
    return {name: value for name, value in state.items() if name != _FOREST}


def _split(v):
    """Weight of the left side: the distribution function of the biweight kernel on [-1, 1]."""
    square = v.square()
    return (square * 3.0).sub_(10.0).mul_(square).add_(15.0).mul_(v).mul_(1 / 16).add_(0.5)


def _split_slope(v):
    """Derivative of `_split`: the kernel."""
    return (1.0 - v.square()).square_().mul_(15 / 16)


def _where_different(one, other):
    """Where flat arrays of integers differ.

    Numpy compares them six times as fast as torch, and its search has no branches, which mispredict
    in torch's.
    """
    if one.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(one.numpy() != other.numpy()))
    return (one != other).nonzero().squeeze(1)


def _lowest(bits):
    """Number of the lowest bit."""
    return _bit_number((-bits).bitwise_and_(bits))


def _highest(bits):
    """Number of the highest bit."""
    return _bit_number((bits >> 1).bitwise_not_().bitwise_and_(bits))


def _padded(array, shape):
    """The array, with zeros up to that shape."""
    if array.shape == shape:
        return array
    larger = array.new_zeros(shape)
    larger[tuple(slice(n) for n in array.shape)] = array
    return larger


def _bit_number(power_of_two):
    """Exponent of the leading bit of positive integers, from the bits of a float.

    Exact for powers of two, and for integers whose second leading bit is 0 (no rounding can then
    reach the leading one).
    """
    if power_of_two.dtype == torch.int32:
        return power_of_two.to(torch.float32).view(torch.int32).bitwise_right_shift_(23).sub_(127)
    return power_of_two.to(torch.float64).view(torch.int64).bitwise_right_shift_(52).sub_(1023)


def _own_interval(points, own):
    """Interval between breakpoints of their own in that lies each interval between points that hold
    these, (n + 2,); the last one is for NaN.
    """
    inner = np.searchsorted(own, points, side="right")
    return np.concatenate([[0], inner, [len(own) + 1]])


def _leaves_in_reach(trees, j, mask_dtype):
    """Breakpoints of feature j, (m,), and the leaves in reach between them, (m + 2, T).

    The last row is for NaN.
    """
    left, right = trees.left.cpu().numpy(), trees.right.cpu().numpy()
    tree, gap = np.nonzero((trees.feature.cpu().numpy() == j) & (left != 0))
    bits = left[tree, gap].astype(mask_dtype), right[tree, gap].astype(mask_dtype)
    everything = ((np.int64(1) << (1 + (left != 0).sum(1))) - 1).astype(mask_dtype)

    def routed(goes_left):
        """Leaves in reach where nodes send all to one side, of shape (n_nodes, n_intervals)."""
        table = np.tile(everything, (goes_left.shape[1], 1))
        for dies, own in zip((goes_left, ~goes_left), bits[::-1], strict=True):
            interval, node = np.nonzero(dies.T)
            np.bitwise_and.at(table, (interval, tree[node]), ~own[node])
        return table

    nan_left = trees.nan_left.cpu().numpy()[tree, gap][:, None]
    for_nan = routed(nan_left)
    known = trees.known_codes[j].cpu().numpy()
    if known.any():
        codes = np.arange(-1, len(np.trim_zeros(known, "b")) + 1)  # an unknown one at each end
        goes_left = np.tile(nan_left, len(codes))
        met = np.flatnonzero(known)
        sets = trees.left_codes.cpu().numpy()[trees.code_set.cpu().numpy()[tree, gap]]
        goes_left[:, met + 1] = sets[:, met]
        return codes[1:] - 0.5, np.r_[routed(goes_left), for_nan]

    spacing = trees.spacing.double().cpu().numpy()[tree, gap]
    t = trees.threshold.double().cpu().numpy()[tree, gap]
    r = REACH * trees.softness * spacing
    points, where = np.unique(np.concatenate([t + r, t - r]), return_inverse=True)
    left_dies, right_dies = where[: len(t)], where[len(t) :]
    # row b: b breakpoints lie below x
    below = np.tile(everything, (len(points) + 1, 1))
    above = below.copy()
    np.bitwise_and.at(below, (left_dies + 1, tree), ~bits[0])
    np.bitwise_and.at(above, (right_dies, tree), ~bits[1])
    np.bitwise_and.accumulate(below, axis=0, out=below)
    np.bitwise_and.accumulate(above[::-1], axis=0, out=above[::-1])
    return points, np.r_[below & above, for_nan]
