"""Boosted trees as a torch energy, with hard or soft splits.

A fitted ``HistGradientBoostingClassifier`` is read node by node. With softness c = 0 the module
is the classifier's logit. With c > 0 the split ``x <= t`` becomes sigmoid((t - x) / tau), where
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
the set in two, until single leaves remain. For 400 trees of 31 leaves one core needs about 5
microseconds per row for hard splits (scikit-learn: 18) and 15 to 50 for softness 0.1 to 0.5, the
gradient included; no array is larger than a chunk of rows times the number of trees, or the
table (10 to 20 MB for 1,000 trees in ten dimensions; it is left out of pickles).
"""

from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from skebm._sklearn_compat import BoostedNodes, hist_gradient_boosting_nodes

SATURATION = 18.0  # a sigmoid beyond this is taken as 0 or 1; the error is 1.5e-8
MIN_SPACING = 0.002  # thresholds closer than this count as this far apart
CHUNK = 1024  # rows at a time: bounds the memory, and the masks then stay in the cache


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
    _breakpoints: torch.Tensor
    _table: torch.Tensor
    _everything: torch.Tensor
    _offset: torch.Tensor

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
    ):
        # value: (T, L), leaf values. The L leaves of a tree, from left to right, have L - 1 gaps
        # and each internal node sits in one gap. Hence for nodes, too, arrays of shape (T, L):
        # feature, threshold, spacing, left and right (bits of the leaves below either child; 0
        # where there is no node); lca: (T, L, L), the gap of the lowest common ancestor.
        super().__init__()
        self.n_features = n_features
        buffers = dict(value=value, feature=feature, threshold=threshold, spacing=spacing)
        buffers |= dict(left=left, right=right, lca=lca, baseline=baseline)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self._softness = 0.0
        self._make_table()

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
            Fitted on two classes and numerical features without missing values, with at most 63
            leaves per tree.
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
        if softness != self._softness:
            self._softness = float(softness)
            self._make_table()

    def __getstate__(self) -> dict[str, Any]:
        # The table is several times larger than the trees and made anew in milliseconds.
        kept = {name: tensor for name, tensor in self._buffers.items() if name not in TABLE}
        return self.__dict__ | {"_buffers": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_table()

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
        return _TreeSum.apply(z, self).to(z.dtype)

    def _make_table(self):
        """Table of the leaves in reach, for each interval between the breakpoints of a feature."""
        value, feature = self.value, self.feature.cpu().numpy()
        left, right = self.left.cpu().numpy(), self.right.cpu().numpy()
        threshold = self.threshold.double().cpu().numpy()
        reach = SATURATION * self.softness * self.spacing.double().cpu().numpy()
        # 31 leaves, scikit-learn's default, fit an int32: half the memory and time of an int64
        mask_dtype = np.int32 if value.shape[1] <= 31 else np.int64
        breakpoints, tables = [], []
        for j in range(self.n_features):
            tree, gap = np.nonzero((feature == j) & (left != 0))
            t, r = threshold[tree, gap], reach[tree, gap]
            points, where = np.unique(np.concatenate([t + r, t - r]), return_inverse=True)
            left_dies, right_dies = where[: len(t)], where[len(t) :]
            # row b: b breakpoints lie below x
            below = np.full((len(points) + 1, self.n_trees), -1, mask_dtype)
            above = below.copy()
            bits = left[tree, gap].astype(mask_dtype), right[tree, gap].astype(mask_dtype)
            np.bitwise_and.at(below, (left_dies + 1, tree), ~bits[0])
            np.bitwise_and.at(above, (right_dies, tree), ~bits[1])
            np.bitwise_and.accumulate(below, axis=0, out=below)
            np.bitwise_and.accumulate(above[::-1], axis=0, out=above[::-1])
            breakpoints.append(points)
            tables.append(below & above)
        n_leaves = 1 + (left != 0).sum(1)
        everything = ((np.int64(1) << n_leaves) - 1).astype(mask_dtype)
        sizes = [len(points) for points in breakpoints]
        self._slices = np.cumsum([0, *sizes]).tolist()
        for name, array, dtype in [
            ("_breakpoints", np.concatenate(breakpoints), self.threshold.dtype),
            ("_table", np.concatenate(tables), None),
            ("_everything", everything, None),
            ("_offset", np.arange(self.n_trees, dtype=np.int32) * value.shape[1], None),
        ]:
            tensor = torch.from_numpy(array).to(value.device, dtype)
            self.register_buffer(name, tensor, persistent=False)

    def _leaves_in_reach(self, z):
        """Bits of the leaves that z reaches, (n, T)."""
        alive = self._everything.expand(len(z), -1).clone()
        rows = torch.empty_like(alive)
        for j, column in enumerate(z.t().contiguous()):
            start, stop = self._slices[j], self._slices[j + 1]
            if start == stop:
                continue
            place = torch.searchsorted(self._breakpoints[start:stop], column)
            torch.index_select(self._table, 0, place.add_(start + j), out=rows)
            alive.bitwise_and_(rows)
        return alive

    def _evaluate(self, z, gradient):
        """Sum of the trees at z; its gradient is written into `gradient` unless that is None."""
        alive = self._leaves_in_reach(z)
        lowest = alive & -alive
        leaf = _bit_number(lowest).add_(self._offset)
        value = _take(self.value, leaf.view(-1))
        if self.softness > 0:
            shared = (alive != lowest).view(-1).nonzero().squeeze(1)
            if len(shared):
                value[shared] = self._resolve(z, shared, _take(alive, shared), gradient)
        return value.view(len(z), -1).sum(1)

    def _resolve(self, z, shared, alive, gradient):
        """Value of trees of which a point reaches several leaves.

        `shared` holds row * n_trees + tree of the pairs, `alive` the bits of their leaves.
        """
        n_leaves = self.value.shape[1]
        row = shared // self.n_trees
        tree = (shared - row * self.n_trees) * n_leaves  # from here on places in flat arrays
        row = row * self.n_features
        x = z.reshape(-1)
        levels = []
        while len(tree):
            # the split that separates the leaves left over, and what it leaves on either side
            lowest, highest = _bit_number(alive & -alive), _bit_number(alive & ~(alive >> 1))
            gap = _take(self.lca, (tree + lowest) * n_leaves + highest).to(alive.dtype)
            node = tree + gap
            cell = row + _take(self.feature, node)
            width = _take(self.spacing, node).mul_(self.softness)
            weight = _take(self.threshold, node).sub_(_take(x, cell)).div_(width).sigmoid_()
            left = alive & ((2 << gap) - 1)
            alive = torch.cat([left, alive ^ left])
            tree, row = torch.cat([tree, tree]), torch.cat([row, row])
            single = alive & -alive
            value = _take(self.value, tree + _bit_number(single))
            again = (alive != single).nonzero().squeeze(1)
            levels.append((cell, width, weight, value, again))
            alive, tree, row = _take(alive, again), _take(tree, again), _take(row, again)

        below: Any = None
        differences = []
        for _, _, weight, value, again in reversed(levels):
            if below is not None:
                value[again] = below
            on_left, on_right = value.chunk(2)
            differences.append(on_left - on_right)
            below = torch.addcmul(on_right, weight, differences[-1])

        if gradient is not None:
            reach = torch.ones_like(below)
            for cell, width, weight, _, again in levels:
                to_left = reach * weight
                to_right = reach - to_left
                slope = to_right.mul(weight).mul_(differences.pop()).div_(width)
                gradient.view(-1).index_add_(0, cell, slope, alpha=-1.0)
                reach = _take(torch.cat([to_left, to_right]), again)
        return below


TABLE = ("_breakpoints", "_table", "_everything", "_offset")


class _TreeSum(torch.autograd.Function):
    """All values, and all gradients with them: they share nearly all of the work."""

    @staticmethod
    def forward(ctx, z, trees):
        x = z.detach().to(trees.threshold.dtype)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(x, memory_format=torch.contiguous_format) if wanted else None
        value = x.new_empty(len(x))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            value[part] = trees._evaluate(x[part], gradient[part] if wanted else None)
        if wanted:
            ctx.save_for_backward(gradient.to(z.dtype))
        return value.add_(trees.baseline)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None


def _bit_number(power_of_two):
    """Exponent of the leading bit of positive integers, from the bits of a float.

    Exact for powers of two, and for integers whose second leading bit is 0 (no rounding can then
    reach the leading one).
    """
    if power_of_two.dtype == torch.int32:
        return power_of_two.to(torch.float32).view(torch.int32).bitwise_right_shift_(23).sub_(127)
    return power_of_two.to(torch.float64).view(torch.int64).bitwise_right_shift_(52).sub_(1023)


def _take(array, index):
    """Entries of the flattened array; several times as fast as indexing."""
    return array.view(-1).index_select(0, index)


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
    return (
        scatter(leaves, first[leaves], nodes.value[leaves], np.float64),
        scatter(internal, gap, nodes.feature[internal], np.int64),
        scatter(internal, gap, nodes.threshold[internal], np.float64),
        scatter(internal, gap, spacing, np.float64),
        scatter(internal, gap, bits(left), np.int64),
        scatter(internal, gap, bits(right), np.int64),
        torch.from_numpy(_lowest_common_ancestors(gap_depth)),
        torch.tensor(nodes.baseline, dtype=torch.float64),
    )


def _local_spacing(feature, threshold):
    """Mean distance of each threshold from its two neighbours on the same feature."""
    spacing = np.full(len(threshold), MIN_SPACING)
    for j in np.unique(feature):
        here = feature == j
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
