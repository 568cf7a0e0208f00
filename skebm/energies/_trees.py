"""Boosted trees as a torch energy, with hard or soft splits.

A fitted ``HistGradientBoostingClassifier`` is read node by node. With softness c = 0 the module
is the classifier's logit. Splits of codes of categories, and the way that NaN takes, stay hard;
with c > 0 any other split ``x <= t`` becomes sigmoid((t - x) / tau), where
tau is c times the local spacing of the thresholds of that feature: a point then reaches every
leaf with the product of the weights along its path, and the logit is differentiable.

How it is computed
------------------
A sigmoid beyond +-18 is 0 or 1 to 1.5e-8, so that nearly all leaves of a tree are out of reach of
a given point. The leaves of a tree, numbered from left to right, are the bits of one integer; for
each feature and each interval of its axis a table holds the leaves of each tree that are still in
reach. One row lookup per feature and a bitwise "and" leave, for most trees, a single bit: the
leaf. Only where several bits are left are splits evaluated, and only those that separate the
remaining leaves: the lowest and the highest bit name their lowest common ancestor, which cuts
the set in two, until single leaves remain. All trees of all members are evaluated in one sweep
(`Forest`), in blocks whose part of the table stays in the cache. Soft splits of width 0.25 cost
about five times as much as hard ones; no array is larger than `CELLS`, or the table (10
to 20 MB for 1,000 trees in ten dimensions; it is left out of pickles).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from skebm._sklearn_compat import BoostedNodes, hist_gradient_boosting_nodes

SATURATION = 18.0  # a sigmoid beyond this is taken as 0 or 1; the error is 1.5e-8
MIN_SPACING = 0.002  # thresholds closer than this count as this far apart
BLOCK = 64  # trees whose table is a few hundred kilobytes
CELLS = 1 << 19  # pairs of a row and a tree at a time: bounds the memory


class SoftTrees(nn.Module):
    """Sum of regression trees with hard or soft splits, (n, d) -> (n,).

    Made by :meth:`from_hist_gradient_boosting`.

    Attributes
    ----------
    n_features : int
    n_trees : int
    softness : float
        May be changed at any time; the trees are kept, only the lookup table is made anew.
    """

    n_features: int
    value: torch.Tensor
    feature: torch.Tensor
    threshold: torch.Tensor
    spacing: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    lca: torch.Tensor
    baseline: torch.Tensor
    nan_left: torch.Tensor
    code_set: torch.Tensor
    left_codes: torch.Tensor
    known_codes: torch.Tensor

    def __init__(
        self,
        n_features: int,
        value: torch.Tensor,
        feature: torch.Tensor,
        threshold: torch.Tensor,
        spacing: torch.Tensor,
        left: torch.Tensor,
        right: torch.Tensor,
        lca: torch.Tensor,
        baseline: torch.Tensor,
        nan_left: torch.Tensor,
        code_set: torch.Tensor,
        left_codes: torch.Tensor,
        known_codes: torch.Tensor,
    ):
        # value: (T, L), leaf values. The L leaves of a tree, from left to right, have L - 1 gaps
        # and each internal node sits in one gap. Hence for nodes, too, arrays of shape (T, L):
        # feature, threshold, spacing, left and right (bits of the leaves below either child; 0
        # where there is no node); lca: (T, L, L), the gap of the lowest common ancestor. nan_left:
        # whether NaN and unknown codes go to the left. code_set: which row of left_codes, (n_sets,
        # 256), holds the codes that go to the left, -1 where a threshold decides. known_codes:
        # (n_features, 256), all False for columns of numbers.
        super().__init__()
        self.n_features = n_features
        buffers = dict(value=value, feature=feature, threshold=threshold, spacing=spacing)
        buffers |= dict(left=left, right=right, lca=lca, baseline=baseline)
        buffers |= dict(nan_left=nan_left, code_set=code_set)
        buffers |= dict(left_codes=left_codes, known_codes=known_codes)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.softness = 0.0

    @classmethod
    def from_hist_gradient_boosting(
        cls,
        clf: Any,
        *,
        softness: float = 0.0,
        n_trees: int | None = None,
        offset: float = 0.0,
    ) -> Self:
        """Read a fitted classifier.

        Parameters
        ----------
        clf : HistGradientBoostingClassifier
            Fitted on two classes, with at most 63 leaves per tree. Rows are then in the order and
            codes of the classifier itself: columns of categories first, as numbers 0, 1, ... of
            their sorted categories; NaN is a missing value.
        softness : float, default=0.0
            Width of the splits in units of the local spacing of the thresholds.
        n_trees : int, optional
            Only the first `n_trees` iterations. All of them by default.
        offset : float, default=0.0
            Added to the logit, such as log nu.

        Returns
        -------
        SoftTrees
        """
        nodes = hist_gradient_boosting_nodes(clf, n_trees)
        trees = cls.from_nodes(nodes, clf.n_features_in_, offset=offset)
        trees.softness = softness
        return trees

    @classmethod
    def from_nodes(cls, nodes: BoostedNodes, n_features: int, *, offset: float = 0.0) -> Self:
        """Trees with hard splits, from the nodes of boosted trees.

        Parameters
        ----------
        nodes : BoostedNodes
        n_features : int
        offset : float, default=0.0
            Added to the logit, such as log nu.

        Returns
        -------
        SoftTrees
        """
        trees = cls(n_features, *_layout(nodes))
        trees.baseline += offset
        return trees

    @property
    def n_trees(self) -> int:
        return self.value.shape[0]

    @property
    def softness(self) -> float:
        return self._softness

    @softness.setter
    def softness(self, softness: float) -> None:
        if not softness >= 0:
            raise ValueError(f"softness={softness} must be at least 0.")
        self._softness = float(softness)

    def __getstate__(self) -> dict[str, Any]:
        return without_forest(super().__getstate__())

    def extra_repr(self) -> str:
        return f"n_features={self.n_features}, n_trees={self.n_trees}, softness={self.softness}"

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Value of the trees.

        Parameters
        ----------
        z : Tensor of shape (n, d)

        Returns
        -------
        Tensor of shape (n,)
            In the precision of `z`; differentiable once in `z`.
        """
        return evaluate(self, [self], z[None])[0]

    def _leaves_in_reach(self, j, mask_dtype):
        """Breakpoints of feature j, (m,), and the leaves in reach between them, (m + 2, T).

        The last row is for NaN.
        """
        left, right = self.left.cpu().numpy(), self.right.cpu().numpy()
        tree, gap = np.nonzero((self.feature.cpu().numpy() == j) & (left != 0))
        bits = left[tree, gap].astype(mask_dtype), right[tree, gap].astype(mask_dtype)
        everything = ((np.int64(1) << (1 + (left != 0).sum(1))) - 1).astype(mask_dtype)

        def masks(n_intervals, right_dies, left_dies):
            """Leaves that are left where these nodes lose a side, in the intervals given."""
            table = np.tile(everything, (n_intervals, 1))
            for of_node, own in zip((right_dies, left_dies), bits[::-1], strict=True):
                interval, node = np.nonzero(of_node.T)
                np.bitwise_and.at(table, (interval, tree[node]), ~own[node])
            return table

        nan_left = self.nan_left.cpu().numpy()[tree, gap][:, None]
        for_nan = masks(1, nan_left, ~nan_left)
        known = self.known_codes[j].cpu().numpy()
        if known.any():
            codes = np.arange(-1, len(np.trim_zeros(known, "b")) + 1)  # an unknown one at each end
            goes_left = np.tile(nan_left, len(codes))
            met = codes[known[codes.clip(0, 255)] & (codes >= 0)]
            sets = self.left_codes.cpu().numpy()[self.code_set.cpu().numpy()[tree, gap]]
            goes_left[:, met + 1] = sets[:, met]
            return codes[1:] - 0.5, np.r_[masks(len(codes), goes_left, ~goes_left), for_nan]

        threshold = self.threshold.double().cpu().numpy()[tree, gap]
        spacing = self.spacing.double().cpu().numpy()[tree, gap]
        t, r = threshold, SATURATION * self.softness * spacing
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


