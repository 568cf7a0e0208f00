"""The only file that touches private names of scikit-learn.

Everything here may move between scikit-learn releases; the rest of the package imports it from
here, so that such a move is repaired in one place.
"""

import functools
import inspect
import os
import pickle
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import _fit_context
from sklearn.utils import _safe_indexing
from sklearn.utils._param_validation import HasMethods, Interval, Options, StrOptions
from sklearn.utils.validation import _check_method_params, _check_sample_weight

__all__ = [
    "BoostedNodes",
    "HasMethods",
    "Interval",
    "Options",
    "StrOptions",
    "TreeBooster",
    "_check_method_params",
    "_check_sample_weight",
    "_fit_context",
    "_safe_indexing",
    "hist_gradient_boosting_nodes",
    "power_standardization",
]

FEW_CELLS = 500_000
"""Of a table of so many rows times columns a split is made of steps of some microseconds: threads
that grow trees of it take turns."""


class BoostedNodes(NamedTuple):
    """The nodes of all trees of a boosted classifier, one after the other, as plain arrays.

    Attributes
    ----------
    tree : ndarray of shape (n_nodes,)
        Number of the tree that a node belongs to.
    feature, threshold : ndarray of shape (n_nodes,)
        An internal node sends x to the left child where ``x[feature] <= threshold``; the threshold
        is infinite where only NaN goes to the right.
    is_categorical : ndarray of bool of shape (n_nodes,)
        Whether it sends it there where the code ``x[feature]`` is one of `left_codes` instead.
    left_codes : ndarray of bool of shape (n_nodes, 256)
    nan_goes_left : ndarray of bool of shape (n_nodes,)
        Where NaN goes, and a code that is not known.
    known_codes : ndarray of bool of shape (n_features, 256)
        Of the columns of codes; none of others.
    left, right : ndarray of shape (n_nodes,)
        Positions of the children in these arrays (0 for leaves).
    value : ndarray of shape (n_nodes,)
        What a leaf adds to the logit.
    is_leaf : ndarray of bool of shape (n_nodes,)
    roots : ndarray of shape (n_trees,)
        Positions of the roots.
    baseline : float
        The logit before the first tree.
    """

    tree: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    is_categorical: np.ndarray
    left_codes: np.ndarray
    nan_goes_left: np.ndarray
    known_codes: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray
    is_leaf: np.ndarray
    roots: np.ndarray
    baseline: float


def hist_gradient_boosting_nodes(clf: Any, n_trees: int | None = None) -> BoostedNodes:
    """Read the trees of a fitted binary ``HistGradientBoostingClassifier``.

    Parameters
    ----------
    clf : HistGradientBoostingClassifier
        Fitted on two classes. Columns are as it orders and codes them itself: categorical ones
        first, as numbers 0, 1, ... of their sorted categories.
    n_trees : int, optional
        Read only the first `n_trees` iterations. All of them by default.

    Returns
    -------
    BoostedNodes
    """
    if clf.n_trees_per_iteration_ != 1:
        raise ValueError(f"the classifier must have two classes, got {len(clf.classes_)}.")
    if n_trees is None:
        n_trees = len(clf._predictors)
    elif not 0 <= n_trees <= len(clf._predictors):
        raise ValueError(f"n_trees={n_trees} must lie in [0, {len(clf._predictors)}].")
    trees = [predictors[0] for predictors in clf._predictors[:n_trees]]
    baseline = float(np.ravel(clf._baseline_prediction)[0])
    return _joined(trees, baseline, clf._predictors[0][0].nodes, clf._bin_mapper)


