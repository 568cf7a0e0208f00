import math

import pytest
import torch
from scipy.signal import lfilter

from skebm.partition import estimate, importance_sampling
from skebm.samplers import random_walk


def measure(law, g, **options):
    return estimate(law, law.q, g, **options)


@pytest.mark.parametrize(("d", "kl"), [(1, 0.3), (2, 0.16), (10, 0.63)])
def test_importance_sampling_where_the_base_covers(laws, d, kl):
    law = laws.Tilt(d, kl, b=0.1)
    results = [
        measure(law, laws.rng(s), target_std_error=0.02, max_samples=32_768) for s in range(50)
    ]
    assert {r.method for r in results} == {"importance sampling"}
    laws.check_coverage(results, law.log_z, low=0.5)
    assert max(r.std_error for r in results) <= 0.02


def test_honest_where_importance_sampling_is_not(laws):
    """d = 43, KL 12: the effective sample size is 1e-4."""
    law = laws.Tilt(43, 12.0)
    results, plain = [], []
    for seed in range(6):
        results.append(measure(law, laws.rng(seed)))
        x = law.q.sample(20_000, laws.rng(seed))
        result = importance_sampling(law(x) - law.q.log_prob(x))
        plain.append((result.value - law.log_z) / result.std_error)
    z = torch.tensor([(r.value - law.log_z) / r.std_error for r in results])
    assert torch.tensor(plain).square().mean() > 6
    assert z.square().mean() < 3
    assert z.abs().max() < 4
    assert max(abs(r.value - law.log_z) for r in results) < 0.06
    assert max(r.std_error for r in results) < 0.03
    assert {r.method for r in results} <= {"bridge sampling", "sequential Monte Carlo"}


@pytest.mark.parametrize(("name", "arguments"), [("Skew", (10, 7.0)), ("TwoModes", (6,))])
def test_low_ess_is_left_to_the_particles(laws, name, arguments):
    law = getattr(laws, name)(*arguments)
    results = [measure(law, laws.rng(s), max_particles=4096) for s in range(14)]
    assert {r.method for r in results} <= {"bridge sampling", "sequential Monte Carlo"}
    laws.check_coverage(results, law.log_z, low=0.1, high=2.0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Tilt", (1, 2.0)), ("Tilt", (43, 12.0)), ("Skew", (10, 6.0)), ("TwoModes", (2,))],
)
def test_exact_samples(laws, name, arguments):
    law, results = getattr(laws, name)(*arguments), []
    for seed in range(50):
        g = laws.rng(seed)
        results.append(measure(law, g, samples=law.sample(1000, g)))
    assert results[0].method == "bridge sampling"
    assert results[0].n_samples == 5 * 992  # blocks of equal size
    laws.check_coverage(results, law.log_z, low=0.2)


def test_samples_of_a_chain(laws):
    """Strongly correlated samples, in their order: blocks show it."""
    law, z = laws.Tilt(1, 2.0), []
    for seed in range(50):
        g = laws.rng(seed)
        noise = (law.sample(3200, g) - law.mean).numpy()
        chain = lfilter([math.sqrt(1 - 0.9**2)], [1, -0.9], noise, axis=0)[200:]
        result = measure(law, g, samples=law.mean + torch.as_tensor(chain))
        z.append((result.value - law.log_z) / result.std_error)
    assert torch.tensor(z).square().mean() < 2


def test_without_gradient(laws):
    box = laws.Box()
    result = measure(box, laws.rng())
    assert result.method == "importance sampling"
    assert abs(result.value - box.log_z) < 4 * result.std_error

    def far(x):  # a step function times N(4, I), cut off from autograd
        with torch.no_grad():
            return box.q.log_prob(x - 4) + (x[:, 0] > 4).double()

    result = estimate(far, box.q, laws.rng())
    assert result.method != "importance sampling"
    truth = math.log(0.5 * (1 + math.e))
    assert abs(result.value - truth) < 4 * result.std_error
    walked = estimate(far, box.q, laws.rng(), kernel=random_walk)
    assert abs(walked.value - truth) < 4 * walked.std_error


def test_target_is_respected_and_budget_bounds(laws):
    law = laws.Skew(10, 6.0)
    loose = measure(law, laws.rng(), target_std_error=0.5)
    tight = measure(law, laws.rng(), target_std_error=0.0)
    assert loose.std_error <= 0.5
    assert tight.std_error < loose.std_error
    # five points for each particle, or the particles alone
    assert tight.n_samples in (5 * 16_384, 16_384)
    assert loose.n_samples in (5 * 4096, 4096)


def test_reproducible_and_leaves_the_global_generator(laws):
    law = laws.Tilt(2, 6.0)
    before = torch.get_rng_state()
    a, b, c = (measure(law, laws.rng(s), max_particles=4096) for s in (1, 1, 2))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_std_error": -1.0}, "target_std_error=-1.0 must be at least 0"),
        ({"n_particles": 10}, "n_particles=10 must be at least 32"),
        ({"max_particles": 100}, "max_particles=100 must be at least 4096"),
        ({"max_samples": 100}, "max_samples=100 must"),
        ({"samples": torch.zeros(20, 2).double()}, r"len\(samples\)=20 must be at least 32"),
        ({"samples": torch.zeros(50, 5).double()}, "samples have 5 columns, those of q 2"),
        ({"samples": [[1.0, 2.0]]}, "samples must be a tensor"),
    ],
)
def test_bad_arguments(laws, options, message):
    with pytest.raises(ValueError, match=message):
        measure(laws.Tilt(2, 1.0), laws.rng(), **options)


def test_bad_values_of_the_log_density(laws):
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="log_density is nan or .inf at 8192 of 8192 points"):
            estimate(lambda x, v=bad: x[:, 0] * 0 + v, laws.normal(2), laws.rng())