class Forest:
    """The trees of K members in one table, so that one sweep evaluates all of them.

    Parameters
    ----------
    members : sequence of K SoftTrees
        Of equally many features. It is made for their present softness, precision and device.
    """

    def __init__(self, members: Sequence["SoftTrees"]):
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
        softness = torch.tensor([trees.softness for trees in members]).to(self.value)
        scale = flat("spacing") * softness.repeat_interleave(math.prod(shape))
        # of the exponent (t - x) / scale
        self.per_unit = torch.where(scale > 0, 1.0 / scale, 0.0)
        self.at_zero = flat("threshold") * self.per_unit
        device = self.value.device
        self._member = torch.arange(len(members), device=device).repeat_interleave(n_blocks)
        first_leaf = self.n_leaves * torch.arange(len(members) * shape[0], device=device)
        self._first_leaf = first_leaf.to(torch.int32).view(len(self._member), 1, self.width)
        if n_blocks:
            self._make_table(members, n_blocks)

    def is_made_for(self, members: Iterable["SoftTrees"]) -> bool:
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
            pairs = [trees._leaves_in_reach(j, mask_dtype) for j in range(n_features)]
            breakpoints.append([points for points, _ in pairs])
            table = np.concatenate([masks for _, masks in pairs])
            padding = [(0, 0), (0, n_blocks * self.width - trees.n_trees)]
            table = np.pad(table, padding, constant_values=1)
            blocks.append(table.reshape(len(table), n_blocks, self.width).transpose(1, 0, 2))
            first.append(np.cumsum([0] + [len(masks) for _, masks in pairs[:-1]]))
            begins += (begin + len(table) * np.arange(n_blocks)).tolist()
            begin += n_blocks * len(table)
        sizes = np.array([[len(points) for points in of_member] for of_member in breakpoints])
        # a feature that splits nothing need not be looked up
        self._used = np.flatnonzero(sizes.any(axis=0)).tolist() or [0]
        padded = np.full((*sizes.shape, sizes.max()), np.inf)
        for index in np.ndindex(*sizes.shape):
            padded[index][: sizes[index]] = breakpoints[index[0]][index[1]]

        def tensor(array, dtype):
            return torch.from_numpy(array).to(self.value.device, dtype)

        # by feature, then by member
        self._breakpoints = tensor(padded.swapaxes(0, 1).copy(), self.value.dtype)
        self._n_breakpoints = tensor(sizes.T[..., None].copy(), torch.int32)
        self._first = tensor(np.stack(first, axis=1)[..., None], torch.int32)
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
        for start in range(0, z.shape[1], size):
            rows = slice(start, start + size)
            x = z[:, rows].contiguous()
            place = self._place(x)
            # as many blocks of trees at once as there is room for
            n_blocks = max(1, size // x.shape[1])
            for block in range(0, len(self._begin), n_blocks):
                blocks = slice(block, block + n_blocks)
                slope = None if gradient is None else gradient[:, rows]
                sums = self._evaluate(x, place, blocks, slope)
                value[:, rows].index_add_(0, self._member[blocks], sums)
        return value

    def _place(self, x):
        """Row of a block of the table that holds the leaves in reach, (d, K, n)."""
        place = torch.searchsorted(
            self._breakpoints, x.permute(2, 0, 1).contiguous(), out_int32=True
        )
        place = torch.minimum(place, self._n_breakpoints)
        is_nan = x.isnan()
        if is_nan.any():  # after all intervals
            place = torch.where(is_nan.permute(2, 0, 1), self._n_breakpoints + 1, place)
        return place.add_(self._first)

    def _evaluate(self, x, place, blocks, gradient):
        """Sum of the trees of some blocks, (n_blocks, n); gradients are added to `gradient`."""
        member, n_rows = self._member[blocks], x.shape[1]
        at = place.index_select(1, member).add_(self._begin[blocks, None]).view(len(place), -1)
        alive = self._table.index_select(0, at[self._used[0]])
        lowest = torch.empty_like(alive)
        for j in self._used[1:]:
            torch.index_select(self._table, 0, at[j], out=lowest)
            alive.bitwise_and_(lowest)
        torch.neg(alive, out=lowest).bitwise_and_(alive)
        by_block = len(member), n_rows, self.width
        leaf = _bit_number(lowest).view(by_block).add_(self._first_leaf[blocks]).view(-1)
        value = self.value.index_select(0, leaf)
        if self._is_soft:
            shared = _nonzero((alive != lowest).view(-1))
            if len(shared):
                # where the leaves of a tree, and the coordinates of a row, begin in flat arrays
                tree = self._first_leaf[blocks].expand(by_block).reshape(-1)
                row = member[:, None] * n_rows + torch.arange(n_rows, device=x.device)
                row = (row * x.shape[2]).to(torch.int32)[..., None].expand(by_block).reshape(-1)
                alive, tree, row = (a.view(-1).index_select(0, shared) for a in (alive, tree, row))
                value.scatter_(0, shared, self._resolve(x, alive, tree, row, gradient))
        return value.view(by_block).sum(-1)

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
            exponent = self.at_zero.index_select(0, node)
            weight = exponent.addcmul_(per_unit, x.index_select(0, cell), value=-1.0).sigmoid_()
            left = (2 << gap.to(alive.dtype)).sub_(1).bitwise_and_(alive)
            right = alive ^ left
            # what both sides have, one after the other
            tree, row = tree.repeat(2), row.repeat(2)
            lowest = torch.cat([lowest, _lowest(right)])
            highest = torch.cat([_highest(left), highest])
            value = self.value.index_select(0, tree + lowest)
            again = _nonzero(lowest != highest)
            levels.append((cell, per_unit, weight, value, again))
            alive, tree, row, lowest, highest = (
                both.index_select(0, again)
                for both in (torch.cat([left, right]), tree, row, lowest, highest)
            )

        below: Any = None
        differences = []
        for _, _, weight, value, again in reversed(levels):
            if below is not None:
                value.scatter_(0, again, below)
            on_left, on_right = value.chunk(2)
            differences.append(on_left - on_right)
            below = torch.addcmul(on_right, weight, differences[-1])

        if gradient is not None:
            total = torch.zeros_like(x)
            reach = torch.ones_like(below)
            for cell, per_unit, weight, _, again in levels:
                to_left = reach * weight
                to_right = reach - to_left
                slope = to_right.mul(weight).mul_(differences.pop()).mul_(per_unit)
                total.index_add_(0, cell, slope, alpha=-1.0)
                reach = torch.cat([to_left, to_right]).index_select(0, again)
            gradient += total.view(z.shape)
        return below


class _TreeSum(torch.autograd.Function):
    """All values, and all gradients with them: they share nearly all of the work."""

    @staticmethod
    def forward(ctx, z, forest):
        x = z.detach().to(forest.value.dtype)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(x, memory_format=torch.contiguous_format) if wanted else None
        value = forest(x, gradient)
        if wanted:
            ctx.save_for_backward(gradient.to(z.dtype))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad[..., None] * gradient, None


def evaluate(owner: nn.Module, members: Sequence[SoftTrees], z: torch.Tensor) -> torch.Tensor:
    """Sums of the trees of every member, (K, n, d) -> (K, n), in the precision of `z`.

    Differentiable once in `z`. The table is kept with its `owner` until a member changes.
    """
    forest = owner.__dict__.get(_FOREST)
    if forest is None or not forest.is_made_for(members):
        forest = owner.__dict__[_FOREST] = Forest(members)
    return _TreeSum.apply(z, forest).to(z.dtype)


_FOREST = "_forest"


def without_forest(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an owner for pickles; the table is larger, and made anew in milliseconds."""
    return {name: value for name, value in state.items() if name != _FOREST}


def _nonzero(mask):
    """Where a flat mask is true; numpy's search has no branches, which mispredict in torch's."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


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


def _layout(nodes):
    """Tensors of `SoftTrees` from `BoostedNodes`."""
    internal = np.flatnonzero(~nodes.is_leaf)
    levels = [nodes.roots]
    while len(levels[-1]):
        parents = levels[-1][~nodes.is_leaf[levels[-1]]]
        levels.append(np.concatenate([nodes.left[parents], nodes.right[parents]]))
    depth, n_below = np.zeros(len(nodes.tree), int), nodes.is_leaf.astype(int)
    first = np.zeros(len(nodes.tree), int)  # number of the leftmost leaf below a node
    for k, level in reversed(list(enumerate(levels))):
        depth[level] = k
        parents = level[~nodes.is_leaf[level]]
        n_below[parents] = n_below[nodes.left[parents]] + n_below[nodes.right[parents]]
    for level in levels:
        parents = level[~nodes.is_leaf[level]]
        left, right = nodes.left[parents], nodes.right[parents]
        first[left] = first[parents]
        first[right] = first[parents] + n_below[left]

    n_trees, n_leaves = len(nodes.roots), n_below.max(initial=1)
    if n_leaves > 63:
        raise ValueError(
            f"a tree with {n_leaves} leaves cannot be read; set max_leaf_nodes to at most 63."
        )

    def scatter(where, column, content, dtype):
        array = np.zeros((n_trees, n_leaves), dtype)
        array[nodes.tree[where], column] = content
        return torch.from_numpy(array)

    def bits(node):
        return ((np.int64(1) << n_below[node]) - 1) << first[node]

    left, right = nodes.left[internal], nodes.right[internal]
    gap = first[right] - 1
    spacing = _local_spacing(nodes.feature[internal], nodes.threshold[internal])
    gap_depth = scatter(internal, gap, depth[internal], np.int64).numpy()
    leaves = np.flatnonzero(nodes.is_leaf)
    by_code = nodes.is_categorical[internal]
    of_codes = internal[by_code]
    return (
        scatter(leaves, first[leaves], nodes.value[leaves], np.float64),
        scatter(internal, gap, nodes.feature[internal], np.int64),
        scatter(internal, gap, nodes.threshold[internal], np.float64),
        scatter(internal, gap, spacing, np.float64),
        scatter(internal, gap, bits(left), np.int64),
        scatter(internal, gap, bits(right), np.int64),
        torch.from_numpy(_lowest_common_ancestors(gap_depth)),
        torch.tensor(nodes.baseline, dtype=torch.float64),
        scatter(internal, gap, nodes.nan_goes_left[internal], bool),
        scatter(of_codes, gap[nodes.is_categorical[internal]], np.arange(len(of_codes)) + 1, int)
        - 1,
        torch.from_numpy(nodes.left_codes[of_codes]),
        torch.from_numpy(nodes.known_codes),
    )


def _local_spacing(feature, threshold):
    """Mean distance of each threshold from its two neighbours on the same feature."""
    spacing = np.full(len(threshold), MIN_SPACING)
    for j in np.unique(feature):
        here = (feature == j) & np.isfinite(threshold)
        if not here.any():
            continue
        distinct, which = np.unique(threshold[here], return_inverse=True)
        if len(distinct) > 1:
            gaps = np.diff(distinct)
            mean = 0.5 * (np.r_[gaps[0], gaps] + np.r_[gaps, gaps[-1]])
            spacing[here] = np.maximum(mean, MIN_SPACING)[which]
    return spacing


def _lowest_common_ancestors(gap_depth):
    """(T, L, L): the gap of the shallowest node between two leaves, from the depths (T, L)."""
    n_trees, n_leaves = gap_depth.shape
    lca = np.zeros((n_trees, n_leaves, n_leaves), np.int8)
    tree = np.arange(n_trees)
    for low in range(n_leaves - 1):
        best = np.full(n_trees, low)
        lca[:, low, low + 1] = best
        for high in range(low + 2, n_leaves):
            best = np.where(gap_depth[:, high - 1] < gap_depth[tree, best], high - 1, best)
            lca[:, low, high] = best
    return lca