def _joined(predictors, baseline, like, bins):
    """Nodes of trees, one after the other; `like` has their dtype, where there are none."""
    trees = [predictor.nodes for predictor in predictors]
    sizes = np.array([len(nodes) for nodes in trees], dtype=np.int64)
    roots = np.cumsum(sizes) - sizes
    tree = np.repeat(np.arange(len(trees)), sizes)
    nodes: Any = np.concatenate(trees) if trees else np.zeros(0, like.dtype)
    is_leaf = nodes["is_leaf"].astype(bool)
    is_categorical = nodes["is_categorical"].astype(bool) & ~is_leaf
    left_codes = np.zeros((len(nodes), 256), dtype=bool)
    if is_categorical.any():
        sets = np.concatenate([predictor.raw_left_cat_bitsets for predictor in predictors])
        n_sets = [len(predictor.raw_left_cat_bitsets) for predictor in predictors]
        first = np.repeat(np.cumsum([0, *n_sets])[:-1], sizes)
        of_node = first + nodes["bitset_idx"]
        left_codes[is_categorical] = _codes_in(sets[of_node[is_categorical]])
    known_codes = np.zeros((len(bins.is_categorical_), 256), dtype=bool)
    for j in np.flatnonzero(bins.is_categorical_):
        known_codes[j, bins.bin_thresholds_[j].astype(np.int64)] = True
    shift = np.where(is_leaf, 0, roots[tree])
    return BoostedNodes(
        tree=tree,
        feature=nodes["feature_idx"].astype(np.int64),
        threshold=nodes["num_threshold"].astype(np.float64),
        is_categorical=is_categorical,
        left_codes=left_codes,
        nan_goes_left=nodes["missing_go_to_left"].astype(bool),
        known_codes=known_codes,
        left=nodes["left"].astype(np.int64) + shift,
        right=nodes["right"].astype(np.int64) + shift,
        value=nodes["value"].astype(np.float64),
        is_leaf=is_leaf,
        roots=roots,
        baseline=baseline,
    )


