"""Tasks of known distributions, built without an estimator."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from skebm._random import Seeds
from skebm.bases import AffineTransform
from skebm.models import FeatureMap
from skebm.training import Columns, Task
from skebm.training.distributions import Distributions
from skebm.training.task import make_splits
from skebm.training.tilted_task import tilted_task


def _plain(x, n_members, weight=None, seed=0, fraction=0.5):
    d, seeds = x.shape[1], Seeds(seed)
    columns = replace(
        Columns.learn(x.numpy(), range(d)), center=np.zeros(d), scale=np.ones(d)
    )  # fmt: skip
    return Task(
        columns=columns, given=x, x=x, weight=x.new_ones(len(x)) if weight is None else weight,
        splits=make_splits(len(x), n_members, fraction, seeds.rng("folds")),
        draw=lambda seed: x, changes=False, seeds=seeds, device=torch.device("cpu"),
    )  # fmt: skip


def _tilted(x, bases, proposals=None, **options):
    task, d = _plain(x, len(bases), **options), x.shape[1]
    features = FeatureMap(AffineTransform(torch.zeros(d), torch.ones(d)))
    proposals = bases if proposals is None else proposals
    return tilted_task(task, Distributions(bases, proposals, proposals), features)


@pytest.fixture(scope="session")
def plain():
    """``plain(x, n_members, weight, seed, fraction)``: a task whose columns keep their units."""
    return _plain


@pytest.fixture(scope="session")
def tilted():
    """``tilted(x, bases, proposals, weight, seed, fraction)``: with features x, clipped."""
    return _tilted
