import copy
import math
import pickle

import joblib
import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from skebm import _sklearn_compat
from skebm._sklearn_compat import TreeBooster, hist_gradient_boosting_nodes
from skebm.energies import MemberEnergies, _forest
from skebm.energies._trees import MIN_SPACING, SoftTrees

SETTINGS = dict(early_stopping=False, max_features=0.5, random_state=0)


def make(n=1500, d=4, max_iter=40, **kwargs):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal((n, d)), rng.gamma(2.0, size=(n, d)) - 2.0])
    x[:, -1] = np.round(x[:, -1], 1)  # a column with ties
    y = np.repeat([0, 1], n)
    clf = HistGradientBoostingClassifier(max_iter=max_iter, **SETTINGS | kwargs).fit(x, y)
    return clf, torch.from_numpy(rng.permutation(x)[:700].copy())


@pytest.fixture(scope="module")
def fitted():
    return make()


def literal(clf, z, softness, n_trees=None):
    """The definition, path by path."""
    nodes = hist_gradient_boosting_nodes(clf, n_trees)
    spacing = {}
    for j in range(z.shape[1]):
        t = np.unique(nodes.threshold[~nodes.is_leaf & (nodes.feature == j)])
        for k in range(len(t)):
            gaps = np.diff(t[max(k - 1, 0) : k + 2])
            if len(gaps) == 1:
                gaps = np.repeat(gaps, 2)
            spacing[j, t[k]] = max(gaps.mean(), MIN_SPACING)
    total = torch.full((len(z),), nodes.baseline, dtype=torch.float64)

    def descend(i, weight):
        if nodes.is_leaf[i]:
            return weight * nodes.value[i]
        j, t = nodes.feature[i], nodes.threshold[i]
        # the biweight kernel is a beta distribution, whose distribution function is a binomial sum
        p = ((t - z[:, j]) / (softness * spacing[j, t]) / 8 + 0.5).clamp(0, 1)
        s = sum(math.comb(5, k) * p**k * (1 - p) ** (5 - k) for k in (3, 4, 5))
        return descend(nodes.left[i], weight * s) + descend(nodes.right[i], weight * (1 - s))

    for root in nodes.roots:
        total = total + descend(root, torch.ones_like(total))
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_leaf_nodes": 63, "min_samples_leaf": 3},
        {"max_leaf_nodes": 2},
        {"min_samples_leaf": 4000},  # no split at all
    ],
)
def test_hard_trees_equal_the_classifier(settings):
    clf, z = make(**settings)
    trees = SoftTrees.from_hist_gradient_boosting(clf)
    nodes = hist_gradient_boosting_nodes(clf)
    at_thresholds = z.clone()
    for j in range(z.shape[1]):
        t = nodes.threshold[~nodes.is_leaf & (nodes.feature == j)]
        if len(t):
            at_thresholds[:, j] = torch.from_numpy(np.resize(t, len(z)))
    extreme = torch.tensor([[1e300] * 4, [-1e300] * 4, [np.inf] * 4, [-np.inf] * 4]).double()
    for x in (z, at_thresholds, torch.nextafter(at_thresholds, extreme[0]), extreme[:2]):
        np.testing.assert_allclose(trees(x), clf.decision_function(x.numpy()), atol=1e-12)
    assert trees(extreme).isfinite().all()


def test_first_trees_equal_the_staged_decision(fitted):
    clf, z = fitted
    stages = list(clf.staged_decision_function(z.numpy()))
    for t in (1, 7, 40):
        trees = SoftTrees.from_hist_gradient_boosting(clf, n_trees=t)
        assert trees.n_trees == t
        np.testing.assert_allclose(trees(z), stages[t - 1].ravel(), atol=1e-12)
    none = SoftTrees.from_hist_gradient_boosting(clf, n_trees=0)
    np.testing.assert_allclose(none(z), hist_gradient_boosting_nodes(clf).baseline)
    with pytest.raises(ValueError, match="n_trees=41"):
        SoftTrees.from_hist_gradient_boosting(clf, n_trees=41)


@pytest.mark.parametrize("softness", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("max_leaf_nodes", [31, 50])
def test_soft_trees_equal_their_definition(softness, max_leaf_nodes):
    clf, z = make(max_iter=15, max_leaf_nodes=max_leaf_nodes)
    z = z.requires_grad_()
    trees = SoftTrees.from_hist_gradient_boosting(clf, softness=softness)
    expected = literal(clf, z, softness)
    torch.testing.assert_close(trees(z), expected, rtol=0, atol=2e-7)
    weights = torch.linspace(-1, 1, len(z), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * trees(z)).sum(), z)
    (reference,) = torch.autograd.grad((weights * expected).sum(), z)
    torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=2e-5)