def _codes_in(bitsets):
    """Which of the codes 0 to 255 are in sets of eight 32-bit words, (n, 8) -> (n, 256)."""
    bits = bitsets[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    return bits.reshape(len(bitsets), 256).astype(bool)


@functools.cache
def _turn(process):
    """Lock for the steps between which a thread has the interpreter for a moment.

    Each thread would wait for the other at every step, and to be woken takes longer than the step.
    """
    return threading.Lock()  # a fork may begin while its parent holds its own


class TreeBooster:
    """Boosting of an unfitted ``HistGradientBoostingClassifier``, tree by tree.

    The trees are those that the classifier's `fit` grows. But rows are binned once, boosting can be
    looked at and go on at no cost, and values at further rows are kept up to date. Warm starts of
    the classifier itself bin the rows, and predict them by all trees, anew.

    Parameters
    ----------
    classifier : HistGradientBoostingClassifier
        Without early stopping or constraints.
    X : ndarray of shape (n_samples, n_features)
        NaN where a value is missing.
    y : ndarray of shape (n_samples,)
        0 or 1.
    sample_weight : ndarray of shape (n_samples,) or None
    judged : ndarray of shape (n_judged, n_features)
        Rows at which the logit is wanted.
    n_categories : sequence of int, default=()
        The first columns are codes 0, 1, ... of so many categories.

    Attributes
    ----------
    logit : ndarray of shape (n_judged,)
        After the trees grown so far.
    n_trees : int
    """

    def __init__(
        self,
        classifier: Any,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray | None,
        judged: np.ndarray,
        n_categories: Sequence[int] = (),
    ):
        # here: the import is slow
        from sklearn._loss.loss import HalfBinomialLoss
        from sklearn.ensemble._hist_gradient_boosting.binning import _BinMapper

        rng = np.random.RandomState(classifier.random_state)
        seeds = [rng.randint(np.iinfo(np.uint32).max, dtype="u8") for _ in range(2)]
        self._classifier, self._columns_rng = classifier, np.random.default_rng(seeds[1])
        codes = [np.arange(size, dtype=np.float64) for size in n_categories]
        n_numbers = X.shape[1] - len(codes)
        self._has_nan = np.isnan(X).any(axis=0).astype(np.uint8)
        self._bins: Any = _BinMapper(
            n_bins=classifier.max_bins + 1,
            is_categorical=np.array([True] * len(codes) + [False] * n_numbers),
            known_categories=[*codes, *[None] * n_numbers], random_state=seeds[0], n_threads=1,
        )  # fmt: skip
        weighted = {} if sample_weight is None else {"sample_weight": sample_weight}
        bins_are_weighted = "sample_weight" in inspect.signature(_BinMapper.fit).parameters
        self._bins.fit(X, **weighted if bins_are_weighted else {})
        self._X = self._bins.transform(X)
        self._y, self._weight = y.astype(np.float64), sample_weight
        self._loss: Any = HalfBinomialLoss(sample_weight=sample_weight)
        self._slopes = self._loss.init_gradient_and_hessian(
            n_samples=len(y), dtype=np.float32, order="F"
        )
        self._baseline = float(
            np.ravel(self._loss.fit_intercept_only(y_true=self._y, sample_weight=sample_weight))[0]
        )
        self._raw = np.full(len(y), self._baseline)
        self._judged = np.ascontiguousarray(self._bins.transform(judged))  # read row by row
        self.logit = np.full(len(judged), self._baseline)
        self._trees: list[Any] = []

    def __reduce__(self):
        # joblib pickles array by array, several of each tree, and lends large ones only to be read
        return _restored, (pickle.dumps(vars(self), pickle.HIGHEST_PROTOCOL),)

    @property
    def n_trees(self) -> int:
        return len(self._trees)

    def grow(self) -> None:
        """Grow one more tree."""
        from sklearn.ensemble._hist_gradient_boosting.gradient_boosting import (
            _update_raw_predictions,
        )
        from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor

        gradient, hessian = self._slopes
        self._loss.gradient_hessian(
            y_true=self._y, raw_prediction=self._raw, sample_weight=self._weight,
            gradient_out=gradient, hessian_out=hessian, n_threads=1,
        )  # fmt: skip
        growth = _Growth(
            self._classifier, self._X, gradient, hessian, self._bins, self._has_nan,
            self._columns_rng,
        )  # fmt: skip
        growth.grow()
        _update_raw_predictions(self._raw, growth, 1)
        tree = TreePredictor(*growth.arrays(self._bins.bin_thresholds_))
        self.logit += tree.predict_binned(self._judged, self._bins.missing_values_bin_idx_, 1)
        self._trees.append(tree)

    def nodes(self, n_trees: int) -> BoostedNodes:
        """Return the nodes of the first trees, of which at least one has been grown."""
        like = self._trees[0].nodes
        return _joined(self._trees[:n_trees], self._baseline, like, self._bins)


def _restored(state):
    booster = TreeBooster.__new__(TreeBooster)
    vars(booster).update(pickle.loads(state))
    return booster


class _Node:
    """A node of a growing tree; the first one of a heap is that whose split gains most.

    Its rows are those from `partition_start` to `partition_stop` of the partition of all rows.
    """

    __slots__ = (
        "depth", "gain", "gradient", "hessian", "histograms", "number", "partition_start",
        "partition_stop", "rows", "split", "value",
    )  # fmt: skip

    def __init__(self, number, depth, rows, start, gradient, hessian, value):
        self.number, self.depth, self.value = number, depth, value
        self.rows, self.partition_start, self.partition_stop = rows, start, start + len(rows)
        self.gradient, self.hessian = gradient, hessian  # sums over the rows

    def __lt__(self, other):
        return self.gain > other.gain


class _Growth:
    """Growth of one tree, the same as that of scikit-learn's ``TreeGrower``.

    That one serves constraints, many losses and threads, and takes a third of its time to do so
    where trees are small. This one has the compiled parts of it, and little Python around them.

    Attributes
    ----------
    splitter : Splitter
        With the partition of the rows.
    finalized_leaves : list of _Node
        `_update_raw_predictions` reads these, and the partition.
    """

    def __init__(self, classifier, X_binned, gradient, hessian, bins, has_nan, columns_rng):
        from sklearn.ensemble._hist_gradient_boosting.histogram import HistogramBuilder
        from sklearn.ensemble._hist_gradient_boosting.splitting import Splitter

        n_bins = classifier.max_bins + 1
        self._classifier, self._has_nan = classifier, has_nan.tolist()
        self._n_cells = X_binned.size
        self._builder: Any = HistogramBuilder(X_binned, n_bins, gradient, hessian, False, 1)
        self.splitter: Any = Splitter(
            X_binned=X_binned,
            n_bins_non_missing=bins.n_bins_non_missing_,
            missing_values_bin_idx=n_bins - 1,
            has_missing_values=has_nan,
            is_categorical=bins.is_categorical_,
            monotonic_cst=np.zeros(X_binned.shape[1], dtype=np.int8),
            l2_regularization=classifier.l2_regularization,
            min_samples_leaf=classifier.min_samples_leaf,
            feature_fraction_per_split=classifier.max_features,
            rng=columns_rng,
        )
        self._n_bins_non_missing = bins.n_bins_non_missing_.tolist()
        self.finalized_leaves: list[_Node] = []
        self._inner: list[_Node] = []

    def grow(self):
        """Split nodes, those first that gain most, until there are as many leaves as asked for."""
        heap, enough = [], 2 * self._classifier.min_samples_leaf
        self._begin(heap, enough)
        with _turn(os.getpid()) if self._n_cells < FEW_CELLS else nullcontext():
            self._split(heap, enough)
        for leaf in self.finalized_leaves:
            leaf.value *= self._classifier.learning_rate

    def _split(self, heap, enough):
        leaves, inner = self.finalized_leaves, self._inner
        split_rows, add_up = self.splitter.split_indices, self._builder.compute_histograms_brute
        subtract = self._builder.compute_histograms_subtraction
        most, deepest = self._classifier.max_leaf_nodes, self._classifier.max_depth
        while heap:
            node = heappop(heap)
            split = node.split
            left_rows, right_rows, n_left = split_rows(split, node.rows)
            number, depth = 2 * len(inner) + 1, node.depth + 1
            left = _Node(
                number, depth, left_rows, node.partition_start,
                split.sum_gradient_left, split.sum_hessian_left, split.value_left,
            )  # fmt: skip
            right = _Node(
                number + 1, depth, right_rows, left.partition_stop,
                split.sum_gradient_right, split.sum_hessian_right, split.value_right,
            )  # fmt: skip
            inner.append(node)
            n_right = len(right_rows)
            if not self._has_nan[split.feature_idx]:
                split.missing_go_to_left = n_left > n_right  # what has not been seen
            if len(leaves) + len(heap) + 2 == most:
                leaves += [left, right, *heap]
                break
            grows_left = n_left >= enough and depth != deepest
            grows_right = n_right >= enough and depth != deepest
            if grows_left or grows_right:
                # the rows of one child are added up, and the other has what is left
                less, more = (left, right) if n_left < n_right else (right, left)
                less.histograms = add_up(less.rows)
                more.histograms = subtract(node.histograms, less.histograms)
            node.histograms = None
            for child, grows in ((left, grows_left), (right, grows_right)):
                if grows:
                    self._look(child, heap)
                else:
                    leaves.append(child)

    def _begin(self, heap, enough):
        """Put the root on the heap, or among the leaves."""
        rows = self.splitter.partition
        histograms = self._builder.compute_histograms_brute(rows)
        one = np.asarray(histograms[0])  # any column will do
        root = _Node(0, 0, rows, 0, one["sum_gradients"].sum(), one["sum_hessians"].sum(), 0.0)
        root.histograms = histograms
        if len(rows) < enough or root.hessian < self.splitter.min_hessian_to_split:
            self.finalized_leaves.append(root)
        else:
            self._look(root, heap)

    def _look(self, node, heap):
        """Find the best split of a node, and put it on the heap, or else among the leaves."""
        node.split = split = self.splitter.find_node_split(
            len(node.rows), node.histograms, node.gradient, node.hessian, node.value
        )
        node.gain = split.gain
        if node.gain > 0:
            heappush(heap, node)
        else:
            node.histograms = None
            self.finalized_leaves.append(node)

    def arrays(self, thresholds):
        """Arrays of the grown tree, for a ``TreePredictor``."""
        from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE

        inner, splits = self._inner, [node.split for node in self._inner]
        features, bins = [s.feature_idx for s in splits], [s.bin_idx for s in splits]
        nodes: Any = np.zeros(2 * len(inner) + 1, dtype=PREDICTOR_RECORD_DTYPE)
        nodes["is_leaf"] = 1
        value = nodes["value"]
        for leaf in self.finalized_leaves:
            value[leaf.number] = leaf.value
        some: Any = np.zeros(len(inner), dtype=PREDICTOR_RECORD_DTYPE)
        some["feature_idx"], some["bin_threshold"] = features, bins
        some["num_threshold"] = [
            # the last bin of numbers: only NaN goes to the right
            np.inf if b == self._n_bins_non_missing[j] - 1 else thresholds[j][b]
            for j, b in zip(features, bins, strict=True)
        ]
        some["missing_go_to_left"] = [s.missing_go_to_left for s in splits]
        some["left"] = range(1, len(nodes), 2)
        some["right"] = some["left"] + 1
        sets = [s.left_cat_bitset for s in splits if s.is_categorical]
        if sets:
            some["is_categorical"] = is_categorical = [s.is_categorical for s in splits]
            some["bitset_idx"] = np.cumsum(is_categorical) - some["is_categorical"]
        nodes[[node.number for node in inner]] = some
        codes = np.array(sets, dtype=np.uint32).reshape(-1, 8)
        return nodes, codes, codes  # codes 0, 1, ... are the numbers of their bins


def power_standardization(transformer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale by which a fitted ``PowerTransformer`` standardises its powers.

    Parameters
    ----------
    transformer : PowerTransformer
        Fitted.

    Returns
    -------
    mean, scale : ndarray of shape (n_features,)
        0 and 1 where it does not standardise.
    """
    if not transformer.standardize:
        return np.zeros_like(transformer.lambdas_), np.ones_like(transformer.lambdas_)
    return transformer._scaler.mean_, transformer._scaler.scale_
