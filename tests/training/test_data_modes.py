"""Modes of the data that recalibration may weight."""

import math

import pytest
import torch

from skebm._random import Seeds
from skebm.bases import GaussianMixtureBase
from skebm.training.acceptance import data_modes, recalibrate
from skebm.training.distributions import Distributions
from skebm.training.task import Task, make_splits
from skebm.training.tilted_task import tilted_task


@pytest.mark.parametrize(("n", "d"), [(400, 10), (1000, 20), (4000, 10)])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_modes_have_not_seen_the_rows_they_are_judged_on(n, d, seed):
    # the base is the truth and f = 0: whatever recalibration adds is an error
    truth = GaussianMixtureBase([1.0], torch.zeros(1, d), torch.eye(d)[None])
    rng = torch.Generator().manual_seed(seed)
    x = truth.sample(n, rng)
    task = Task(
        columns=None, given=x, x=x, weight=torch.ones(n).double(),
        splits=make_splits(n, 4, 0.1, rng), draw=None, changes=False,
        seeds=Seeds(seed), device=torch.device("cpu"),
    )  # fmt: skip
    bases = [truth] * 4
    modes = data_modes(task, bases)
    assert modes is not None
    task = tilted_task(task, Distributions(bases, bases, bases), torch.nn.Identity(), modes)
    zero = [torch.zeros(len(held)).double() for held in task.held]
    _, mode_weights, _ = recalibrate(
        task, zero, torch.zeros_like(task.pool_log_ratio), task.responsibilities()
    )
    if len(mode_weights):
        new, others = truth.sample(20_000, rng), truth.sample(20_000, rng)
        for mode in modes:
            tilt, of_others = (mode.responsibilities(rows) @ mode_weights for rows in (new, others))
            log_z = torch.logsumexp(of_others, 0) - math.log(len(others))
            assert tilt.mean() - log_z > -0.02