def test_gradient_by_finite_differences(fitted):
    clf, z = fitted
    trees = SoftTrees.from_hist_gradient_boosting(clf, softness=0.5)
    assert torch.autograd.gradcheck(
        trees, z[:8].clone().requires_grad_(), eps=1e-5, atol=1e-3, rtol=1e-4
    )


def test_small_softness_is_the_hard_tree_away_from_thresholds(fitted):
    clf, z = fitted
    nodes = hist_gradient_boosting_nodes(clf)
    away = torch.ones(len(z), dtype=torch.bool)
    for j in range(z.shape[1]):
        t = torch.from_numpy(nodes.threshold[~nodes.is_leaf & (nodes.feature == j)])
        away &= (z[:, j, None] - t).abs().amin(1) > 1e-4
    assert away.sum() > 100
    hard = clf.decision_function(z.numpy())
    errors = []
    for softness in (0.5, 0.05, 1e-4):
        trees = SoftTrees.from_hist_gradient_boosting(clf, softness=softness)
        errors.append(np.abs(trees(z).numpy() - hard)[away].max())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12


@pytest.mark.parametrize("softness", [0.0, 0.5])
def test_batching_precision_and_pickle(fitted, softness):
    clf, z = fitted
    trees = SoftTrees.from_hist_gradient_boosting(clf, softness=softness)
    whole = trees(z.repeat(3, 1))[: len(z)]
    one_by_one = torch.cat([trees(row[None]) for row in z[:100]])
    torch.testing.assert_close(whole[:100], one_by_one, rtol=0, atol=1e-12)
    assert trees(z[:0]).shape == (0,)
    assert trees(z.float()).dtype == torch.float32
    stored = pickle.dumps(trees)
    assert len(stored) < 1.5 * sum(b.nbytes for n, b in trees.named_buffers() if n[0] != "_")
    for twin in (pickle.loads(stored), copy.deepcopy(trees)):
        assert twin.softness == softness
        assert torch.equal(twin(z), trees(z))
    # float32 buffers round thresholds: nearly all points are on the same side of them
    assert (trees.float()(z) - whole).abs().median() < 1e-5


def test_softness_can_be_changed(fitted):
    clf, z = fitted
    trees = SoftTrees.from_hist_gradient_boosting(clf)
    hard, leaves = trees(z), trees.value
    trees.softness = 0.5
    assert torch.equal(trees(z), SoftTrees.from_hist_gradient_boosting(clf, softness=0.5)(z))
    trees.softness = 0.0
    assert torch.equal(trees(z), hard)
    assert trees.value is leaves
    with pytest.raises(ValueError, match="softness=-1"):
        trees.softness = -1


def test_members_in_one_sweep_are_those_apart(fitted, monkeypatch):
    clf, z = fitted
    other, _ = make(max_iter=9, max_leaf_nodes=12)
    read = SoftTrees.from_hist_gradient_boosting
    members = [read(clf), read(other, softness=0.3, offset=1.0), read(clf, n_trees=0)]
    z = torch.stack([z, 0.7 * z, z]).requires_grad_()
    weights = torch.linspace(-1, 1, z.shape[0] * z.shape[1], dtype=torch.float64).view(3, -1)
    apart = torch.stack([f(rows) for f, rows in zip(members, z, strict=True)])
    (slope,) = torch.autograd.grad((weights * apart).sum(), z)
    sweeps = []
    monkeypatch.setattr(_forest, "BLOCK", 16)  # blocks that end within a member
    monkeypatch.setattr(_forest, "CELLS", 5000)  # and rows in several parts
    call = _forest.Forest.__call__
    monkeypatch.setattr(_forest.Forest, "__call__", lambda *a: sweeps.append(a[0]) or call(*a))
    energy = MemberEnergies(members)
    together = energy(z)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((weights * together).sum(), z)[0], slope)
    assert torch.equal(energy(z.detach()), together)
    one_by_one = torch.cat([energy(row) for row in z.detach().split(1, dim=1)[:20]], dim=1)
    torch.testing.assert_close(one_by_one, apart[:, :20], rtol=0, atol=1e-12)
    same = z[0].detach().expand(3, -1, -1)  # rows that members share
    torch.testing.assert_close(energy(same), energy(same.clone()), rtol=0, atol=0)
    # a member that has changed is read anew, and the table is not stored
    members[0].softness = 0.3
    torch.testing.assert_close(energy(z)[0], read(clf, softness=0.3)(z[0]), rtol=0, atol=1e-12)
    assert sweeps[-1] is not sweeps[0]
    assert len(pickle.dumps(energy)) < 1.5 * sum(b.nbytes for b in energy.buffers())


