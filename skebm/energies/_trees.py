"""Boosted trees as a torch energy, with hard or soft splits.

A fitted ``HistGradientBoostingClassifier`` is read node by node. With softness c = 0 the module
is the classifier's logit. Splits of codes of categories, and the way that NaN takes, stay hard;
with c > 0 any other split ``x <= t`` becomes F((t - x) / tau), where tau is c times the local
spacing of the thresholds of that feature, and F the distribution function of the biweight kernel on
[-4, 4], about that of a normal distribution of standard deviation 1.5: a point then reaches leaves
with the product of the weights along their paths, and the logit is differentiable, twice. How trees
are computed is told in `_forest.py`.
"""

from typing import Any, Self

import numpy as np
import torch
from torch import nn

from skebm._sklearn_compat import BoostedNodes, hist_gradient_boosting_nodes

from ._forest import evaluate, without_forest

MIN_SPACING = 0.002  # thresholds closer than this count as this far apart


class SoftTrees(nn.Module):
    """Sum of regression trees with hard or soft splits, (n, d) -> (n,).

    Made by :meth:`from_hist_gradient_boosting`.

    Attributes
    ----------
    n_features : int
    n_trees : int
    softness : float
        May be changed at any time; the trees are kept, only the lookup table is made anew.

    See Also
    --------
    skebm.Boosting : The specification that estimators take.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from sklearn.ensemble import HistGradientBoostingClassifier
    >>> from skebm.energies import SoftTrees
    >>> X = np.random.default_rng(0).normal(size=(500, 2))
    >>> clf = HistGradientBoostingClassifier(max_iter=5, max_leaf_nodes=8).fit(X, X[:, 0] > 0)
    >>> trees = SoftTrees.from_hist_gradient_boosting(clf)
    >>> trees.n_trees
    5
    >>> logits = trees(torch.as_tensor(X)).numpy()
    >>> np.allclose(logits, clf.decision_function(X), atol=1e-5)
    True
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
        scatter(of_codes, gap[by_code], np.arange(1, len(of_codes) + 1), np.int64) - 1,
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
