"""The only file that touches private names of scikit-learn.

Everything here may move between scikit-learn releases; the rest of the package imports it from
here, so that such a move is repaired in one place.
"""

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
    "_check_method_params",
    "_check_sample_weight",
    "_fit_context",
    "_safe_indexing",
    "hist_gradient_boosting_nodes",
    "power_standardization",
]


class BoostedNodes(NamedTuple):
    """The nodes of all trees of a boosted classifier, one after the other, as plain arrays.

    Attributes
    ----------
    tree : ndarray of shape (n_nodes,)
        Number of the tree that a node belongs to.
    feature, threshold : ndarray of shape (n_nodes,)
        An internal node sends x to the left child where ``x[feature] <= threshold``.
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
        Fitted on two classes, numerical features, no missing values.
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
    trees = [predictors[0].nodes for predictors in clf._predictors[:n_trees]]
    baseline = float(np.ravel(clf._baseline_prediction)[0])
    sizes = np.array([len(nodes) for nodes in trees], dtype=np.int64)
    roots = np.cumsum(sizes) - sizes
    tree = np.repeat(np.arange(n_trees), sizes)
    nodes: Any = np.concatenate(trees) if trees else np.zeros(0, clf._predictors[0][0].nodes.dtype)
    is_leaf = nodes["is_leaf"].astype(bool)
    if nodes["is_categorical"][~is_leaf].any():
        raise ValueError("trees with categorical splits cannot be read; pass numerical features.")
    if not np.isfinite(nodes["num_threshold"][~is_leaf]).all():
        raise ValueError("trees with splits on missing values cannot be read.")
    shift = np.where(is_leaf, 0, roots[tree])
    return BoostedNodes(
        tree=tree,
        feature=nodes["feature_idx"].astype(np.int64),
        threshold=nodes["num_threshold"].astype(np.float64),
        left=nodes["left"].astype(np.int64) + shift,
        right=nodes["right"].astype(np.int64) + shift,
        value=nodes["value"].astype(np.float64),
        is_leaf=is_leaf,
        roots=roots,
        baseline=baseline,
    )


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