def test_trees_of_a_point_that_is_no_number(fitted):
    trees = SoftTrees.from_hist_gradient_boosting(fitted[0], softness=0.1)
    assert trees(torch.full((3, 4), torch.nan).double()).shape == (3,)


def test_trees_that_cannot_be_read():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 2))
    three = HistGradientBoostingClassifier(max_iter=2).fit(x, np.arange(500) % 3)
    with pytest.raises(ValueError, match="two classes, got 3"):
        SoftTrees.from_hist_gradient_boosting(three)
    big = dict(max_leaf_nodes=80, min_samples_leaf=2)
    with pytest.raises(ValueError, match="at most 63"):
        SoftTrees.from_hist_gradient_boosting(make(max_iter=1, **big)[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_trees_grown_one_by_one_are_those_of_the_classifier(weighted):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((900, 3))
    y = (x[:, 0] * x[:, 1] + 0.3 * rng.standard_normal(900) > 0).astype(int)
    weight = rng.gamma(2.0, size=900) if weighted else None
    new = rng.standard_normal((200, 3))
    options = dict(SETTINGS, learning_rate=0.2, max_leaf_nodes=7, l2_regularization=1.0)
    booster = TreeBooster(HistGradientBoostingClassifier(**options), x, y, weight, new)
    for n_trees in (1, 12):
        while booster.n_trees < n_trees:
            booster.grow()
        clf = HistGradientBoostingClassifier(max_iter=n_trees, **options)
        expected = clf.fit(x, y, sample_weight=weight).decision_function(new)
        np.testing.assert_allclose(booster.logit, expected, atol=1e-7)
        trees = SoftTrees.from_nodes(booster.nodes(n_trees), 3, offset=0.5)
        np.testing.assert_allclose(trees(torch.from_numpy(new)), expected + 0.5, atol=1e-7)
    few = SoftTrees.from_nodes(booster.nodes(1), 3)
    assert few.n_trees == 1


def boosters(n=400):
    """Boosting of two tables."""
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        x, new = rng.standard_normal((n, 3)), rng.standard_normal((100, 3))
        y = (x[:, 0] * x[:, 1] > 0).astype(int)
        clf = HistGradientBoostingClassifier(max_leaf_nodes=7, **SETTINGS)
        found.append(TreeBooster(clf, x, y, None, new))
    return found


def grown(booster, n_trees=10):
    for _ in range(n_trees):
        booster.grow()
    return booster


def assert_same_trees(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.logit, other.logit)
        for a, b in zip(one.nodes(one.n_trees), other.nodes(other.n_trees), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("few_cells", [0, 10**9])
def test_trees_grown_in_threads_are_the_same(few_cells, monkeypatch):
    monkeypatch.setattr(_sklearn_compat, "FEW_CELLS", few_cells)
    found = joblib.Parallel(2, "threading")(joblib.delayed(grown)(b) for b in boosters())
    assert_same_trees(found, map(grown, boosters()))


def test_trees_go_on_growing_in_processes():
    # rows of more than a few bytes come to the process as maps that cannot be written to
    parallel = joblib.Parallel(2, "loky", max_nbytes=1000)

    def grown_there(booster):  # workers cannot import this file
        for _ in range(10):
            booster.grow()
        return booster

    found = boosters()
    for _ in range(2):
        found = parallel(joblib.delayed(grown_there)(b) for b in found)
    assert_same_trees(found, [grown(b, 20) for b in boosters()])
    for b in found:
        assert b.n_trees == 20


@pytest.mark.parametrize(
    "options",
    [
        dict(max_features=0.5, l2_regularization=1.0),
        dict(max_leaf_nodes=None, max_depth=3),
        dict(max_bins=20, min_samples_leaf=60, learning_rate=0.3),
        dict(min_samples_leaf=301),  # no node can be split
    ],
)
def test_grown_trees_are_those_of_the_classifier_to_the_bit(options):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((600, 4)).round(1)
    x[rng.random(600) < 0.1, 2] = np.nan
    x[:, 3] = x[:, 0]  # splits that gain the same
    y = np.nan_to_num(x[:, 2]) * x[:, 0] + 0.3 * rng.standard_normal(600) > 0
    options = dict(options, max_iter=15, early_stopping=False, random_state=0)
    whole = HistGradientBoostingClassifier(**options).fit(x, y)
    booster = TreeBooster(HistGradientBoostingClassifier(**options), x, y.astype(int), None, x)
    for expected, _ in zip(whole.staged_decision_function(x), range(15), strict=True):
        booster.grow()
        np.testing.assert_array_equal(booster.logit, np.ravel(expected))
    ours, theirs = booster.nodes(15), hist_gradient_boosting_nodes(whole)
    for name in ("value", "threshold", "feature", "nan_goes_left"):
        of_leaves = name == "value"
        mine, other = (getattr(n, name)[n.is_leaf == of_leaves] for n in (ours, theirs))
        np.testing.assert_array_equal(np.sort(mine), np.sort(other))


@pytest.fixture(scope="module")
def of_states():
    """A classifier of two columns of codes and three of numbers, all with holes, and its rows."""
    rng = np.random.default_rng(3)
    n = 3_000
    x = np.c_[rng.integers(0, 200, n), rng.integers(0, 3, n), rng.standard_normal((n, 3))]
    x[:, 1:] = np.where(rng.random((n, 4)) < 0.2, np.nan, x[:, 1:])
    y = (x[:, 0] % 7 < 3) ^ np.isnan(x[:, 2]) ^ (np.nan_to_num(x[:, 4]) > 0)
    classifier = HistGradientBoostingClassifier(
        categorical_features=[0, 1], max_iter=60, max_features=0.5, random_state=0
    )
    return classifier.fit(x, y ^ (rng.random(n) < 0.1)), x


def test_trees_of_categories_and_holes_are_those_of_the_classifier(of_states):
    classifier, x = of_states
    trees = SoftTrees.from_hist_gradient_boosting(classifier)
    rng = np.random.default_rng(4)
    new = np.c_[
        rng.integers(-1, 256, 2_000), rng.integers(-1, 9, 2_000), rng.standard_normal((2_000, 3))
    ].astype(float)  # codes that were never met among them
    new[rng.random(new.shape) < 0.2] = np.nan
    for rows in (x, new):
        expected = classifier.decision_function(rows)
        np.testing.assert_allclose(trees(torch.from_numpy(rows)), expected, atol=1e-10)


def test_soft_trees_of_categories_and_holes_route_these_as_hard_ones_do(of_states):
    classifier, x = of_states
    hard = SoftTrees.from_hist_gradient_boosting(classifier)
    soft = SoftTrees.from_hist_gradient_boosting(classifier, softness=0.2)
    # numbers that are far from all thresholds leave codes and holes alone to decide
    rows = np.where(np.isnan(x), np.nan, np.c_[x[:, :2], np.sign(x[:, 2:]) * 1e6])
    rows = torch.from_numpy(rows[:500])
    np.testing.assert_allclose(soft(rows), hard(rows), atol=1e-9)
    z = torch.from_numpy(x[:100]).requires_grad_(True)
    soft(z).sum().backward()
    assert not z.grad[:, :2].any()
    assert not z.grad[z.isnan()].any()
    step = torch.zeros(5).double()
    step[4] = 1e-6
    slope = (soft(z.detach() + step) - soft(z.detach() - step)) / 2e-6
    there = ~z.isnan()[:, 4]
    np.testing.assert_allclose(z.grad[there, 4], slope[there], rtol=1e-4, atol=1e-5)


def test_trees_of_categories_grown_one_by_one(of_states):
    _, x = of_states
    codes = np.where(np.isnan(x[:, :2]), [[200, 3]], x[:, :2])
    x = np.c_[codes, x[:, 2:]]
    y = (codes[:, 0] % 5 < 2) ^ (np.isnan(x[:, 3]))
    options = dict(max_iter=20, max_features=0.5, early_stopping=False, random_state=0)
    whole = HistGradientBoostingClassifier(categorical_features=[0, 1], **options).fit(x, y)
    booster = TreeBooster(
        HistGradientBoostingClassifier(**options), x, y.astype(int), None, x, [201, 4]
    )
    for _ in range(20):
        booster.grow()
    np.testing.assert_allclose(booster.logit, whole.decision_function(x), atol=1e-7)
    trees = SoftTrees.from_nodes(booster.nodes(20), 5)
    np.testing.assert_allclose(trees(torch.from_numpy(x)), booster.logit, atol=1e-10)
