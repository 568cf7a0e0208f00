"""Fits of the lowest view without an estimator."""

import warnings

import numpy as np
import pytest
import torch

from skebm._random import Seeds
from skebm.bases import VIEWS
from skebm.exceptions import LowEffectiveSampleSizeWarning
from skebm.training import Columns, fit_lowest_view, make_task
from skebm.training.views import TRIMMED_SHARE, common_scale

EQUAL = torch.ones(500, dtype=torch.float64)


def task(X, seed=0, n_members=2):
    return make_task(
        X, np.ones(len(X)), Columns.learn(X, range(X.shape[1])), n_members=n_members,
        validation_fraction=0.1, smoothing=0.0, seeds=Seeds(seed), device=torch.device("cpu"),
    )  # fmt: skip


def gaussian(n=500, d=2, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_a_common_scale_takes_quantiles_to_quantiles():
    rng = np.random.default_rng(0)
    scale = torch.as_tensor(rng.normal(size=500))
    logs = torch.stack([scale, 3.0 * scale - 5.0, scale.exp()], dim=1)
    mapped = common_scale(logs, scale, EQUAL)(logs)
    # increasing functions of one another come to the same, up to what is between two knots
    inner = scale.abs() < 2.0
    for column in mapped.T:
        torch.testing.assert_close(column[inner], scale[inner], atol=0.03, rtol=0)


def test_a_common_scale_of_equal_values_is_finite():
    logs = torch.tensor([0.0, 0.0, 0.0, 1.0]).double().repeat(125)[:, None]
    mapped = common_scale(logs, logs[:, 0], EQUAL)(logs)[:, 0]
    assert (mapped[logs[:, 0] == 1] > mapped[logs[:, 0] == 0].max()).all()


def test_weights_move_the_quantiles():
    scale = torch.linspace(0.0, 1.0, 500).double()
    weight = torch.where(scale < 0.5, 1e-6, 1.0).double()
    logs = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)).double()
    mapped = common_scale(logs, scale, weight)(logs[weight == 1.0])
    assert mapped.median().item() == pytest.approx(0.75, abs=0.05)


def test_without_a_choice_the_lowest_of_one_view_is_the_view():
    X = gaussian()
    fitted = fit_lowest_view(task(X), ["sharp"], "auto")
    x = torch.as_tensor(gaussian(200, seed=1))
    expected = torch.stack([q.components[0].log_prob(x) for q in fitted.model.bases])
    # the scale is that of the view itself, so that Z = 1
    torch.testing.assert_close(fitted.model.log_members(x), expected, atol=0.01, rtol=0)


def test_rows_are_judged_by_the_member_that_has_not_seen_them():
    own = task(gaussian())
    fitted = fit_lowest_view(own, ["local", "wide"], "auto", trims=True)
    for k, held in enumerate(own.held):
        centers = fitted.model.bases[k].components[0].centers
        assert torch.cdist(own.given[held], centers).min() > 0
    assert (fitted.judges >= 0).all()


def test_the_oddest_rows_are_left_out():
    X = gaussian(400)
    X[:20] += 8.0  # a cluster of its own, too large for neighbours
    own = task(X)
    n_centers = []
    for trims in (False, True):
        model = fit_lowest_view(own, ["local", "linear", "wide"], "auto", trims=trims).model
        kept = torch.cat([base.components[0].centers for base in model.bases])
        n_centers.append(len(kept))
        far = own.given[:20]
        assert bool((torch.cdist(far, kept).amin(1) < 1e-5).all()) != trims
    # each row is seen by one member of two
    assert n_centers == [400, 400 - int(TRIMMED_SHARE * 400)]


def test_names_and_summary():
    fitted = fit_lowest_view(task(gaussian(100)), list(VIEWS), "auto")
    assert fitted.attributes["views_"] == list(VIEWS)
    assert "lowest of the views sharp, local, linear, wide:" in fitted.attributes["_summary"]


def test_log_z_is_shared_where_views_have_little_in_common():
    with pytest.warns(LowEffectiveSampleSizeWarning, match=r"views have\s+little mass in common"):
        fitted = fit_lowest_view(task(gaussian(60, 40)), ["sharp", "linear"], "auto")
    assert len(fitted.model.log_partition.unique()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit_lowest_view(task(gaussian()), ["sharp", "linear"], "auto")
    assert len(fitted.model.log_partition.unique()) == 2


def test_samples_asked_for_are_drawn():
    few = fit_lowest_view(task(gaussian()), ["sharp", "linear"], 1_000)
    more = fit_lowest_view(task(gaussian()), ["sharp", "linear"], 16_000)
    errors = [f.attributes["log_partition_std_error_"].mean() for f in (few, more)]
    assert errors[0] == pytest.approx(4.0 * errors[1], rel=0.4)
