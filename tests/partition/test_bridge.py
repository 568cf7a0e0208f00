import math

import pytest
import torch

from skebm.partition import bridge_sampling, importance_sampling


def log_ratio(law, x):
    return law(x) - law.q.log_prob(x)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Tilt", (1, 0.5)),
        ("Tilt", (2, 3.0)),
        ("Skew", (10, 2.0)),
        ("TwoModes", (2,)),
        ("Tilt", (43, 5.0)),
    ],
)
@pytest.mark.parametrize("sizes", [(1000, 1000), (4000, 500)])
def test_errors_are_honest(laws, name, arguments, sizes):
    law = getattr(laws, name)(*arguments)
    results = []
    for seed in range(100):
        g = laws.rng(seed)
        x, y = law.q.sample(sizes[0], g), law.sample(sizes[1], g)
        results.append(bridge_sampling(log_ratio(law, x), log_ratio(law, y)))
    laws.check_coverage(results, law.log_z, low=0.6, high=1.5)
    assert results[0].method == "bridge sampling"
    assert results[0].n_samples == sum(sizes)


def test_it_is_the_fixed_point_of_meng_and_wong(laws):
    law, g = laws.Tilt(2, 1.0), laws.rng()
    l_q = log_ratio(law, law.q.sample(300, g))
    l_p = log_ratio(law, law.sample(200, g))
    r, s_p, s_q = 1.0, 200 / 500, 200 / 500
    s_q = 1 - s_p
    for _ in range(500):
        above = (l_q.exp() / (s_p * l_q.exp() + s_q * r)).mean()
        r = (above / (1 / (s_p * l_p.exp() + s_q * r)).mean()).item()
    assert bridge_sampling(l_q, l_p).value == pytest.approx(math.log(r), abs=1e-8)


def test_better_than_importance_sampling_with_the_same_draws(laws):
    law = laws.Tilt(10, 2.6)
    errors = torch.zeros(40, 2)
    for seed in range(40):
        g = laws.rng(seed)
        l_q = log_ratio(law, law.q.sample(2000, g))
        both = bridge_sampling(l_q, log_ratio(law, law.sample(2000, g)))
        errors[seed, 0] = importance_sampling(l_q).value - law.log_z
        errors[seed, 1] = both.value - law.log_z
    plain, bridge = errors.square().mean(0).sqrt()
    assert bridge < 0.5 * plain


def test_constants_shifts_and_symmetry(laws):
    law, g = laws.Tilt(2, 1.0), laws.rng()
    l_q, l_p = log_ratio(law, law.q.sample(300, g)), log_ratio(law, law.sample(200, g))
    result = bridge_sampling(l_q, l_p)
    shifted = bridge_sampling(l_q + 700, l_p + 700)
    assert shifted.value == pytest.approx(result.value + 700)
    assert shifted.std_error == pytest.approx(result.std_error)
    back = bridge_sampling(-l_p, -l_q)  # the laws change places
    assert back.value == pytest.approx(-result.value)
    assert back.std_error == pytest.approx(result.std_error)
    same = bridge_sampling(torch.full((10,), 2.0), torch.full((20,), 2.0))
    assert same.value == pytest.approx(2.0)
    assert same.std_error == pytest.approx(0.0, abs=1e-8)


def test_points_outside_of_the_other_support():
    """q uniform on (0, 2), p uniform on (1, 3) with density 1 on it: Z = 2."""
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0)).double()
    x, y = 2 * u[:2000], 1 + 2 * u[2000:]
    l_q = torch.where(x > 1, math.log(2), -math.inf)
    l_p = torch.where(y < 2, math.log(2), math.inf)
    result = bridge_sampling(l_q, l_p)
    assert abs(result.value - math.log(2)) < 4 * result.std_error
    assert result.std_error == pytest.approx(math.sqrt(2 / 2000), rel=0.1)


def test_correlated_samples(laws):
    """Samples of the model each repeated ten times: the error is honest with their true number."""
    law, z, naive = laws.Tilt(2, 3.0), [], []
    for seed in range(100):
        g = laws.rng(seed)
        l_q = log_ratio(law, law.q.sample(1000, g))
        l_p = log_ratio(law, law.sample(100, g)).repeat(10)
        for ess, errors in ((100, z), (None, naive)):
            result = bridge_sampling(l_q, l_p, model_ess=ess)
            errors.append((result.value - law.log_z) / result.std_error)
    assert 0.7 < torch.tensor(z).square().mean() < 1.4
    assert torch.tensor(naive).square().mean() > 2


@pytest.mark.parametrize(
    ("l_q", "l_p", "options", "message"),
    [
        ([0.0], [0.0, 1.0], {}, "log_ratio_proposal must have shape"),
        ([0.0, 1.0], [[0.0, 1.0]], {}, "log_ratio_model must have shape"),
        ([0.0, math.nan], [0.0, 1.0], {}, "log_ratio_proposal must not contain nan or .inf"),
        ([0.0, math.inf], [0.0, 1.0], {}, "log_ratio_proposal must not contain nan or .inf"),
        ([0.0, 1.0], [0.0, -math.inf], {}, "log_ratio_model must not contain nan or -inf"),
        ([0.0, 1.0], [0.0, 1.0], {"model_ess": 0}, "model_ess=0 must be positive"),
        ([-math.inf] * 2, [0.0, 1.0], {}, "no overlap"),
        ([0.0, 1.0], [math.inf] * 2, {}, "no overlap"),
        ([-math.inf] * 2, [math.inf] * 2, {}, "no overlap"),
        ([-3000.0] * 2, [3000.0] * 2, {}, "no overlap"),
    ],
)
def test_bad_arguments(l_q, l_p, options, message):
    with pytest.raises(ValueError, match=message):
        bridge_sampling(torch.tensor(l_q), torch.tensor(l_p), **options)
